"""The loop: optimizer steps from ``start`` to the end, log lines, validation, checkpoints, an orderly stop."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deepspec.batch import Batch
from deepspec.distributed import on_all_ranks
from deepspec.errors import CheckpointError, SourceLost, system_error
from deepspec.progress import Progress, bytes_in, waiting
from deepspec.recipe import Recipe, TrainSection
from deepspec.training.checkpoints import Checkpoints, Manifest
from deepspec.training.engine import Engine
from deepspec.training.plan import lr_factor
from deepspec.training.prefetch import Prefetcher, TrainStep
from deepspec.training.report import Meter, Reporter
from deepspec.training.signals import StopSignal
from deepspec.training.validation import HeldOut, Sets

log = logging.getLogger(__name__)
PROFILED_STEPS = (3, 6)  # steps left to warm up, steps recorded


def save_error(problem: OSError | RuntimeError, folder: Path) -> CheckpointError:
    """A checkpoint that could not be written, the line of who raised it inside."""
    known = system_error(problem, folder, CheckpointError)
    line = known.problem if known is not None else next(iter(str(problem).strip().splitlines()), repr(problem))
    remedy = (known and known.remedy) or "look for room and permissions, then run the same command again"
    return CheckpointError(
        f"the checkpoint cannot be written ({line}); earlier ones are complete", file=folder, remedy=remedy
    )


def exhausted(train: TrainSection, stale: int) -> bool:
    """Whether a run with ``stale`` validations since its best one ends early, by ``train.validation.patience``."""
    patience = None if train.validation is None else train.validation.patience
    return patience is not None and stale >= patience


class _Lost(Exception):
    """The source of a rank is lost; ``problem`` is None where it is another rank's."""

    def __init__(self, problem: SourceLost | None) -> None:
        self.problem = problem


class Trainer:
    """One run on one rank.

    Args:
        recipe: resolved and checked.
        engine: the draft under DeepSpeed.
        prefetcher: the run's data.
        checkpoints: where they are written.
        manifest: of this run; step and score are filled in at each save.
        validator: None without `train.validation`.
        profile: a folder for the trace of a few steps, or None.
    """

    def __init__(
        self, recipe: Recipe, engine: Engine, prefetcher: Prefetcher, checkpoints: Checkpoints, manifest: Manifest, *,
        validator: HeldOut | Sets | None = None, profile: Path | None = None,
    ) -> None:  # fmt: skip
        self.recipe, self.train, self.engine, self.prefetcher = recipe, recipe.train, engine, prefetcher
        self.checkpoints, self.manifest, self.total_steps = checkpoints, manifest, manifest.total_steps
        self.validator, self.profile = validator, profile
        self.meter = Meter(engine.sum)
        self.reporter: Reporter | None = None
        self.saved: int | None = None
        self.stale = manifest.stale

    def run(self, start: int) -> bool:
        """Train from step ``start`` (steps done so far) to the end.

        Returns:
            Whether the end was reached, or patience ended; False when a signal ended the run. In all cases it is saved.

        Raises:
            NonFiniteLoss: the loss is not a number; nothing is saved from then on.
        """
        self.saved = start or None
        if self.engine.world.is_main:
            self.reporter = Reporter(self.recipe, self.checkpoints.run, self.total_steps, start)
        try:
            progress = Progress("training", self.total_steps - start, noun="steps", unit="samples", every=math.inf)
            with StopSignal() as stop, self._profiler() as profiler:
                for step in self.prefetcher.steps(start, self.total_steps):
                    flags = torch.stack([step.weight, torch.tensor(float(stop.asked), dtype=torch.float64)])
                    weight, asked = self.engine.sum(flags).tolist()
                    if asked:
                        self._stop(step.number)
                        return False
                    try:
                        self._optimize(step, weight)
                    except _Lost as lost:
                        self._save_and_end(step.number, lost.problem)
                    progress.add(1, self.train.global_batch)
                    self._after(step.number + 1)
                    if profiler is not None:
                        profiler.step()
                    if exhausted(self.train, self.stale):
                        log.info("ends at step %d: %d validations without a better score", step.number + 1, self.stale)
                        break
            progress.close()
            self._finish()
            return True
        finally:
            if self.reporter is not None:
                self.reporter.close()

    def _optimize(self, step: TrainStep, weight: float) -> None:
        lr = self.train.lr * lr_factor(step.number, self.total_steps, self.train.warmup_ratio)
        for number, batch in enumerate(self._batches(step)):
            self.engine.begin_micro_batch(last=number + 1 == step.count)
            terms = self.engine.forward(batch)
            share = self.engine.backward(terms, max(weight, 1e-12))
            self.engine.step(lr)
            self.meter.add(step.number, batch, terms, share)
        self.meter.steps += 1

    def _batches(self, step: TrainStep) -> Iterator[Batch]:
        """The step's micro-batches; where the source of a rank is lost, every rank ends before the same one.

        Raises:
            _Lost: on every rank.
        """
        if not self.prefetcher.source.can_be_lost:
            yield from step.batches
            return
        for _ in range(step.count):
            try:
                found: Batch | SourceLost = next(step.batches)
            except SourceLost as problem:
                found = problem
            lost = float(isinstance(found, SourceLost))
            if self.engine.sum(torch.tensor([lost])).item():
                raise _Lost(found if isinstance(found, SourceLost) else None)
            yield found  # type: ignore[misc]  # a batch: nobody's source is lost

    def _save_and_end(self, done: int, problem: SourceLost | None) -> None:
        """Save what is trained, without the step that has begun.

        Raises:
            DeepSpecError: always: what ``problem`` says, on rank 0; the other ranks exit with code 1 silently.
        """
        self.meter.check_finite()
        if done:
            self._save(done)
        self.checkpoints.wait()
        self.engine.barrier()

        def tell() -> None:
            if problem is not None:  # of this rank
                saved = f"saved after step {done}/{self.total_steps}" if done else "nothing is trained yet"
                facts = {name: getattr(problem, name) for name in ("file", "key", "found", "wanted", "remedy")}
                raise SourceLost(f"{problem.problem}; {saved}", **facts)

        on_all_ranks(self.engine.world, tell)

    def _after(self, done: int) -> None:
        """Log, validate and save as the recipe schedules it after ``done`` steps."""
        last = done == self.total_steps
        validation = self.train.validation
        validate = self.validator is not None and validation is not None and (done % validation.every == 0 or last)
        save = done % self.train.save_every == 0 or last
        if not (done % self.train.log_every == 0 or validate or save):
            return
        self.meter.check_finite()
        if done % self.train.log_every == 0 or last:
            self._log(done)
        begun = time.perf_counter()
        score, best = self._validate(done) if validate else (None, False)
        if score is not None:
            self.stale = 0 if best else self.stale + 1
        if save or best or exhausted(self.train, self.stale):
            self._save(done, score)
        if self.reporter is not None:
            self.reporter.exclude(time.perf_counter() - begun)

    def _log(self, done: int) -> None:
        values = self.meter.take()
        values["lr"] = self.train.lr * lr_factor(done - 1, self.total_steps, self.train.warmup_ratio)
        values["grad_norm"] = self.engine.grad_norm()
        waited = torch.zeros(self.engine.world.size, dtype=torch.float64)
        waited[self.engine.world.rank], self.prefetcher.wait_seconds = self.prefetcher.wait_seconds, 0.0
        longest = self.engine.sum(waited).max().item()  # the rank that waits longest holds all others up
        if self.reporter is not None:
            self.reporter.training(done, values, longest)

    def _validate(self, done: int) -> tuple[float | None, bool]:
        """Measure; returns the score, and whether this is the best so far, to be saved."""
        values, score = self.validator.run(self.engine, done)  # type: ignore[union-attr]
        if self.reporter is not None:
            self.reporter.validation(done, values)
        if not self.train.keep_best or score is None:
            return score, False
        best = None
        if self.engine.world.is_main:
            self.checkpoints.wait()
            best = self.checkpoints.best()
        better = torch.tensor([float(self.engine.world.is_main and (best is None or score > best[1]))])
        return score, bool(self.engine.sum(better).item())

    def _save(self, done: int, score: float | None = None) -> None:
        if self.saved == done:
            return
        if self.engine.world.is_main:
            self.checkpoints.wait()
        self.engine.barrier()
        folder, temporary = self.checkpoints.folder, self.checkpoints.temporary(done)
        try:
            with waiting(f"saving step {done}", self.engine.saved_bytes(), partial(bytes_in, folder / temporary)):
                self.engine.save(folder, temporary)
        except (OSError, RuntimeError) as problem:  # torch's writer makes RuntimeErrors of a full disk
            self.checkpoints.discard(done)
            raise save_error(problem, folder / f"step_{done}") from problem
        self.engine.barrier()
        if self.engine.world.is_main:
            self.checkpoints.commit(replace(self.manifest, step=done, score=score, stale=self.stale))
        self.saved = done

    def _finish(self) -> None:
        with waiting("writing the last checkpoint to the disk"):
            self.checkpoints.wait()
        best = self.checkpoints.best() if self.engine.world.is_main and self.train.keep_best else None
        if best is not None:
            log.info("best validation: %.4f, %s", best[1], self.checkpoints.folder / f"step_{best[0]}")

    def _stop(self, done: int) -> None:
        self.meter.check_finite()
        if done:
            self._save(done)
        self.checkpoints.wait()
        self.engine.barrier()
        log.info("stopped by a signal after step %d/%d; run again to continue", done, self.total_steps)

    @contextlib.contextmanager
    def _profiler(self) -> Iterator[Any]:
        if self.profile is None:
            yield None
            return
        self.profile.mkdir(parents=True, exist_ok=True)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        trace = self.profile / f"rank{self.engine.world.rank}.json"
        with torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=0, warmup=PROFILED_STEPS[0], active=PROFILED_STEPS[1], repeat=1),
            on_trace_ready=lambda done: done.export_chrome_trace(str(trace)),
        ) as profiler:
            yield profiler
