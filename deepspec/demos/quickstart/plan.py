"""The stages of the quickstart, and the paths of their outputs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from deepspec.demos.quickstart import USUAL_TYPE
from deepspec.demos.runner import Runner
from deepspec.demos.stages import (
    PYTHON,
    USUAL,
    Names,
    Stage,
    answers,
    beside_server,
    cache,
    evaluate,
    recipes,
    shared_recipe,
    train,
)
from deepspec.errors import DataError
from deepspec.recipe import load_recipe

ROOT = Path("build/quickstart")  # of everything generated, in the working directory; the recipes name it too
DECODE = ("--batch-size", "16", "--no-plain")  # of a study, which compares accepted lengths


def quickstart(drafters: str = USUAL, source: str = "cache", target_type: str = USUAL_TYPE) -> None:
    """Run every stage that is not complete yet, write the report and print the table.

    Args:
        drafters: which; see :func:`deepspec.demos.stages.recipes`.
        source: of the hidden states; see :func:`plan`.
        target_type: of the target; see :data:`deepspec.demos.quickstart.TYPES`.

    Raises:
        DeepSpecError: a stage failed, or a drafter that there is not.
    """
    from deepspec.demos.quickstart.report import write_report

    root = root_of(target_type)
    Runner(plan(drafters, source, target_type), root / "logs", cores=max(2, os.cpu_count() or 1)).run()
    print(f"\n{write_report(root)}\n\n{root}/report.html, {root}/results.json\n\nnow you can")
    draft = root / f"{list(recipes(recipe_of, drafters))[-1]}-draft"
    print(f"- talk to it, and see it draft: deepspec chat --target {root}/target --draft {draft}")
    print("- take a real model, a few hours on a CPU: deepspec demo real")
    print("- train for your own target: deepspec recipes list")


def require_finished() -> None:
    """Check that the target, prompts and cache of a quickstart are there, for what is studied on them.

    Raises:
        DataError: it has not run to its end.
    """
    made = ROOT / "results.json"
    if not made.exists():
        raise DataError("no finished quickstart", file=made, remedy="run `deepspec quickstart` first, for its target")


def more_prompts(folder: Path, held_out: int) -> Stage:
    """The stage that writes the quickstart's prompts again, with ``held_out`` of them to evaluate on."""
    write = (PYTHON, "-m", "deepspec.demos.quickstart", "prompts", "--held-out", str(held_out), "--output", str(folder))
    return Stage("prompts", write, folder / "train.jsonl.manifest.json")


def recipe_of(algorithm: str) -> str:
    """The name of the quickstart's recipe for an algorithm."""
    return f"quickstart_{algorithm}"


def root_of(target_type: str) -> Path:
    """The folder of everything generated for a target of that type."""
    return ROOT if target_type == USUAL_TYPE else ROOT.with_name(f"{ROOT.name}-{target_type}")


def results_folder(algorithm: str, root: Path = ROOT) -> Path:
    """The folder of the draft's evaluation."""
    return root / f"{algorithm}-results"


def _moved(root: Path) -> Names:
    """What the recipes, which are those of the usual target, must be told of another one in ``root``."""
    if root == ROOT:
        return ()
    names = {"target.path": root / "target", "target.family": "null", "data.cache": f"[{root / 'cache'}]"}
    names["data.conversations"] = root / "conversations.jsonl"
    return tuple(f"{key}={value}" for key, value in names.items())


def plan(drafters: str = USUAL, source: str = "cache", target_type: str = USUAL_TYPE) -> list[Stage]:
    """All stages, in an order in which each one's needs come before it.

    Args:
        drafters: which; see :func:`deepspec.demos.stages.recipes`.
        source: ``cache`` builds one before the trainings. With another one the first training writes it from the hidden
            states that the source computes, and the others read it: ``online``, in the training itself, or ``served``,
            by a feature server that runs beside it.
        target_type: see :data:`deepspec.demos.quickstart.TYPES`; each has a folder of its own.
    """
    root = root_of(target_type)
    prompts, target, conversations, kept = (
        root / "prompts",
        root / "target",
        root / "conversations.jsonl",
        root / "cache",
    )
    make, moved = ("target", "--target-type", target_type, "--output", str(target)), _moved(root)
    found = recipes(recipe_of, drafters)
    shared = shared_recipe(recipes(recipe_of))
    own = (PYTHON, "-m", "deepspec.demos.quickstart")
    stages = [
        Stage("prompts", (*own, "prompts", "--output", str(prompts)), prompts / "train.jsonl.manifest.json"),
        Stage("target", (*own, *make), target / "target.json", work=5),
        answers("answers", shared, prompts / "train.jsonl", conversations, ("prompts", "target"), moved),
    ]
    readers = {name: recipe for name, recipe in found.items() if load_recipe(recipe).data.source == "cache"}
    build = cache("cache", shared, conversations, kept, ("answers",), moved)
    writer = None if source == "cache" or not readers else shared_recipe(readers)
    stages += [] if writer else [build]
    for name, recipe in sorted(found.items(), key=lambda item: item[1] != writer):  # who writes the cache comes first
        draft, tasks, needs = root / f"{name}-draft", [prompts / "held_out.jsonl"], (f"export {name}",)
        own_keys = (*moved, f"output={root / name}") if moved else ()
        if recipe == writer:
            written = (*own_keys, f"data.source={source}", f"data.write_cache={kept}")
            training, exported = train(name, recipe, draft, ("answers",), overrides=written)
            if source == "served":
                training = beside_server(training, recipe, root / "logs" / "server.log", (*own, "served"), moved)
            stages += [training, exported, replace(build, needs=(training.name,))]
        else:
            stages += train(name, recipe, draft, ("cache",), overrides=own_keys)
        results = results_folder(name, root)
        stages.append(evaluate(f"evaluate {name}", recipe, draft, tasks, results, needs, overrides=moved))
    return stages
