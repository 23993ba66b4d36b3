"""Accepted length of drafts trained on each cache level, from the same seed, on the quickstart's target.

    make quickstart; python benchmarks/bench_levels.py [--levels near compact smallest] [--recipe R] [--json FILE]

Recodes the quickstart's lossless cache to each level, trains the same recipe on each, and evaluates all drafts at T=0
on the same held-out prompts: the text is the target's own, so the drafts are compared on identical tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from bars import Bars, at_most, write_bars
from start import QUICKSTART, Benchmark, quickstart_inputs

from deepspec.arguments import COUNT
from deepspec.distributed import free_port
from deepspec.errors import run_main

ROOT = QUICKSTART
WORK = ROOT / "levels"
DEEPSPEC = (sys.executable, "-m", "deepspec")
LIMIT = 0.02  # of the accepted length


def run(*command: str) -> None:
    """Run a command of the pipeline; its output goes to the log."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    with open(WORK / "log", "ab") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)


def accepted_length(level: str, recipe: str, prompts: Path) -> tuple[float, float]:
    """(accepted length, tokens' bytes on disk) of the draft trained on ``level``."""
    cache, place = (ROOT / "cache" if level == "lossless" else WORK / f"cache-{level}"), WORK / level
    if not (cache / "manifest.json").exists():
        run(*DEEPSPEC, "cache", "recode", str(ROOT / "cache"), str(cache), "--level", level)
    if not (place / "draft" / "provenance.json").exists():
        launcher = ["deepspeed", "--master_port", str(free_port()), "-q", "--num_gpus", "2", "--module"]
        train = [*launcher, "deepspec", "train", "--recipe", recipe]
        run(*train, "--set", f"data.cache=[{cache}]", "--set", f"cache.level={level}", "--set", f"output={place}/run")
        run(*DEEPSPEC, "consolidate", f"{place}/run", f"{place}/draft")
    if not (place / "results" / "results.json").exists():
        evaluate = [*DEEPSPEC, "evaluate", "--target", str(ROOT / "target"), "--draft", f"{place}/draft"]
        settings = ["--temperature", "0", "--max-new-tokens", "96", "--batch-size", "16", "--no-plain"]
        run(*evaluate, "--tasks", str(prompts), *settings, "--output", f"{place}/results")
    summary = json.loads((place / "results" / "results.json").read_text())["summaries"][0]
    manifest = json.loads((cache / "manifest.json").read_text())
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    return summary["accepted_length"], size / manifest["tokens"]


def main() -> None:
    """Parse arguments, run, print the table."""
    bars = f"a level loses at most {LIMIT:.0%} of lossless's accepted length"
    parser = Benchmark(__doc__, bars=bars, takes="25 to 45 minutes; what is made under build/quickstart/levels stays")
    parser.add_argument("--levels", nargs="+", default=["near", "compact", "smallest"], help="beside lossless")
    parser.add_argument("--recipe", default="quickstart_dspark", help="that is trained")
    parser.add_argument("--prompts", type=COUNT, default=256, help="held out, decoded greedily")
    given = parser.parse_args()
    quickstart_inputs(target=ROOT / "target", cache=ROOT / "cache" / "manifest.json")
    WORK.mkdir(parents=True, exist_ok=True)
    prompts = WORK / "prompts" / "held_out.jsonl"
    if not prompts.exists():
        held_out = ("--train", "1500", "--held-out", str(given.prompts), "--output", str(prompts.parent))
        run(sys.executable, "-m", "deepspec.demos.quickstart", "prompts", *held_out)
    bars: Bars = {}
    exact, _ = accepted_length("lossless", given.recipe, prompts)
    print("| level | bytes per token | accepted length T=0 | against lossless |\n|---|---|---|---|")
    for level in ["lossless", *given.levels]:
        length, size = accepted_length(level, given.recipe, prompts)
        print(f"| {level} | {size:,.0f} | {length:.3f} | {length / exact - 1:+.1%} |", flush=True)
        if level != "lossless":
            bars[f"{level} accepted length lost"] = at_most(1 - length / exact, LIMIT)
    write_bars(given.json, bars)


if __name__ == "__main__":
    run_main(main)
