"""From a checkpoint to a draft folder by the command: precision, with and without the target's embeddings, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import training_tools as tools
from safetensors.torch import load_file, save_file

from deepspec.checkpoints import read_manifest, read_weights, steps_of
from deepspec.distributed import World
from deepspec.drafts import FROZEN, load_draft
from deepspec.errors import CheckpointError, DraftError, TargetError
from deepspec.export.consolidate import consolidate
from deepspec.export.convert import ExportOptions, export_draft
from deepspec.files import read_json
from deepspec.recipe import load_recipe
from deepspec.targets import load, load_target
from deepspec.targets.digests import sampled_digest
from deepspec.training import run

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


def test_the_model_states_are_loaded_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest, loaded, original = place / "a" / "run" / "checkpoints" / "step_4", list[str](), torch.load

    def counted(path: Path, **options: Any) -> Any:
        loaded.append(path.name)
        return original(path, **options)

    monkeypatch.setattr(torch, "load", counted)
    read_weights(newest, read_manifest(newest))
    assert sorted(loaded) == ["bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"]


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


def test_a_run_whose_target_was_moved_is_told_where_it_is(place: Path, tmp_path: Path) -> None:
    run, moved, gone = place / "a" / "run", tmp_path / "moved", tmp_path / "gone"
    consolidate(run, tmp_path / "before")
    shutil.copytree(place / "target", moved)
    (place / "target").rename(gone)
    try:
        with pytest.raises(TargetError, match="--target"):
            consolidate(run, tmp_path / "draft")
        done = tools.launch(TOOL, [str(run), str(tmp_path / "draft"), "--target", str(moved)])
        export_draft(run, tmp_path / "out", ExportOptions(target=str(moved)))
    finally:
        gone.rename(place / "target")
    assert done.returncode == 0, done.stderr
    one, other = (json.loads((tmp_path / name / "provenance.json").read_text()) for name in ("before", "draft"))
    assert one["recipe_digest"] == other["recipe_digest"]
    assert other["target"]["path"] == str(moved)
    for name in ("draft", "out"):
        stored = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(stored[key], value) for key, value in load_file(
            tmp_path / "before" / "model.safetensors").items())  # fmt: skip


def test_refusals_are_one_line(place: Path, tmp_path: Path) -> None:
    consolidate(place / "a" / "run", tmp_path / "draft")
    again = tools.launch(TOOL, [str(place / "a" / "run"), str(tmp_path / "draft")])
    nothing = tools.launch(TOOL, [str(tmp_path / "none"), str(tmp_path / "other")])
    for done, words in ((again, "already holds a draft"), (nothing, "not a checkpoint")):
        assert done.returncode == 1
        assert words in done.stderr.strip().splitlines()[-1]
        assert "Traceback" not in done.stderr


# -- the target is still that of the training -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(place: Path) -> Path:
    """The run's draft without embedding and head."""
    consolidate(place / "a" / "run", place / "bare", embeddings=False)
    return place / "bare"


@pytest.fixture
def changed(place: Path, bare: Path) -> Iterator[Path]:
    """The folder while one value of the target's head is another one."""
    file = place / "target" / "model.safetensors"
    kept = file.read_bytes()
    weights = load_file(file)
    weights["lm_head.weight"][7, 7] += 1
    save_file(weights, file, metadata={"format": "pt"})
    yield place
    file.write_bytes(kept)


def test_a_target_that_was_trained_on_meanwhile_is_noticed(changed: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not those of the training: target\.weights.*--without-embeddings"):
        consolidate(changed / "a" / "run", tmp_path / "draft")
    assert not (tmp_path / "draft").exists()
    consolidate(changed / "a" / "run", tmp_path / "draft", embeddings=False)


def test_a_draft_is_not_made_under_another_config(place: Path, tmp_path: Path) -> None:
    config = place / "target" / "config.json"
    kept = config.read_text()
    other = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    config.write_text(json.dumps(json.loads(kept) | other))
    try:
        for embeddings in (True, False):
            with pytest.raises(CheckpointError, match=r"rope_theta: training 10000\.0, now 500000\.0; put the target"):
                consolidate(place / "a" / "run", tmp_path / "draft", embeddings=embeddings)
    finally:
        config.write_text(kept)


@pytest.mark.parametrize("source", ["a/run", "bare"])
@pytest.mark.parametrize("form", ["vllm", "deepspec"])
def test_an_export_never_bakes_in_another_target(changed: Path, tmp_path: Path, source: str, form: str) -> None:
    with pytest.raises(DraftError, match=r"weights are not those of the training; found '\w+\.\.\.'; wanted \w+"):
        export_draft(changed / source, tmp_path / "out", ExportOptions(format=form))
    assert not (tmp_path / "out").exists()
    export_draft(changed / source, tmp_path / "out", ExportOptions(format=form, embeddings=False))


def test_an_export_reads_embedding_and_head_alone(
    place: Path, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = Path(shutil.copytree(place / "target", tmp_path / "moved"))
    monkeypatch.setattr(load, "load_target", None)  # the whole target is not loaded
    export_draft(bare, tmp_path / "out", ExportOptions(target=str(moved)))
    stored, weights = load_file(tmp_path / "out" / "model.safetensors"), load_file(moved / "model.safetensors")
    theirs = (weights["model.embed_tokens.weight"], weights["lm_head.weight"])
    assert all(torch.equal(stored[name], end.to(stored[name].dtype)) for name, end in zip(FROZEN, theirs, strict=True))
    assert "warning" not in capsys.readouterr().err
    with pytest.raises(TargetError, match="cannot load the target"):  # nothing is taken from it, but it must be one
        export_draft(tmp_path / "out", tmp_path / "again", ExportOptions(target=str(tmp_path)))
    silent = Path(shutil.copytree(bare, tmp_path / "silent"))
    (silent / "provenance.json").write_text("{}")
    export_draft(silent, tmp_path / "other", ExportOptions())
    assert "does not say which target's weights" in capsys.readouterr().err
    load_draft(tmp_path / "other")


def test_a_run_of_before_goes_on_and_is_compared_by_the_digest_that_it_holds(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools.use_memory_source(monkeypatch)
    output = Path(shutil.copytree(place / "a" / "run", tmp_path / "run"))
    manifest = steps_of(output)[4] / "manifest.json"
    values = read_json(manifest)
    del values["identity"]
    values["target_digest"] = sampled_digest(place / "target", torch.float32)
    manifest.write_text(json.dumps(values))
    start = run.prepare(load_recipe(place / "a" / "recipe.yaml", [f"output={output}"]), World(), False).start
    assert start.step == 4
    assert "is of an earlier version" in capsys.readouterr().err
    values["target_digest"] = "0" * 64
    manifest.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"target\.weights: run 000000000000\.\.\., now"):
        run.prepare(load_recipe(place / "a" / "recipe.yaml", [f"output={output}"]), World(), False)
