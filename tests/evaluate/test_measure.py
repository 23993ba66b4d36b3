"""Measures and tables by definition: positions, intervals, averages, the paired comparison of runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec.errors import EvaluationError
from deepspec.evaluate.__main__ import compare
from deepspec.evaluate.compare import Run, comparison, difference
from deepspec.evaluate.measure import PromptResult, bootstrap, by_position, macro_averages, summarise
from deepspec.evaluate.report import plot_lengths, position_table, remarks, summary_table, time_table
from deepspec.evaluate.results import Provenance, Results
from deepspec.pages import figure


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=30))
@settings(max_examples=50, deadline=None)
def test_acceptance_by_position_is_the_definition(pairs: list[tuple[int, int]]) -> None:
    pairs = [(max(a, b), min(a, b)) for a, b in pairs]
    conditional, prefix = by_position([p for p, _ in pairs], [a for _, a in pairs])
    product = 1.0
    full = [pair for pair in pairs if pair[0] == 5]
    for slot in range(1, len(prefix) + 1):
        verified = [a for p, a in pairs if p >= slot]
        assert prefix[slot - 1] == pytest.approx(sum(a >= slot for a in verified) / len(verified))
    if len(full) == len(pairs) and pairs:  # all rounds verify every slot: prefixes are products of conditionals
        for slot, one in enumerate(conditional):
            product *= one
            assert prefix[slot] == pytest.approx(product)


def test_interval_covers_the_mean_and_shrinks() -> None:
    random = np.random.default_rng(0)
    widths = []
    for count in (20, 2000):
        rounds = random.integers(5, 15, count).astype(float)
        low, high = bootstrap(rounds * random.normal(3.0, 0.5, count), rounds, 0)
        assert low < 3.0 < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 4


def test_acceptance_length_pools_rounds() -> None:
    results = [
        PromptResult("t", 0, 0.0, 9, [3, 3, 3], [4, 4, 4], [2, 2, 2], equal_to_baseline=True),
        PromptResult("t", 1, 0.0, 1, [1], [4], [0], equal_to_baseline=False),
    ]
    summary = summarise("t", 0.0, results)
    assert summary.acceptance_length == 2.5
    assert summary.verify_rate == 6 / 16
    assert summary.verified_length == 4.0
    assert summary.equal_to_baseline == 0.5
    assert summary.prefix == [0.75, 0.75, 0.0, 0.0]
    assert summary.speed_up is None


def timed(
    index: int, seconds: float, baseline_seconds: float, tokens: int = 10, baseline_tokens: int = 10
) -> PromptResult:
    spent = {"prefill": 0.1, "draft": seconds - 0.3, "verify": 0.1, "head": 0.05, "other": 0.05, "total": seconds}
    return PromptResult(
        "t", index, 1.0, tokens, [2] * 5, [4] * 5, [1] * 5, steps=5, seconds=spent,
        baseline_tokens=baseline_tokens, baseline_seconds=baseline_seconds,
    )  # fmt: skip


def test_speed_up_is_a_ratio_of_rates_with_its_interval() -> None:
    same = summarise("t", 1.0, [timed(n, 1.0, 2.0) for n in range(8)])
    assert same.speed_up == pytest.approx(2.0)
    assert same.speed_up_interval == pytest.approx((2.0, 2.0))
    assert same.milliseconds_per_step["total"] == pytest.approx(1000 * 0.9 / 5)  # without prefill
    longer = summarise("t", 1.0, [timed(n, 1.0, 4.0, baseline_tokens=20) for n in range(8)])
    assert longer.speed_up == pytest.approx(2.0)  # the baseline sampled twice as many tokens in twice the time
    mixed = summarise("t", 1.0, [timed(n, 1.0, 1.0 + n % 2 * 2) for n in range(40)])
    assert mixed.speed_up_interval is not None
    assert mixed.speed_up_interval[0] < 2.0 < mixed.speed_up_interval[1]
    half = [timed(0, 1.0, 2.0), PromptResult("t", 1, 1.0, 1, [1], [4], [0])]
    assert summarise("t", 1.0, half).speed_up is None  # a prompt without its baseline


def test_macro_average_weighs_tasks_alike() -> None:
    one = summarise("a", 0.0, [PromptResult("a", n, 0.0, 8, [4, 4], [4, 4], [3, 3]) for n in range(9)])
    two = summarise("b", 0.0, [PromptResult("b", 0, 0.0, 2, [2], [4], [1])])
    one.paper_value, two.paper_value = 4.0, 3.0
    (macro,) = macro_averages([one, two])
    assert (macro.acceptance_length, macro.paper_value, macro.prompts) == (3.0, 3.5, 10)
    assert macro.prefix == [1.0, 0.5, 0.5, 0.0]
    two.paper_value = None
    (macro,) = macro_averages([one, two])
    assert macro.paper_value is None  # an average over other tasks would stand beside it


def one_round_or_none(*lengths: int) -> list[PromptResult]:
    """A prompt for each length: that many tokens in one round of seven slots; 0: no round at all."""
    return [
        PromptResult("t", n, 0.0, k or 1, [k] if k else [], [7] if k else [], [k - 1] if k else [])
        for n, k in enumerate(lengths)
    ]


def test_a_prompt_without_a_round_enters_no_average() -> None:
    mixed, alone = summarise("t", 0.0, one_round_or_none(4, 0, 2, 0)), summarise("t", 0.0, one_round_or_none(4, 2))
    for key in ("acceptance_length", "interval", "verify_rate", "verified_length", "conditional", "rounds"):
        assert getattr(mixed, key) == getattr(alone, key)
    assert (mixed.prompts, mixed.without_rounds) == (4, 2)
    assert "t at T=0: 2 of 4 prompts ended at their first token" in remarks([mixed.to_row()])[0]


def test_no_round_at_all_is_no_acceptance_length(tmp_path: Path) -> None:
    none = summarise("t", 0.0, one_round_or_none(0, 0, 0))
    assert (none.acceptance_length, none.interval, none.verify_rate, none.verified_length) == (None, None, None, None)
    row = json.loads(json.dumps(none.to_row()))
    assert row["accepted_length"] is None
    assert "| t | 0 | none |  | 0 |" in summary_table([row]).markdown()
    assert position_table([row]).markdown().count("\n") == time_table([row]).markdown().count("\n") == 2
    plot = figure(lambda axes: plot_lengths(axes, [row]))
    assert plot.startswith("<figure")
    other = summarise("u", 0.0, one_round_or_none(3, 3))
    (macro,) = macro_averages([none, other])
    assert (macro.acceptance_length, macro.interval, macro.verify_rate) == (3.0, (3.0, 3.0), other.verify_rate)
    (macro,) = macro_averages([none, none])
    assert (macro.acceptance_length, macro.interval) == (None, None)
    some, nothing = write_run(tmp_path / "some", [3, 4]), write_run(tmp_path / "nothing", [0, 0])
    assert nothing.results.summaries[0].acceptance_length is None
    assert difference(some, nothing, "t", 0.0) is None
    assert "| none | no rounds |" in comparison([some, nothing])


def test_one_prompt_has_no_interval(tmp_path: Path) -> None:
    one = summarise("t", 0.0, one_round_or_none(4))
    assert (one.acceptance_length, one.interval) == (4.0, None)
    assert "| 4.00 (one prompt) |" in summary_table([one.to_row()]).markdown()
    assert summarise("t", 1.0, [timed(0, 1.0, 2.0)]).speed_up_interval is None
    (macro,) = macro_averages([one, summarise("u", 0.0, one_round_or_none(3, 3))])
    assert (macro.acceptance_length, macro.interval) == (3.5, None)
    assert "| 3.50 (no interval) |" in summary_table([macro.to_row()]).markdown()
    first, other = write_run(tmp_path / "a", [3, 0]), write_run(tmp_path / "b", [5, 2])
    found = difference(first, other, "t", 0.0)
    assert found is not None
    assert (found.value, found.interval, found.prompts) == (2.0, None, 1)
    assert "| +2.00 (one prompt) |" in comparison([first, other])


def test_tables_show_every_measure() -> None:
    summary = summarise("t", 1.0, [timed(n, 1.0, 2.0) for n in range(4)])
    summary.paper_value = 6.11
    rows = [summary.to_row()]
    assert (
        "| t | 1 | 2.00 (2.00-2.00) | 6.11 | 25% | 10 | 5 | 2.00x (2.00-2.00) |  |  | 4 |"
        in summary_table(rows).markdown()
    )
    assert "| 1.000 / 1.000 | 0.000 / 0.000 | 0.000 / 0.000 |" in position_table(rows).markdown()
    assert "| 140.000 | 20.000 | 10.000 | 10.000 | 180.000 | 4.00 | 0.40 |" in time_table(rows).markdown()


def write_run(folder: Path, lengths: list[int], digest: str = "same") -> Run:
    """A finished run of one round a prompt that committed so many tokens; 0: of none."""
    rows = one_round_or_none(*lengths)
    folder.mkdir()
    (folder / "results.jsonl").write_text("".join(json.dumps(one.to_row()) + "\n" for one in rows))
    values: dict[str, Any] = dict.fromkeys(Provenance.__dataclass_fields__, "")
    provenance = Provenance(**(values | {"tasks": {"t": digest}}))
    Results("dspark", 7, [summarise("t", 0.0, rows)], provenance).save(folder)
    return Run.load(folder)


def test_comparison_is_paired(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(1, 7, 200)
    first = write_run(tmp_path / "a", lengths.tolist())
    better = write_run(tmp_path / "b", (lengths + random.integers(0, 2, 200)).tolist())
    found = difference(first, better, "t", 0.0)
    assert found is not None
    assert found.interval[0] < found.value < found.interval[1]
    unpaired = (
        sum((s.interval[1] - s.interval[0]) ** 2 for run in (first, better) for s in run.results.summaries) ** 0.5
    )
    assert found.interval[1] - found.interval[0] < unpaired / 2
    same = difference(first, first, "t", 0.0)
    assert same is not None
    assert (same.value, same.interval) == (0.0, (0.0, 0.0))
    other = write_run(tmp_path / "c", lengths.tolist(), digest="other")
    assert difference(first, other, "t", 0.0) is None
    text = comparison([first, better, other])
    assert f"{found.value:+.2f}" in text
    assert "other prompts" in text
    assert "| a |" in text


def test_comparison_needs_two_finished_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [1, 2])
    with pytest.raises(EvaluationError, match="two results folders"):
        compare([str(tmp_path / "a")])
    with pytest.raises(EvaluationError, match="no such file"):
        compare([str(tmp_path / "a"), str(tmp_path / "b")])
