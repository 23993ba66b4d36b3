"""What each choice of a draft costs or brings, on the quickstart's target: a table of variants, minutes each.

Every variant is one of the quickstart's drafts with something changed, trained from the same seed for as many steps on
the same answers, and decoded over the same held-out prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deepspec.demos.quickstart.plan import ROOT as QUICKSTART
from deepspec.demos.stages import PYTHON, Names, Stage, evaluate, export, train

ROOT = Path("build/ablations")
LOGS = ROOT / "logs"
STUDY = ROOT / "scheduler" / "study.json"
CALIBRATION = ROOT / "sts.json"  # figures of the fit, which is in the draft's folder only where it helps
RECIPE = "recipes/ablation.yaml"
PROMPTS = ROOT / "prompts" / "held_out.jsonl"
HELD_OUT = 256  # prompts
BASE = "base"
STEPS = 500  # of every variant: half of the quickstart's
CURVE = (100, 200, 300, 400)  # optimizer steps of the base whose drafts are measured too
DECODE = ("--batch-size", "16", "--no-plain")


@dataclass(frozen=True)
class Variant:
    """One changed thing."""

    about: str
    overrides: Names = ()
    level: str = "lossless"  # of the cache


VARIANTS = {
    BASE: Variant("3 layers, block 7, Markov rank 64, lossless cache"),
    "layers-1": Variant("1 layer", ("draft.num_layers=1",)),
    "layers-2": Variant("2 layers", ("draft.num_layers=2",)),
    "layers-5": Variant("5 layers", ("draft.num_layers=5",)),
    "block-4": Variant("block 4", ("draft.block_size=4",)),
    "block-12": Variant("block 12", ("draft.block_size=12",)),
    "no-markov": Variant("no Markov head", ("draft.markov_rank=0", "draft.confidence_with_markov=false")),
    "near": Variant("near-lossless cache", level="near"),
    "compact": Variant("compact cache", level="compact"),
    "smallest": Variant("smallest cache", level="smallest"),
}
LEVELS = ("raw", *(variant.level for variant in VARIANTS.values() if variant.level != "lossless"))  # to recode


def cache_of(level: str) -> Path:
    """Where the cache of a level stands."""
    return QUICKSTART / "cache" if level == "lossless" else ROOT / f"cache-{level}"


def plan() -> list[Stage]:
    """All stages; the quickstart's target, prompts and cache must be whole."""
    write = (
        PYTHON,
        "-m",
        "deepspec.demos.quickstart",
        "prompts",
        "--held-out",
        str(HELD_OUT),
        "--output",
        str(ROOT / "prompts"),
    )
    stages = [Stage("prompts", write, ROOT / "prompts" / "train.jsonl.manifest.json")]
    for level in LEVELS:
        recode = (PYTHON, "tools/cache.py", "recode", str(cache_of("lossless")), str(cache_of(level)), "--level", level)
        stages.append(Stage(f"recode {level}", recode, cache_of(level) / "manifest.json"))
    for name in VARIANTS:
        stages += _variant(name)
    for step in CURVE:
        checkpoint = ROOT / BASE / "run" / "checkpoints" / f"step_{step}"
        stages += _measured(f"step-{step}", checkpoint, f"train {BASE}", "[0.0]")
    return [*stages, *_confidence()]


def _confidence() -> list[Stage]:
    """The base's confidence scaled at T=1, and the scheduler over a copy of it that is scaled for greedy decoding."""
    draft, greedy, measured = ROOT / BASE / "draft", ROOT / "greedy-draft", (f"evaluate {BASE}",)

    def fit(of: Path, temperature: str, report: Path) -> Names:
        command = (PYTHON, "-m", "deepspec.evaluate.calibration", "--results", str(ROOT / BASE / "results"))
        return (*command, "--draft", str(of), "--temperature", temperature, "--report", str(report))

    study: Names = (PYTHON, "-m", "deepspec.evaluate", "--study", "scheduler", "--target", str(QUICKSTART / "target"))
    study += ("--draft", str(greedy), "--tasks", str(PROMPTS), "--temperature", "0", "--max-new-tokens", "96")
    return [
        Stage("sts", fit(draft, "1", CALIBRATION), CALIBRATION, measured),
        export("export greedy", ROOT / BASE / "run", greedy, (f"train {BASE}",)),
        Stage("sts greedy", fit(greedy, "0", ROOT / "sts-greedy.json"), ROOT / "sts-greedy.json",
              (*measured, "export greedy")),
        Stage("scheduler", (*study, "--output", str(STUDY.parent)), STUDY, ("sts greedy", "prompts")),
    ]  # fmt: skip


def _variant(name: str) -> list[Stage]:
    variant, run = VARIANTS[name], ROOT / name / "run"
    overrides = (
        *variant.overrides,
        f"train.max_steps={STEPS}",
        f"cache.level={variant.level}",
        f"data.cache=[{cache_of(variant.level)}]",
    )
    overrides += (f"output={run}", *((f"train.keep_every={CURVE[0]}", "train.save_every=100") if name == BASE else ()))
    needs = () if variant.level == "lossless" else (f"recode {variant.level}",)
    training = train(f"train {name}", RECIPE, needs, processes=1, overrides=overrides)
    temperatures = "[0.0,1.0]" if name == BASE else "[0.0]"  # the base's rounds at T=1 calibrate its confidence
    return [training, *_measured(name, training.whole.parent, training.name, temperatures)]


def _measured(name: str, checkpoint: Path, training: str, temperatures: str) -> list[Stage]:
    """Export and evaluation of one checkpoint."""
    draft, results, exported = ROOT / name / "draft", ROOT / name / "results", f"export {name}"
    overrides = (f"evaluate.temperature={temperatures}",)
    return [
        export(exported, checkpoint, draft, (training,)),
        evaluate(f"evaluate {name}", RECIPE, draft, [PROMPTS], results, (exported, "prompts"), DECODE, overrides),
    ]
