"""How many drafted tokens to verify: a fixed length, a confidence threshold, or the hardware-aware prefix scheduler.

Admission must be *causal* to stay lossless: whether token k of a row is verified may depend on confidences up to k
(they depend on tokens before k), never on token k itself or what was drafted behind it. A prefix cut at the first low
confidence is causal. So is the scheduler, because it admits in order of survival probability and stops at the first
token that does not pay: token k + 1 of a row never survives likelier than token k, so it is looked at later. Taking the
best total over all admissions instead would look ahead, and would bias the output.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

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
        """Slots worth drafting in the next round; None: all that the draft has. It may know earlier rounds alone."""
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
    """Seconds of a whole round (draft, verify, head, the rest) against tokens per verify step, on one machine.

    Args:
        table: ``table[rows]`` is a pair of ascending arrays (tokens, seconds) with that many rows decoding together
            and all slots drafted.
        saved: ``saved[rows][d]`` are the seconds less when only d slots are drafted; empty: none.
        even: ``even[rows]`` are the seconds less when all slots are drafted and verified, since nothing is chosen and
            rows of one length need no unpacking; empty: none.
    """

    table: Mapping[int, tuple[np.ndarray, np.ndarray]]
    saved: Mapping[int, np.ndarray] = field(default_factory=dict)
    even: Mapping[int, float] = field(default_factory=dict)

    def _nearest(self, rows: int) -> int:
        known = np.array(sorted(self.table))
        return int(known[np.abs(np.log(known) - np.log(max(rows, 1))).argmin()])

    def seconds(self, rows: int, tokens: np.ndarray, drafted: int | None = None) -> np.ndarray:
        """Interpolated seconds of a round of ``rows`` rows for each entry of ``tokens``; drafted None: all slots."""
        nearest = self._nearest(rows)
        measured, seconds = self.table[nearest]
        # Another number of rows is read off at the same tokens per row.
        spent = np.interp(tokens * (nearest / max(rows, 1)), measured, seconds)
        if drafted is None or nearest not in self.saved:
            return spent
        saved = self.saved[nearest]
        return spent - saved[min(drafted, len(saved) - 1)]

    def even_seconds(self, rows: int, drafted: int) -> float:
        """Seconds of a round that verifies all of ``drafted`` tokens a row."""
        spent = float(self.seconds(rows, np.array([rows * (1 + drafted)]), drafted)[0])
        return spent - self.even.get(self._nearest(rows), 0.0)

    def save(self, path: str | Path) -> None:
        """Write the table as JSON."""
        table = {str(rows): [list(map(float, a)) for a in pair] for rows, pair in self.table.items()}
        saved = {str(rows): list(map(float, values)) for rows, values in self.saved.items()}
        even = {str(rows): value for rows, value in self.even.items()}
        files.write_json(path, {"table": table, "saved": saved, "even": even})

    @staticmethod
    def load(path: str | Path) -> StepCosts:
        """Read what :meth:`save` wrote.

        Raises:
            EvaluationError: no such file, or not such a table.
        """
        raw = files.read_json(path, EvaluationError, "write one with --study scheduler")
        try:
            table = {int(rows): (np.array(pair[0]), np.array(pair[1])) for rows, pair in raw["table"].items()}
            saved = {int(rows): np.array(values) for rows, values in raw["saved"].items()}
            return StepCosts(table, saved, {int(rows): float(value) for rows, value in raw["even"].items()})
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as problem:
            raise EvaluationError(f"not a table of step costs ({problem})", file=path) from None


class Throughput:
    """Algorithm 1 of the DSpark paper: admit tokens of all rows in order of survival while expected tokens/s rise.

    Slots that recent rounds would not have admitted are not drafted either. Where recent rounds say that choosing
    gains less than rows of one length do, all that is drafted is verified. Every now and then all slots are drafted, to
    see whether that has changed. All this looks at earlier rounds only, so admission stays causal.

    Args:
        costs: of this machine.
    """

    _EVERY = 16  # rounds between two that draft all slots
    _PAUSE = 8  # rounds between two that learn while all is verified: only to learn, choosing costs time
    _ENOUGH = 64  # drafts of rows, from as many of the latter as that takes, to tell how many slots pay
    _GAIN = 1.01  # another way than choosing among all slots must promise more tokens per second than this

    def __init__(self, costs: StepCosts) -> None:
        self.costs = costs
        # of rounds that drafted all slots: rows, and by way (choosing among 0 .. K slots, verifying all) [K + 2] tokens
        # expected and seconds
        self._seen: deque[tuple[int, np.ndarray, np.ndarray]] = deque()
        self._evidence = 0  # rows of these rounds
        self._curves: dict[tuple[int, int], np.ndarray] = {}
        self._ways: dict[int, tuple[np.ndarray, float]] = {}
        self._rounds = 0
        self._width: int | None = None
        self._even = bool(costs.even)  # until it knows better, where that is the cheaper way

    @property
    def max_draft(self) -> int | None:
        """All slots in the first rounds and every now and then; else those that paid in the last such rounds."""
        return None if self._looks else self._width

    @property
    def needs_confidence(self) -> bool:
        """Not where everything is verified and nothing learned."""
        return not self._even or self._learns

    @property
    def _looks(self) -> bool:
        return self._rounds % self._EVERY == 0

    @property
    def _learns(self) -> bool:
        wants = self._looks or not self._knows
        return wants and self.max_draft is None and (not self._even or self._rounds % self._PAUSE == 0)

    def admit(self, confidence: np.ndarray | None, drafted: int, rows: int) -> np.ndarray:
        """One pass over all rows' tokens, likeliest first; stops at the first that lowers tokens per second."""
        even, learns = self._even, self._learns
        self._rounds += 1
        everything = np.full(rows, drafted, dtype=np.int64)
        if drafted == 0 or (even and not learns):
            return everything
        survival, lengths = self.choose(_required(confidence))
        if learns:
            self._remember(survival, lengths)
        return everything if even else lengths

    def choose(self, confidence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Survival [R, K] of tokens with ``confidence`` [R, K], and how many of each row pay, [R]."""
        rows, drafted = confidence.shape
        survival = confidence.cumprod(axis=1)  # falling along a row
        order = np.argsort(-survival, axis=None, kind="stable")  # stable: on a tie the earlier token of a row is first
        committed = rows + np.concatenate(([0.0], survival.ravel()[order].cumsum()))  # one token a row comes anyway
        rate = committed / self._seconds(rows, drafted)
        falls = np.flatnonzero(rate[1:] < rate[:-1])
        admitted = order[: int(falls[0]) if len(falls) else len(order)]
        return survival, np.bincount(admitted // drafted, minlength=rows).astype(np.int64)

    @property
    def _knows(self) -> bool:
        return self._evidence >= self._ENOUGH

    def _seconds(self, rows: int, drafted: int) -> np.ndarray:
        """Seconds of a round by admitted tokens [R * K + 1]; looked up once."""
        if (rows, drafted) not in self._curves:
            tokens = rows + np.arange(rows * drafted + 1)
            self._curves[rows, drafted] = self.costs.seconds(rows, tokens, drafted)
        return self._curves[rows, drafted]

    def _seconds_of_ways(self, rows: int, slots: int) -> tuple[np.ndarray, float]:
        """Seconds of choosing, by slots drafted and tokens admitted [K + 1, R * K + 1], and of verifying all."""
        if rows not in self._ways:
            tokens, widths = rows + np.arange(rows * slots + 1), range(slots + 1)
            chosen = np.stack([self.costs.seconds(rows, tokens, width) for width in widths])
            self._ways[rows] = chosen, self.costs.even_seconds(rows, slots)
        return self._ways[rows]

    def _remember(self, survival: np.ndarray, lengths: np.ndarray) -> None:
        """Add this round's tokens and seconds by number of slots, and choose what to do from now on."""
        rows, slots = survival.shape
        chosen, even = self._seconds_of_ways(rows, slots)
        admitted = np.arange(slots) < lengths[:, None]
        committed, tokens = np.full(slots + 2, float(rows)), np.zeros(slots + 1, dtype=np.int64)
        committed[1:-1] += (survival * admitted).sum(axis=0).cumsum()
        committed[-1] += survival.sum()
        admitted.sum(axis=0).cumsum(out=tokens[1:])
        self._seen.append((rows, committed, np.append(chosen[np.arange(slots + 1), tokens], even)))
        self._evidence += rows
        while self._evidence - self._seen[0][0] >= self._ENOUGH:
            self._evidence -= self._seen.popleft()[0]
        if not self._knows:
            return
        rates = np.sum([seen[1] for seen in self._seen], axis=0) / np.sum([seen[2] for seen in self._seen], axis=0)
        best = int(np.argmax(rates))
        gains = bool(rates[best] > self._GAIN * rates[slots])
        self._even, self._width = gains and best > slots, best if gains and best < slots else None


def admit_plain(survival: np.ndarray, costs: StepCosts) -> np.ndarray:
    """The same as :meth:`Throughput.admit` token by token, from survival [R, K]; the twin that tests compare with."""
    rows, slots = survival.shape
    lengths = np.zeros(rows, dtype=np.int64)
    expected, tokens = float(rows), rows
    best = expected / float(costs.seconds(rows, np.array([tokens]), slots)[0])
    while lengths.sum() < rows * slots:
        heads = [
            (-survival[row, lengths[row]], row * slots + lengths[row]) for row in range(rows) if lengths[row] < slots
        ]
        gain, place = min(heads)
        expected, tokens = expected - gain, tokens + 1
        rate = expected / float(costs.seconds(rows, np.array([tokens]), slots)[0])
        if rate < best:
            break
        best = rate
        lengths[place // slots] += 1
    return lengths


def _required(confidence: np.ndarray | None) -> np.ndarray:
    if confidence is None:
        raise EvaluationError(
            "this policy needs a draft with a confidence head",
            remedy="use a fixed length, or a draft trained with draft.confidence_head: true",
        )
    return confidence
