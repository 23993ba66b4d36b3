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
from deepspec.training.plan import RunPlan, StepPlan, lr_factor
from deepspec.training.settings import FROM_RECIPE, accumulation_steps, deepspeed_settings

CONFIGS = Path(__file__).parents[2] / "deepspeed_configs"


def make(lengths: np.ndarray, sizes: tuple[int, ...] | None = None, **over: object) -> RunPlan:
    values = {"seed": 1, "global_batch": 8, "micro_batch": 2, **over}
    return RunPlan(lengths, sizes or (len(lengths),), **values)  # type: ignore[arg-type]


CUTS = st.one_of(
    st.sampled_from([1, 2, 4]).map(lambda samples: {"micro_batch": samples}),
    st.integers(1, 3000).map(lambda tokens: {"micro_tokens": tokens}),
)


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 200), CUTS, st.integers(0, 3))
def test_an_epoch_shows_every_sample_once_whatever_the_cut(count: int, cut: dict[str, int], epoch: int) -> None:
    lengths = np.random.default_rng(count).integers(5, 500, count)
    plan = make(lengths, **cut)
    steps = [plan.step(epoch * plan.steps_per_epoch + i) for i in range(plan.steps_per_epoch)]
    seen = np.concatenate([step.samples for step in steps])
    assert len(set(seen.tolist())) == len(seen) == plan.steps_per_epoch * 8
    assert all(step.epoch == epoch for step in steps)
    for step in steps:
        for world in (1, 2):
            shares = [step.share(rank, world) for rank in range(world)]
            assert len({len(share) for share in shares}) == 1
            dealt = [number for share in shares for numbers in share for number in numbers.tolist()]
            assert sorted(dealt) == sorted(step.samples.tolist())
    assert np.array_equal(
        make(lengths, **cut).step(plan.steps_per_epoch).samples, plan.step(plan.steps_per_epoch).samples
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), CUTS)
def test_the_cut_does_not_choose_the_samples_of_a_step(seed: int, cut: dict[str, int]) -> None:
    lengths = np.random.default_rng(seed).integers(5, 500, 100)
    for step in range(20):
        assert set(make(lengths, **cut).step(step).samples) == set(make(lengths).step(step).samples)


def padded_tokens(step: StepPlan) -> int:
    """Tokens that one process computes in the step, padding included."""
    edges = np.cumsum([0, *(len(numbers) for numbers in step.micro_batches(1))])
    return int((step.lengths[edges[:-1]] * np.diff(edges)).sum())


SPREADS = {  # tokens of 20,000 samples
    "wide": lambda dice: np.clip(dice.lognormal(6.3, 0.8, 20_000), 16, 4096),
    "uniform": lambda dice: dice.integers(16, 4096, 20_000),
    "two lengths": lambda dice: np.where(dice.random(20_000) < 0.5, 64, 4096),
    "near": lambda dice: dice.normal(72, 19, 20_000).clip(36, 107),
}


@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("spread", SPREADS)
def test_a_global_batch_of_512_has_under_one_percent_of_padding(spread: str, micro: int) -> None:
    lengths = SPREADS[spread](np.random.default_rng(0)).astype(np.int64)
    plan = make(lengths, global_batch=512, micro_batch=micro)
    limit = 0.02 if (spread, micro) == ("wide", 4) else 0.01  # the few longest of 512 lie far apart
    steps = [plan.step(number) for number in range(plan.steps_per_epoch)]
    assert 1 - sum(int(step.lengths.sum()) for step in steps) / sum(map(padded_tokens, steps)) < limit


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("world", [1, 2, 8])
def test_micro_tokens_bounds_a_micro_batch_and_balances_the_ranks(spread: str, world: int) -> None:
    lengths = SPREADS[spread](np.random.default_rng(1)).astype(np.int64)
    plan = make(lengths, global_batch=64, micro_tokens=8192)
    shares = []
    for number in range(30):
        step = plan.step(number)
        costs = [[int(lengths[part].max()) * len(part) for part in step.share(rank, world)] for rank in range(world)]
        assert max(map(max, costs)) <= 8192
        shares.append([max(at) / (sum(at) / world) for at in zip(*costs, strict=True)])
        fewest = -(-padded_tokens(step) // 8192)
        assert len(costs[0]) * world <= 2 * fewest + 2 * world  # no more, smaller forwards than it takes
    assert np.mean([one for share in shares for one in share]) < 1.35  # the slowest rank of a forward, of the mean


def chi_square(seen: list[float], random: list[float]) -> float:
    """Pearson's statistic over its degrees of freedom, in up to ten bins that random draws fill alike."""
    edges = np.unique(np.quantile(random, np.linspace(0, 1, 11)))[1:-1]
    counts = [
        np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1) for values in (seen, random)
    ]
    expected = counts[1] * (len(seen) / len(random))
    return float(((counts[0] - expected) ** 2 / expected).sum() / len(edges))


@pytest.mark.parametrize("cut", [{"micro_batch": 1}, {"micro_batch": 4}, {"micro_tokens": 2048}], ids=str)
@pytest.mark.parametrize("global_batch", [8, 64])
def test_a_step_is_an_unbiased_draw_of_lengths_and_sources(global_batch: int, cut: dict[str, int]) -> None:
    """Over many steps, what a step holds is distributed as in plain random draws of the same size."""
    dice = np.random.default_rng(5)
    kinds = dice.integers(0, 10, 16_000)
    lengths = (40 * (1 + kinds) + dice.integers(0, 30, 16_000)).astype(np.int64)  # a kind has its own lengths
    plan = make(lengths, global_batch=global_batch, **cut)
    steps = [plan.step(number).samples for number in range(3 * plan.steps_per_epoch)]
    drawn = [dice.choice(16_000, global_batch, replace=False) for _ in range(20_000)]
    measures = {
        "longest kind's share": lambda numbers: np.mean(kinds[numbers] == 9),
        "share of short samples": lambda numbers: np.mean(lengths[numbers] < 100),
        "mean length": lambda numbers: lengths[numbers].mean(),
        "spread of lengths": lambda numbers: lengths[numbers].std(),
        "commonest kind": lambda numbers: np.bincount(kinds[numbers]).max(),
    }
    found = {name: chi_square(list(map(one, steps)), list(map(one, drawn))) for name, one in measures.items()}
    assert max(found.values()) < 3.0, found  # 1 is expected; buckets over many steps gave over 100


def test_the_kinds_of_a_small_step_are_those_of_random_draws() -> None:
    """The published code's 5.7 of ten kinds in a step of eight; buckets of length over many steps left 3.3."""
    kinds = np.repeat(np.arange(10), 400)
    plan = make((40 * (1 + kinds)).astype(np.int64), micro_batch=4)
    seen = [len(set(kinds[plan.step(number).samples].tolist())) for number in range(plan.steps_per_epoch)]
    assert np.mean(seen) == pytest.approx(10 * (1 - 0.9**8), abs=0.15)


def test_caches_are_mixed_by_weight() -> None:
    plan = make(np.full(400, 9), (300, 100), group_weights=(1.0, 3.0))
    drawn = np.concatenate([plan.step(i).samples for i in range(plan.steps_per_epoch)])
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
    tokens = TrainSection(global_batch=24, micro_tokens=4096)  # single samples, as DeepSpeed counts them
    assert [accumulation_steps(tokens, size) for size in (1, 2, 3, 24)] == [24, 12, 8, 1]
    with pytest.raises(RecipeError, match=r"shared by 5 processes"):
        accumulation_steps(tokens, 5)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_configurations_say_nothing_that_the_recipe_says(path: Path) -> None:
    settings = deepspeed_settings(TrainSection(deepspeed=str(path), global_batch=8, grad_clip=0.7), 2)
    assert not set(json.loads(path.read_text())) & set(FROM_RECIPE)
    assert settings["train_batch_size"] == 8
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["gradient_clipping"] == 0.7
    assert settings["zero_optimization"]["stage"] == int(path.stem[4])
    assert settings.get("bf16", {}).get("enabled", False) == path.stem.endswith("bf16")
    assert ("offload_optimizer" in settings["zero_optimization"]) == ("offload" in path.stem or "nvme" in path.stem)


@pytest.mark.parametrize("key", [*FROM_RECIPE])
def test_a_key_of_the_recipe_in_the_json_is_an_error(tmp_path: Path, key: str) -> None:
    (tmp_path / "c.json").write_text(json.dumps({key: 1}))
    with pytest.raises(RecipeError, match=f"{key}: belongs to the recipe"):
        deepspeed_settings(replace(TrainSection(), deepspeed=str(tmp_path / "c.json")), 1)


def test_bad_configurations_are_named(tmp_path: Path) -> None:
    wrong = {"{": "not a JSON", "[]": "not a DeepSpeed", '{"fp16": {"enabled": true}}': "fp16"}
    wrong |= {'{"data_types": {"buffer_dtype": "fp32"}}': "data_types.buffer_dtype: weights and buffers"}
    wrong |= {'{"data_types": {"keep_in_fp32_modules": ["norm"]}}': "data_types.keep_in_fp32_modules: weights and"}
    for text, words in wrong.items():
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(RecipeError, match=words):
            deepspeed_settings(TrainSection(deepspeed=str(tmp_path / "c.json")), 1)
    with pytest.raises(RecipeError, match="no such file"):
        deepspeed_settings(TrainSection(deepspeed=str(tmp_path / "none.json")), 1)
