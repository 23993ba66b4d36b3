"""Programs in processes of their own: one that ends, and a server that runs while a block does."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepspec.distributed import free_port
from deepspec.errors import DeepSpecError
from deepspec.files import read_json, write_json
from deepspec.http import NoReply, request

PACKAGE = Path(__file__).resolve().parents[1]
CHECKOUT = PACKAGE.parent  # of a package that is not installed
POLL = 1.0  # seconds between two questions for a server's health
GRACE = 60.0  # seconds that a server has to end by itself
ERRORS = ("Error:", "error:", "error, ", "not supported")  # marks of a line that names one


def run(
    command: Sequence[str],
    output: Path,
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
    folder: Path | None = None,
) -> None:
    """Run a program to its end, in ``folder`` or this process's.

    Its stdout and stderr go to the log ``output``; ``environment`` adds to this process's.

    Raises:
        DeepSpecError: it failed or took too long; ``found`` is the last error in its log.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "wb") as stream:
        try:
            code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False, timeout=timeout,
                                  cwd=folder, env=os.environ | dict(environment or {})).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            raise DeepSpecError("the program did not end", file=output, found=f"{timeout:.0f} s") from None
    if code:
        raise DeepSpecError(f"the program ended with exit code {code}", file=output, found=last_error(output))


def run_job(
    command: Sequence[str],
    work: Path,
    name: str,
    job: Mapping[str, Any],
    environment: Mapping[str, str],
    timeout: float,
) -> tuple[dict[str, Any], Path]:  # fmt: skip
    """The answer of a program that reads a job from one JSON file and writes its answer to another, and its log.

    Args:
        command: without the two files, which are added.
        work: folder of both files and of the log, named after ``name``.
        name: of the job.
        job: what it reads.
        environment: added to this process's; deepspec is on PYTHONPATH.
        timeout: seconds.

    Raises:
        DeepSpecError: it failed or took too long; ``found`` is the last error in its log.
    """
    question, answer, output = (work / f"{name}.{end}" for end in ("job.json", "out.json", "log"))
    write_json(question, dict(job))
    answer.unlink(missing_ok=True)
    run([*command, str(question), str(answer)], output, {"PYTHONPATH": python_path(work)} | dict(environment), timeout)
    return dict(read_json(answer)), output


def python_path(work: Path) -> str:
    """A folder, made in ``work``, from which an engine's own interpreter imports deepspec and nothing beside it."""
    folder = work / "python"
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / PACKAGE.name
    if link.resolve() != PACKAGE:
        link.unlink(missing_ok=True)  # to another one
        link.symlink_to(PACKAGE)
    return str(folder.resolve())


@contextmanager
def serve(
    command: Sequence[str], output: Path, environment: Mapping[str, str], timeout: float, health: str = "/health"
) -> Iterator[str]:
    """The URL of a server that runs until the block ends; see :func:`run`.

    Args:
        command: without ``--host`` and ``--port``, which are added.
        output: its log.
        environment: added to this process's.
        timeout: seconds that it has to become ready.
        health: the path that replies 200 once it is.

    Raises:
        DeepSpecError: it ended, or was not ready in time; ``found`` is the last error in its log.
    """
    url = f"http://127.0.0.1:{(port := free_port())}"
    with open(output, "wb") as stream:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=stream, stderr=subprocess.STDOUT,
            env=os.environ | dict(environment), start_new_session=True,
        )  # fmt: skip
    end = time.monotonic() + timeout
    try:
        while not _healthy(url + health):
            if process.poll() is not None or time.monotonic() > end:
                state = "did not become ready" if process.poll() is None else f"ended with code {process.returncode}"
                raise DeepSpecError(f"the server {state}", file=output, found=last_error(output))
            time.sleep(POLL)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _healthy(url: str) -> bool:
    try:
        return request("GET", url, 5).status == 200
    except NoReply:
        return False


def last_error(output: Path) -> str:
    """The last line of a log that names an error, or its last line."""
    lines = [line.strip() for line in output.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if any(mark in line for mark in ERRORS)]
    return (errors or lines or ["nothing"])[-1][-300:]
