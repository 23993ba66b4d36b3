"""From a checkpoint to a draft folder by the command: precision, with and without the target's embeddings, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import training_tools as tools
from safetensors.torch import load_file

from deepspec.drafts import FROZEN, load_draft
from deepspec.errors import CheckpointError, DraftError
from deepspec.export.consolidate import consolidate, read_weights
from deepspec.export.manifest import read_manifest, steps_of
from deepspec.targets import load_target

TOOL = tools.ROOT / "tools" / "zero_to_fp32.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a target and a run of four steps in bf16, kept every two."""
    folder = tmp_path_factory.mktemp("export")
    target = tools.make_target(folder / "target")
    recipe = tools.write_recipe(folder / "a", target, zero="zero1_bf16", max_steps=4, save_every=2)
    tools.run_jobs(folder, [{"recipe": str(recipe)}], 1)
    return folder


def test_the_command_writes_a_draft_that_stands_alone(place: Path, tmp_path: Path) -> None:
    done = tools.launch(TOOL, [str(place / "a" / "run"), str(tmp_path / "draft"), "--dtype", "fp32"])
    assert done.returncode == 0, done.stderr
    newest = place / "a" / "run" / "checkpoints" / "step_4"
    assert done.stdout.strip() == f"{newest} -> {tmp_path / 'draft'}"
    target = load_target(place / "target", torch.float32)
    alone = load_draft(tmp_path / "draft")
    assert torch.equal(alone.frozen.embed_VD, target.embed_weight)
    assert torch.equal(alone.frozen.head_VD, target.head_weight)
    masters = read_weights(newest, read_manifest(newest))
    stored = load_file(tmp_path / "draft" / "model.safetensors")
    assert set(stored) == {*masters, *FROZEN}
    assert all(torch.equal(stored[name], tensor) for name, tensor in masters.items())
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in masters.values())  # fp32 masters
    provenance = json.loads((tmp_path / "draft" / "provenance.json").read_text())
    assert provenance["step"] == 4
    assert provenance["dtype"] == "float32"
    assert (tmp_path / "draft" / "recipe.yaml").is_file()


def test_an_earlier_checkpoint_without_embeddings(place: Path, tmp_path: Path) -> None:
    earlier = str(steps_of(place / "a" / "run")[2])
    done = tools.launch(TOOL, [earlier, str(tmp_path / "draft"), "--without-embeddings"])
    assert done.returncode == 0, done.stderr
    stored = load_file(tmp_path / "draft" / "model.safetensors")
    assert not set(stored) & set(FROZEN)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}  # as trained
    assert json.loads((tmp_path / "draft" / "provenance.json").read_text())["step"] == 2
    with pytest.raises(DraftError, match="has no embedding and head"):
        load_draft(tmp_path / "draft")
    load_draft(tmp_path / "draft", load_target(place / "target", torch.bfloat16))


def test_refusals_are_one_line(place: Path, tmp_path: Path) -> None:
    consolidate(place / "a" / "run", tmp_path / "draft")
    again = tools.launch(TOOL, [str(place / "a" / "run"), str(tmp_path / "draft")])
    nothing = tools.launch(TOOL, [str(tmp_path / "none"), str(tmp_path / "other")])
    for done, words in ((again, "already holds a draft"), (nothing, "not a checkpoint")):
        assert done.returncode == 1
        assert words in done.stderr.strip().splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_a_target_that_was_trained_on_meanwhile_is_noticed(tmp_path: Path) -> None:
    target = tools.make_target(tmp_path / "target")
    recipe = tools.write_recipe(tmp_path / "a", target, max_steps=1)
    tools.run_jobs(tmp_path, [{"recipe": str(recipe)}], 1)
    tools.make_target(target, seed=8)
    with pytest.raises(CheckpointError, match=r"not those of the training.*--without-embeddings"):
        consolidate(tmp_path / "a" / "run", tmp_path / "draft")
    assert not (tmp_path / "draft").exists()
    consolidate(tmp_path / "a" / "run", tmp_path / "draft", embeddings=False)
