"""The scheduler study over a tiny target: profile, comparison, tables, plots; and its arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from algorithm_tools import tiny_draft, tiny_target
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec.decoding.clock import StepTiming
from deepspec.decoding.records import DecodeSettings
from deepspec.decoding.scheduler import FixedLength, Policy, StepCosts, Throughput
from deepspec.errors import EvaluationError
from deepspec.evaluate.profile import Probe, fit, profile
from deepspec.evaluate.study import (
    SCHEDULER,
    Bench,
    StudyOptions,
    compare,
    judge,
    markdown,
    plot,
    sentence,
)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**16), st.integers(2, 8), st.sampled_from((1, 4, 64)))
def test_fitted_costs_are_convex_and_never_fall(seed: int, slots: int, rows: int) -> None:
    random = np.random.default_rng(seed)
    timings = [
        StepTiming(rows, rows + int(random.integers(0, rows * slots + 1)), 1, seconds)
        for seconds in random.uniform(0.5, 2.0, 40)
    ]
    tokens, seconds = fit(timings, rows, slots)
    slopes = np.diff(seconds) / np.diff(tokens)
    assert (slopes >= -1e-9).all()
    assert (np.diff(slopes) >= -1e-9).all()


def test_costs_are_found_again_beneath_noise_and_outliers() -> None:
    """A knee at half of the tokens; one round in twenty is disturbed."""
    random = np.random.default_rng(0)
    timings = []
    for _ in range(600):
        tokens = int(random.integers(4, 33))
        seconds = 1.0 + 0.05 * max(0, tokens - 18)
        timings.append(StepTiming(4, tokens, 1, seconds * random.uniform(0.97, 1.03) + (random.random() < 0.05)))
    tokens, seconds = fit(timings, 4, 7)
    np.testing.assert_allclose(np.interp([4, 18, 32], tokens, seconds), [1.0, 1.0, 1.7], atol=0.02)


def test_a_probe_tries_ragged_lengths() -> None:
    probe = Probe(seed=0)
    lengths = {tuple(probe.admit(None, 4, 3)) for _ in range(200)}
    assert all(0 <= length <= 4 for row in lengths for length in row)
    assert len(lengths) > 40


def made_up(scheduler: list[float], load: int = 4) -> list[dict]:
    fixed = {"concurrency": load, "policy": "fixed 3", "attempts": [100.0] * len(scheduler), "tokens_per_second": 100.0}
    own = {"concurrency": load, "policy": SCHEDULER, "attempts": scheduler, "tokens_per_second": scheduler[0]}
    return [fixed, own]


@pytest.mark.parametrize(
    ("attempts", "sure", "says"),
    [
        ([99.9, 100.2, 100.1, 99.8, 100.0], True, "as fast as fixed 3"),
        ([103.1, 102.9, 103.0, 103.2, 102.8], True, "3.0 % faster than fixed 3"),
        ([96.9, 97.1, 97.0, 97.2, 96.8], True, "3.0 % slower than fixed 3"),
        ([140.0, 170.0, 150.0, 120.0, 180.0], True, "52.0 % faster than fixed 3"),  # wide, and far from 1
        ([90.0, 112.0, 97.0, 108.0, 95.0], False, "too noisy to tell scheduler and fixed 3 apart"),
        ([100.0], False, "one attempt says nothing"),
    ],
)
def test_a_sentence_is_written_only_where_the_spread_allows_it(attempts: list[float], sure: bool, says: str) -> None:
    (finding,) = judge(made_up(attempts))
    assert finding["sure"] is sure
    assert says in sentence(finding)


class NoisyBench:
    """Every run emits 100 tokens; the scheduler's seconds come from ``seconds``, by load and attempt."""

    slots = 2

    def __init__(self, seconds: dict[int, list[float]]) -> None:
        self.seconds, self.runs = seconds, []

    def run(self, policy: Policy, concurrency: int, rounds: int | None = None, attempt: int = 0) -> list[StepTiming]:
        self.runs.append((concurrency, attempt))
        own = self.seconds[concurrency]
        spent = own[attempt % len(own)] if isinstance(policy, Throughput) else 1.0
        return [StepTiming(concurrency, 2 * concurrency, 100, spent)]


def test_attempts_go_on_at_the_noisy_loads_alone_and_are_bounded() -> None:
    costs = StepCosts({1: (np.array([1.0, 3.0]), np.array([1.0, 1.0]))})
    bench = NoisyBench({1: [1.0], 8: [0.8, 1.3, 0.9, 1.2]})
    options = StudyOptions("", "", "", concurrency=(1, 8), repeats=3, most_repeats=7)
    rows = compare(bench, costs, options)
    assert {attempt for load, attempt in bench.runs if load == 1} == {0, 1, 2}
    assert {attempt for load, attempt in bench.runs if load == 8} == set(range(7))
    quiet, noisy = judge(rows)
    assert (quiet["attempts"], quiet["sure"], noisy["attempts"], noisy["sure"]) == (3, True, 7, False)
    text = markdown({"rows": rows, "findings": [quiet, noisy]})
    assert "as fast as" in text
    assert "too noisy" in text
    assert "bar" not in text.lower()


def test_a_study_of_answers_of_one_token_is_refused() -> None:
    target = tiny_target("qwen3")
    bench = Bench(target, tiny_draft("dspark", target), DecodeSettings(max_new_tokens=1), ((1, 5, 9), (4, 7)))
    with pytest.raises(EvaluationError, match="every answer was one token"):
        bench.run(FixedLength(), 2)


def test_settings_of_a_study_out_of_range_are_refused() -> None:
    for changed in ({"concurrency": (0,)}, {"concurrency": (1, 1)}, {"concurrency": ()}, {"threshold": 1.5}):
        with pytest.raises(EvaluationError, match=next(iter(changed))):
            StudyOptions("", "", "", **changed)


@pytest.mark.slow
def test_a_study_of_a_tiny_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspec.evaluate.profile.PASSES", 1)
    target = tiny_target("qwen3")
    draft = tiny_draft("dspark", target)
    bench = Bench(target, draft, DecodeSettings(max_new_tokens=4), ((1, 5, 9), (4, 7), (3,)))
    costs = profile(bench.run, bench.slots, (6,))
    options = StudyOptions("", "", "", concurrency=(6,), repeats=1, most_repeats=1)
    rows = compare(bench, costs, options)
    assert {row["policy"] for row in rows} == {"fixed 1", "fixed 2", "fixed 3", "fixed 4", "threshold 0.5", SCHEDULER}
    assert all(row["tokens_per_second"] > 0 and row["accepted_length"] >= 1 for row in rows)
    study = {"rows": rows, "findings": judge(rows), "costs": costs.to_row()}
    plot(study, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"throughput.png", "verified.png", "trade.png", "costs.png"}
    assert SCHEDULER in markdown(study)
