"""The plan, the schedule and DeepSpeed's settings: pure functions of the recipe."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec.errors import DataError, RecipeError
from deepspec.recipe import TrainSection
from deepspec.training.plan import Plan
from deepspec.training.schedule import lr_factor
from deepspec.training.settings import FROM_RECIPE, accumulation_steps, deepspeed_settings

CONFIGS = Path(__file__).parents[1] / "deepspeed_configs"


def make(lengths: np.ndarray, sizes: tuple[int, ...] | None = None, **over: object) -> Plan:
    values = {"seed": 1, "global_batch": 8, "micro_batch": 2, "bucket_batches": 4, **over}
    return Plan(lengths, sizes or (len(lengths),), **values)  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None)
@given(st.integers(8, 200), st.integers(0, 5), st.sampled_from([1, 2, 4]), st.integers(0, 3))
def test_an_epoch_shows_every_sample_once_whatever_the_cut(count: int, bucket: int, micro: int, epoch: int) -> None:
    lengths = np.random.default_rng(count).integers(5, 500, count)
    plan = make(lengths, bucket_batches=bucket, micro_batch=micro)
    steps = [plan.step(epoch * plan.steps_per_epoch + i) for i in range(plan.steps_per_epoch)]
    seen = np.concatenate([step.micro_batches.flatten() for step in steps])
    assert len(set(seen.tolist())) == len(seen) == plan.steps_per_epoch * 8
    assert all(step.epoch == epoch for step in steps)
    for step in steps:
        for world in (1, 2):
            shares = np.concatenate([step.share(rank, world).flatten() for rank in range(world)])
            assert sorted(shares.tolist()) == sorted(step.micro_batches.flatten().tolist())
    again = make(lengths, bucket_batches=bucket, micro_batch=micro)
    assert np.array_equal(again.step(plan.steps_per_epoch).micro_batches, plan.step(plan.steps_per_epoch).micro_batches)


SPREADS = {  # tokens of 20,000 samples
    "wide": lambda dice: np.clip(dice.lognormal(6.3, 0.8, 20_000), 16, 4096),
    "uniform": lambda dice: dice.integers(16, 4096, 20_000),
    "two lengths": lambda dice: np.where(dice.random(20_000) < 0.5, 64, 4096),
    "near": lambda dice: dice.normal(72, 19, 20_000).clip(36, 107),
}


@pytest.mark.parametrize("micro", [1, 4, 8])
@pytest.mark.parametrize("spread", SPREADS)
def test_bucketing_keeps_padding_under_five_percent(spread: str, micro: int) -> None:
    lengths = SPREADS[spread](np.random.default_rng(0)).astype(np.int64)
    plain = make(lengths, global_batch=64, micro_batch=micro, bucket_batches=0)
    bucketed = make(lengths, global_batch=64, micro_batch=micro, bucket_batches=50)
    assert bucketed.padding_share(bucketed.steps_per_epoch) < 0.05
    assert (plain.padding_share(100) > 0.15) == (micro > 1)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 4, 8]))
def test_lengths_say_nothing_about_when_a_sample_comes(seed: int, micro: int) -> None:
    """Bucketing sorts inside micro-batches only: over an epoch long and short samples come as early as any."""
    lengths = np.random.default_rng(seed).integers(5, 2000, 4096)
    plan = make(lengths, seed=seed, global_batch=64, micro_batch=micro, bucket_batches=16)
    means = [lengths[plan.step(step).micro_batches].mean() for step in range(plan.steps_per_epoch)]
    # 64 / micro independent draws a step: their mean scatters by std / sqrt(64 / micro)
    error = lengths.std() * np.sqrt(micro / 64)
    assert np.abs(np.array(means) - lengths.mean()).max() < 5 * error
    halves = np.mean(means[: len(means) // 2]), np.mean(means[len(means) // 2 :])
    assert abs(halves[0] - halves[1]) < 5 * error / np.sqrt(len(means) / 4)


def test_a_step_mixes_lengths_although_a_micro_batch_does_not() -> None:
    lengths = np.arange(1, 4001)
    plan = make(lengths, global_batch=64, micro_batch=4, bucket_batches=50)
    spread = [np.std(lengths[plan.step(i).micro_batches]) for i in range(plan.steps_per_epoch)]
    assert min(spread) > 500


def test_caches_are_mixed_by_weight() -> None:
    plan = make(np.full(400, 9), (300, 100), group_weights=(1.0, 3.0))
    drawn = np.concatenate([plan.step(i).micro_batches.flatten() for i in range(plan.steps_per_epoch)])
    assert (drawn >= 300).sum() == 300
    assert np.bincount(drawn[drawn >= 300])[300:].tolist() == [3] * 100
    assert len(set(drawn[drawn < 300].tolist())) == 100


def test_too_few_samples_are_named() -> None:
    with pytest.raises(DataError, match=r"found 7; wanted at least train\.global_batch = 8"):
        make(np.full(7, 5))


def test_schedule_warms_up_from_the_first_step_and_decays_to_zero() -> None:
    factors = [lr_factor(step, 100, 0.04) for step in range(101)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert all(a > b for a, b in itertools.pairwise(factors[4:]))
    assert factors[52] == pytest.approx(0.5)
    assert 0 < factors[99] < 0.001
    assert factors[100] == 0.0
    assert lr_factor(0, 1, 0.04) == 1.0
    assert lr_factor(0, 10, 0.0) == 1.0


def test_accumulation_keeps_the_global_batch() -> None:
    train = TrainSection(global_batch=24, micro_batch=2)
    assert [accumulation_steps(train, size) for size in (1, 2, 3, 4, 6, 12)] == [12, 6, 4, 3, 2, 1]
    with pytest.raises(RecipeError, match=r"shared by 5 processes.*can be one of 1, 2, 3, 4, 6, 12"):
        accumulation_steps(train, 5)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_configurations_say_nothing_that_the_recipe_says(path: Path) -> None:
    settings = deepspeed_settings(TrainSection(deepspeed=str(path), global_batch=8, grad_clip=0.7), 2)
    assert not set(json.loads(path.read_text())) & set(FROM_RECIPE)
    assert settings["train_batch_size"] == 8
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["gradient_clipping"] == 0.7
    assert settings["zero_optimization"]["stage"] == int(path.stem[4])
    assert settings.get("bf16", {}).get("enabled", False) == path.stem.endswith("bf16")
    assert ("offload_optimizer" in settings["zero_optimization"]) == ("offload" in path.stem)


@pytest.mark.parametrize("key", [*FROM_RECIPE])
def test_a_key_of_the_recipe_in_the_json_is_an_error(tmp_path: Path, key: str) -> None:
    (tmp_path / "c.json").write_text(json.dumps({key: 1}))
    with pytest.raises(RecipeError, match=f"{key}: belongs to the recipe"):
        deepspeed_settings(replace(TrainSection(), deepspeed=str(tmp_path / "c.json")), 1)


def test_bad_configurations_are_named(tmp_path: Path) -> None:
    for text, words in (("{", "not a JSON"), ("[]", "not a DeepSpeed"), ('{"fp16": {"enabled": true}}', "fp16")):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(RecipeError, match=words):
            deepspeed_settings(TrainSection(deepspeed=str(tmp_path / "c.json")), 1)
    with pytest.raises(RecipeError, match="no such file"):
        deepspeed_settings(TrainSection(deepspeed=str(tmp_path / "none.json")), 1)
