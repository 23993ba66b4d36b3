"""What each choice of a draft changes, on the quickstart's target: a table of variants, minutes each.

Every variant of ``recipes/ablations/quickstart.yaml`` is a draft of the quickstart with something changed, trained from
the same seed for as many steps on the same answers, and decoded over the same held-out prompts.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from deepspec.demos.quickstart.plan import DECODE, more_prompts, require_finished
from deepspec.demos.quickstart.plan import ROOT as QUICKSTART
from deepspec.demos.runner import Runner
from deepspec.demos.stages import DEEPSPEC, Names, Stage, evaluate, export, train, variants
from deepspec.recipe_files import RECIPES

ROOT = Path("build/ablations")
LOGS = ROOT / "logs"
STUDY = ROOT / "scheduler" / "study.json"
CALIBRATION = ROOT / "sts.json"  # figures of the fit, which is in the draft's folder only where it helps
PROMPTS = ROOT / "prompts" / "held_out.jsonl"
HELD_OUT = 256  # prompts
STEPS = 500  # of every variant: half of the quickstart's
CURVE = (100, 200, 300, 400)  # optimizer steps of the base whose drafts are measured too
BASE = "base"  # the variant that changes nothing
TABLE = yaml.safe_load((RECIPES / "ablations" / "quickstart.yaml").read_text("utf-8"))
RECIPE: str = TABLE["recipe"]
VARIANTS = variants(TABLE)
LEVELS = ("raw", *(variant.level for variant in VARIANTS.values() if variant.level != "lossless"))  # to recode


def ablate(cores: int) -> None:
    """Run every stage of the ablations that is not complete yet, ``cores`` processes at a time.

    Raises:
        DeepSpecError: the quickstart has not run, or a stage failed.
    """
    require_finished()
    Runner(plan(), LOGS, cores).run()


def cache_of(level: str) -> Path:
    """The folder of a level's cache."""
    return QUICKSTART / "cache" if level == "lossless" else ROOT / f"cache-{level}"


def plan() -> list[Stage]:
    """All stages; the quickstart's target, prompts and cache must be complete."""
    stages = [more_prompts(PROMPTS.parent, HELD_OUT)]
    for level in LEVELS:
        recode = (DEEPSPEC, "cache", "recode", str(cache_of("lossless")), str(cache_of(level)), "--level", level)
        stages.append(Stage(f"recode {level}", recode, cache_of(level) / "manifest.json"))
    for name in VARIANTS:
        stages += _variant(name)
    for step in CURVE:
        name, checkpoint = f"step-{step}", ROOT / BASE / "run" / "checkpoints" / f"step_{step}"
        stages += [export(f"export {name}", checkpoint, ROOT / name / "draft", (f"train {BASE}",)), _measured(name)]
    return [*stages, *_confidence()]


def _confidence() -> list[Stage]:
    """The base's confidence scaled at T=1, and the scheduler over a copy of it that is scaled for greedy decoding."""
    draft, greedy, measured = ROOT / BASE / "draft", ROOT / "greedy-draft", (f"evaluate {BASE}",)

    def fit(of: Path, temperature: str, report: Path) -> Names:
        command = (DEEPSPEC, "calibrate", "--results", str(ROOT / BASE / "results"))
        return (*command, "--draft", str(of), "--temperature", temperature, "--report", str(report))

    study: Names = (DEEPSPEC, "study", "--target", str(QUICKSTART / "target"))
    study += ("--draft", str(greedy), "--tasks", str(PROMPTS), "--temperature", "0", "--max-new-tokens", "96")
    return [
        Stage("sts", fit(draft, "1", CALIBRATION), CALIBRATION, measured),
        export("export greedy", ROOT / BASE / "run", greedy, (f"train {BASE}",)),
        Stage("sts greedy", fit(greedy, "0", ROOT / "sts-greedy.json"), ROOT / "sts-greedy.json",
              (*measured, "export greedy")),
        Stage("scheduler", (*study, "--output", str(STUDY.parent)), STUDY, ("sts greedy", "prompts")),
    ]  # fmt: skip


def _variant(name: str) -> list[Stage]:
    variant = VARIANTS[name]
    overrides = (*variant.overrides, f"train.max_steps={STEPS}", f"cache.level={variant.level}",
                 f"data.cache=[{cache_of(variant.level)}]", f"output={ROOT / name / 'run'}")  # fmt: skip
    if name == BASE:
        overrides += (f"train.keep_every={CURVE[0]}", f"train.save_every={CURVE[0]}")
    needs = () if variant.level == "lossless" else (f"recode {variant.level}",)
    return [*train(name, RECIPE, ROOT / name / "draft", needs, processes=1, overrides=overrides), _measured(name)]


def _measured(name: str) -> Stage:
    """The evaluation of one draft; the base's rounds at T=1 calibrate its confidence."""
    temperatures, needs = "[0.0,1.0]" if name == BASE else "[0.0]", (f"export {name}", "prompts")
    overrides = (f"evaluate.temperature={temperatures}",)
    draft, results = ROOT / name / "draft", ROOT / name / "results"
    return evaluate(f"evaluate {name}", RECIPE, draft, [PROMPTS], results, needs, DECODE, overrides)
