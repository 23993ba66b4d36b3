"""What a round costs on this machine: seconds by rows, drafted slots and verified tokens, measured and fitted.

One decoding run a concurrency, every round of it with another number of slots and other lengths, so that a slow moment
of the machine spoils no single point of the table; then a convex, never falling function of the tokens is fitted to all
rounds. The lengths of the rows differ, as the scheduler's do, or are all that was drafted, which costs less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from deepspec.data.progress import Progress
from deepspec.decoding.clock import Turn
from deepspec.decoding.scheduler import Policy, StepCosts

PASSES = 2  # over all concurrencies, so that a slow minute does not fall on one of them alone
KNOTS = (0.25, 0.5, 0.75)  # where the fitted costs may bend, of the way from the fewest tokens to the most
EVEN = 0.25  # share of the rounds that verify all that was drafted
OUTLIER = 4.0  # rounds slower than the fit by so many median deviations are left out: another process ran


class Runs(Protocol):
    """What :func:`profile` needs of a bench: the draft's slots, and turns of a policy at a concurrency."""

    @property
    def slots(self) -> int:
        """K."""
        ...

    def run(self, policy: Policy, concurrency: int, turns: int | None = None, attempt: int = 0) -> list[Turn]:
        """Decode and return the turns."""
        ...


class Probe:
    """Every round another number of drafted slots, and rows of other lengths: binomial with a share drawn anew, or all.

    Args:
        slots: K; half of the rounds draft them all.
        seed: of the draws.
    """

    needs_confidence = False

    def __init__(self, slots: int, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self.max_draft: int | None = None
        self._slots = slots

    def admit(self, confidence: np.ndarray | None, drafted: int, rows: int) -> np.ndarray:
        """Random lengths, whatever the confidence."""
        fewer = self._random.random() < 0.5
        self.max_draft = int(self._random.integers(0, self._slots)) if fewer else None
        share = 1.0 if self._random.random() < EVEN else self._random.random()
        return self._random.binomial(drafted, share, size=rows).astype(np.int64)


def profile(bench: Runs, concurrency: Sequence[int]) -> StepCosts:
    """Measure and fit the costs of a round at each concurrency."""
    turns: dict[int, list[Turn]] = {c: [] for c in concurrency}
    progress = Progress("profile of step costs", PASSES * len(turns), "turns")
    for attempt in range(PASSES):
        for c in turns:
            seen = bench.run(Probe(bench.slots, attempt), c, turns=120 + 360 // c, attempt=attempt)
            turns[c] += seen
            progress.add(1, len(seen))
    progress.finish()
    table, saved, even = {}, {}, {}
    for seen in turns.values():
        rows = round(float(np.mean([turn.rows for turn in seen])))
        table[rows], saved[rows], even[rows] = fit(seen, rows, bench.slots)
    return StepCosts(table, saved, even)


def fit(turns: Sequence[Turn], rows: int, slots: int) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray, float]:
    """Least squares of a round's seconds, without outliers.

        seconds = base + convex, never falling part of the tokens - saving a slot left out - saving of no draft at all
                  - saving where all that was drafted is verified

    The scheduler stops at the first token that does not pay. With convex costs and falling survival the rate has one
    peak, so that this is the best place to stop.

    Returns:
        (tokens, seconds) at the knots with all slots drafted, the seconds saved by the number of slots [K + 1], and
        those that rows of one length save.
    """
    verified, drafted, seconds, own = (
        np.array([getattr(turn, key) for turn in turns], dtype=float) for key in _COLUMNS
    )
    tokens, even = verified * (rows / own), verified == own * (1 + drafted)
    knots = rows * (1 + slots * np.array((0.0, *KNOTS)))
    bends = np.maximum(tokens[:, None] - knots, 0.0)
    inputs = np.column_stack((bends, drafted - slots, -(drafted == 0).astype(float), -even.astype(float)))
    kept = np.ones(len(turns), dtype=bool)
    for _ in range(3):
        base, weights = nonnegative_fit(inputs[kept], seconds[kept])
        residual = seconds - base - inputs @ weights
        kept = residual <= OUTLIER * np.median(np.abs(residual[kept])) + 1e-12
    grid = np.append(knots, rows * (1.0 + slots))
    fitted = base + np.maximum(grid[:, None] - knots, 0.0) @ weights[: len(knots)]
    *_, slot, undrafted, together = map(float, weights)
    saved = slot * (slots - np.arange(slots + 1.0))
    saved[0] += undrafted
    return (grid, fitted), saved, together


_COLUMNS = ("verified", "drafted", "seconds", "rows")


def nonnegative_fit(inputs: np.ndarray, values: np.ndarray, sweeps: int = 2000) -> tuple[float, np.ndarray]:
    """(base, weights [M] >= 0) of the least squares fit values [N] = base + inputs [N, M] @ weights.

    By coordinate descent, which ends at the optimum because the problem is convex and the bounds are separate.
    """
    centred = inputs - inputs.mean(axis=0)
    scale = np.maximum(np.linalg.norm(centred, axis=0), 1e-12)
    columns = centred / scale
    gram, target = columns.T @ columns, columns.T @ (values - values.mean())
    weights = np.zeros(inputs.shape[1])
    for _ in range(sweeps):
        for m in range(len(weights)):
            if gram[m, m] > 0:
                weights[m] = max(0.0, weights[m] + (target[m] - gram[m] @ weights) / gram[m, m])
    weights /= scale
    return float(values.mean() - inputs.mean(axis=0) @ weights), weights
