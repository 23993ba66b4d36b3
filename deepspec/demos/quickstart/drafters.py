"""Every drafter and loss on the quickstart's target, from two seeds, after equal steps and after equal seconds.

The variants are those of ``recipes/ablations/drafters.yaml``. Each is trained by one process for the same number of
steps, and once more, with its own schedule, for as many steps as fit the seconds of the fastest. All drafts decode the
same held-out prompts greedily; a difference is over the prompts, paired, the rounds of both seeds together.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from deepspec.demos.quickstart.plan import DECODE, more_prompts, require_finished
from deepspec.demos.runner import Runner
from deepspec.demos.stages import Names, Stage, evaluate, train
from deepspec.errors import RecipeError, nearest
from deepspec.evaluate.compare import Run
from deepspec.evaluate.measure import quantiles, resampled
from deepspec.files import write_json, write_text
from deepspec.recipe import load_recipe
from deepspec.recipe_files import RECIPES
from deepspec.tables import Table, fill_page

ROOT = Path("build/drafters")
PROMPTS, HELD_OUT = ROOT / "prompts" / "held_out.jsonl", 256
PAGE = Path("docs/algorithms.md")
TABLE = yaml.safe_load((RECIPES / "ablations" / "drafters.yaml").read_text(encoding="utf-8"))
STEPS, SECONDS = "steps", "seconds"  # what is equal


@dataclass(frozen=True)
class Variant:
    """One drafter with one loss."""

    about: str
    recipe: str
    overrides: Names = ()


VARIANTS = {name: Variant(row["about"], row["recipe"], tuple(row.get("overrides", ())))
            for name, row in TABLE["variants"].items()}  # fmt: skip


def compare(names: Sequence[str], seeds: Sequence[int], cores: int, seconds: bool) -> str:
    """Run what is not complete yet, ``cores`` processes at a time; the tables as Markdown.

    Args:
        names: of the variants; none: all.
        seeds: of the trainings.
        cores: processes at a time.
        seconds: after equal seconds too.

    Raises:
        DeepSpecError: no such variant, no finished quickstart, or a stage failed.
    """
    for name in names:
        if name not in VARIANTS:
            raise RecipeError("no such variant", key="--variant", found=name, remedy=nearest(name, VARIANTS))
    require_finished()
    chosen = list(names) or list(VARIANTS)
    steps = dict.fromkeys(chosen, int(TABLE["steps"]))
    Runner(_plan(STEPS, steps, seeds), ROOT / "logs", cores).run()
    parts = [text(STEPS, steps, seeds)]
    if seconds:
        steps = equal_seconds(steps, seeds)
        Runner(_plan(SECONDS, steps, seeds), ROOT / "logs", cores).run()
        parts.append(text(SECONDS, steps, seeds))
    return "\n\n".join(parts)


def write(tables: str) -> tuple[Path, ...]:
    """Put the tables into the page of algorithms, where there is one, and beside the runs."""
    write_text(ROOT / "drafters.md", tables + "\n")
    if not PAGE.is_file():
        return (ROOT / "drafters.md",)
    write_text(PAGE, fill_page(PAGE.read_text(encoding="utf-8"), "drafters", tables))
    return ROOT / "drafters.md", PAGE


def folder(kind: str, name: str, seed: int) -> Path:
    """Of one training, its draft and its results."""
    return ROOT / kind / f"{name}-{seed}"


def _plan(kind: str, steps: dict[str, int], seeds: Sequence[int]) -> list[Stage]:
    stages = [more_prompts(PROMPTS.parent, HELD_OUT)]
    for name, count in steps.items():
        variant = VARIANTS[name]
        for seed in seeds:
            place, title = folder(kind, name, seed), f"{name} {seed} {kind}"
            overrides = (*variant.overrides, f"train.max_steps={count}", f"train.save_every={count}", f"seed={seed}")
            stages += train(title, variant.recipe, place / "draft", (), 1, (*overrides, f"output={place / 'run'}"))
            work = (f"evaluate {title}", variant.recipe, place / "draft", [PROMPTS], place / "results")
            needs = (f"export {title}", "prompts")
            stages.append(evaluate(*work, needs, DECODE, ("evaluate.temperature=[0.0]",)))
    return stages


def step_seconds(run: Path) -> float:
    """Seconds of a step, from the log: the median over its lines."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    batch = load_recipe(run / "recipe.yaml").train.global_batch
    return float(np.median([batch / row["samples_per_second"] for row in rows if row["kind"] == "train"]))


def equal_seconds(steps: dict[str, int], seeds: Sequence[int]) -> dict[str, int]:
    """The steps of every variant that take as long as all steps of the fastest one."""
    own = {name: np.mean([step_seconds(folder(STEPS, name, seed) / "run") for seed in seeds]) for name in steps}
    return {name: max(1, round(count * min(own.values()) / own[name])) for name, count in steps.items()}


def text(kind: str, steps: dict[str, int], seeds: Sequence[int]) -> str:
    """The table of the drafts and that of the differences; figures as JSON beside the runs."""
    found = {name: [Run.load(folder(kind, name, seed) / "results") for seed in seeds] for name in steps}
    draws = {name: np.divide(*(resampled(part, 0) for part in _sums(runs))) for name, runs in found.items()}
    rows, value, pairs = [], dict[str, Any](), []
    for name, runs in found.items():
        lengths = [run.results.summaries[0].acceptance_length for run in runs]
        low, high = quantiles(draws[name])
        pooled = np.divide(*(part.sum() for part in _sums(runs)))
        took = np.mean([step_seconds(folder(kind, name, seed) / "run") for seed in seeds])
        measured = f"{pooled:.2f} ({low:.2f}-{high:.2f})", ", ".join(f"{one:.2f}" for one in lengths if one is not None)
        rows.append([VARIANTS[name].about, steps[name], f"{1000 * took:.0f}", *measured])
        value[name] = {"steps": steps[name], "step_seconds": took, "accepted_length": pooled, "interval": [low, high]}
    head = ["draft", "steps", "ms a step", "accepted length, T=0 (95 %)", f"of the seeds {', '.join(map(str, seeds))}"]
    for one, other in ((pair["variant"], pair["with"]) for pair in TABLE["pairs"]):
        if one in found and other in found:
            low, high = quantiles(draws[one] - draws[other])
            by = value[one]["accepted_length"] - value[other]["accepted_length"]
            pairs.append([VARIANTS[one].about, VARIANTS[other].about, f"{by:+.2f} ({low:+.2f} to {high:+.2f})"])
            value[one][f"above {other}"] = [by, low, high]
    write_json(ROOT / f"{kind}.json", value)
    differences = Table(["draft", "against", "accepted length (95 %, paired)"], pairs).markdown()
    return f"After equal {kind}:\n\n{Table(head, rows).markdown()}\n\n{differences}"


def _sums(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, rounds) of every prompt, of all seeds together."""
    keys = sorted(runs[0].rows)
    committed = [[run.rows[key]["committed"] for run in runs] for key in keys]
    tokens = np.array([sum(map(sum, one)) for one in committed], dtype=float)
    return tokens, np.array([sum(map(len, one)) for one in committed], dtype=float)
