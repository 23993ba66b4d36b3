"""The plan of a large run, simulated in one process: ``python benchmarks/bench_scale.py [--samples N]``.

Ten million samples on 8, 64 and 512 ranks, with the code that a training runs and no model: how long the plan of an
epoch takes and how much memory, whether every sample comes once, and how evenly the tokens (padding included) fall on
the ranks.
"""

from __future__ import annotations

import resource
import time

import numpy as np
from bars import Bars, at_least, at_most, write_bars
from start import Benchmark

from deepspec.arguments import COUNT
from deepspec.errors import run_main
from deepspec.progress import Progress
from deepspec.tables import Table
from deepspec.training.plan import RunPlan

GLOBAL_BATCH, MICRO_TOKENS, LONGEST = 4096, 16384, 4096
RANKS = (8, 64, 512)


def main() -> int:
    """Plan, deal, count."""
    bars = "60 CPU seconds and 2 GB for an epoch's plan on 512 ranks, 2 % between the ranks, every sample once"
    parser = Benchmark(__doc__, bars=bars, takes="two minutes")
    parser.add_argument("--samples", type=COUNT, default=10_000_000, help="of the data")
    given = parser.parse_args()
    lengths = np.clip(np.random.default_rng(0).lognormal(6.5, 0.8, given.samples), 16, LONGEST).astype(np.int32)
    rows: list[list[object]] = []
    bars: Bars = {}
    for ranks in RANKS:
        seconds, missing, spread, slowest = epoch(lengths, ranks)
        rows.append([ranks, f"{seconds:.1f} s", f"{100 * spread:.2f} %", f"{slowest:.3f}", missing])
        bars[f"{ranks} ranks: tokens of a rank, from the mean"] = at_most(spread, 0.02)
        bars[f"{ranks} ranks: samples not drawn, or drawn twice"] = at_most(missing, 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    bars["CPU seconds of an epoch's plan, 512 ranks"] = at_most(seconds, 60)
    bars["GB of memory, at most"] = at_most(peak, 2)
    bars["samples"] = at_least(given.samples, 10_000_000)
    head = ["ranks", "plan of an epoch (CPU)", "tokens of a rank, from the mean", "slowest rank of a step, of the mean"]
    print(Table([*head, "samples missing or twice"], rows).markdown())
    print(f"peak memory {peak:.2f} GB, {given.samples:,} samples, global batch {GLOBAL_BATCH:,}")
    write_bars(given.json, bars)
    return int(not all(bar["holds"] for bar in bars.values()))


def epoch(lengths: np.ndarray, ranks: int) -> tuple[float, int, float, float]:
    """Of one epoch: CPU seconds of its plan, samples that do not come once, the ranks' spread, the slowest rank."""
    begun = time.process_time()
    plan = RunPlan(lengths, [len(lengths)], seed=0, global_batch=GLOBAL_BATCH, micro_tokens=MICRO_TOKENS)
    seen, tokens, slowest = np.zeros(len(lengths), dtype=np.int8), np.zeros(ranks, dtype=np.int64), []
    counting = 0.0
    progress = Progress(f"{ranks} ranks", plan.steps_per_epoch, noun="steps")
    for number in range(plan.steps_per_epoch):
        step = plan.step(number)
        batches = step.micro_batches(ranks)
        other = time.process_time()
        costs = np.array([lengths[batch].max() * len(batch) for batch in batches]).reshape(-1, ranks)
        tokens += np.roll(costs.sum(axis=0), -number)  # as StepPlan.share deals them
        slowest.append(costs.max(axis=1).sum() / costs.mean(axis=1).sum())
        for batch in batches:
            seen[batch] += 1
        counting += time.process_time() - other
        progress.add(1, int(costs.sum()))
    left_out = len(lengths) - plan.steps_per_epoch * GLOBAL_BATCH  # of the last, incomplete step
    wrong = int(np.count_nonzero(seen != 1)) - left_out
    spread = float(np.abs(tokens / tokens.mean() - 1).max())
    return time.process_time() - begun - counting, wrong, spread, float(np.mean(slowest))


if __name__ == "__main__":
    run_main(main)
