"""Accepted length of drafts trained on each cache level, from the same seed, on the quickstart's target.

    make quickstart && python benchmarks/bench_levels.py [--levels near compact smallest] [--recipe R] [--json FILE]

Recodes the quickstart's lossless cache to each level, trains the same recipe on each, and evaluates all drafts at T=0
on the same held-out prompts: the text is the target's own, so the drafts are compared on identical tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from bars import Bars, at_most, write_bars

from deepspec.distributed import free_port

ROOT = Path("build/quickstart")
WORK = ROOT / "levels"


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
        run(sys.executable, "tools/cache.py", "recode", str(ROOT / "cache"), str(cache), "--level", level)
    if not (place / "draft" / "provenance.json").exists():
        train = [
            "deepspeed",
            "--master_port",
            str(free_port()),
            "-q",
            "--num_gpus",
            "2",
            "launch/train.py",
            "--recipe",
            recipe,
        ]
        run(*train, "--set", f"data.cache=[{cache}]", "--set", f"cache.level={level}", "--set", f"output={place}/run")
        run(sys.executable, "tools/zero_to_fp32.py", f"{place}/run", f"{place}/draft")
    if not (place / "results" / "results.json").exists():
        evaluate = [
            sys.executable,
            "-m",
            "deepspec.evaluate",
            "--target",
            str(ROOT / "target"),
            "--draft",
            f"{place}/draft",
        ]
        settings = ["--temperature", "0", "--max-new-tokens", "96", "--batch-size", "16", "--no-plain"]
        run(*evaluate, "--tasks", str(prompts), *settings, "--output", f"{place}/results")
    summary = json.loads((place / "results" / "results.json").read_text())["summaries"][0]
    manifest = json.loads((cache / "manifest.json").read_text())
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    return summary["accepted_length"], size / manifest["tokens"]


def main() -> None:
    """Parse arguments, run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", nargs="+", default=["near", "compact", "smallest"])
    parser.add_argument("--recipe", default="recipes/quickstart_dspark.yaml")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
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
            bars[f"{level} accepted length lost"] = at_most(1 - length / exact, 0.02)
    write_bars(given.json, bars)


if __name__ == "__main__":
    main()
