"""Interrupted runs: the same bits at the same number of processes, the same losses at another, nothing silent."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import training_tools as tools

from deepspec.errors import CheckpointError
from deepspec.export.manifest import Manifest, read_manifest, steps_of
from deepspec.recipe import load_recipe
from deepspec.training.checkpoints import Checkpoints, check_resume

WORKER = tools.ROOT / "tests" / "training_worker.py"


def losses(place: Path) -> list[float]:
    return [row["loss"] for row in tools.log_of(place / "run")]


class Runs:
    """An undisturbed run, and the same run cut into pieces, at one and two processes."""

    def __init__(self, folder: Path, stages: tuple[str, ...]) -> None:
        self.folder = folder
        self.target = tools.make_target(folder / "target")
        tools.run_jobs(folder, [self.job(f"whole_{s}", s) for s in stages], 2)
        pieces = [self.job(f"same_{s}", s, 4) for s in stages] + [self.job(f"same_{s}", s) for s in stages]
        moves = [self.job(f"moved_{s}", s, 4) for s in stages]
        tools.run_jobs(folder, pieces + moves, 2)
        tools.run_jobs(folder, [self.job(f"moved_{s}", s, 8) for s in stages], 1)
        tools.run_jobs(folder, [self.job(f"moved_{s}", s) for s in stages], 2)

    def job(self, name: str, stage: str, steps: int | None = None) -> dict[str, Any]:
        place = self.folder / name
        if not place.exists():
            tools.write_recipe(place, self.target, "dspark", f"{stage}_fp32", max_steps=12, lr=1e-3)
        return {"recipe": str(place / "recipe.yaml"), "steps": steps, "gather": str(place / "live.pt")}


STAGES = ("zero0", "zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("resume"), STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_resume_at_the_same_size_is_bit_equal(runs: Runs, stage: str) -> None:
    assert losses(runs.folder / f"same_{stage}") == losses(runs.folder / f"whole_{stage}")
    one, other = (torch.load(runs.folder / f"{name}_{stage}" / "live.pt") for name in ("same", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_then_one_then_two_give_the_same_losses(runs: Runs, stage: str) -> None:
    found, wanted = losses(runs.folder / f"moved_{stage}"), losses(runs.folder / f"whole_{stage}")
    assert len(found) == len(wanted) == 12
    assert found == pytest.approx(wanted, abs=1e-5)


def test_a_run_leaves_recipe_versions_and_seed(runs: Runs) -> None:
    run = runs.folder / "whole_zero1" / "run"
    about = json.loads((run / "run.json").read_text())
    assert about["seed"] == 3
    assert {"torch", "deepspeed", "deepspec"} <= set(about["versions"])
    assert load_recipe(run / "recipe.yaml").digest() == about["recipe_digest"]
    assert list(steps_of(run)) == [12]


def manifest_of(runs: Runs) -> tuple[Manifest, Any]:
    place = runs.folder / "whole_zero1"
    return read_manifest(place / "run" / "checkpoints" / "step_12"), load_recipe(place / "recipe.yaml")


@pytest.mark.parametrize(
    ("override", "accepted"),
    [
        ("train.lr=1e-2", True),
        ("train.max_steps=24", True),
        ("train.global_batch=8", False),
        ("train.bucket_batches=7", False),
        ("seed=4", False),
        ("draft.num_anchors=5", False),
        ("data.max_length=99", False),
    ],
)
def test_changes_on_resume_are_named(runs: Runs, override: str, accepted: bool) -> None:
    manifest, _ = manifest_of(runs)
    changed = load_recipe(runs.folder / "whole_zero1" / "recipe.yaml", [override])
    key = override.split("=")[0]
    with pytest.raises(CheckpointError, match=key):
        check_resume(manifest, changed, manifest.fingerprint, manifest.target_digest, accept=False)
    if accepted:
        lines = check_resume(manifest, changed, manifest.fingerprint, manifest.target_digest, accept=True)
        assert len(lines) == 1
        assert lines[0].startswith(key)
    else:
        with pytest.raises(CheckpointError, match="cannot change"):
            check_resume(manifest, changed, manifest.fingerprint, manifest.target_digest, accept=True)


def test_other_data_and_another_target_are_refused(runs: Runs) -> None:
    manifest, recipe = manifest_of(runs)
    with pytest.raises(CheckpointError, match="the data are not the run's"):
        check_resume(manifest, recipe, {"source": "other"}, manifest.target_digest, accept=True)
    with pytest.raises(CheckpointError, match="weights are not the run's"):
        check_resume(manifest, recipe, manifest.fingerprint, "0" * 64, accept=True)
    unchanged = load_recipe(runs.folder / "whole_zero1" / "recipe.yaml", ["train.log_every=5", "train.workers=0"])
    assert check_resume(manifest, unchanged, manifest.fingerprint, manifest.target_digest, accept=False) == []


def test_kept_checkpoints(runs: Runs, tmp_path: Path) -> None:
    manifest, recipe = manifest_of(runs)
    train = replace(recipe.train, keep_last=2, keep_every=4, keep_best=True)
    kept = Checkpoints(tmp_path, train)
    kept.clean()
    for step, score in ((1, 3.0), (2, 1.0), (4, None), (5, 2.0), (6, None), (7, 2.5)):
        folder = tmp_path / "checkpoints" / kept.temporary(step)
        folder.mkdir()
        (folder / "weights").write_bytes(b"x" * step)
        kept.commit(replace(manifest, step=step, score=score, files={}))
    kept.wait()
    assert list(steps_of(tmp_path)) == [1, 4, 6, 7]
    assert kept.best() == (1, 3.0)
    half = tmp_path / "checkpoints" / kept.temporary(8)
    half.mkdir()
    assert list(steps_of(tmp_path)) == [1, 4, 6, 7]
    kept.clean()
    assert not half.exists()
    (tmp_path / "checkpoints" / "step_7" / "weights").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"weights: file missing or cut; found 3; wanted 7 bytes"):
        read_manifest(tmp_path / "checkpoints" / "step_7")


def start(job: dict[str, Any], folder: Path) -> subprocess.Popen[str]:
    path = folder / "job.json"
    path.write_text(json.dumps([job]))
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")
    }
    command = [sys.executable, str(WORKER), str(path)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=tools.ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def wait_for_step(process: subprocess.Popen[str], run: Path, more_than: int) -> bool:
    while process.poll() is None:
        log = run / "log.jsonl"
        if log.exists() and log.read_text().count("\n") > more_than:
            return True
        time.sleep(0.02)
    return False


def test_sigterm_saves_and_exits_zero(tmp_path: Path) -> None:
    target = tools.make_target(tmp_path / "target")
    recipe = tools.write_recipe(tmp_path / "r", target, max_steps=5000)
    process = start({"recipe": str(recipe)}, tmp_path)
    assert wait_for_step(process, tmp_path / "r" / "run", 3)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "stopped by a signal" in output
    step, folder = list(steps_of(tmp_path / "r" / "run").items())[-1]
    assert read_manifest(folder).step == step >= 3


@pytest.mark.slow
def test_twenty_kills_end_in_the_same_bits(tmp_path: Path) -> None:
    target = tools.make_target(tmp_path / "target")
    settings = {"max_steps": 60, "save_every": 1, "keep_last": 2}
    whole = tools.write_recipe(tmp_path / "whole", target, **settings)
    tools.run_jobs(tmp_path, [{"recipe": str(whole), "gather": str(tmp_path / "whole.pt")}], 1)
    broken = tools.write_recipe(tmp_path / "broken", target, **settings)
    job = {"recipe": str(broken), "gather": str(tmp_path / "broken.pt")}
    run, moments, kills = tmp_path / "broken" / "run", random.Random(5), 0
    while kills < 20:
        rows = (run / "log.jsonl").read_text().count("\n") if (run / "log.jsonl").exists() else 0
        process = start(job, tmp_path)
        if not wait_for_step(process, run, rows):
            break
        time.sleep(moments.random() * 0.08)
        process.kill()
        process.communicate()
        kills += 1
    assert kills == 20
    process = start(job, tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    one, other = torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "broken.pt")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    done = tools.launch(tools.ROOT / "launch" / "train.py", ["--recipe", str(tmp_path / "none.yaml")])
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert "no such recipe file" in done.stderr
    assert "Traceback" not in done.stderr
