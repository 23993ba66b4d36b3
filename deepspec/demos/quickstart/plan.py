"""The stages of the quickstart, and the paths of their outputs."""

from __future__ import annotations

import os
from pathlib import Path

from deepspec.demos.runner import Runner
from deepspec.demos.stages import PYTHON, USUAL, Stage, answers, cache, evaluate, recipes, shared_recipe, train
from deepspec.errors import DataError

ROOT = Path("build/quickstart")  # of everything generated, in the working directory; the recipes name it too
LOGS = ROOT / "logs"
DECODE = ("--batch-size", "16", "--no-plain")  # of a study, which compares accepted lengths


def quickstart(drafters: str = USUAL) -> None:
    """Run every stage that is not complete yet, write the report and print the table.

    Args:
        drafters: which; see :func:`deepspec.demos.stages.recipes`.

    Raises:
        DeepSpecError: a stage failed, or a drafter that there is not.
    """
    from deepspec.demos.quickstart.report import write_report

    Runner(plan(drafters), LOGS, cores=max(2, os.cpu_count() or 1)).run()
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


def plan(drafters: str = USUAL) -> list[Stage]:
    """All stages, in an order in which each one's needs come before it."""
    prompts, target, conversations = ROOT / "prompts", ROOT / "target", ROOT / "conversations.jsonl"
    found = recipes(recipe_of, drafters)
    shared = shared_recipe(recipes(recipe_of))
    own = (PYTHON, "-m", "deepspec.demos.quickstart")
    stages = [
        Stage("prompts", (*own, "prompts", "--output", str(prompts)), prompts / "train.jsonl.manifest.json"),
        Stage("target", (*own, "target", "--output", str(target)), target / "target.json", work=5),
        answers("answers", shared, prompts / "train.jsonl", conversations, ("prompts", "target")),
        cache("cache", shared, conversations, ROOT / "cache", ("answers",)),
    ]
    for name, recipe in found.items():
        draft, tasks, needs = ROOT / f"{name}-draft", [prompts / "held_out.jsonl"], (f"export {name}",)
        stages += train(name, recipe, draft, ("cache",))
        stages.append(evaluate(f"evaluate {name}", recipe, draft, tasks, results_folder(name), needs))
    return stages
