"""The stages of the quickstart, and where what they make stands."""

from __future__ import annotations

from pathlib import Path

from deepspec.demos.stages import PYTHON, Stage, answers, cache, evaluate, export, shared_recipe, train
from deepspec.recipe import load_recipe
from deepspec.registry import ALGORITHMS

ROOT = Path("build/quickstart")  # of everything generated; the recipes name it too
LOGS = ROOT / "logs"


def recipe_of(algorithm: str) -> str:
    """The quickstart's recipe file of an algorithm, relative to the checkout."""
    return f"recipes/quickstart_{algorithm}.yaml"


def draft_folder(algorithm: str) -> Path:
    """Where the finished draft stands."""
    return ROOT / f"{algorithm}-draft"


def results_folder(algorithm: str) -> Path:
    """Where the evaluation of the draft stands."""
    return ROOT / f"{algorithm}-results"


def plan() -> list[Stage]:
    """All stages, in an order in which each one's needs come before it."""
    prompts, target, conversations = ROOT / "prompts", ROOT / "target", ROOT / "conversations.jsonl"
    shared = shared_recipe(recipe_of)
    own = (PYTHON, "-m", "deepspec.demos.quickstart")
    stages = [
        Stage("prompts", (*own, "prompts", "--output", str(prompts)), prompts / "train.jsonl.manifest.json"),
        Stage("target", (*own, "target", "--output", str(target)), target / "target.json"),
        answers("answers", shared, prompts / "train.jsonl", conversations, ("prompts", "target")),
        cache("cache", shared, conversations, ROOT / "cache", ("answers",)),
    ]
    for algorithm in ALGORITHMS:
        recipe, draft, tasks = recipe_of(algorithm), draft_folder(algorithm), [prompts / "held_out.jsonl"]
        stages += [
            train(f"train {algorithm}", recipe, ("cache",)),
            export(f"export {algorithm}", Path(load_recipe(recipe).output), draft, (f"train {algorithm}",)),
            evaluate(
                f"evaluate {algorithm}", recipe, draft, tasks, results_folder(algorithm), (f"export {algorithm}",)
            ),
        ]
    return stages
