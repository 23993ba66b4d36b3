"""What a round costs on this machine: seconds by rows, drafted slots and verified tokens, measured and fitted.

One decoding run a concurrency, every round of it with another number of slots and other lengths, so that a slow moment
of the machine spoils no single point of the table; then a convex, never falling function of the tokens is fitted to all
rounds. The lengths of the rows differ, as the scheduler's do. Rounds that verify all they draft are measured apart:
they cost less, since rows of one length need no unpacking, and the same shapes come again and again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from deepspec.decoding.clock import StepTiming
from deepspec.decoding.scheduler import FixedLength, Policy, StepCosts, Throughput
from deepspec.progress import Progress

PASSES = 2  # over all concurrencies, so that a slow minute does not fall on one of them alone
KNOTS = (0.25, 0.5, 0.75)  # where the fitted costs may bend, of the way from the fewest tokens to the most
CHOICES = 100  # of the scheduler, to time it
OUTLIER = 4.0  # rounds slower than the fit by so many median deviations are left out: another process ran


class Runs(Protocol):
    """What :func:`profile` needs of a bench: the draft's slots, and turns of a policy at a concurrency."""

    @property
    def slots(self) -> int:
        """K."""
        ...

    def run(self, policy: Policy, concurrency: int, turns: int | None = None, attempt: int = 0) -> list[StepTiming]:
        """Decode and return the turns."""
        ...


class Probe:
    """Every round another number of drafted slots, and rows of other lengths: binomial with a share drawn anew.

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
        return self._random.binomial(drafted, self._random.random(), size=rows).astype(np.int64)


def profile(bench: Runs, concurrency: Sequence[int]) -> StepCosts:
    """Measure and fit the costs of a round at each concurrency."""
    ragged: dict[int, list[StepTiming]] = {c: [] for c in concurrency}
    even: dict[int, list[StepTiming]] = {c: [] for c in concurrency}
    progress = Progress("profile of step costs", PASSES * len(ragged), "turns")
    for attempt in range(PASSES):
        for c in ragged:
            ragged[c] += bench.run(Probe(bench.slots, attempt), c, turns=120 + 360 // c, attempt=attempt)
            even[c] += bench.run(FixedLength(), c, turns=40 + 120 // c, attempt=attempt)
            progress.add(1, len(ragged[c]) + len(even[c]))
    progress.finish()
    table, saved, less = {}, {}, {}
    for c, seen in ragged.items():
        rows = round(float(np.mean([turn.rows for turn in seen])))
        table[rows], saved[rows] = fit(seen, rows, bench.slots)
        costs = StepCosts(table, saved)
        less[rows] = saving(costs, even[c]) + choosing(costs, rows, bench.slots)
    return StepCosts(table, saved, less)


def saving(costs: StepCosts, even: Sequence[StepTiming]) -> float:
    """Seconds by which rounds that always verify all they draft undercut ``costs``; 0 where they do not."""
    expected = [float(costs.seconds(turn.rows, np.array([turn.verified]), turn.drafted)[0]) for turn in even]
    return max(0.0, float(np.median(np.array(expected) - np.array([turn.seconds for turn in even]))))


def choosing(costs: StepCosts, rows: int, slots: int) -> float:
    """Seconds that the scheduler itself takes to choose among the drafted tokens of ``rows`` rows."""
    policy, spent = Throughput(costs), []
    for confidence in np.random.default_rng(0).random((CHOICES, rows, slots)):
        start = time.perf_counter()
        policy.choose(confidence)
        spent.append(time.perf_counter() - start)
    return float(np.median(spent))


def fit(turns: Sequence[StepTiming], rows: int, slots: int) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Least squares of a round's seconds, without outliers.

        seconds = base + convex, never falling part of the tokens - saving a slot left out - saving of no draft at all

    The scheduler stops at the first token that does not pay. With convex costs and falling survival the rate has one
    peak, so that this is the best place to stop.

    Returns:
        (tokens, seconds) at the knots with all slots drafted, and the seconds saved by the number of slots [K + 1].
    """
    verified, drafted, seconds, own = (
        np.array([getattr(turn, key) for turn in turns], dtype=float) for key in _COLUMNS
    )
    tokens = verified * (rows / own)
    knots = rows * (1 + slots * np.array((0.0, *KNOTS)))
    bends = np.maximum(tokens[:, None] - knots, 0.0)
    inputs = np.column_stack((bends, drafted - slots, -(drafted == 0).astype(float)))
    kept = np.ones(len(turns), dtype=bool)
    for _ in range(3):
        base, weights = nonnegative_fit(inputs[kept], seconds[kept])
        residual = seconds - base - inputs @ weights
        kept = residual <= OUTLIER * np.median(np.abs(residual[kept])) + 1e-12
    grid = np.append(knots, rows * (1.0 + slots))
    fitted = base + np.maximum(grid[:, None] - knots, 0.0) @ weights[: len(knots)]
    *_, slot, undrafted = map(float, weights)
    saved = slot * (slots - np.arange(slots + 1.0))
    saved[0] += undrafted
    return (grid, fitted), saved


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
