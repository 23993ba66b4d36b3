"""Calibration: the measures on cases known by hand, temperatures recovered, sts.json tied to the draft's weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from deepspec.errors import EvaluationError
from deepspec.evaluate.__main__ import calibrate as command_of_calibration
from deepspec.evaluate.calibration import (
    Rounds,
    area_under_curve,
    assess,
    calibrate,
    expected_calibration_error,
    fit,
    load_sts,
    mean_ece,
    perfect_error,
    survival,
)
from deepspec.files import sha256_file
from deepspec.rows import sealed_row

SKEW = np.array([2.0, 0.5, 1.5])  # the raw logits are the true ones times this


def overconfident(count: int, seed: int) -> Rounds:
    """Rounds whose true logits are the raw ones divided by SKEW."""
    random = np.random.default_rng(seed)
    true = random.normal(1.0, 1.5, (count, 3))
    passed = random.random((count, 3)) < 1 / (1 + np.exp(-true))
    return Rounds(true * SKEW, np.full(count, 3), passed.cumprod(axis=1).sum(axis=1))


def test_measures_by_hand() -> None:
    said, happened = np.array([0.91, 0.93, 0.12, 0.14]), np.array([1, 0, 0, 0])
    assert expected_calibration_error(said, happened) == pytest.approx((2 * 0.42 + 2 * 0.13) / 4)
    assert area_under_curve(said, happened) == pytest.approx(2 / 3)
    assert area_under_curve(np.array([0.5, 0.5]), np.array([1, 0])) == 0.5
    assert area_under_curve(said, np.ones(4)) is None
    assert np.allclose(survival(np.array([[0.0, 0.0]]), [1.0, 1.0]), [[0.5, 0.25]])


def test_fit_recovers_the_temperatures_and_helps_on_other_rounds() -> None:
    temperatures, other = fit(overconfident(20000, 0)), overconfident(20000, 1)
    assert np.allclose(np.log(temperatures), np.log(SKEW), atol=0.35)
    before, after = mean_ece(assess(other, [1.0] * 3)), mean_ece(assess(other, temperatures))
    assert after < 0.015 < before


def test_slots_that_were_not_verified_do_not_count() -> None:
    rounds = overconfident(500, 2)
    cut = Rounds(rounds.logits, np.ones(500, dtype=int), np.minimum(rounds.accepted, 1))
    assert fit(cut)[1:] == [1.0, 1.0]
    assert [row["rounds"] for row in assess(cut, [1.0] * 3)] == [500, 0, 0]


def write_run(root: Path, threshold: float = 0.0) -> tuple[Path, Path]:
    draft, results = root / "draft", root / "results"
    draft.mkdir()
    results.mkdir()
    (draft / "model.safetensors").write_bytes(b"weights")
    digest = sha256_file(draft / "model.safetensors")
    identity = {"draft_sha256": digest, "confidence_threshold": threshold, "tasks": {}, "seed": 7}
    (results / "run.json").write_text(json.dumps({"identity": identity}))
    rounds, lines = overconfident(2000, 3), []
    for index in range(4):
        own = slice(index * 500, index * 500 + 500)
        row = {"task": "t", "index": index, "temperature": 1.0, "confidence": rounds.logits[own].tolist()}
        lines.append(row | {"proposed": [3] * 500, "accepted": rounds.accepted[own].tolist()})
    (results / "results.jsonl").write_bytes(b"".join(sealed_row(line, "results.jsonl") for line in lines))
    return draft, results


def test_saved_and_used_only_with_the_weights_it_was_fitted_for(tmp_path: Path) -> None:
    draft, results = write_run(tmp_path)
    assert load_sts(draft) is None
    saved = calibrate(draft, [results], 1.0)
    assert load_sts(draft) == tuple(saved["temperatures"])
    assert saved["rounds"] == {"fitted": 1000, "assessed": 1000}
    (draft / "model.safetensors").write_bytes(b"other")
    with pytest.raises(EvaluationError, match="fitted for other weights"):
        load_sts(draft)
    with pytest.raises(EvaluationError, match="results of another draft"):
        calibrate(draft, [results], 1.0)


def test_several_runs_of_the_same_prompts_are_read_together(tmp_path: Path) -> None:
    draft, results = write_run(tmp_path)
    shutil.copytree(results, tmp_path / "again")
    both = calibrate(draft, [results, tmp_path / "again"], 1.0)
    assert both["rounds"] == {"fitted": 2000, "assessed": 2000}
    assert both["seeds"] == [7, 7]
    assert both["temperatures"] == calibrate(draft, [results], 1.0)["temperatures"]
    other = json.loads((results / "run.json").read_text())
    other["identity"]["tasks"] = {"t": "other"}
    (tmp_path / "again" / "run.json").write_text(json.dumps(other))
    with pytest.raises(EvaluationError, match=r"again.*other tasks"):
        calibrate(draft, [results, tmp_path / "again"], 1.0)
    for folder, template in ((results, "a"), (tmp_path / "again", "b")):
        other["identity"] |= {"tasks": {}, "identity": {"template": template}}
        (folder / "run.json").write_text(json.dumps(other))
    with pytest.raises(EvaluationError, match=r"again.*another target: template: "):
        calibrate(draft, [results, tmp_path / "again"], 1.0)


def test_unusable_results_are_named(tmp_path: Path) -> None:
    draft, results = write_run(tmp_path, threshold=0.5)
    with pytest.raises(EvaluationError, match="confidence_threshold"):
        calibrate(draft, [results], 1.0)
    identity = json.loads((results / "run.json").read_text())
    identity["identity"]["confidence_threshold"] = 0.0
    (results / "run.json").write_text(json.dumps(identity))
    with pytest.raises(EvaluationError, match="no confidences at temperature 0"):
        calibrate(draft, [results], 0.0)


def test_a_fit_that_makes_the_other_part_worse_writes_nothing_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A calibrated head and few rounds: the fit follows the noise of its own half."""
    draft, results = write_run(tmp_path)
    rounds, lines = Rounds(*vars(overconfident(160, 5)).values()), []
    for index in range(2):
        own = slice(index * 80, index * 80 + 80)
        row = {"task": "t", "index": index, "temperature": 1.0, "confidence": (rounds.logits[own] / SKEW).tolist()}
        lines.append(row | {"proposed": [3] * 80, "accepted": rounds.accepted[own].tolist()})
    (results / "results.jsonl").write_bytes(b"".join(sealed_row(line, "results.jsonl") for line in lines))
    report = tmp_path / "figures.json"
    command = ["calibration", "--draft", str(draft), "--results", str(results), "--report", str(report)]
    monkeypatch.setattr("sys.argv", command)
    command_of_calibration()
    said, figures = capsys.readouterr().out, json.loads(report.read_text())
    assert mean_ece(figures["after"]) > mean_ece(figures["before"])
    assert figures["fitted_ece"]["after"] < figures["fitted_ece"]["before"]
    assert not figures["saved"]
    assert load_sts(draft) is None
    assert "makes ECE worse on the part that it was not fitted on" in said
    for value in (*figures["fitted_ece"].values(), mean_ece(figures["before"]), mean_ece(figures["after"])):
        assert f"{value:.2%}" in said


def test_a_perfect_head_measures_what_is_said_beside_it() -> None:
    """Predictions that come true as often as they say measure about the error reported for them, which falls with N."""
    random = np.random.default_rng(0)
    said = [random.random(count) ** 2 for count in (500, 50_000)]
    for one in said:
        measured = np.mean([expected_calibration_error(one, random.random(len(one)) < one) for _ in range(30)])
        assert perfect_error(one) == pytest.approx(measured, rel=0.15)
    assert perfect_error(said[1]) < perfect_error(said[0]) / 5
