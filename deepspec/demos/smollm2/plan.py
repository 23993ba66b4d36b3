"""The stages of the real run, and the paths of their outputs."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from deepspec.demos.runner import Runner
from deepspec.demos.stages import PYTHON, USUAL, Names, Stage, answers, cache, evaluate, recipes, shared_recipe, train
from deepspec.errors import DataError, nearest
from deepspec.recipe import load_recipe

log = logging.getLogger(__name__)

SHARED = Path("build/real")  # of the target, at every scale; the recipes name it too
TARGET, SITE = SHARED / "target", SHARED / "site"
BATCH = 8  # prompts decoded at a time where no speed is measured
EVALUATIONS = ("chat", "speed", "exact", "tasks")  # of every draft
EXACT = 16  # chat prompts decoded in float32: bfloat16 rounds a verification of many tokens otherwise than of one


@dataclass(frozen=True)
class Scale:
    """How much of everything, with one way through all stages."""

    root: Path
    shards: int  # of the prompts, each answered and cached by itself: as many processes can work at the same time
    each: int  # prompts a shard
    chat: int  # held-out prompts
    timed: int  # of these, decoded one at a time with and without the draft: the speed-up
    samples: int  # prompts of every evaluation task
    answering: Names = ()  # overrides of the recipes, by what they change
    training: Names = ()
    decoding: Names = ()

    def caches(self) -> list[Path]:
        """The cache of every shard."""
        return [self.root / f"cache-{shard}" for shard in range(self.shards)]

    def answers(self) -> list[Path]:
        """The target's answers of every shard."""
        return [self.root / f"answers-{shard}.jsonl" for shard in range(self.shards)]


SCALES = {
    "full": Scale(SHARED, shards=6, each=1000, chat=64, timed=16, samples=12),
    "smoke": Scale(
        Path("build/real-smoke"), shards=2, each=12, chat=4, timed=2, samples=1,
        answering=("regenerate.max_tokens=24",),
        training=("train.max_steps=6", "train.save_every=2"), decoding=("evaluate.max_new_tokens=24",),
    ),
}  # fmt: skip


def real(scale: str, tasks: Path, cores: int, drafters: str = USUAL) -> None:
    """Run every stage of the real run that is not complete yet.

    Args:
        scale: a key of SCALES.
        tasks: folder of evaluation prompts (JSONL); where it is missing, only the held-out chat prompts are decoded.
        cores: processes that compute at a time.
        drafters: which; see :func:`deepspec.demos.stages.recipes`.

    Raises:
        DeepSpecError: no such scale, no such drafter, or a stage failed.
    """
    if scale not in SCALES:
        raise DataError("no such scale", key="--scale", found=scale, remedy=nearest(scale, SCALES))
    files = sorted(tasks.glob("*.jsonl"))
    if not files:
        log.info("no task files in %s: only the held-out chat prompts will be decoded", tasks)
    Runner(plan(SCALES[scale], files, cores, drafters), SCALES[scale].root / "logs", cores).run()


def recipe_of(algorithm: str) -> str:
    """The name of an algorithm's recipe."""
    return f"{algorithm}_smollm2_135m"


def plan(scale: Scale, tasks: list[Path], cores: int, drafters: str = USUAL) -> list[Stage]:
    """All stages, in an order in which each one's needs come before it.

    Args:
        scale: how much of everything.
        tasks: files of evaluation prompts: kept out of the training prompts, and decoded at the end.
        cores: processes of a training.
        drafters: as of :func:`real`.
    """
    prompts, found = scale.root / "prompts", recipes(recipe_of, drafters)
    shared = shared_recipe(recipes(recipe_of))
    counts = ("--shards", str(scale.shards), "--each", str(scale.each), "--held-out", str(scale.chat))
    kept_out = ("--exclude", *map(str, tasks)) if tasks else ()
    own = (PYTHON, "-m", "deepspec.demos.smollm2")
    fetch = (*own, "target", "--site", str(SITE), "--output", str(TARGET))
    write = (*own, "prompts", *counts, *kept_out, "--output", str(prompts))
    stages = [
        Stage("target", fetch, TARGET / "target.json"),
        Stage("prompts", write, prompts / "report.json"),
    ]
    for shard, (folder, conversations) in enumerate(zip(scale.caches(), scale.answers(), strict=True)):
        questions = prompts / f"train-{shard}.jsonl"
        stages += [
            answers(f"answers {shard}", shared, questions, conversations, ("target", "prompts"), scale.answering),
            cache(f"cache {shard}", shared, conversations, folder, (f"answers {shard}",)),
        ]
    for algorithm, recipe in found.items():
        stages += _draft_stages(scale, algorithm, recipe, tasks, cores)
    return stages


def _draft_stages(scale: Scale, algorithm: str, recipe: str, tasks: list[Path], cores: int) -> list[Stage]:
    """Training, export and the evaluations of one algorithm's draft."""
    root, draft = scale.root, scale.root / f"{algorithm}-draft"
    needs, overrides = tuple(f"cache {shard}" for shard in range(scale.shards)), scale.training
    if root != SHARED:  # the recipes name the full run's folders
        overrides += (f"data.cache=[{','.join(map(str, scale.caches()))}]", f"output={root / algorithm}")
        if load_recipe(recipe).data.files:  # it trains without a cache
            overrides += (f"data.conversations=[{','.join(map(str, scale.answers()))}]",)
    stages = [*train(algorithm, recipe, draft, needs, min(cores, 2), overrides)]
    batched = ("--no-plain", "--batch-size", str(BATCH))
    greedy = (*scale.decoding, "evaluate.temperature=[0.0]")
    chat = [root / "prompts" / "chat.jsonl"]
    for kind, files, more, decoding in (
        ("chat", chat, batched, scale.decoding),
        ("speed", chat, ("--samples", str(scale.timed)), scale.decoding),
        ("exact", chat, ("--dtype", "float32", "--samples", str(EXACT)), greedy),
        ("tasks", tasks, (*batched, "--samples", str(scale.samples)), scale.decoding),
    ):
        if files:
            name, output = f"{kind} {algorithm}", root / f"{algorithm}-{kind}"
            stages.append(evaluate(name, recipe, draft, files, output, (f"export {algorithm}",), more, decoding))
    return stages
