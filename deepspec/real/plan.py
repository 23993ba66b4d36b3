"""The stages of the real run, and where what they make stands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deepspec.quickstart.stages import PYTHON, Names, Stage, answers, cache, evaluate, export, train
from deepspec.recipe import load_recipe
from deepspec.registry import ALGORITHMS

SHARED = Path("build/real")  # of the target, at every scale; the recipes name it too
TARGET, SITE = SHARED / "target", SHARED / "site"
BATCH = 8  # prompts that the tasks decode at a time, where no speed is measured


@dataclass(frozen=True)
class Scale:
    """How much of everything, with one way through all stages."""

    root: Path
    shards: int  # of the prompts, each answered and cached by itself: as many processes can work side by side
    each: int  # prompts a shard
    chat: int  # held-out prompts, decoded with and without the draft, one at a time
    samples: int  # prompts of every evaluation task
    overrides: Names = ()  # of the recipes

    def settings(self, algorithm: str = "") -> Names:
        """The overrides of this scale for the recipe of an algorithm."""
        if not self.overrides:
            return ()
        caches = ",".join(str(self.root / f"cache-{shard}") for shard in range(self.shards))
        return (*self.overrides, f"data.cache=[{caches}]", f"output={self.root / algorithm}")


SCALES = {
    "full": Scale(SHARED, shards=4, each=500, chat=64, samples=12),
    "smoke": Scale(
        Path("build/real-smoke"), shards=2, each=12, chat=4, samples=1,
        overrides=("regenerate.max_tokens=24", "evaluate.max_new_tokens=24", "train.max_steps=6", "train.save_every=2"),
    ),
}  # fmt: skip


def recipe_of(algorithm: str) -> str:
    """The recipe file of an algorithm, relative to the checkout."""
    return f"recipes/{algorithm}_smollm2_135m.yaml"


def plan(scale: Scale, tasks: list[Path], cores: int) -> list[Stage]:
    """All stages, in an order in which each one's needs come before it.

    Args:
        scale: how much of everything.
        tasks: files of evaluation prompts: kept out of the training prompts, and decoded at the end.
        cores: processes of a training.
    """
    root, prompts, shared = scale.root, scale.root / "prompts", recipe_of("dspark")
    counts = ("--shards", str(scale.shards), "--each", str(scale.each), "--held-out", str(scale.chat))
    kept_out = ("--exclude", *map(str, tasks)) if tasks else ()
    own = (PYTHON, "-m", "deepspec.real")
    fetch = (*own, "target", "--site", str(SITE), "--output", str(TARGET))
    write = (*own, "prompts", *counts, *kept_out, "--output", str(prompts))
    stages = [
        Stage("target", fetch, TARGET / "target.json"),
        Stage("prompts", write, prompts / "report.json"),
    ]
    for shard in range(scale.shards):
        conversations, place, sets = root / f"answers-{shard}.jsonl", root / f"cache-{shard}", scale.settings()
        questions = prompts / f"train-{shard}.jsonl"
        stages += [
            answers(f"answers {shard}", shared, questions, conversations, ("target", "prompts"), sets),
            cache(f"cache {shard}", shared, conversations, place, (f"answers {shard}",), sets),
        ]
    for algorithm in ("dspark", *(name for name in ALGORITHMS if name != "dspark")):
        stages += _draft_stages(scale, algorithm, tasks, cores)
    return stages


def _draft_stages(scale: Scale, algorithm: str, tasks: list[Path], cores: int) -> list[Stage]:
    """Training, export and the two evaluations of one algorithm's draft."""
    root, recipe, sets = scale.root, recipe_of(algorithm), scale.settings(algorithm)
    caches = tuple(f"cache {shard}" for shard in range(scale.shards))
    run, draft, exported = Path(load_recipe(recipe, sets).output), root / f"{algorithm}-draft", f"export {algorithm}"
    stages = [
        train(f"train {algorithm}", recipe, caches, min(cores, 2), sets),
        export(exported, run, draft, (f"train {algorithm}",)),
    ]
    chat, held_out = root / f"{algorithm}-chat", [root / "prompts" / "chat.jsonl"]
    stages.append(evaluate(f"chat {algorithm}", recipe, draft, held_out, chat, (exported,), overrides=sets))
    if tasks:
        more = ("--no-plain", "--batch-size", str(BATCH), "--samples", str(scale.samples))
        place = root / f"{algorithm}-tasks"
        stages.append(evaluate(f"tasks {algorithm}", recipe, draft, tasks, place, (exported,), more, sets))
    return stages
