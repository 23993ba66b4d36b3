"""The study of drafters: what it runs, and how it counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepspec.demos.quickstart import drafters
from deepspec.demos.quickstart.drafters import STEPS, TABLE, VARIANTS, Study, step_cost
from deepspec.errors import DataError
from deepspec.recipe import load_recipe


def write_run(study: Study, name: str, seed: int, cpu: list[float]) -> Path:
    run = study.folder(name, seed) / "run"
    run.mkdir(parents=True)
    rows = [{"kind": "train", "cpu_seconds_per_sample": one, "memory_gb": 0.5} for one in cpu]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"kind": "validation"}]))
    load_recipe(VARIANTS[name].recipe, VARIANTS[name].overrides).save(run / "recipe.yaml")
    return run


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.setattr(drafters, "ROOT", tmp_path)
    return Study(STEPS, 60, dict.fromkeys(("dflash", "eagle3", "dflash-l1"), 60), (0, 1), 16)


def test_every_variant_is_a_recipe_and_every_pair_has_two_of_them() -> None:
    for variant in VARIANTS.values():
        load_recipe(variant.recipe, variant.overrides)
    assert {name for pair in TABLE["pairs"] for name in pair.values()} <= set(VARIANTS)
    assert set(TABLE["equal_seconds"]) <= set(VARIANTS)


def test_a_step_costs_the_median_of_its_cpu_seconds(study: Study) -> None:
    run = write_run(study, "dflash", 0, [0.9, 0.25, 0.5])
    assert step_cost(run) == (8 * 0.5, 0.5)  # eight samples a step


def test_equal_seconds_are_those_of_the_fastest_of_the_drafters_compared(study: Study) -> None:
    for seed in study.seeds:
        write_run(study, "dflash", seed, [0.1 + 0.1 * seed])
        write_run(study, "eagle3", seed, [0.3])
    again = study.equal_seconds()
    assert again.steps == {"dflash": 60, "eagle3": 30}  # losses of one drafter are compared after equal steps alone
    assert again.root != study.root
    assert study.root.name == "steps-60"  # another number of steps is another folder


def test_a_log_of_an_earlier_version_is_named(study: Study) -> None:
    run = write_run(study, "dflash", 0, [0.1])
    (run / "log.jsonl").write_text('{"kind": "train", "samples_per_second": 3.0}\n')
    with pytest.raises(DataError, match=r"earlier version.*log\.jsonl|log\.jsonl.*earlier version"):
        step_cost(run)


def test_the_stages_of_every_training_follow_one_another(study: Study) -> None:
    stages = {stage.name: stage for stage in study.stages()}
    assert len(stages) == 1 + 3 * 2 * 3
    assert stages["evaluate dflash 1 steps"].needs == ("export dflash 1 steps", "prompts")
    assert "train.max_steps=60" in stages["train dflash 1 steps"].command
