"""Runs several trainings in one process group: ``deepspeed --num_gpus N training_worker.py JOBS.json``.

Starting processes costs more than these tiny trainings, so a test session starts each world once. A job is
{"recipe": path, "set": [...], "steps": stop after this many or null, "gather": folder for the live weights or null}.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from deepspec import registry
from deepspec.distributed import on_rank0
from deepspec.log import start_logging
from deepspec.nn.cpu import matmul
from deepspec.recipe import load_recipe
from deepspec.training import run
from deepspec.training.engine import training_processes


def train(job: dict, world) -> None:
    """One run; ``steps`` ends it early as a signal would."""
    recipe = load_recipe(job["recipe"], job.get("set", []))
    on_rank0(world, lambda: run.keep_draft(recipe))
    prepared = run.prepare(recipe, world, job.get("accept", False))
    trainer = run.assemble(prepared, world, profile=False)
    if job.get("steps"):
        ask = trainer.prefetcher.steps

        def until(start: int, stop: int):
            yield from ask(start, min(stop, job["steps"]))

        trainer.prefetcher.steps = until
    trainer.run(prepared.start.step)
    if job.get("steps"):
        trainer._stop(job["steps"])
    if job.get("gather"):
        with trainer.engine.complete_model() as model:
            if world.is_main:
                torch.save(model.state_dict(), job["gather"])
    trainer.engine.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs")
    parser.add_argument("--local_rank")
    options = parser.parse_args()
    registry.SOURCES["cache"] = "training_tools:MemorySource"
    if os.environ.get("DEEPSPEC_PRODUCTS") == "onednn":  # read when deepspec was imported: before a fork
        matmul._MIN_MULTIPLICATIONS = 0
    start_logging()
    with training_processes() as world:
        for job in json.loads(Path(options.jobs).read_text()):
            train(job, world)


if __name__ == "__main__":
    main()
