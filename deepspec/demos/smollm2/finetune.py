"""The real run's drafts fine-tuned on one narrow domain, against as many steps from a fresh start.

The domain is a record of a sentence as JSON: prompts by ``finetune.yaml``, answered by the target. Three trainings of
each algorithm that has a recipe: from the general draft on domain and general answers mixed by weight, and on the
domain alone from the target's layers and from random weights. All drafts decode the same held-out prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deepspec.demos.runner import Runner
from deepspec.demos.smollm2 import plan as real
from deepspec.demos.smollm2.plan import PYTHON
from deepspec.demos.stages import Names, Stage, answers, cache, evaluate, recipes, shared_recipe, train
from deepspec.errors import DataError, nearest

FRESH: Names = ("train.lr=4e-3", "data.cache_weights=null")  # the general drafts' own rate
TUNED = "tuned"  # the one start that is a draft
STARTS: dict[str, Names] = {
    TUNED: (),
    "target": ("train.init=target", *FRESH),
    "random": ("train.init=random", *FRESH),
}
GENERAL = "general"  # the draft of the real run, as it is
TASKS = ("domain", "chat")


@dataclass(frozen=True)
class FinetuneScale:
    """How much of everything; the general draft and its data are those of the real run of the same name."""

    root: Path
    prompts: int  # of the domain, to train on
    held_out: int  # of the domain, and of chat, to evaluate on
    overrides: Names = ()  # of trainings and answers
    decoding: Names = ()


SCALES = {
    "full": FinetuneScale(Path("build/finetune"), prompts=400, held_out=48),
    "smoke": FinetuneScale(
        Path("build/finetune-smoke"), prompts=16, held_out=2,
        overrides=("train.max_steps=3", "train.save_every=2", "regenerate.max_tokens=24"),
        decoding=("evaluate.max_new_tokens=8",),
    ),
}  # fmt: skip


def finetune(scale: str, cores: int) -> None:
    """Run every stage of the fine-tuning that is not complete yet, ``cores`` processes at a time.

    Raises:
        DeepSpecError: no such scale, no finished real run of that scale, or a stage failed.
    """
    if scale not in SCALES:
        raise DataError("no such scale", key="--scale", found=scale, remedy=nearest(scale, SCALES))
    for algorithm in recipes(recipe_of):
        made = general_draft(scale, algorithm) / "provenance.json"
        if not made.exists():
            remedy = f"run `deepspec demo real --scale {scale}` first: its drafts are fine-tuned"
            raise DataError("no draft to start from", file=made, remedy=remedy)
    Runner(plan(scale, cores), SCALES[scale].root / "logs", cores).run()


def recipe_of(algorithm: str) -> str:
    """The name of the fine-tuning's recipe for an algorithm."""
    return f"finetune_{algorithm}_smollm2_135m"


def general_draft(scale: str, algorithm: str) -> Path:
    """The real run's draft."""
    return real.SCALES[scale].root / f"{algorithm}-draft"


def plan(scale: str, cores: int) -> list[Stage]:
    """All stages; those of the real run must be complete."""
    sizes, found = SCALES[scale], recipes(recipe_of)
    root, prompts, shared = sizes.root, sizes.root / "prompts", shared_recipe(found)
    write: Names = (PYTHON, "-m", "deepspec.demos.smollm2", "domain", "--train", str(sizes.prompts))
    write += ("--held-out", str(sizes.held_out), "--output", str(prompts))
    asked, answered = prompts / "train.jsonl", root / "answers.jsonl"
    stages = [
        Stage("prompts", write, prompts / "train.jsonl.manifest.json"),
        answers("answers", shared, asked, answered, ("prompts",), sizes.overrides),
        cache("cache", shared, answered, root / "cache", ("answers",)),
    ]
    for algorithm, recipe in found.items():
        stages.append(_measured(scale, algorithm, GENERAL, general_draft(scale, algorithm), "prompts"))
        for start, overrides in STARTS.items():
            stages += _draft(scale, algorithm, recipe, start, overrides, min(cores, 2))
    return stages


def _draft(scale: str, algorithm: str, recipe: str, start: str, overrides: Names, processes: int) -> list[Stage]:
    """Training, export and evaluation of one draft."""
    sizes, name = SCALES[scale], f"{algorithm} {start}"
    folder, draft = sizes.root / f"{algorithm}-{start}", sizes.root / f"{algorithm}-{start}-draft"
    caches = [str(sizes.root / "cache")]
    if start == TUNED:
        caches.append(str(real.SCALES[scale].caches()[0]))
        overrides += (f"train.init.draft={general_draft(scale, algorithm)}",)
    overrides += (*sizes.overrides, f"data.cache=[{','.join(caches)}]", f"output={folder}")
    stages = train(name, recipe, draft, ("cache",), processes, overrides)
    return [*stages, _measured(scale, algorithm, start, draft, f"export {name}")]


def _measured(scale: str, algorithm: str, start: str, draft: Path, need: str) -> Stage:
    """The evaluation of one draft on the held-out prompts of domain and chat."""
    sizes, general = SCALES[scale], real.SCALES[scale].root
    tasks = [sizes.root / "prompts" / "domain.jsonl", general / "prompts" / "chat.jsonl"]
    more = ("--no-plain", "--batch-size", str(2 * real.BATCH), "--samples", str(sizes.held_out))
    output, name = results_of(scale, algorithm, start), f"evaluate {algorithm} {start}"
    needs = tuple(dict.fromkeys(("prompts", need)))
    return evaluate(name, recipe_of(algorithm), draft, tasks, output, needs, more, sizes.decoding)


def results_of(scale: str, algorithm: str, start: str) -> Path:
    """The folder of one draft's evaluation."""
    return SCALES[scale].root / f"{algorithm}-{start}-results"
