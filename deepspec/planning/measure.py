"""The rates of this machine, from real training steps of small drafts: ``deepspec plan --measure FILE``.

Every drafter of the registry trains a few micro-batches under the real engine, at widths of its own; what each costs is
counted as a plan counts it, and the seconds a FLOP, a byte and an operator are those that explain the CPU seconds
measured best (least squares of relative errors, none below 0).
"""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from deepspec import registry
from deepspec.cache.format import HIDDEN_CHUNK
from deepspec.cache.levels import LEVELS
from deepspec.distributed import pick_device
from deepspec.errors import RecipeError
from deepspec.planning.libraries import library_bytes
from deepspec.planning.machines import Machine
from deepspec.planning.memory import optimizer_bytes, step_bytes
from deepspec.planning.probes import LARGE, PRECISIONS, SIZES, RateProbe, run_probe
from deepspec.progress import Progress
from deepspec.training.engine import training_processes


def fit(rows: NDArray[np.float64], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Coefficients, none below 0, that explain the seconds with the least relative error."""
    scaled, ones = rows / seconds[:, None], np.ones(len(seconds))
    best, least = np.zeros(rows.shape[1]), float("inf")
    for count in range(1, rows.shape[1] + 1):
        for chosen in itertools.combinations(range(rows.shape[1]), count):
            part = scaled[:, chosen]
            scale = np.maximum(np.abs(part).max(axis=0), 1e-300)
            found = np.linalg.lstsq(part / scale, ones, rcond=None)[0] / scale
            error = float(((part @ found - 1) ** 2).sum())
            if found.min() >= 0 and error < least:
                best, least = np.zeros(rows.shape[1]), error
                best[list(chosen)] = found
    return best


def decode_rates() -> dict[str, float]:
    """Raw bytes a second that one core decodes, by level."""
    values = torch.randn(HIDDEN_CHUNK, 1280, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    words, rates = values.view(torch.int16).numpy().view(np.uint16), {}
    for name, level in LEVELS.items():
        codec = level.features(words)
        data, out = np.frombuffer(codec.encode_rows(words), np.uint8), np.empty_like(words)
        times = []
        for _ in range(5):
            begun = time.process_time()
            codec.decode_rows(data, out, 0, len(out))
            times.append(time.process_time() - begun)
        rates[name] = words.nbytes / max(statistics.median(times[1:]), 1e-6)
    return rates


def measure(precisions: Sequence[str] = tuple(PRECISIONS)) -> Machine:
    """The machine that this process runs on.

    Args:
        precisions: whose rates are wanted.

    Raises:
        RecipeError: several processes, of which each would measure.
    """
    jobs, large = (
        [
            (name, sizes[(number + turn) % len(sizes)], precision)
            for turn, precision in enumerate(precisions)
            for number, name in enumerate(registry.ALGORITHMS)
        ]
        for sizes in (SIZES, LARGE)
    )
    with training_processes() as world:
        if world.size > 1:
            raise RecipeError("rates are measured by one process", found=world.size, wanted="1 process")
        progress, probes = Progress("measuring", 2 * len(jobs) + len(large), noun="probes"), []
        for job in jobs + large:
            probes.append(run_probe(*job, world))
            progress.add()
    machine = machine_of(probes, precisions)
    taken: dict[str, list[float]] = {}
    for job, probe in zip(jobs, probes[: len(jobs)], strict=True):
        taken.setdefault(job[0], []).append(library_bytes(job, probe, machine))
        progress.add()
    progress.close()
    reserves = {name: max(statistics.fmean(found), 0.0) for name, found in taken.items()}
    return replace(machine, reserve=statistics.median(reserves.values()), reserve_of=reserves)


def machine_of(probes: Sequence[RateProbe], precisions: Sequence[str]) -> Machine:
    """The rates that explain the probes, with no bytes for libraries."""
    rows = np.array(
        [
            [*(one.cost.flops[dtype] for dtype in precisions), one.cost.moved + step_bytes(one.sizes.parameters, 2),
             float(one.cost.operators)]
            for one in probes
        ]
    )  # fmt: skip
    found = fit(rows, np.array([one.seconds for one in probes]))
    *flop_seconds, moving, each = (float(one) for one in found)
    stepping = statistics.median(one.step_seconds / optimizer_bytes(one.sizes.parameters) for one in probes)
    device, memory = pick_device(), psutil.virtual_memory().total
    accelerator = device.type != "cpu"
    title = torch.cuda.get_device_name() if accelerator else platform.processor() or platform.machine()
    return Machine(
        platform.node(), f"{title}, one process" + f" of {torch.get_num_threads()} threads" * (not accelerator), True,
        f"deepspec plan --measure, {len(probes)} probes", "accelerator" if accelerator else "cpu",
        float(torch.cuda.get_device_properties(device).total_memory if accelerator else memory), 0.0, 1.0,
        {dtype: 1 / max(one, 1e-18) for dtype, one in zip(precisions, flop_seconds, strict=True)},
        1 / max(moving, 1e-15),
        each, 1 / stepping, gpus=max(torch.cuda.device_count(), 1), cores=os.cpu_count() or 1,
        host_memory=float(memory), decode_rate=decode_rates(),
    )  # fmt: skip
