"""A full and a read-only disk: one line and exit code 1, nothing left, and the same command then works."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from counts import Row
from processes import Ended
from stages import Place, Stage, contents

TOOLS = ("build", "cache export", "rebuild", "prepare", "regenerate", "recode", "train zero1_fp32", "consolidate",
         "export", "import", "evaluate")  # fmt: skip
PATIENCE = 120.0
SHARES = (0.0, 0.5, 0.9)  # of the bytes that a stage needs, that the disk has


class NoMount(Exception):
    """This machine does not allow mounting."""


@contextlib.contextmanager
def mounted(folder: Path, size: int) -> Iterator[None]:
    """A file system in memory of that many bytes.

    Raises:
        NoMount: it is not allowed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        raise NoMount
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    """Change a mounted file system."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def full_disk(stage: Stage, place: Place) -> Row:
    """Run a stage on disks with a part of the room that it needs, then on the same one with enough.

    Without the right to mount, files of limited size (RLIMIT_FSIZE) stand in for a full disk.

    Returns:
        The counts.
    """
    row, work = Row("disk", f"full: {stage.name}"), place.work("disk")
    stage.prepare(work)
    ended = stage.start(work).wait(PATIENCE)
    if ended.code:
        row.add({"lost": f"with room: {ended.last_words}"})
        return row
    wanted, needed = contents(work / "out"), _bytes(work / "out")
    for share in SHARES:
        row.add(_full(stage, place, max(4096, int(share * needed)), wanted, needed))
    return row


def read_only(stage: Stage, place: Place) -> Row:
    """Run a stage where nothing can be written; skipped for a user who may write everywhere and cannot mount."""
    row, work = Row("disk", f"read-only: {stage.name}"), place.work("disk")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    out = work / "out"
    try:
        with mounted(out, 64 << 20):
            before = _fill(stage, out)
            remount(out, "ro")
            ended = stage.start(work).wait(PATIENCE)
            row.add(_judge(ended, contents(out), before, before))
    except NoMount:
        if os.geteuid() == 0:
            row.skipped = "root writes into every folder, and a tmpfs cannot be mounted here"
            return row
        out.mkdir(exist_ok=True)
        before = _fill(stage, out)
        out.chmod(0o555)
        try:
            ended = stage.start(work).wait(PATIENCE)
            row.add(_judge(ended, contents(out), before, before))
        finally:
            out.chmod(0o755)
    return row


def _bytes(folder: Path) -> int:
    """Of all files of a folder on a disk of pages."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return sum(-(-size // 4096) * 4096 for size in sizes)


def _fill(stage: Stage, out: Path) -> dict[str, str]:
    if stage.before is not None:
        stage.before(out)
    return contents(out)


def _full(stage: Stage, place: Place, size: int, wanted: dict[str, str], needed: int) -> dict[str, str]:
    work = place.work("disk")
    shutil.rmtree(work, ignore_errors=True)
    out = work / "out"
    try:
        with mounted(out, 4 * needed + (1 << 20)):
            before = _fill(stage, out)
            remount(out, f"size={_bytes(out) + size}")
            ended = stage.start(work).wait(PATIENCE)
            verdicts = _judge(ended, contents(out), before, wanted)
            remount(out, f"size={4 * needed + (1 << 20)}")
            return verdicts if "right" not in verdicts else _again(stage, work, out, wanted, ended)
    except NoMount:
        out.mkdir(exist_ok=True)
        before = _fill(stage, out)
        largest = max(path.stat().st_size for path in place.given.rglob("*") if path.is_file())
        ended = stage.start(work, max_file=min(size, largest) // 8).wait(PATIENCE)
        verdicts = _judge(ended, contents(out), before, wanted)
        return verdicts if "right" not in verdicts else _again(stage, work, out, wanted, ended)


def _judge(ended: Ended, found: dict[str, str], before: dict[str, str], wanted: dict[str, str]) -> dict[str, str]:
    """The verdicts on a run that cannot have had enough room; one that had is right where its files are."""
    if ended.code == 0 and found == wanted and found != before:
        return {"right": "it had enough room"}
    verdicts = {}
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    if ended.has_traceback:
        verdicts["traceback"] = ended.last_words
    if ended.hung:
        verdicts["hang"] = f"{PATIENCE:g} s"
    if ended.code != 1 or len(lines) != 1:
        verdicts["lost"] = f"wanted exit code 1 and one line, found {ended.last_words}"
    if left := sorted(name for name in found if name not in before and name not in wanted and _temporary(name)):
        verdicts["left"] = f"{left[:3]}"
    return verdicts or {"right": lines[0]}


def _temporary(name: str) -> bool:
    """Whether a file has a name for the time of a job; finished parts, rows and checkpoints stay for the next start."""
    return name.endswith(".tmp") or any(part.startswith(".") for part in Path(name).parts)


def _again(stage: Stage, work: Path, out: Path, wanted: dict[str, str], first: Ended) -> dict[str, str]:
    """The same command with room: it ends in the same files."""
    stage = (stage.again and first.code != 0 and stage.again(out)) or stage
    second = stage.start(work).wait(PATIENCE)
    found = contents(out)
    other = sorted(name for name in wanted if found.get(name) != wanted[name])
    if second.code or other:
        return {"lost": f"with room again: {second.last_words if second.code else f'other files: {other[:3]}'}"}
    if extra := sorted(found.keys() - wanted.keys()):
        return {"left": f"with room again: {extra[:3]}"}
    return {"right": "with room again the same files"}
