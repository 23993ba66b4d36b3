"""What a round costs on this machine: seconds by rows and verified tokens, measured once and fitted.

Every round of a run has other lengths, as the scheduler's do, so that a slow moment of the machine spoils no single
point of the table; then a convex, never falling function of the tokens is fitted to all rounds of a concurrency.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np

from deepspec.decoding.clock import StepTiming
from deepspec.decoding.scheduler import StepCosts
from deepspec.progress import Progress

PASSES = 2  # over all concurrencies, so that a slow minute does not hit one of them alone
KNOTS = (0.0, 0.25, 0.5, 0.75)  # where the fitted costs may bend, of the way from the fewest tokens to the most
OUTLIER = 4.0  # rounds slower than the fit by so many median deviations are left out: another process ran


class Probe:
    """Rows of other lengths in every round: binomial with a share drawn each time."""

    max_draft: int | None = None

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def admit(self, confidence: np.ndarray | None, drafted: int, rows: int) -> np.ndarray:
        """Random lengths, whatever the confidence."""
        return self._random.binomial(drafted, self._random.random(), size=rows).astype(np.int64)


def profile(run: Callable[..., list[StepTiming]], slots: int, concurrency: Sequence[int]) -> StepCosts:
    """Measure and fit the costs of a round at each concurrency.

    Args:
        run: ``run(policy, concurrency, rounds=..., attempt=...)`` decodes and returns the timings.
        slots: that the draft has.
        concurrency: each a number of rows that decode together.
    """
    timings: dict[int, list[StepTiming]] = {c: [] for c in concurrency}
    progress = Progress("profile of step costs", PASSES * len(timings), "rounds")
    for attempt in range(PASSES):
        for c, seen in timings.items():
            seen += run(Probe(attempt), c, rounds=120 + 360 // c, attempt=attempt)
            progress.add(1, len(seen))
    progress.finish()
    rows = {c: round(float(np.mean([timing.rows for timing in seen]))) for c, seen in timings.items()}
    return StepCosts({rows[c]: fit(seen, rows[c], slots) for c, seen in timings.items()})


def fit(timings: Sequence[StepTiming], rows: int, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, seconds) at the knots: least squares of a round's seconds, convex and never falling, without outliers.

    The scheduler stops at the first token that does not pay. With convex costs and falling survival the rate has one
    peak, so that this is the best index to stop at.
    """
    verified, seconds, own = (
        np.array([getattr(timing, key) for timing in timings], dtype=float) for key in ("verified", "seconds", "rows")
    )
    knots = rows * (1 + slots * np.array(KNOTS))
    inputs = np.maximum((verified * (rows / own))[:, None] - knots, 0.0)
    used = np.ones(len(timings), dtype=bool)
    for _ in range(3):
        base, weights = nonnegative_fit(inputs[used], seconds[used])
        residual = seconds - base - inputs @ weights
        used = residual <= OUTLIER * np.median(np.abs(residual[used])) + 1e-12
    grid = np.append(knots, rows * (1.0 + slots))
    return grid, base + np.maximum(grid[:, None] - knots, 0.0) @ weights


def nonnegative_fit(inputs: np.ndarray, values: np.ndarray) -> tuple[float, np.ndarray]:
    """(base, weights [M] >= 0) of the least squares fit values [N] = base + inputs [N, M] @ weights; M is small.

    The best fit of all choices of inputs whose weights come out non-negative; the others weigh 0.
    """
    best = (np.inf, 0.0, np.zeros(inputs.shape[1]))
    for choice in product((False, True), repeat=inputs.shape[1]):
        columns = np.column_stack((np.ones(len(values)), inputs[:, choice]))
        base, *own = np.linalg.lstsq(columns, values, rcond=None)[0]
        weights = np.zeros(inputs.shape[1])
        weights[list(choice)] = own
        error = float(((values - base - inputs @ weights) ** 2).sum())
        if min(own, default=0.0) >= 0 and error < best[0]:
            best = (error, float(base), weights)
    return best[1:]
