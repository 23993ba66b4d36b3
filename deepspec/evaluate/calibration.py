"""Confidence against what happened: reliability, ECE, AUC, Brier; Sequential Temperature Scaling fitted and saved.

``python -m deepspec.evaluate.calibration --draft D --results FOLDER ...`` reads the rounds of finished evaluations that
verified everything (the same prompts with other seeds, for instance), fits one temperature a position on the prompts of
even index, prints ECE before and after on both halves, and saves ``sts.json`` into the draft folder, from where later
evaluations take it. A fit that makes ECE worse on the prompts of odd index is reported and not saved.

Measured ECE is biased upwards: with finitely many samples even a perfect head misses the observed rates a little. What
such a head would measure with the same predictions is reported beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepspec.drafts import weights_sha256
from deepspec.errors import EvaluationError, run_main
from deepspec.evaluate.report import number
from deepspec.evaluate.results import open_rows
from deepspec.files import read_json, sealed, write_json
from deepspec.identity import differences
from deepspec.tables import Table

BINS = 10  # of equal width
GRID = np.exp(np.linspace(np.log(0.2), np.log(5.0), 161))  # temperatures tried; 1 is the one in the middle
STS_FILE = "sts.json"
DRAWS = 200  # of the outcomes of a perfect head


@dataclass(frozen=True)
class Rounds:
    """Confidences of R rounds with K drafted slots, and what was accepted.

    Args:
        logits: [R, K] raw confidence logits.
        verified: [R] slots that were verified (fewer after a drafted stop token).
        accepted: [R] of them, accepted.
    """

    logits: np.ndarray
    verified: np.ndarray
    accepted: np.ndarray


def survival(logits: np.ndarray, temperatures: Sequence[float] | np.ndarray) -> np.ndarray:
    """Probability [R, k] that slots 1..k are all accepted: the cumulative product of scaled confidences [R, k]."""
    return np.asarray((1 / (1 + np.exp(-logits / np.asarray(temperatures)))).cumprod(axis=1))


def reliability(predicted: np.ndarray, happened: np.ndarray) -> list[tuple[int, float, float]]:
    """(count, mean prediction, observed rate) of each of the equally wide bins that is not empty; inputs [N]."""
    bins = np.minimum((predicted * BINS).astype(int), BINS - 1)
    rows = []
    for index in range(BINS):
        inside = bins == index
        if inside.any():
            rows.append((int(inside.sum()), float(predicted[inside].mean()), float(happened[inside].mean())))
    return rows


def expected_calibration_error(predicted: np.ndarray, happened: np.ndarray) -> float:
    """Mean over samples of |prediction - observed rate| by bin; 0 without samples."""
    misses = (count * abs(mean - rate) for count, mean, rate in reliability(predicted, happened))
    return sum(misses) / max(1, len(predicted))


def perfect_error(predicted: np.ndarray, seed: int = 0) -> float:
    """The mean ECE that predictions [N] would measure if each came true exactly as often as predicted."""
    random, bins = np.random.default_rng(seed), np.minimum((predicted * BINS).astype(int), BINS - 1)
    errors = []
    for _ in range(DRAWS):
        missed = (random.random(len(predicted)) < predicted) - predicted
        errors.append(np.abs(np.bincount(bins, weights=missed, minlength=BINS)).sum() / max(1, len(predicted)))
    return float(np.mean(errors))


def area_under_curve(predicted: np.ndarray, happened: np.ndarray) -> float | None:
    """Probability that a sample that happened has the higher prediction, ties half; None with one class only."""
    positive = happened.astype(bool)
    yes, no = int(positive.sum()), int((~positive).sum())
    if not yes or not no:
        return None
    _, inverse, counts = np.unique(predicted, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[inverse]  # the mean rank of equal predictions
    return float((ranks[positive].sum() - yes * (yes + 1) / 2) / (yes * no))


def fit(rounds: Rounds) -> list[float]:
    """Sequential Temperature Scaling: position by position, the temperature of least ECE of the cumulative product.

    A position that no round verified keeps 1; among equals the temperature nearest to 1 is taken.
    """
    temperatures: list[float] = []
    before = np.ones(len(rounds.logits))
    candidates = GRID[np.argsort(np.abs(np.log(GRID)), kind="stable")]
    for slot in range(rounds.logits.shape[1]):
        known = rounds.verified > slot
        logits, happened = rounds.logits[:, slot], rounds.accepted[known] > slot
        best = 1.0
        if known.any():
            scaled = (before[known] / (1 + np.exp(-logits[known] / t)) for t in candidates)
            errors = [expected_calibration_error(predicted, happened) for predicted in scaled]
            best = float(candidates[int(np.argmin(errors))])
        temperatures.append(best)
        before = before / (1 + np.exp(-logits / best))
    return temperatures


def assess(rounds: Rounds, temperatures: Sequence[float]) -> list[dict[str, Any]]:
    """Per position: ECE, AUC and Brier of survival against "accepted so far", and its reliability."""
    predicted = survival(rounds.logits, temperatures)
    rows = []
    for slot in range(rounds.logits.shape[1]):
        known = rounds.verified > slot
        own, happened = predicted[known, slot], rounds.accepted[known] > slot
        rows.append(
            {
                "position": slot + 1,
                "rounds": int(known.sum()),
                "ece": expected_calibration_error(own, happened),
                "ece_if_perfect": perfect_error(own),
                "auc": area_under_curve(own, happened),
                "brier": float(((own - happened) ** 2).mean()) if known.any() else None,
                "reliability": reliability(own, happened),
            }
        )
    return rows


def mean_ece(rows: Sequence[dict[str, Any]], key: str = "ece") -> float:
    """Mean over positions that were verified."""
    return float(np.mean([row[key] for row in rows if row["rounds"]]))


def read_rounds(folders: Sequence[Path], temperature: float) -> tuple[Rounds, Rounds]:
    """The rounds of results folders at one temperature: of the prompts of even index, and of odd index.

    Raises:
        EvaluationError: no such rounds, or a run that did not verify everything.
    """
    halves: tuple[list[tuple[list[float], int, int]], ...] = ([], [])
    for folder in folders:
        identity = _identity(folder)
        if identity["confidence_threshold"]:
            raise EvaluationError(
                "what a threshold cut was not verified", file=folder / "run.json", key="confidence_threshold",
                found=identity["confidence_threshold"], wanted=0, remedy="evaluate once without a threshold",
            )  # fmt: skip
        for row in open_rows(folder, "results").values():
            if row["temperature"] == temperature:
                own = zip(row["confidence"], row["proposed"], row["accepted"], strict=True)
                halves[row["index"] % 2].extend(one for one in own if one[0])
    if not halves[0] or not halves[1]:
        raise EvaluationError(
            f"no confidences at temperature {temperature:g} in both halves", file=folders[0] / "results.jsonl",
            wanted="two prompts or more, decoded with a draft that has a confidence head",
        )  # fmt: skip
    even, odd = (Rounds(*(np.array(column) for column in zip(*half, strict=True))) for half in halves)
    return even, odd


def _identity(folder: Path) -> dict[str, Any]:
    return dict(read_json(folder / "run.json", EvaluationError, "is this a results folder?")["identity"])


def load_sts(draft: Path) -> tuple[float, ...] | None:
    """The temperatures fitted for a draft; None where it has none.

    Raises:
        EvaluationError: fitted for other weights.
    """
    path = draft / STS_FILE
    if not path.exists():
        return None
    values = read_json(path, EvaluationError)
    if values["draft_sha256"] != weights_sha256(draft):
        raise EvaluationError("fitted for other weights", file=path, remedy="fit again, or remove it")
    return tuple(values["temperatures"])


def calibrate(draft: Path, folders: Sequence[Path], temperature: float) -> dict[str, Any]:
    """Fit on even prompts, assess on odd ones; returns the content of ``sts.json``, and whether it is ``saved``.

    It is not where the mean ECE on the odd prompts rises; what an earlier fit has saved then stays.

    Raises:
        EvaluationError: results of another draft, of other tasks than the first folder's (whose halves could differ),
            of another target, or without confidences.
    """
    weights, first = weights_sha256(draft), _identity(folders[0])
    tasks = first["tasks"]
    for folder in folders:
        identity = _identity(folder)
        if identity["draft_sha256"] != weights:
            raise EvaluationError("results of another draft", file=folder / "run.json", wanted=f"those of {draft}")
        if identity["tasks"] != tasks:
            raise EvaluationError(
                "results of other tasks", file=folder / "run.json", key="tasks", found=identity["tasks"], wanted=tasks
            )
        if first.get("identity") and identity.get("identity"):  # results of before have none
            lines = differences(first["identity"], identity["identity"], (str(folders[0]), str(folder)))
            if lines:
                raise EvaluationError(f"results of another target: {'; '.join(lines)}", file=folder / "run.json")
    even, odd = read_rounds(folders, temperature)
    temperatures = fit(even)
    unscaled = [1.0] * len(temperatures)
    result = {
        "temperatures": temperatures,
        "sampling_temperature": temperature,
        "draft_sha256": weights,
        "tasks": tasks,
        "seeds": [_identity(folder)["seed"] for folder in folders],
        "rounds": {"fitted": len(even.logits), "assessed": len(odd.logits)},
        "before": assess(odd, unscaled),
        "after": assess(odd, temperatures),
        "fitted_ece": {
            "before": mean_ece(assess(even, unscaled)),
            "after": mean_ece(assess(even, temperatures)),
        },
    }

    result["saved"] = mean_ece(result["after"]) <= mean_ece(result["before"])
    if result["saved"]:
        write_json(draft / STS_FILE, sealed(result))
    return result


def markdown(result: dict[str, Any]) -> str:
    """A row a position, before and after on the prompts not fitted on; the mean ECE of both halves; whether saved."""
    header = ["position", "rounds", "temperature", "ECE before", "after", "if perfect", "AUC before", "after"]
    cells = []
    for one, other, temperature in zip(result["before"], result["after"], result["temperatures"], strict=True):
        own = [one["position"], one["rounds"], f"{temperature:.3f}"]
        own += [f"{error:.2%}" for error in (one["ece"], other["ece"], other["ece_if_perfect"])]
        cells.append([*own, *(number(row[key], ".3f") for key in ("auc", "brier") for row in (one, other))])
    before, after = (mean_ece(result[key]) for key in ("before", "after"))
    perfect = mean_ece(result["after"], "ece_if_perfect")
    cells.append(["mean", "", "", f"{before:.2%}", f"{after:.2%}", f"{perfect:.2%}", *[""] * 4])
    (fitted, assessed), errors = result["rounds"].values(), result["fitted_ece"]
    lines = [
        Table([*header, "Brier before", "after"], cells).markdown() + "\n",
        f"Mean ECE on the {fitted:,} rounds fitted on: {errors['before']:.2%} before, {errors['after']:.2%} after.",
        f"Mean ECE on the {assessed:,} other rounds: {before:.2%} before, {after:.2%} after.",
    ]
    if not result["saved"]:
        lines.append(f"The fit makes ECE worse on the part that it was not fitted on: no {STS_FILE} is written.")
    return "\n".join(lines)


if __name__ == "__main__":
    from deepspec.evaluate.__main__ import calibrate as command

    run_main(command)
