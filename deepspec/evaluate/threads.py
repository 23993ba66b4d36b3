"""How many CPU threads decode fastest: measured, because small models lose more to synchronisation than they gain."""

from __future__ import annotations

import logging
import os
import time

import torch

from deepspec.targets import Target

log = logging.getLogger(__name__)
PROBES = 5  # timed forwards a thread count; the fastest counts


def choose_threads(target: Target, tokens: int, most: int) -> int | None:
    """The thread count of the fastest forward of ``tokens`` tokens, by a short probe; set for this process and logged.

    None where there is nothing to choose: a GPU, ``OMP_NUM_THREADS`` set, or one core.

    Args:
        target: the model that decoding runs.
        tokens: as many as a verification step has.
        most: threads at most, the cores that belong to this process.
    """
    if target.device.type != "cpu" or "OMP_NUM_THREADS" in os.environ or most < 2:
        return None
    counts = sorted({1 << power for power in range(most.bit_length())} | {most})
    seconds = {count: _seconds(target, tokens, count) for count in counts}
    best = min(seconds, key=lambda count: seconds[count])
    torch.set_num_threads(best)
    shown = ", ".join(f"{count}: {1000 * value:.1f} ms" for count, value in seconds.items())
    log.info("threads: %d (a forward of %d tokens by thread count: %s)", best, tokens, shown)
    return best


def own_cores(local_size: int) -> int:
    """Cores that this process may use when ``local_size`` processes share the machine."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, local_size))


@torch.inference_mode()
def _seconds(target: Target, tokens: int, threads: int) -> float:
    torch.set_num_threads(threads)
    ids = torch.zeros(1, tokens, dtype=torch.long, device=target.device)
    best = float("inf")
    for _ in range(PROBES + 1):  # the first warms up, and may be the fastest all the same
        start = time.perf_counter()
        target.logits(target.forward(ids, []).last_hidden)
        best = min(best, time.perf_counter() - start)
    return best
