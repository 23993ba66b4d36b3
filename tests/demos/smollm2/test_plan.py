"""The tables of stages of the real run and the ablations, and a runner that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from deepspec.demos.runner import Runner
from deepspec.demos.smollm2 import ablation, finetune
from deepspec.demos.smollm2.plan import SCALES, plan, real, recipe_of
from deepspec.demos.stages import PYTHON, Stage
from deepspec.errors import DataError, DeepSpecError
from deepspec.recipe import Recipe, load_recipe
from deepspec.registry import ALGORITHMS


@pytest.fixture(autouse=True)
def _checkout(monkeypatch) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[3])


PLANS = [plan(scale, [Path("t.jsonl")], 2) for scale in SCALES.values()]


@pytest.mark.parametrize("stages", [*PLANS, ablation.plan(), *(finetune.plan(scale, 2) for scale in finetune.SCALES)])
def test_needs_come_before_and_no_artefact_is_made_twice(stages: list[Stage]) -> None:
    before: set[str] = set()
    for stage in stages:
        assert set(stage.needs) <= before
        before.add(stage.name)
    assert len(before) == len(stages) == len({stage.artefact for stage in stages})


def test_scales_share_the_target_alone() -> None:
    full, smoke = (plan(SCALES[name], [], 2) for name in ("full", "smoke"))
    both = {stage.artefact for stage in full} & {stage.artefact for stage in smoke}
    assert both == {Path("build/real/target/target.json")}
    for stage in smoke:
        for word in stage.command:
            assert "build/real/" not in word or stage.name == "target" or "target" in word, (stage.name, word)


def test_the_recipes_name_the_full_run() -> None:
    scale = SCALES["full"]
    for algorithm in ALGORITHMS:
        recipe = load_recipe(recipe_of(algorithm))
        assert [Path(path) for path in recipe.data.cache] == scale.caches()
        assert Path(recipe.output) == scale.root / algorithm
        trained = next(stage for stage in plan(scale, [], 2, "all") if stage.name == f"train {algorithm}")
        assert trained.artefact.parent.parent.parent == Path(recipe.output)


def test_the_three_drafts_see_the_same_tokens() -> None:
    recipes = [load_recipe(recipe_of(algorithm)) for algorithm in ALGORITHMS]
    assert len({(r.train.max_steps, r.train.global_batch, r.data.cache, r.data.max_length) for r in recipes}) == 1


def test_without_tasks_only_the_chat_prompts_are_decoded() -> None:
    names = [stage.name for stage in plan(SCALES["full"], [], 1)]
    assert not [name for name in names if name.startswith("tasks")]
    assert [name for name in names if name.startswith("chat")]


def test_a_fine_tuning_starts_from_the_real_runs_draft_and_mixes_its_data() -> None:
    for scale, sizes in finetune.SCALES.items():
        for stage in (one for one in finetune.plan(scale, 2) if one.name.startswith("train")):
            recipe, start = _recipe_of_stage(stage), stage.name.split()[-1]
            fresh, caches = start != finetune.TUNED, [sizes.root / "cache", SCALES[scale].caches()[0]]
            assert [Path(path) for path in recipe.data.cache] == caches[: 1 if fresh else 2]
            assert (recipe.data.cache_weights is None) == fresh
            draft = getattr(recipe.train.init, "draft", None)
            assert draft == (None if fresh else str(finetune.general_draft(scale, recipe.algorithm)))
            assert recipe.draft == load_recipe(recipe_of(recipe.algorithm)).draft
            assert stage.artefact.parts[-2] == f"step_{recipe.train.max_steps}"


def _recipe_of_stage(stage: Stage) -> Recipe:
    words = stage.command
    overrides = [after for before, after in pairwise(words) if before == "--set"]
    return load_recipe(words[words.index("--recipe") + 1], overrides)


def test_every_variant_changes_one_thing() -> None:
    base = load_recipe(ablation.RECIPE).to_dict()
    for name, variant in ablation.VARIANTS.items():
        changed = load_recipe(ablation.RECIPE, variant.overrides).to_dict()
        differs = {key for key in base["draft"] if base["draft"][key] != changed["draft"][key]}
        levels = {"level"} - {variant.level == "lossless" and "level"}
        assert len((differs | levels) - {"confidence_with_markov"}) == (name != ablation.BASE), name


def test_bad_starts_are_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # where no quickstart is
    with pytest.raises(DataError, match="did you mean 'smoke'"):
        real("smok", tmp_path, 1)
    with pytest.raises(DataError, match="did you mean 'smoke'"):
        finetune.finetune("smok", 1)
    monkeypatch.setattr(finetune, "general_draft", lambda *_: tmp_path)
    with pytest.raises(DataError, match="deepspec demo real --scale smoke"):
        finetune.finetune("smoke", 1)
    monkeypatch.setattr(ablation, "QUICKSTART", tmp_path)
    with pytest.raises(DataError, match="deepspec quickstart"):
        ablation.ablate(1)


KILLED = """
import sys
from pathlib import Path
from deepspec.demos.runner import Runner
from deepspec.demos.stages import PYTHON, Stage
code = "import time, os; print(os.getpid(), flush=True); time.sleep(60)"
Runner([Stage("slow", (PYTHON, "-c", code), Path("never"))], Path(sys.argv[1]), 1).run()
"""


def start_and_kill(logs: Path, how: signal.Signals) -> int:
    """Kill a runner while its stage runs; the stage's process id."""
    runner = subprocess.Popen([sys.executable, "-c", KILLED, str(logs)], stdout=subprocess.DEVNULL)
    log = logs / "slow.log"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().endswith("\n")):
        assert time.monotonic() < deadline, "the stage never started"
        time.sleep(0.05)
    runner.send_signal(how)
    runner.wait(timeout=60)
    return int(log.read_text())


def lives(process: int) -> bool:
    """Whether a process runs (a dead one that nobody waited for does not)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_runner_that_is_ended_ends_its_stages(tmp_path: Path) -> None:
    stage = start_and_kill(tmp_path, signal.SIGTERM)
    assert not lives(stage)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_what_a_killed_runner_left_is_not_started_twice(tmp_path: Path) -> None:
    stage = start_and_kill(tmp_path, signal.SIGKILL)
    assert lives(stage)
    again = [Stage("slow", (PYTHON, "-c", f"open({str(tmp_path / 'done')!r}, 'w')"), tmp_path / "done")]
    try:
        with pytest.raises(DeepSpecError, match="earlier run still works on this stage"):
            Runner(again, tmp_path, 1).run()
    finally:
        os.kill(stage, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while lives(stage) and time.monotonic() < deadline:
        time.sleep(0.05)
    Runner(again, tmp_path, 1).run()
    assert (tmp_path / "done").exists()
