"""Stages: each a command that can be run again, and the file that is written last.

The functions here write the commands of the pipeline's own tools; each demonstration's ``plan`` puts them together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from deepspec.distributed import multiplies_bfloat16
from deepspec.errors import RecipeError, nearest
from deepspec.recipe import load_recipe
from deepspec.recipe_files import own_recipes
from deepspec.registry import ALGORITHMS, algorithm

PYTHON, DEEPSPEC, LAUNCHER = "python", "deepspec", "deepspeed"  # what a user types; the runner has its own interpreter
USUAL, ALL = "usual", "all"  # of the drafters: those that are not in MORE; every one that has a recipe
MORE: list[str] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))["more"]
Names = tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """One command of a demonstration."""

    name: str
    command: Names
    artefact: Path  # exists = what this stage makes is complete
    needs: Names = ()  # stages that must be complete before
    cores: int = 1  # processes that compute at the same time
    work: float = 0.1  # seconds on all of these, against those of the others: for the time left


@dataclass(frozen=True)
class Variant:
    """One training of a comparison: what it is, and its recipe with what it changes."""

    about: str
    recipe: str
    overrides: Names = ()
    level: str = "lossless"  # of the cache


def variants(table: Mapping[str, Any]) -> dict[str, Variant]:
    """Those of a file in ``recipes/ablations``; a variant without a recipe has that of all."""
    common = {"recipe": table["recipe"]} if "recipe" in table else {}
    rows = {name: {**common, **row} for name, row in table["variants"].items()}
    return {name: Variant(**row | {"overrides": tuple(row.get("overrides", ()))}) for name, row in rows.items()}


def recipes(recipe_of: Callable[[str], str], drafters: str = USUAL) -> dict[str, str]:
    """Of every algorithm that has one, its recipe: ``recipe_of`` gives its name, or a path, by the algorithm's name.

    Args:
        recipe_of: a recipe need not exist.
        drafters: ``usual``, ``all``, or names with commas between them.

    Raises:
        RecipeError: there is none at all, or none for a name.
    """
    known = own_recipes()
    found = {name: recipe_of(name) for name in ALGORITHMS}
    found = {name: recipe for name, recipe in found.items() if recipe in known or Path(recipe).is_file()}
    if not found:
        raise RecipeError("no such recipe", key=recipe_of("*"), wanted="a file of that name among deepspec's recipes")
    if drafters == ALL:
        return found
    chosen = [name for name in found if name not in MORE] if drafters == USUAL else drafters.split(",")
    for name in chosen:
        if name not in found:
            remedy = nearest(name, (USUAL, ALL, *found))
            raise RecipeError("no such drafter here", key="--drafters", found=name, remedy=remedy)
    return {name: recipe for name, recipe in found.items() if name in chosen}


def shared_recipe(found: Mapping[str, str]) -> str:
    """The recipe that answers and cache are made by for all drafts: the first whose loss reads all of a cache."""
    for name, path in found.items():
        if algorithm(name).needs_last_hidden(load_recipe(path).draft):
            return path
    return next(iter(found.values()))


def settings(overrides: Sequence[str]) -> Names:
    """``--set key=value`` for every override of the recipe."""
    return tuple(word for text in overrides for word in ("--set", text))


def native(recipe: str, overrides: Names = ()) -> Names:
    """The overrides, and float32 in place of bfloat16 where this CPU would take many times as long in bfloat16."""
    if multiplies_bfloat16():
        return overrides
    read = load_recipe(recipe, overrides)
    changed: Names = ("target.dtype=float32",) if read.target.dtype == "bfloat16" else ()
    config = Path(read.train.deepspeed)
    if "bf16" in config.name:
        changed += (f"train.deepspeed={config.with_name(config.name.replace('bf16', 'fp32'))}",)
    return overrides + changed


def answers(name: str, recipe: str, prompts: Path, output: Path, needs: Names, overrides: Names = ()) -> Stage:
    """The target answers ``prompts`` in this process."""
    command = (DEEPSPEC, "regenerate", "--recipe", recipe, "--prompts", str(prompts), "--output", str(output))
    return Stage(name, command + settings(native(recipe, overrides)), Path(f"{output}.manifest.json"), needs, work=2)


def beside_server(stage: Stage, recipe: str, log: Path, start: Names, overrides: Names = ()) -> Stage:
    """A training whose hidden states a feature server computes that runs as long as it does.

    Args:
        stage: the training.
        recipe: whose target is served.
        log: of the server.
        start: the command that starts both.
        overrides: of the recipe.
    """
    words = ("--quiet", "--recipe", recipe, *settings(native(recipe, overrides)), "--log", str(log), "--")
    return replace(stage, command=(*start, *words, *stage.command))


def cache(name: str, recipe: str, data: Path, output: Path, needs: Names, overrides: Names = ()) -> Stage:
    """The target's hidden states over ``data``."""
    command = (DEEPSPEC, "cache", "build", "--recipe", recipe, "--data", str(data), "--output", str(output))
    return Stage(name, command + settings(native(recipe, overrides)), output / "manifest.json", needs, work=1)


def train(
    name: str, recipe: str, draft: Path, needs: Names, processes: int = 2, overrides: Names = ()
) -> tuple[Stage, Stage]:
    """A draft, trained under DeepSpeed's launcher and exported; the recipe states ``train.max_steps``."""
    overrides = native(recipe, overrides)
    read = load_recipe(recipe, overrides)
    launcher = (LAUNCHER, "-q", "--num_gpus", str(processes), "--module")
    command = (*launcher, DEEPSPEC, "train", "--recipe", recipe)
    checkpoint = Path(read.output) / "checkpoints" / f"step_{read.train.max_steps}"
    trained = f"train {name}"
    return (
        Stage(trained, command + settings(overrides), checkpoint / "manifest.json", needs, processes, 8.0),
        export(f"export {name}", checkpoint, draft, (trained,)),
    )


def export(name: str, checkpoint: Path, draft: Path, needs: Names) -> Stage:
    """A checkpoint, or a run's newest one, as a draft folder."""
    command = (DEEPSPEC, "consolidate", str(checkpoint), str(draft))
    return Stage(name, command, draft / "provenance.json", needs)


def evaluate(
    name: str, recipe: str, draft: Path, tasks: Sequence[Path], output: Path, needs: Names,
    more: Names = (), overrides: Names = (),
) -> Stage:  # fmt: skip
    """Decode ``tasks`` with a draft as the recipe's `evaluate:` section states, with ``more`` arguments."""
    command: Names = (DEEPSPEC, "evaluate", "--recipe", recipe, "--draft", str(draft))
    command += ("--tasks", ",".join(map(str, tasks)), "--output", str(output), *more)
    if not multiplies_bfloat16() and "--dtype" not in more:
        command += ("--dtype", "float32")
    return Stage(name, command + settings(overrides), output / "results.json", needs, work=2)
