"""The stages of the quickstart: each one a command that anyone can run again, and the file that says it is whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deepspec.recipe import load_recipe
from deepspec.registry import ALGORITHMS

ROOT = Path("build/quickstart")  # of everything generated; the recipes name it too
LOGS = ROOT / "logs"
PYTHON = "python"  # what a user types; the runner puts its own interpreter there


@dataclass(frozen=True)
class Stage:
    """One command of the pipeline."""

    name: str
    command: tuple[str, ...]
    whole: Path  # exists = this stage's artefact is whole
    needs: tuple[str, ...] = ()  # stages that must be whole before
    cores: int = 1  # processes that compute at the same time


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
    prompts, target, cache, answers = ROOT / "prompts", ROOT / "target", ROOT / "cache", ROOT / "conversations.jsonl"
    shared = recipe_of("dspark")  # target, sampling and data of the three recipes are the same
    own = (PYTHON, "-m", "deepspec.quickstart")
    from_prompts = ("--prompts", str(prompts / "train.jsonl"))
    stages = [
        Stage("prompts", (*own, "prompts", "--output", str(prompts)), prompts / "train.jsonl.manifest.json"),
        Stage("target", (*own, "target", "--output", str(target)), target / "target.json"),
        Stage(
            "answers",
            (PYTHON, "tools/regenerate.py", "--recipe", shared, *from_prompts, "--output", str(answers)),
            Path(f"{answers}.manifest.json"),
            ("prompts", "target"),
        ),
        Stage(
            "cache",
            (PYTHON, "tools/build_cache.py", "--recipe", shared, "--data", str(answers), "--output", str(cache)),
            cache / "manifest.json",
            ("answers",),
        ),
    ]
    for algorithm in ALGORITHMS:
        stages += draft_stages(algorithm)
    return stages


def draft_stages(algorithm: str) -> list[Stage]:
    """Training, export and evaluation of one algorithm's draft."""
    recipe = load_recipe(recipe_of(algorithm))
    run, draft, results = Path(recipe.output), draft_folder(algorithm), results_folder(algorithm)
    train = ("deepspeed", "-q", "--num_gpus", "2", "launch/train.py", "--recipe", recipe_of(algorithm))
    evaluate: tuple[str, ...] = (
        PYTHON,
        "-m",
        "deepspec.evaluate",
        "--target",
        recipe.target.path,
        "--draft",
        str(draft),
    )
    evaluate += ("--tasks", str(ROOT / "prompts" / "held_out.jsonl"), "--output", str(results))
    evaluate += ("--temperature", *(f"{t:g}" for t in recipe.evaluate.temperature))
    evaluate += ("--max-new-tokens", str(recipe.evaluate.max_new_tokens))
    checkpoint = run / "checkpoints" / f"step_{recipe.train.max_steps}" / "manifest.json"
    return [
        Stage(f"train {algorithm}", train, checkpoint, ("cache",), cores=2),
        Stage(
            f"export {algorithm}",
            (PYTHON, "tools/zero_to_fp32.py", str(run), str(draft)),
            draft / "provenance.json",
            (f"train {algorithm}",),
        ),
        Stage(f"evaluate {algorithm}", evaluate, results / "results.json", (f"export {algorithm}",)),
    ]
