"""The real run and the ablations from the first stage to the last."""

from __future__ import annotations

import time
from pathlib import Path

from deepspec.demos.runner import Runner
from deepspec.demos.smollm2 import ablation
from deepspec.demos.smollm2.plan import SCALES, plan
from deepspec.errors import DataError, nearest


def real(scale: str, tasks: Path, cores: int) -> None:
    """Run every stage of the real run that is not whole yet.

    Args:
        scale: a key of SCALES.
        tasks: folder of evaluation prompts (JSONL); where it is missing, only the held-out chat prompts are decoded.
        cores: processes that compute at a time.

    Raises:
        DeepSpecError: no such scale, not in the checkout's root, or a stage failed.
    """
    if scale not in SCALES:
        raise DataError("no such scale", key="--scale", found=scale, remedy=nearest(scale, SCALES))
    files = sorted(tasks.glob("*.jsonl"))
    if not files:
        print(f"no task files in {tasks}: only the held-out chat prompts will be decoded", flush=True)
    started, root = time.monotonic(), SCALES[scale].root
    Runner(plan(SCALES[scale], files, cores), root / "logs", cores).run()
    print(f"\n{time.monotonic() - started:.0f} s in this start; everything stands in {root}, the logs in {root}/logs")


def ablate(cores: int) -> None:
    """Run every stage of the ablations that is not whole yet, ``cores`` processes at a time.

    Raises:
        DeepSpecError: the quickstart has not run, or a stage failed.
    """
    made = ablation.QUICKSTART / "results.json"
    if not made.exists():
        raise DataError("no finished quickstart", file=made, remedy="run `make quickstart` first: its target is used")
    Runner(ablation.plan(), ablation.LOGS, cores).run()
