"""Training throughput from a cache and online, cut by samples and by tokens; the wait for data; what padding wastes.

    make quickstart
    python benchmarks/bench_training.py [--json FILE]                          # one process
    deepspeed --num_gpus 2 benchmarks/bench_training.py [--json FILE]          # as the quickstart trains

All four ways run in turn within one process group, several rounds, so that a busy machine disturbs them alike; medians
count. A step's samples are a random draw, sorted and cut into micro-batches: "samples" cuts by the recipe's
`train.micro_batch`, "tokens" by `train.micro_tokens` (no two conversations share a row). Tokens are those of
conversations: padding does not count as work. "wait" is the share of the step time in which the slowest rank waited for
its batches; online it holds the target's own passes. The second table, from the plan alone: the share of padding in all
computed tokens over an epoch, and the tokens of the rank with most of them at a time against the mean.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from bars import Bars, at_most, write_bars
from start import QUICKSTART, Benchmark, quickstart_inputs

from deepspec.arguments import COUNT
from deepspec.cli import rank_word
from deepspec.distributed import World
from deepspec.errors import run_main
from deepspec.recipe import load_recipe
from deepspec.training.engine import training_processes
from deepspec.training.plan import RunPlan
from deepspec.training.run import assemble, prepare

WORK = Path("build/bench_training")
WAYS = {  # name -> overrides of the recipe
    "cache, samples": [],
    "cache, tokens": ["train.micro_tokens=1024"],
    "online, samples": ["data.source=online"],
    "online, tokens": ["data.source=online", "train.micro_tokens=1024"],
}
WAIT, LIMIT = 0.05, 0.02  # shares


def train(recipe: str, overrides: list[str], world: World, steps: int) -> dict[str, float]:
    """Train ``steps`` steps (at least 20) and measure them without the first ten."""
    output = WORK / "run"
    dist.barrier()  # all have read the last run's log
    if world.is_main:
        shutil.rmtree(output, ignore_errors=True)
    dist.barrier()
    settings = [f"output={output}", f"train.max_steps={steps}", "train.log_every=10", "train.tensorboard=false"]
    trainer = assemble(prepare(load_recipe(recipe, [*overrides, *settings]), world, False), world, profile=False)
    begun = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):  # the log lines
        trainer.run(0)
    cpu = torch.tensor(time.process_time() - begun)
    dist.all_reduce(cpu)
    plan = trainer.prefetcher.plan
    tokens = sum(int(plan.step(number).lengths.sum()) for number in range(steps))
    trainer.engine.close()
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()][1:]
    means = {key: statistics.mean(row[key] for row in rows) for key in ("tokens_per_second", "data_wait", "padding")}
    return means | {"tokens_per_cpu_second": tokens / float(cpu)}


def throughput(recipe: str, world: World, steps: int, rounds: int) -> dict[str, dict[str, float]]:
    """The median of ``rounds`` rounds of each way."""
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    for number in range(rounds):
        for name, overrides in WAYS.items():
            seen[name].append(train(recipe, overrides, world, steps))
            if world.is_main:
                print(f"round {number + 1}/{rounds}: {name} done", flush=True)
    return {name: {key: statistics.median(one[key] for one in all_) for key in all_[0]} for name, all_ in seen.items()}


def padding(lengths: np.ndarray, global_batch: int, cut: dict[str, int], world_size: int) -> tuple[float, float]:
    """(share of padding over an epoch, padded tokens of the fullest rank at a time against the mean)."""
    plan = RunPlan(lengths, (len(lengths),), seed=42, global_batch=global_batch, **cut)
    real = padded = slowest = 0
    for step in map(plan.step, range(plan.steps_per_epoch)):
        costs = [int(lengths[part].max()) * len(part) for part in step.micro_batches(world_size)]
        real, padded = real + int(step.lengths.sum()), padded + sum(costs)
        slowest += sum(world_size * max(costs[i : i + world_size]) for i in range(0, len(costs), world_size))
    return 1 - real / padded, slowest / padded


def padding_table(recipe: str, world: World, bars: Bars) -> list[str]:
    """Rows of the padding table: the recipe's own samples, and a wide spread of lengths."""
    prepared = prepare(load_recipe(recipe, [f"output={WORK / 'none'}"]), world, False)
    wide = np.clip(np.random.default_rng(0).lognormal(6.3, 0.8, 40_000), 16, 4096).astype(np.int64)
    cuts = [{"micro_batch": 1}, {"micro_batch": 4}, {"micro_batch": 8}, {"micro_tokens": 4096}, {"micro_tokens": 8192}]
    rows = []
    for name, lengths in ((prepared.recipe.name, prepared.source.lengths), ("16 to 4,096 tokens", wide)):
        for batch, ranks in ((8, 2), (64, 8), (512, 8)):
            for cut in cuts:
                (key, value), *_ = cut.items()
                if batch % (cut.get("micro_batch", 1) * ranks) or len(lengths) < batch:
                    continue
                share, busiest = padding(lengths, batch, cut, ranks)
                rows.append(f"| {name} | {batch} | {ranks} | {key} {value:,} | {share:.2%} | {busiest:.2f}x |")
                if batch == 512 and value == 4:
                    bars[f"padding: {name}, global batch 512, {key} {value}"] = at_most(share, LIMIT)
    return rows


def report(measured: dict[str, dict[str, float]], world: World) -> None:
    """Print the throughput table."""
    first = next(iter(measured.values()))
    print(f"\nload average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {world.size} processes\n")
    print("| features, batches | tokens/s | of the first | per CPU second, of the first | wait | padding |")
    print("|---|---|---|---|---|---|")
    for name, one in measured.items():
        wall = one["tokens_per_second"] / first["tokens_per_second"]
        cpu = one["tokens_per_cpu_second"] / first["tokens_per_cpu_second"]
        print(
            f"| {name} | {one['tokens_per_second']:,.0f} | {wall:.2f}x | {cpu:.2f}x | {one['data_wait']:.2%} | "
            f"{one['padding']:.1%} |"
        )


def main() -> None:
    """Parse arguments, measure, print both tables."""
    limits = f"at most {WAIT:.0%} of a cache's step time is waiting for data; at most {LIMIT:.0%} is padding"
    parser = Benchmark(__doc__, bars=limits, takes="10 minutes")
    parser.add_argument("--recipe", default="quickstart_dspark", help="that is trained")
    parser.add_argument("--steps", type=COUNT, default=60, help="of each training")
    parser.add_argument("--rounds", type=COUNT, default=3, help="of all ways, in turn")
    rank_word(parser)
    given = parser.parse_args()
    quickstart_inputs(target=QUICKSTART / "target", cache=QUICKSTART / "cache" / "manifest.json")
    with training_processes() as world:
        measured: dict[str, Any] = throughput(given.recipe, world, given.steps, given.rounds)
        bars: Bars = {"share of step time waiting for data": at_most(measured["cache, samples"]["data_wait"], WAIT)}
        rows = padding_table(given.recipe, world, bars)
        if world.is_main:
            report(measured, world)
            print(
                "\n| lengths | global batch | ranks | cut by | padding | fullest rank |\n|---|---|---|---|---|---|",
                *rows,
                sep="\n",
            )
            write_bars(given.json, bars)
            shutil.rmtree(WORK)


if __name__ == "__main__":
    run_main(main)
