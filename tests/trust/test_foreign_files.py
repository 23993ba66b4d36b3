"""Names and objects in files that somebody else made: nothing leaves the folder, nothing is run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from deepspec.cache.plan import CachePlan
from deepspec.cache.reader import TargetCache
from deepspec.cache.recode import recode_cache
from deepspec.cache.store import open_store
from deepspec.checkpoints import known_types, read_manifest, read_untrained
from deepspec.drafts import INDEX, WEIGHTS, read_weights
from deepspec.errors import CacheError, CheckpointError, DeepSpecError, DraftError, RecipeError, TargetError
from deepspec.export.consolidate import consolidate
from deepspec.export.convert import read_draft
from deepspec.files import safe_join
from deepspec.recipe import load_recipe
from deepspec.targets.stored import weight_files

ARTEFACTS = Path(__file__).parents[1] / "house" / "artefacts"
OUTSIDE = ["../victim", "/etc/hostname", "a/../../victim", "..", ".", "", "a//b", "a\\..\\b", "a\nb", "a\x1b[2J"]


class Payload:
    """Runs a command where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ARTEFACTS, tmp_path / "build" / "old"))  # where its recipe names it


def poison(run: Path, mark: Path) -> Path:
    """Put a payload into the model states of a run's newest checkpoint; returns its folder."""
    folder = max((run / "checkpoints").glob("step_*"))
    path = next(folder.glob("**/*mp_rank_00_model_states.pt"))
    torch.save(torch.load(path, weights_only=False) | {"payload": Payload(mark)}, path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][str(path.relative_to(folder))] = path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_consolidation_does_not_run_the_code_in_a_checkpoint(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    poison(old / "run", tmp_path / "ran")
    with pytest.raises(CheckpointError, match=r"it was not loaded.*system"):
        consolidate(old / "run", tmp_path / "draft", embeddings=False)
    assert not (tmp_path / "ran").exists()


def test_a_resume_does_not_run_the_code_in_a_checkpoint(old: Path, tmp_path: Path) -> None:
    folder = poison(old / "run", tmp_path / "ran")
    with pytest.raises(CheckpointError, match="it was not loaded"):
        read_untrained(folder, read_manifest(folder))
    path = next(folder.glob("**/*mp_rank_00_model_states.pt"))
    with pytest.raises(CheckpointError, match="it was not loaded"), known_types(folder):
        torch.load(path, map_location="cpu", weights_only=False)  # as DeepSpeed's loader asks for it
    assert not (tmp_path / "ran").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


class Attribute:
    """Is written as ``getattr(owner, name)``, as Python 3.11.0 to 3.11.3 write a member of an enum."""

    def __init__(self, owner: object, name: str) -> None:
        self.given = owner, name

    def __reduce__(self) -> tuple[object, tuple[object, str]]:
        return getattr, self.given


def test_an_enum_as_python_3_11_2_writes_it_is_read_and_no_other_attribute(tmp_path: Path) -> None:
    torch.save({"stage": Attribute(ZeroStageEnum, "weights")}, tmp_path / "good.pt")
    with known_types(tmp_path):
        assert torch.load(tmp_path / "good.pt", weights_only=False) == {"stage": ZeroStageEnum.weights}
    for owner, name in ((ZeroStageEnum, "__class__"), (ZeroStageEnum, "mro"), (LossScaler, "__init__")):
        torch.save({"stage": Attribute(owner, name)}, tmp_path / "bad.pt")
        with pytest.raises(CheckpointError, match="it was not loaded"), known_types(tmp_path):
            torch.load(tmp_path / "bad.pt", weights_only=False)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_stays_inside_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(DeepSpecError, match="leads out of its folder"):
        safe_join(tmp_path, name, DeepSpecError, "key")


def test_a_link_may_lead_into_the_hub_s_blobs_alone(tmp_path: Path) -> None:
    blob = tmp_path / "models--a--b" / "blobs" / "123"
    blob.parent.mkdir(parents=True)
    blob.touch()
    snapshot = tmp_path / "models--a--b" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / WEIGHTS).symlink_to(blob)
    assert safe_join(snapshot, WEIGHTS, DeepSpecError, "key").is_file()
    (snapshot / "other").symlink_to(Path(__file__))
    with pytest.raises(DeepSpecError, match="a link that leads out"):
        safe_join(snapshot, "other", DeepSpecError, "key")


def test_a_pipe_is_no_file_of_weights(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / WEIGHTS)
    with pytest.raises(DraftError, match="not a regular file"):
        read_weights(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "pipe.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"fc.weight": "pipe.safetensors"}}))
    with pytest.raises(DraftError, match="not a regular file"):
        read_weights(tmp_path)


@pytest.mark.parametrize("name", ["../victim.safetensors", "/victim.safetensors"])
def test_an_index_names_files_beside_it(old: Path, tmp_path: Path, name: str) -> None:
    draft = old / "draft"
    shutil.move(draft / WEIGHTS, old / "victim.safetensors")
    (draft / INDEX).write_text(json.dumps({"weight_map": {"fc.weight": name}}))
    with pytest.raises(DraftError, match="leads out of its folder"):
        read_weights(draft)
    target = old / "target"
    (target / WEIGHTS).unlink()
    (target / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(TargetError, match="leads out of its folder"):
        weight_files(target)


@pytest.mark.parametrize("name", ["../../victim", "..", "0", "00000/../../../victim", "part"])
def test_a_part_is_called_by_digits_alone(old: Path, tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (tmp_path / "recoded" / "parts").mkdir(parents=True)  # as a killed recode leaves it, so that ".." can be followed
    plan = json.loads((old / "cache" / "plan.json").read_text())
    plan["parts"][0]["name"] = name
    (old / "cache" / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(CacheError, match="not the name of a part"):
        CachePlan.load(open_store(str(old / "cache")))
    with pytest.raises(CacheError, match="not the name of a part"):
        recode_cache(old / "cache", tmp_path / "recoded", "lossless", "lossless")
    assert victim.is_dir()


def test_a_manifest_names_parts_and_table_as_ours_does(old: Path) -> None:
    path = old / "cache" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"table": "../../samples-000000000000"}))
    with pytest.raises(CacheError, match="not a table of samples"):
        TargetCache.open(old / "cache")
    manifest["parts"][0]["name"] = "../x"
    path.write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match="not the name of a part"):
        TargetCache.open(old / "cache")


@pytest.mark.parametrize("special", ["pipe", "/dev/zero"])
def test_a_pipe_or_a_device_in_the_place_of_a_file_is_refused(special: str, tmp_path: Path) -> None:
    """Reading one may never return."""
    path = Path(special)
    if special == "pipe":
        path = tmp_path / "pipe"
        os.mkfifo(path)
    with pytest.raises(RecipeError, match="not a regular file"):
        load_recipe(path)
    (tmp_path / "recipe.yaml").write_text(f"extends: {path}\n")
    with pytest.raises(RecipeError, match="not a regular file"):
        load_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "config.json").symlink_to(path)
    with pytest.raises(DraftError, match=r"config\.json: not a regular file"):
        read_draft(tmp_path)
