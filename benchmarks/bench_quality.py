"""Accepted length against training steps, three drafters and two seeds each: a change that costs acceptance is seen.

    make quickstart && python benchmarks/bench_quality.py [--steps 600] [--prompts 288] [--json FILE]

Trains the quickstart's recipes on the quickstart's cache, keeps a checkpoint at every quarter of the steps, and decodes
the same held-out prompts greedily with each. The interval resamples prompts and seeds together. What is whole is not
made again: everything stands under build/bench_quality, and is removed by `make clean`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from bars import Bars, at_least, write_bars
from start import QUICKSTART, Benchmark, quickstart_inputs

from deepspec.arguments import COUNT
from deepspec.demos.quickstart.plan import recipe_of
from deepspec.demos.runner import Runner
from deepspec.demos.stages import PYTHON, Stage, evaluate, export, recipes, train
from deepspec.errors import run_main
from deepspec.files import write_json
from deepspec.recipe import load_recipe

WORK = Path("build/bench_quality")
PROMPTS = WORK / "prompts" / "held_out.jsonl"
LIMITS = {"dflash": 4.55, "dspark": 4.25, "eagle3": 6.1}  # accepted length after 600 steps, T=0
POINTS = 4  # checkpoints of a training that are measured
RESAMPLES = 2000
DECODE = ("--no-plain", "--batch-size", "16")

Counts = dict[int, tuple[int, int]]  # prompt -> (tokens committed, rounds)


def place(algorithm: str, seed: int, step: int) -> Path:
    """Where the draft of a checkpoint and its results stand."""
    return WORK / algorithm / f"seed-{seed}" / f"step-{step}"


def stages(algorithm: str, seed: int, steps: int) -> list[Stage]:
    """One training, and export and evaluation of each of its checkpoints."""
    recipe, run, every = recipe_of(algorithm), WORK / algorithm / f"seed-{seed}" / "run", steps // POINTS
    overrides = (f"seed={seed}", f"train.max_steps={steps}", f"train.save_every={every}", f"train.keep_every={every}")
    training = train(f"train {algorithm} {seed}", recipe, (), processes=2, overrides=(*overrides, f"output={run}"))
    made = [training]
    for step in range(every, steps + 1, every):
        name, folder = f"{algorithm} {seed} step {step}", place(algorithm, seed, step)
        draft, results = folder / "draft", folder / "results"
        made.append(export(f"export {name}", run / "checkpoints" / f"step_{step}", draft, (training.name,)))
        needs, greedy = (f"export {name}", "prompts"), ("evaluate.temperature=[0.0]",)
        made.append(evaluate(f"evaluate {name}", recipe, draft, [PROMPTS], results, needs, DECODE, greedy))
    return made


def counts(folder: Path) -> Counts:
    """Tokens and rounds of every prompt of an evaluation."""
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["index"]: (sum(row["committed"]), len(row["committed"])) for row in rows if "committed" in row}


def interval(seeds: list[Counts]) -> tuple[float, float, float]:
    """(accepted length, 95 % bounds), resampling the seeds and the prompts that they share."""
    prompts = sorted(seeds[0])
    values = np.array([[one[prompt] for prompt in prompts] for one in seeds], dtype=float)  # [seeds, prompts, 2]
    dice = np.random.default_rng(0)
    lengths = []
    for _ in range(RESAMPLES):
        chosen = values[dice.integers(0, len(seeds), len(seeds))][:, dice.integers(0, len(prompts), len(prompts))]
        tokens, rounds = chosen.sum((0, 1))
        lengths.append(tokens / rounds)
    tokens, rounds = values.sum((0, 1))
    low, high = np.quantile(lengths, [0.025, 0.975])
    return float(tokens / rounds), float(low), float(high)


def report(algorithms: list[str], steps: int) -> tuple[list[dict[str, object]], Bars]:
    """Print the table; its rows and the bars."""
    rows: list[dict[str, object]] = []
    bars: Bars = {}
    print("\n| draft | steps | accepted length T=0 (95 %) | per seed |\n|---|---|---|---|")
    for algorithm in algorithms:
        first = load_recipe(recipe_of(algorithm)).seed
        for step in range(steps // POINTS, steps + 1, steps // POINTS):
            seeds = [counts(place(algorithm, seed, step) / "results") for seed in (first, first + 1)]
            mean, low, high = interval(seeds)
            each = [sum(t for t, _ in one.values()) / sum(r for _, r in one.values()) for one in seeds]
            print(
                f"| {algorithm} | {step} | {mean:.2f} ({low:.2f}-{high:.2f}) | {', '.join(f'{x:.2f}' for x in each)} |"
            )
            rows.append({
                "draft": algorithm, "steps": step, "accepted_length": mean, "interval": [low, high],
                "seeds": {str(first + number): value for number, value in enumerate(each)}, "prompts": len(seeds[0]),
            })  # fmt: skip
        if steps == 600 and algorithm in LIMITS:
            bars[f"{algorithm}: accepted length after {steps} steps, T=0"] = at_least(mean, LIMITS[algorithm])
    return rows, bars


def main() -> None:
    """Parse arguments, train, measure, print the table."""
    known = sorted(recipes(recipe_of))
    bars = f"accepted length at T=0 after 600 steps at least {', '.join(f'{k} {v}' for k, v in LIMITS.items())}"
    parser = Benchmark(__doc__, bars=bars, takes="25 to 50 minutes; what is made under build/bench_quality stays")
    parser.add_argument("--steps", type=COUNT, default=600, help="optimizer steps of every training")
    parser.add_argument("--prompts", type=COUNT, default=288, help="held-out prompts")
    parser.add_argument("--drafters", nargs="+", default=known, choices=known, help="of the quickstart's recipes")
    given = parser.parse_args()
    quickstart_inputs(target=QUICKSTART / "target", cache=QUICKSTART / "cache" / "manifest.json")
    write = (PYTHON, "-m", "deepspec.demos.quickstart", "prompts", "--held-out", str(given.prompts), "--output")
    plan = [Stage("prompts", (*write, str(PROMPTS.parent)), PROMPTS.parent / "train.jsonl.manifest.json")]
    for algorithm in given.drafters:
        first = load_recipe(recipe_of(algorithm)).seed
        plan += [stage for seed in (first, first + 1) for stage in stages(algorithm, seed, given.steps)]
    Runner(plan, WORK / "logs", cores=2).run()
    rows, bars_found = report(given.drafters, given.steps)
    write_bars(None, bars_found)
    if given.json is not None:
        write_json(given.json, {"bars": bars_found, "rows": rows})


if __name__ == "__main__":
    run_main(main)
