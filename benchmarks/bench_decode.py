"""What batching buys and what the loop costs: prompts/s at batch 16 against 1, overhead a round at batch 1.

``python benchmarks/bench_decode.py [--target T --draft D --tasks FILE.jsonl]``: the quickstart's without them. Greedy,
the same prompts at every batch size, the rows of the file taken again from the start until there are ``--samples`` of
them; prefill and the draining of the last batch are inside the measured time. Overhead is the time of a round outside
draft, verification and head, prefill not counted, as a share of the rest.

``--baseline-checkout DIR`` decodes the same prompts with the code of another checkout in the same run, ``--pairs``
pairs in turn: tokens per CPU second of each process, and whether the outputs are equal token for token.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import deque
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import torch
from bars import Bars, at_least, at_most, write_bars
from decode_worker import compare
from start import QUICKSTART, Benchmark, quickstart_inputs

from deepspec.arguments import COUNT
from deepspec.data.chat import Renderer
from deepspec.decoding.loop import Decoder
from deepspec.decoding.records import DecodeRequest, DecodeSettings
from deepspec.distributed import pick_device
from deepspec.drafts import load_draft
from deepspec.errors import run_main
from deepspec.tables import Table
from deepspec.targets import load_target, load_tokenizer


def main() -> None:
    """Measure and print a Markdown table."""
    bars = "the last batch size decodes 4x the prompts/s of the first; overhead at most 10 % of the models' time"
    parser = Benchmark(__doc__, bars=bars, takes="a minute")
    parser.add_argument("--target", default=str(QUICKSTART / "target"), help="folder or hub id")
    parser.add_argument("--draft", default=str(QUICKSTART / "dspark-draft"), help="draft folder")
    parser.add_argument(
        "--tasks", help='a JSONL of {"turns": [...]}', default=str(QUICKSTART / "prompts" / "held_out.jsonl")
    )
    parser.add_argument("--samples", type=COUNT, default=64, help="prompts to decode")
    parser.add_argument("--max-new-tokens", type=COUNT, default=96, help="of each answer")
    parser.add_argument("--batch-size", type=COUNT, nargs="+", default=[1, 16], help="prompts at a time")
    parser.add_argument("--repeat", type=COUNT, default=3, help="the fastest run of each size counts")
    parser.add_argument("--threads", type=COUNT, default=1, help="of torch")
    parser.add_argument("--baseline-checkout", type=Path, metavar="DIR", help="an older deepspec to compare with")
    parser.add_argument("--pairs", type=COUNT, default=7, help="with --baseline-checkout")
    given = parser.parse_args()
    quickstart_inputs(target=given.target, draft=given.draft, tasks=given.tasks)
    torch.set_num_threads(given.threads)

    target = load_target(given.target, device=pick_device())
    draft = load_draft(given.draft, target)
    renderer = Renderer(load_tokenizer(given.target), target.spec)
    rows = [json.loads(line) for line in Path(given.tasks).read_text(encoding="utf-8").splitlines() if line.strip()]
    prompts = [tuple(renderer.prompt([{"role": "user", "content": row["turns"][0]}])) for row in rows]
    prompts = list(islice(cycle(prompts), given.samples))
    if given.baseline_checkout is not None:
        write_bars(given.json, _compare(given, prompts, renderer.stop_token_ids))
        return
    settings = DecodeSettings(max_new_tokens=given.max_new_tokens, stop_token_ids=renderer.stop_token_ids)
    capacity = max(map(len, prompts)) + given.max_new_tokens + draft.config.max_draft + 2

    def run(batch_size: int) -> dict[str, float]:
        decoder = Decoder(target, draft.algorithm.drafter(draft, batch_size, capacity), settings, batch_size)
        start = time.perf_counter()
        done = list(decoder.stream(deque(DecodeRequest(ids, number) for number, ids in enumerate(prompts))))
        seconds, spent = time.perf_counter() - start, decoder.clock.seconds()
        models = spent["draft"] + spent["verify"] + spent["head"]
        return {
            "batch_size": batch_size,
            "prompts_per_second": len(done) / seconds,
            "tokens_per_second": sum(len(one.output_ids) for one in done) / seconds,
            "overhead": spent["other"] / models,
            "overhead_ms": 1000 * spent["other"] / decoder.clock.rounds,
            "round_ms": 1000 * (models + spent["other"]) / decoder.clock.rounds,
        }

    run(given.batch_size[0])  # first calls
    attempts = [[run(size) for size in given.batch_size] for _ in range(given.repeat)]  # in turn: noise hits all sizes
    best = [max(column, key=lambda one: one["prompts_per_second"]) for column in zip(*attempts, strict=True)]
    write_bars(given.json, _sizes(given, best, f"{len(prompts)} prompts, {target.dtype}"))


def _machine(given: argparse.Namespace) -> str:
    return f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {given.threads} threads"


def _sizes(given: argparse.Namespace, best: list[dict[str, float]], job: str) -> Bars:
    """Print and return the bars of the batch sizes against each other."""
    print(f"{_machine(given)}, {job}, the best of {given.repeat}\n")
    header = ["batch", "prompts/s", "of the first", "tokens/s", "round ms", "of it outside the models", "overhead"]
    rows = []
    for one in best:
        rate, gain = one["prompts_per_second"], one["prompts_per_second"] / best[0]["prompts_per_second"]
        own = [one["batch_size"], f"{rate:.2f}", f"{gain:.2f}x", f"{one['tokens_per_second']:.0f}"]
        rows.append([*own, f"{one['round_ms']:.2f}", f"{one['overhead_ms']:.3f}", f"{one['overhead']:.1%}"])
    print(Table(header, rows).markdown())
    gain = best[-1]["prompts_per_second"] / best[0]["prompts_per_second"]
    return {
        f"prompts_per_second_batch_{given.batch_size[-1]}_of_{given.batch_size[0]}": at_least(gain, 4.0),
        f"overhead_of_a_round_at_batch_{given.batch_size[0]}": at_most(best[0]["overhead"], 0.10),
    }


def _compare(given: argparse.Namespace, prompts: list[tuple[int, ...]], stops: Sequence[int]) -> Bars:
    """Print and return the bars of this checkout against the other."""
    job = {
        "target": str(Path(given.target).resolve()), "draft": str(Path(given.draft).resolve()), "prompts": prompts,
        "max_new_tokens": given.max_new_tokens, "stops": list(stops), "threads": given.threads,
    }  # fmt: skip
    results = compare(given.baseline_checkout, job, given.batch_size, given.pairs)
    print(f"{_machine(given)}, {len(prompts)} prompts, tokens per CPU second, medians of {given.pairs} pairs\n")
    rows = [
        [one.batch_size, f"{one.baseline:.0f}", f"{one.now:.0f}", f"{one.ratio:.2f}x",
         f"{one.lowest:.2f}-{one.highest:.2f}", "yes" if one.equal else "no"]
        for one in results
    ]  # fmt: skip
    print(Table(["batch", "baseline", "now", "ratio", "of single pairs", "equal outputs"], rows).markdown())
    first, last = results[0], results[-1]
    return {
        f"tokens_per_cpu_second_of_baseline_at_batch_{first.batch_size}": at_least(first.ratio, 1.25),
        f"tokens_per_cpu_second_of_baseline_at_batch_{last.batch_size}": at_least(last.ratio, 1.0),
        "outputs_equal_to_baseline": at_least(float(all(one.equal for one in results)), 1.0),
    }


if __name__ == "__main__":
    run_main(main)
