"""Peak memory and time of a training step on one long conversation, at growing lengths.

    python benchmarks/bench_long.py [--json FILE] [--lengths 4096 16384 65536 131072] [--algorithms dspark eagle3]

One forward and backward of a small draft in fp32 (hidden 64, 2 heads / 1 kv, head size 32, vocabulary 1,024) on
features in bf16 of three target layers, with activation checkpointing; one token of 32 is supervised, in three spans;
512 anchors, three TTT steps. Each length runs in a process of its own with one thread; seconds are CPU seconds, memory
is the peak above model and inputs. Slope and R2 are those of the straight line through the peaks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

import numpy as np
import torch
from bars import Bars, at_least, write_bars
from bench_train_step import SMALL, build, forget_peak, make_batch, resident, step
from start import Benchmark

from deepspec.errors import run_main
from deepspec.planning.memory import HANDED_BACK

LENGTHS = (4_096, 16_384, 65_536, 131_072)
SIZE = {**SMALL, "hidden": 64, "heads": 2, "kv": 1, "head_dim": 32, "mlp": 128, "vocab": 1024, "anchors": 512}
LAYERS = 3
STRAIGHT = 0.99  # R2 of memory over length, at least


def measure(algorithm: str, length: int) -> dict[str, float]:
    """Peak MB above model and inputs, seconds, and the loss of one step; run in a process of its own."""
    torch.set_num_threads(1)
    section = {"target_layers": [1, 2, 3], **({"ttt_length": 3} if algorithm == "eagle3" else {})}
    model = build(algorithm, torch.float32, SIZE, section)
    model.activation_checkpointing = True
    step(model, make_batch({**SIZE, "S": 256}, torch.bfloat16, 48, LAYERS), plain=False)
    batch = make_batch({**SIZE, "S": length}, torch.bfloat16, length // 32, LAYERS)
    before, start = forget_peak(), time.process_time()
    loss = step(model, batch, plain=False)
    return {"megabytes": resident("VmHWM") - before, "seconds": time.process_time() - start, "loss": loss}


def in_process(algorithm: str, length: int) -> dict[str, float]:
    """:func:`measure` in a fresh process, one thread."""
    command = [sys.executable, __file__, "--one", algorithm, str(length)]
    environment = {**os.environ, **HANDED_BACK, "OMP_NUM_THREADS": "1"}  # what is freed is not counted
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def line(lengths: list[int], peaks: list[float]) -> tuple[float, float]:
    """(slope, R2) of the straight line through the peaks."""
    slope, rest = np.polyfit(lengths, peaks, 1)
    error = np.square(np.asarray(peaks) - (slope * np.asarray(lengths) + rest)).sum()
    return float(slope), float(1 - error / np.square(peaks - np.mean(peaks)).sum())


def main() -> None:
    """Parse arguments and print the table."""
    bars = f"R2 of memory over length at least {STRAIGHT}"
    parser = Benchmark(__doc__ or "", bars=bars, takes="3 minutes")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="tokens of the conversation")
    parser.add_argument("--algorithms", nargs="+", default=["dspark", "eagle3"], help="of the drafts")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one[0], int(given.one[1]))))
        return
    found: Bars = {}
    for algorithm in given.algorithms:
        print("\n| draft | tokens | peak MB | KB a token | s |\n|---|---|---|---|---|")
        peaks = []
        for length in given.lengths:
            one = in_process(algorithm, length)
            peaks.append(one["megabytes"])
            each = 1024 * one["megabytes"] / length
            print(f"| {algorithm} | {length} | {peaks[-1]:.0f} | {each:.2f} | {one['seconds']:.1f} |", flush=True)
        slope, straight = line(given.lengths, peaks)
        print(f"\n{algorithm}: {1024 * slope:.2f} KB for each further token, R2 {straight:.5f}")
        found[f"{algorithm} R2 of memory over length"] = at_least(straight, STRAIGHT)
    write_bars(given.json, found)


if __name__ == "__main__":
    run_main(main)
