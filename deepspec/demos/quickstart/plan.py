"""The stages of the quickstart, and the paths of their outputs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from deepspec.demos.runner import Runner
from deepspec.demos.stages import (
    PYTHON,
    USUAL,
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
LOGS = ROOT / "logs"
WRITE = f"data.write_cache={ROOT / 'cache'}"
DECODE = ("--batch-size", "16", "--no-plain")  # of a study, which compares accepted lengths


def quickstart(drafters: str = USUAL, source: str = "cache") -> None:
    """Run every stage that is not complete yet, write the report and print the table.

    Args:
        drafters: which; see :func:`deepspec.demos.stages.recipes`.
        source: of the hidden states; see :func:`plan`.

    Raises:
        DeepSpecError: a stage failed, or a drafter that there is not.
    """
    from deepspec.demos.quickstart.report import write_report

    Runner(plan(drafters, source), LOGS, cores=max(2, os.cpu_count() or 1)).run()
    print(f"\n{write_report()}\n\n{ROOT}/report.html, {ROOT}/results.json\n\nnow you can")
    draft = ROOT / f"{list(recipes(recipe_of, drafters))[-1]}-draft"
    print(f"- talk to it, and see it draft: deepspec chat --target {ROOT}/target --draft {draft}")
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


def results_folder(algorithm: str) -> Path:
    """The folder of the draft's evaluation."""
    return ROOT / f"{algorithm}-results"


def plan(drafters: str = USUAL, source: str = "cache") -> list[Stage]:
    """All stages, in an order in which each one's needs come before it.

    Args:
        drafters: which; see :func:`deepspec.demos.stages.recipes`.
        source: ``cache`` builds one before the trainings. With another one the first training writes it from the hidden
            states that the source computes, and the others read it: ``online``, in the training itself, or ``served``,
            by a feature server that runs beside it.
    """
    prompts, target, conversations = ROOT / "prompts", ROOT / "target", ROOT / "conversations.jsonl"
    found = recipes(recipe_of, drafters)
    shared = shared_recipe(recipes(recipe_of))
    own = (PYTHON, "-m", "deepspec.demos.quickstart")
    stages = [
        Stage("prompts", (*own, "prompts", "--output", str(prompts)), prompts / "train.jsonl.manifest.json"),
        Stage("target", (*own, "target", "--output", str(target)), target / "target.json", work=5),
        answers("answers", shared, prompts / "train.jsonl", conversations, ("prompts", "target")),
    ]
    readers = {name: recipe for name, recipe in found.items() if load_recipe(recipe).data.source == "cache"}
    build = cache("cache", shared, conversations, ROOT / "cache", ("answers",))
    writer = None if source == "cache" or not readers else shared_recipe(readers)
    stages += [] if writer else [build]
    for name, recipe in sorted(found.items(), key=lambda item: item[1] != writer):  # who writes the cache comes first
        draft, tasks, needs = ROOT / f"{name}-draft", [prompts / "held_out.jsonl"], (f"export {name}",)
        if recipe == writer:
            training, exported = train(name, recipe, draft, ("answers",), overrides=(f"data.source={source}", WRITE))
            if source == "served":
                training = beside_server(training, recipe, LOGS / "server.log", (*own, "served"))
            stages += [training, exported, replace(build, needs=(training.name,))]
        else:
            stages += train(name, recipe, draft, ("cache",))
        stages.append(evaluate(f"evaluate {name}", recipe, draft, tasks, results_folder(name), needs))
    return stages
