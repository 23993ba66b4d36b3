"""The scheduler study over a tiny target: profile, comparison, tables, plots; and its arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from algorithm_tools import tiny_draft, tiny_target
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec.decoding.clock import Turn
from deepspec.decoding.records import DecodeSettings
from deepspec.decoding.scheduler import StepCosts
from deepspec.evaluate.profile import Probe, choosing, fit, profile, saving
from deepspec.evaluate.study import (
    SCHEDULER,
    Bench,
    StudyOptions,
    compare,
    judge,
    markdown,
    plot,
)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**16), st.integers(2, 8), st.sampled_from((1, 4, 64)))
def test_fitted_costs_are_convex_and_never_fall(seed: int, slots: int, rows: int) -> None:
    random = np.random.default_rng(seed)
    turns = [
        Turn(rows, rows + int(random.integers(0, rows * slots + 1)), 1, int(random.integers(0, slots + 1)), seconds)
        for seconds in random.uniform(0.5, 2.0, 40)
    ]
    (tokens, seconds), saved = fit(turns, rows, slots)
    slopes = np.diff(seconds) / np.diff(tokens)
    assert (slopes >= -1e-9).all()
    assert (np.diff(slopes) >= -1e-9).all()
    assert len(saved) == slots + 1
    assert saved[-1] == 0
    assert (np.diff(saved) <= 1e-12).all()


def test_costs_are_found_again_beneath_noise_and_outliers() -> None:
    """A knee at half of the tokens, a saving a slot, one of no draft at all; one round in twenty is disturbed."""
    random = np.random.default_rng(0)
    turns = []
    for _ in range(600):
        tokens, drafted = int(random.integers(4, 33)), int(random.integers(0, 8))
        seconds = 1.0 + 0.05 * max(0, tokens - 18) - 0.02 * (7 - drafted) - 0.3 * (drafted == 0)
        turns.append(Turn(4, tokens, 1, drafted, seconds * random.uniform(0.97, 1.03) + (random.random() < 0.05)))
    (tokens, seconds), saved = fit(turns, 4, 7)
    np.testing.assert_allclose(np.interp([4, 18, 32], tokens, seconds), [1.0, 1.0, 1.7], atol=0.02)
    np.testing.assert_allclose(saved, [0.44, *(0.02 * (7 - np.arange(1, 8)))], atol=0.02)
    costs = StepCosts({4: (tokens, seconds)}, {4: saved})
    even = [Turn(4, 32, 1, 7, 1.6), Turn(3, 24, 1, 7, 1.6), Turn(4, 32, 1, 7, 9.0)]  # the last one was disturbed
    assert saving(costs, even) == pytest.approx(0.1, abs=0.02)
    assert saving(costs, [Turn(4, 32, 1, 7, 1.9)]) == 0
    assert 0 < choosing(costs, 4, 7) < 1


def test_a_probe_tries_every_width_and_ragged_lengths() -> None:
    probe, widths, lengths = Probe(4, seed=0), set(), set()
    for _ in range(200):
        width = 4 if probe.max_draft is None else probe.max_draft
        widths.add(width)
        given_lengths = probe.admit(None, width, 3)
        assert given_lengths.max() <= width
        lengths.add(tuple(given_lengths))
    assert widths == {0, 1, 2, 3, 4}
    assert len(lengths) > 40


def made_up(scheduler: dict[int, float]) -> list[dict]:
    rows = []
    for load, rate in scheduler.items():
        own = {"attempts": [rate, rate, rate], "tokens_per_second": rate, "verified_per_request": 6 - load / 16}
        fixed = {"attempts": [100.0] * 3, "tokens_per_second": 100.0, "verified_per_request": 6.0}
        rows.append({"concurrency": load, "policy": "fixed 3", **fixed})
        rows.append({"concurrency": load, "policy": SCHEDULER, **own})
    return rows


def test_bars_tell_a_slow_scheduler() -> None:
    bars = judge(made_up({1: 99.0, 16: 120.0}))
    assert all(bar["holds"] for bar in bars.values())
    assert not judge(made_up({1: 97.0, 16: 120.0}))["scheduler_of_best_fixed_at_1"]["holds"]
    assert not judge(made_up({16: 99.0, 1: 99.0}))["verified_length_falls_with_load"]["holds"]


@pytest.mark.slow
def test_a_study_of_a_tiny_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspec.evaluate.profile.PASSES", 1)
    target = tiny_target("qwen3")
    draft = tiny_draft("dspark", target)
    bench = Bench(target, draft, DecodeSettings(max_new_tokens=4), ((1, 5, 9), (4, 7), (3,)))
    costs = profile(bench, (6,))
    options = StudyOptions("", "", "", concurrency=(6,), repeats=1)
    rows = compare(bench, costs, options)
    assert {row["policy"] for row in rows} == {"fixed 1", "fixed 2", "fixed 3", "fixed 4", "threshold 0.5", SCHEDULER}
    assert all(row["tokens_per_second"] > 0 and row["accepted_length"] >= 1 for row in rows)
    study = {"rows": rows, "bars": judge(rows), "costs": {"table": costs.table}}
    plot(study, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"throughput.png", "verified.png", "trade.png", "costs.png"}
    assert SCHEDULER in markdown(study)
