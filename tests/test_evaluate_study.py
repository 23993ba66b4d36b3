"""The scheduler study over a tiny target: profile, comparison, tables, plots; and its arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from algorithm_tools import tiny_draft, tiny_target
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec.decoding.records import DecodeSettings
from deepspec.evaluate.study import (
    SCHEDULER,
    Bench,
    StudyOptions,
    compare,
    falling,
    judge,
    lower_envelope,
    markdown,
    plot,
    profile,
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.1, 9.0), min_size=1, max_size=9))
def test_costs_become_convex_and_never_fall(values: list[float]) -> None:
    tokens, seconds = np.arange(1.0, len(values) + 1), np.array(values)
    same, curve = lower_envelope(tokens, seconds)
    assert (same == tokens).all()
    assert (curve <= seconds + 1e-9).all()
    assert (np.diff(curve) >= -1e-9).all()
    assert (np.diff(curve, 2) >= -1e-9).all()
    straight = 1.0 + 0.5 * tokens
    np.testing.assert_allclose(lower_envelope(tokens, straight)[1], straight)


def test_savings_never_rise() -> None:
    np.testing.assert_allclose(falling(np.array([4.0, 3.0, 1.0, 0.0])), [4.0, 3.0, 1.0, 0.0])
    np.testing.assert_allclose(falling(np.array([4.0, 1.0, 2.0, -1.0])), [4.0, 1.5, 1.5, 0.0])


def made_up(scheduler: dict[int, float]) -> list[dict]:
    rows = []
    for load, rate in scheduler.items():
        own = {"attempts": [rate, rate, rate], "tokens_per_second": rate, "verified_per_request": 6 - load / 16}
        rows.append({"concurrency": load, "policy": "fixed 3", "attempts": [100.0] * 3, "tokens_per_second": 100.0})
        rows.append({"concurrency": load, "policy": SCHEDULER, **own})
    return rows


def test_bars_tell_a_slow_scheduler() -> None:
    bars = judge(made_up({1: 99.0, 16: 120.0}))
    assert all(bar["holds"] for bar in bars.values())
    assert not judge(made_up({1: 97.0, 16: 120.0}))["scheduler_of_best_fixed_at_1"]["holds"]
    assert not judge(made_up({16: 99.0, 1: 99.0}))["verified_length_falls_with_load"]["holds"]


@pytest.mark.slow
def test_a_study_of_a_tiny_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspec.evaluate.study.PROFILE_PASSES", 1)
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
