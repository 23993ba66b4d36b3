"""Prepare 100,000 conversations in bounded memory, and render them at a rate that keeps up with a cache build.

    python benchmarks/bench_data.py [--rows 100000] [--tokenizer FOLDER] [--family qwen3] [--json FILE]

The rows are drawn from a few hundred words. Without ``--tokenizer`` the quickstart's counts the tokens, which cuts the
same text into more of them than a large vocabulary does: its tokens/s are higher for that. Prints rows/s, tokens/s of
one core, and the peak memory of the process after 10 % and at the end: what grows in between is what a row costs for
good (its hash).
"""

import json
import random
import resource
import tempfile
import time
from itertools import islice
from pathlib import Path

from bars import at_least, at_most, write_bars
from start import QUICKSTART, Benchmark, quickstart_inputs
from transformers import AutoTokenizer

from deepspec.arguments import COUNT
from deepspec.data.chat import RenderCounts, Renderer, render_rows
from deepspec.data.conversations import read_conversations
from deepspec.data.prepare import PrepareOptions, prepare
from deepspec.errors import run_main

NODE_RATE = 400_000  # tokens/s of a bare Qwen3-4B forward on 8 GPUs at 400 TFLOP/s each (8 GFLOP a token)
COMMON = "the of and to in is that it for on with as are be this we can how what why when number answer"
WORDS = Path(__file__).read_text().split() + COMMON.split() * 20


def peak_mib() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_rows(path: Path, rows: int) -> None:
    """ShareGPT rows, about 60 words of question and 250 of answer; one in four of two turns, one in fifty a copy."""
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as handle:
        line = ""
        for number in range(rows):
            if number % 50 or not line:
                turns = []
                for _ in range(1 + (rng.random() < 0.25)):
                    question = " ".join(rng.choices(WORDS, k=rng.randint(20, 100)))
                    answer = " ".join(rng.choices(WORDS, k=rng.randint(100, 400)))
                    turns += [{"from": "human", "value": f"{number}: {question}"}, {"from": "gpt", "value": answer}]
                line = json.dumps({"conversations": turns}) + "\n"
            handle.write(line)


def main() -> None:
    bars = f"tokens/s at least {NODE_RATE:,} to prepare, {NODE_RATE // 8:,} a core to render; memory grows by half"
    parser = Benchmark(__doc__, bars=bars, takes="a minute")
    parser.add_argument("--rows", type=COUNT, default=100_000, help="conversations to prepare")
    parser.add_argument("--tokenizer", default=str(QUICKSTART / "target"), help="folder of one with its chat template")
    parser.add_argument("--family", default="qwen3", help="of the target that renders")
    parser.add_argument("--rendered", type=COUNT, default=4000, help="conversations to render")
    args = parser.parse_args()
    quickstart_inputs(tokenizer=args.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        source, base = Path(folder) / "in.jsonl", peak_mib()
        write_rows(source, args.rows)
        start = peak_mib()
        prepare(PrepareOptions({str(source): 1.0}, limit=args.rows // 10), Path(folder) / "tenth")
        tenth, began = peak_mib(), time.perf_counter()
        report = prepare(PrepareOptions({str(source): 1.0}), Path(folder) / "out")
        seconds, whole = time.perf_counter() - began, peak_mib()
        size = source.stat().st_size / 2**20
        print(
            f"prepare: {args.rows} rows ({size:.0f} MiB) in {seconds:.1f} s: {args.rows / seconds:,.0f} rows/s, "
            f"{size / seconds:.1f} MiB/s; kept {report.train + report.held_out}, dropped {dict(report.dropped)}"
        )
        print(
            f"peak memory: {base:.0f} MiB at the start, {start:.0f} before preparing, {tenth:.0f} after a tenth, "
            f"{whole:.0f} after all"
        )
        renderer, counts = Renderer(AutoTokenizer.from_pretrained(args.tokenizer), args.family), RenderCounts()
        rows = list(islice(read_conversations(Path(folder) / "out" / "train.jsonl"), args.rendered))
        began = time.perf_counter()
        for _ in render_rows(renderer, rows, 1, counts):
            pass
        rendering = time.perf_counter() - began
        mean = counts.tokens / counts.rendered
        print(
            f"render with mask: {counts.rendered} conversations of {mean:.0f} tokens: {counts.tokens / rendering:,.0f} "
            f"tokens/s on one core; prepare at that length: {args.rows * mean / seconds:,.0f} tokens/s"
        )
        grown = at_most(whole / tenth, 1.5)  # ten times the rows
        found = {"memory of all rows over a tenth's": grown}
        found["prepare, tokens/s"] = at_least(args.rows * mean / seconds, NODE_RATE)
        found["render, tokens/s per core"] = at_least(counts.tokens / rendering, NODE_RATE / 8)
        write_bars(args.json, found)


if __name__ == "__main__":
    run_main(main)
