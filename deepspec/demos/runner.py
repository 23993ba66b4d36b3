"""Runs the commands of stages, several at a time where the cores allow, each with its own log."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from deepspec.demos.stages import DEEPSPEC, LAUNCHER, Stage
from deepspec.distributed import free_port
from deepspec.errors import DeepSpecError, printable
from deepspec.files import read_json, write_json
from deepspec.log import on_terminal, reports, show_passing, silent_for
from deepspec.progress import PATIENCE, about, duration

log = logging.getLogger(__name__)

PAUSE = 0.1  # seconds between two looks at the running commands
THREADS = {"OMP_NUM_THREADS": "1"}  # a process: the models are small and the cores are few
LOG_TAIL = 15  # lines of a failed stage's log that are shown


@dataclass
class Running:
    """A stage whose command runs."""

    stage: Stage
    process: subprocess.Popen[bytes]
    log: Path
    started: float  # time.monotonic()

    def last_line(self) -> str:
        """The newest line of the log, shortened: the progress line of the stage itself."""
        with open(self.log, "rb") as handle:
            handle.seek(max(0, self.log.stat().st_size - 2000))
            lines = handle.read().decode(errors="replace").replace("\r", "\n").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


class Runner:
    """Runs every stage of a plan.

    Args:
        stages: the plan; needs name earlier stages.
        logs: folder of the logs and of ``seconds.json``, the wall-clock seconds of every stage.
        cores: how many computing processes may run at a time.
    """

    def __init__(self, stages: Sequence[Stage], logs: Path, cores: int) -> None:
        self.stages, self.logs, self.cores = stages, logs, cores
        self.numbers = {stage.name: i for i, stage in enumerate(stages, 1)}
        self.complete = {stage.name for stage in stages if stage.artefact.exists()}
        self._before, self._begun = frozenset(self.complete), time.monotonic()
        self.running: list[Running] = []
        logs.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        """Run what is not complete yet.

        Raises:
            DeepSpecError: a command failed; its log's last lines were printed. What else was running is ended.
        """
        about(output=self.logs.parent)
        for stage in self.stages:
            if stage.name in self.complete:
                self._report(stage, f"complete already ({stage.artefact})")
        waiting = [stage for stage in self.stages if stage.name not in self.complete]
        waiting.sort(key=lambda stage: -stage.cores)  # the wide ones first: narrow ones leave no core idle at the end
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended with this process
        try:
            while waiting or self.running:
                for stage in [one for one in waiting if self._may_start(one)]:
                    if stage.artefact.exists():  # a stage that it needs has made it too
                        waiting.remove(stage)
                        self.complete.add(stage.name)
                        self._report(stage, f"made already ({stage.artefact})")
                    elif self._has_room(stage):
                        waiting.remove(stage)
                        self._start(stage)
                time.sleep(PAUSE)
                self._collect()
                self._show_progress()
        finally:
            for one in self.running:
                with contextlib.suppress(ProcessLookupError):  # it ended by itself just now
                    os.killpg(one.process.pid, signal.SIGTERM)
                one.process.wait()
            signal.signal(signal.SIGTERM, before)
        log.info("the logs are in %s", self.logs)

    def _may_start(self, stage: Stage) -> bool:
        return all(need in self.complete for need in stage.needs)

    def _has_room(self, stage: Stage) -> bool:
        return not self.running or sum(one.stage.cores for one in self.running) + stage.cores <= self.cores

    def _start(self, stage: Stage) -> None:
        self._report(stage, f"$ {typed(stage)}")
        log = self.logs / f"{stage.name.replace(' ', '-')}.log"
        with open(log, "ab") as handle:
            _own(handle, log)
            process = subprocess.Popen(
                resolve(stage.command),
                stdout=handle,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,  # a launcher and its workers end together
            )
        self.running.append(Running(stage, process, log, time.monotonic()))

    def _collect(self) -> None:
        for one in [one for one in self.running if one.process.poll() is not None]:
            self.running.remove(one)
            seconds = time.monotonic() - one.started
            if one.process.returncode != 0 or not one.stage.artefact.exists():
                raise self._failure(one)
            self.complete.add(one.stage.name)
            write_json(self.logs / "seconds.json", stage_seconds(self.logs) | {one.stage.name: round(seconds, 1)})
            self._report(one.stage, f"done in {duration(seconds)} ({self._total()}): {one.last_line()[:150]}")

    def _failure(self, one: Running) -> DeepSpecError:
        lines = one.log.read_text(errors="replace").replace("\r", "\n").splitlines()
        self._report(one.stage, "\n".join(["failed; the end of its log:", *lines[-LOG_TAIL:]]))
        problem = f"stage {one.stage.name!r} failed (exit code {one.process.returncode})"
        if one.process.returncode == 0:
            problem = f"stage {one.stage.name!r} ended without writing {one.stage.artefact}"
        remedy = f"fix the cause and run the same command again; alone: {typed(one.stage)}"
        return DeepSpecError(problem, file=one.log, remedy=remedy)

    def _total(self) -> str:
        """``6 of 13, about 3:10 left``: by the work of the stages that this start has done."""
        left = sum(one.work * one.cores for one in self.stages if one.name not in self.complete)
        done = sum(one.work * one.cores for one in self.stages if one.name in self.complete - self._before)
        text = f"{len(self.complete)} of {len(self.stages)}"
        return f"{text}, about {duration((time.monotonic() - self._begun) * left / done)} left" if left else text

    def _report(self, stage: Stage, text: str) -> None:
        log.info("[%2d/%d] %s: %s", self.numbers[stage.name], len(self.stages), stage.name, text)

    def _show_progress(self) -> None:
        """One line with the progress of the running stages, on a terminal once a second."""
        if not (reports() and self.running) or silent_for() < (1.0 if on_terminal() else PATIENCE - 1.0):
            return
        width, now = max(20, (shutil.get_terminal_size().columns - 1) // len(self.running) - 3), time.monotonic()
        parts = [f"{one.stage.name} {duration(now - one.started)}: {one.last_line()}" for one in self.running]
        show_passing(" | ".join(printable(part)[:width] for part in parts))


def _own(handle: BinaryIO, log: Path) -> None:
    """Empty the log, unless a process of an earlier run still writes it: every process of a stage shares this lock.

    Raises:
        DeepSpecError: one does; a second one would work on the same files.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        remedy = "wait until it has ended, or end it, and run the same command again"
        raise DeepSpecError("a process of an earlier run still works on this stage", file=log, remedy=remedy) from None
    handle.truncate(0)


def typed(stage: Stage) -> str:
    """The stage's command as a user types it with the virtual environment active."""
    return f"{' '.join(f'{name}={value}' for name, value in THREADS.items())} {shlex.join(stage.command)}"


def stage_seconds(logs: Path) -> dict[str, Any]:
    """Wall-clock seconds of every stage that has run."""
    path = logs / "seconds.json"
    return dict(read_json(path)) if path.exists() else {}


def resolve(command: tuple[str, ...]) -> list[str]:
    """The command by this interpreter, whatever the PATH says, and a free port for a launcher."""
    program, *words = command
    if program == LAUNCHER:
        words = ["-m", "deepspeed.launcher.runner", "--master_port", str(free_port()), *words]
    elif program == DEEPSPEC:
        words = ["-m", DEEPSPEC, *words]
    return [sys.executable, *words]


def _environment() -> dict[str, str]:
    """THREADS for a stage's process; and DeepSpeed need not look for an accelerator, and warn, where none is."""
    accelerator = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    return THREADS | accelerator | {"PYTHONUNBUFFERED": "1"} | os.environ
