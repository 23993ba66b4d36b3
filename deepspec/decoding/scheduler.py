"""How many drafted tokens to verify: a fixed length, a confidence threshold, or the hardware-aware prefix scheduler.

Admission must be *causal* to stay lossless: whether token k of a row is verified may depend on confidences up to k
(they depend on tokens before k), never on token k itself or what was drafted after it. A prefix cut at the first low
confidence is causal. So is the scheduler: it admits in order of survival probability and stops at the first token that
does not pay, and token k + 1 of a row never survives likelier than token k. Taking the best total over all admissions
instead would look ahead, and would bias the output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from deepspec import files
from deepspec.errors import EvaluationError


class Policy(Protocol):
    """Decides each round how many drafted tokens of each row go to the target."""

    @property
    def needs_confidence(self) -> bool:
        """Whether :meth:`admit` reads confidences."""
        ...

    @property
    def max_draft(self) -> int | None:
        """Slots that the next round drafts; None: all that the draft has."""
        ...

    def admit(self, confidence: np.ndarray | None, drafted: int, rows: int) -> np.ndarray:
        """Lengths [R] int64 between 0 and ``drafted``.

        ``confidence`` [R, K] is the probability that a token is accepted given that those before it were.
        """
        ...


@dataclass(frozen=True)
class FixedLength:
    """Always ``length`` tokens; None: as many as the draft proposes."""

    length: int | None = None
    needs_confidence: bool = False

    @property
    def max_draft(self) -> int | None:
        """No more slots than will be verified."""
        return self.length

    def admit(self, confidence: np.ndarray | None, drafted: int, rows: int) -> np.ndarray:
        """``length`` for every row."""
        return np.full(rows, drafted if self.length is None else min(self.length, drafted), dtype=np.int64)


@dataclass(frozen=True)
class Threshold:
    """The longest prefix whose every confidence is at least ``threshold``."""

    threshold: float
    needs_confidence: bool = True
    max_draft: int | None = None

    def admit(self, confidence: np.ndarray | None, drafted: int, rows: int) -> np.ndarray:
        """Cut each row at its first low confidence."""
        return (_required(confidence) >= self.threshold).cumprod(axis=1).sum(axis=1).astype(np.int64)


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a complete round (draft, verify, head, the rest) by tokens per verify step, measured on one machine.


    Args:
        table: ``table[rows]`` is a pair of ascending arrays (tokens, seconds) with that many rows decoding together.
    """

    table: Mapping[int, tuple[np.ndarray, np.ndarray]]

    def seconds(self, rows: int, tokens: np.ndarray) -> np.ndarray:
        """Interpolated seconds of a round of ``rows`` rows for each entry of ``tokens``."""
        known = np.array(sorted(self.table))
        nearest = int(known[np.abs(np.log(known) - np.log(max(rows, 1))).argmin()])
        # Another number of rows is read off at the same tokens per row.
        return np.interp(tokens * (nearest / max(rows, 1)), *self.table[nearest])

    def to_row(self) -> dict[str, Any]:
        """A JSON value."""
        return {"table": {str(rows): [list(map(float, a)) for a in pair] for rows, pair in self.table.items()}}

    @staticmethod
    def load(path: str | Path) -> StepCosts:
        """Read ``costs.json`` of a study, also one of an earlier version, which holds more than the table.

        Raises:
            EvaluationError: no such file, or not such a table.
        """
        raw = files.read_json(path, EvaluationError, "write one with --study scheduler")
        try:
            return StepCosts({int(rows): (np.array(a), np.array(b)) for rows, (a, b) in raw["table"].items()})
        except (AttributeError, KeyError, TypeError, ValueError) as problem:
            raise EvaluationError(f"not a table of step costs ({problem})", file=path) from None


class Throughput:
    """Algorithm 1 of the DSpark paper: admit tokens of all rows in order of survival while expected tokens/s rise.

    Args:
        costs: of this machine, measured once.
    """

    needs_confidence = True
    max_draft: int | None = None

    def __init__(self, costs: StepCosts) -> None:
        self.costs = costs
        self._curves: dict[tuple[int, int], np.ndarray] = {}  # seconds by admitted tokens [R * K + 1]

    def admit(self, confidence: np.ndarray | None, drafted: int, rows: int) -> np.ndarray:
        """One pass over all rows' tokens, likeliest first; stops at the first that lowers tokens per second."""
        if drafted == 0:
            return np.zeros(rows, dtype=np.int64)
        survival = _required(confidence).cumprod(axis=1)  # [R, K], falling along a row
        order = np.argsort(-survival, axis=None, kind="stable")  # stable: on a tie the earlier token of a row is first
        committed = rows + np.concatenate(([0.0], survival.ravel()[order].cumsum()))  # one token a row comes anyway
        if (rows, drafted) not in self._curves:
            self._curves[rows, drafted] = self.costs.seconds(rows, rows + np.arange(rows * drafted + 1))
        rate = committed / self._curves[rows, drafted]
        falls = np.flatnonzero(rate[1:] < rate[:-1])
        admitted = order[: int(falls[0]) if len(falls) else len(order)]
        return np.bincount(admitted // drafted, minlength=rows).astype(np.int64)


def _required(confidence: np.ndarray | None) -> np.ndarray:
    if confidence is None:
        raise EvaluationError(
            "this policy needs a draft with a confidence head",
            remedy="use a fixed length, or a draft trained with draft.confidence_head: true",
        )
    return confidence
