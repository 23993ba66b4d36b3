"""Every drafter and loss on the quickstart's target, from two seeds, after equal steps and after equal seconds.

The variants are those of ``recipes/ablations/drafters.yaml``. Each is trained by one process for the same number of
steps; the drafters once more, with their own schedule, for as many steps as fit the seconds of the fastest. All drafts
decode the same held-out prompts greedily; a difference is over the prompts, paired, the rounds of both seeds together.
Seconds are those of the processor, which what else runs on the machine disturbs least.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from deepspec.demos.quickstart.plan import DECODE, more_prompts, require_finished
from deepspec.demos.quickstart.plan import ROOT as QUICKSTART
from deepspec.demos.runner import Runner
from deepspec.demos.stages import Stage, evaluate, train, variants
from deepspec.drafts import load_draft
from deepspec.errors import DataError, RecipeError, nearest
from deepspec.evaluate.compare import Run
from deepspec.evaluate.measure import quantiles, resampled
from deepspec.files import write_json, write_text
from deepspec.recipe import load_recipe
from deepspec.recipe_files import RECIPES
from deepspec.tables import Table, fill_page
from deepspec.targets import load_target

ROOT = Path("build/drafters")
PAGE = Path("docs/algorithms.md")
TABLE = yaml.safe_load((RECIPES / "ablations" / "drafters.yaml").read_text(encoding="utf-8"))
STEPS, SECONDS = "steps", "seconds"  # what is equal
CONTEXT, PASSES = 128, 40  # tokens before the first drafted block, and blocks, of the time to draft one
VARIANTS = variants(TABLE)


@dataclass(frozen=True)
class Study:
    """Trainings after equal steps, or equal seconds, and where they are.

    Args:
        what: STEPS or SECONDS.
        base: the steps of all, or of the fastest.
        steps: of each variant.
        seeds: of the trainings.
        held_out: prompts that are decoded.
    """

    what: str
    base: int
    steps: dict[str, int]
    seeds: tuple[int, ...]
    held_out: int

    @property
    def root(self) -> Path:
        """Of its trainings; its figures are beside it."""
        return ROOT / f"{self.what}-{self.base}"

    def folder(self, name: str, seed: int) -> Path:
        """Of one training, its draft and its results."""
        return self.root / f"{name}-{seed}"

    def run(self, cores: int) -> str:
        """Run what is not complete yet; the tables."""
        Runner(self.stages(), ROOT / "logs", cores).run()
        return text(self)

    def stages(self) -> list[Stage]:
        """All of it."""
        prompts = ROOT / f"prompts-{self.held_out}"
        stages = [more_prompts(prompts, self.held_out)]
        for name, count in self.steps.items():
            variant = VARIANTS[name]
            for seed in self.seeds:
                place, title = self.folder(name, seed), f"{name} {seed} {self.what}"
                overrides = (*variant.overrides, f"train.max_steps={count}", f"train.save_every={count}",
                             f"seed={seed}", f"output={place / 'run'}")  # fmt: skip
                stages += train(title, variant.recipe, place / "draft", (), 1, overrides)
                tasks, needs = [prompts / "held_out.jsonl"], (f"export {title}", "prompts")
                work = (f"evaluate {title}", variant.recipe, place / "draft", tasks, place / "results")
                stages.append(evaluate(*work, needs, DECODE, ("evaluate.temperature=[0.0]",)))
        return stages

    def equal_seconds(self) -> Study:
        """The table's variants for that, each for as many steps as take as long as all steps of the fastest one."""
        chosen = [name for name in TABLE["equal_seconds"] if name in self.steps]
        own = {name: np.mean([step_cost(self.folder(name, seed) / "run")[0] for seed in self.seeds]) for name in chosen}
        steps = {name: max(1, round(self.base * min(own.values()) / own[name])) for name in chosen}
        return Study(SECONDS, self.base, steps, self.seeds, self.held_out)


def compare(
    names: Sequence[str], seeds: Sequence[int], cores: int, seconds: bool, steps: int = 0, held_out: int = 0
) -> str:
    """Run what is not complete yet, ``cores`` processes at a time; the tables as Markdown.

    Args:
        names: of the variants; none: all.
        seeds: of the trainings.
        cores: processes at a time.
        seconds: after equal seconds too.
        steps: of every variant; 0: those of the table.
        held_out: prompts that are decoded; 0: those of the table.

    Raises:
        DeepSpecError: no such variant, no finished quickstart, or a stage failed.
    """
    for name in names:
        if name not in VARIANTS:
            raise RecipeError("no such variant", key="--variant", found=name, remedy=nearest(name, VARIANTS))
    require_finished()
    count = steps or int(TABLE["steps"])
    chosen = dict.fromkeys(list(names) or VARIANTS, count)
    study = Study(STEPS, count, chosen, tuple(seeds), held_out or int(TABLE["held_out"]))
    parts = [study.run(cores)]
    if seconds:
        parts.append(study.equal_seconds().run(cores))
    return "\n\n".join(parts)


def write(tables: str) -> tuple[Path, ...]:
    """Put the tables into the page of algorithms, where there is one, and beside the runs."""
    write_text(ROOT / "drafters.md", tables + "\n")
    if not PAGE.is_file():
        return (ROOT / "drafters.md",)
    write_text(PAGE, fill_page(PAGE.read_text(encoding="utf-8"), "drafters", tables))
    return ROOT / "drafters.md", PAGE


def step_cost(run: Path) -> tuple[float, float]:
    """(CPU seconds of a step, the median over the log's lines; the most GB that the process held).

    Raises:
        DataError: a log of an earlier version.
    """
    path = run / "log.jsonl"
    rows = [row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()) if row["kind"] == "train"]
    if not all("cpu_seconds_per_sample" in row for row in rows):
        remedy = f"remove {run.parent} and run the same command again"
        raise DataError("a training of an earlier version", file=path, key="cpu_seconds_per_sample", remedy=remedy)
    batch = load_recipe(run / "recipe.yaml").train.global_batch
    return batch * float(np.median([row["cpu_seconds_per_sample"] for row in rows])), rows[-1]["memory_gb"]


def draft_seconds(folder: Path) -> float:
    """CPU seconds in which a draft takes one committed position and drafts a block: the median of PASSES."""
    target = load_target(QUICKSTART / "target", torch.float32)
    model = load_draft(folder, target)
    drafter = model.algorithm.drafter(model, 1, CONTEXT + PASSES)
    tokens = torch.randint(0, 1000, (1, CONTEXT + PASSES + 1), generator=torch.Generator().manual_seed(0))
    features, spent = target.forward(tokens[:, :-1], model.config.target_layers).features, []
    for first, last in [(0, CONTEXT), *((at, at + 1) for at in range(CONTEXT, CONTEXT + PASSES))]:
        start, after = time.process_time(), tokens[:, first + 1 : last + 1]
        drafter.extend(features[:, first:last], after, torch.tensor([last - first]), last)
        drafter.propose(after[:, -1], lambda logits, _slot: (logits.argmax(dim=-1), None))
        spent.append(time.process_time() - start)
    return float(np.median(spent[1:]))


def text(study: Study) -> str:
    """The table of the drafts and that of the differences; figures as JSON beside the runs."""
    seeds, places = study.seeds, {name: [study.folder(name, seed) for seed in study.seeds] for name in study.steps}
    found = {name: [Run.load(place / "results") for place in own] for name, own in places.items()}
    draws = {name: np.divide(*(resampled(part, 0) for part in _sums(runs))) for name, runs in found.items()}
    rows, value = [], dict[str, Any]()
    for name, runs in found.items():
        lengths = [run.results.summaries[0].acceptance_length for run in runs]
        low, high = quantiles(draws[name])
        pooled = np.divide(*(part.sum() for part in _sums(runs)))
        took, held = np.mean([step_cost(place / "run") for place in places[name]], axis=0)
        drafted = draft_seconds(places[name][0] / "draft")
        shown = f"{pooled:.2f} ({low:.2f}-{high:.2f})", ", ".join(f"{one:.2f}" for one in lengths if one is not None)
        costs = study.steps[name], f"{1000 * took:.0f}", f"{study.steps[name] * took:.0f}", f"{held:.2f}"
        rows.append([VARIANTS[name].about, *costs, *shown, f"{1000 * drafted:.1f}"])
        value[name] = {
            "steps": study.steps[name], "step_seconds": took, "memory_gb": held, "draft_seconds": drafted,
            "accepted_length": pooled, "interval": [low, high],
        }  # fmt: skip
    head = ["draft", "steps", "CPU ms a step", "CPU s", "GB", "accepted length, T=0 (95 %)",
            f"of the seeds {', '.join(map(str, seeds))}", "CPU ms to draft"]  # fmt: skip
    differences = _differences(draws, value)
    write_json(study.root.with_suffix(".json"), value)
    return f"After equal {study.what}:\n\n{Table(head, rows).markdown()}\n\n{differences}"


def _differences(draws: dict[str, np.ndarray], value: dict[str, Any]) -> str:
    """The pairs of the table, over the same prompts; added to ``value``."""
    pairs = []
    for one, other in ((pair["variant"], pair["with"]) for pair in TABLE["pairs"]):
        if one in draws and other in draws:
            low, high = quantiles(draws[one] - draws[other])
            by = value[one]["accepted_length"] - value[other]["accepted_length"]
            pairs.append([VARIANTS[one].about, VARIANTS[other].about, f"{by:+.2f} ({low:+.2f} to {high:+.2f})"])
            value[one][f"above {other}"] = [by, low, high]
    return Table(["draft", "against", "accepted length (95 %, paired)"], pairs).markdown()


def _sums(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, rounds) of every prompt, of all seeds together."""
    keys = sorted(runs[0].rows)
    committed = [[run.rows[key]["committed"] for run in runs] for key in keys]
    tokens = np.array([sum(map(sum, one)) for one in committed], dtype=float)
    return tokens, np.array([sum(map(len, one)) for one in committed], dtype=float)
