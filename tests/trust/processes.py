"""Commands as processes that can be killed: forked from here, so that one costs no import, or under a real launcher."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspec.distributed import RANK_VARIABLES

ROOT = Path(__file__).resolve().parents[2]
TAG = "DEEPSPEC_TRUST"  # an environment variable that every process of a launched group inherits
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")
OURS = re.compile(r'File "/.*/(deepspec|tools|launch|tests/trust)/')  # a line of a traceback
UNSET = (*RANK_VARIABLES, "OPENAI_API_KEY")
SET = {
    "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu",
    "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """A process that has ended: its exit code (-N: killed by signal N), what it printed, whether it had to be ended."""

    code: int
    stdout: str
    stderr: str
    hung: bool = False

    @property
    def has_traceback(self) -> bool:
        """Whether it printed a traceback with a line of ours in it; a launcher's own does not count."""
        return "Traceback (most recent call last)" in self.stderr and bool(OURS.search(self.stderr))

    @property
    def last_words(self) -> str:
        """The last line on stderr."""
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        return f"exit code {self.code}: {lines[-1][:300] if lines else 'no word'}"


class Running:
    """A process, and all that it started, until it has ended."""

    def __init__(self, pid: int, folder: Path, tag: str | None = None) -> None:
        self.pid, self.folder, self.tag = pid, folder, tag
        self._code: int | None = None

    def alive(self) -> bool:
        """Whether the first process has not ended."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code is None

    def group(self) -> list[int]:
        """Every process of a launched group that is alive, the launcher too."""
        if self.tag is None:
            return [self.pid] if self.alive() else []
        return [pid for pid, environment in _environments() if environment.get(TAG) == self.tag]

    def ranks(self) -> list[int]:
        """The ranks of a launched group; of a forked command itself."""
        if self.tag is None:
            return self.group()
        found = [(pid, one) for pid, one in _environments() if one.get(TAG) == self.tag]
        return [pid for pid, one in found if any(name in one for name in RANKS) and pid != self.pid]

    def signal(self, number: int, pids: Iterable[int]) -> None:
        """Send a signal to processes of the group."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, seconds: float) -> Ended:
        """Wait for the end of all of it; what lives longer is killed, and the end counts as hung."""
        end = time.monotonic() + seconds
        while (self.alive() or (self.tag is not None and self.group())) and time.monotonic() < end:
            time.sleep(0.01 if self.tag is None else 0.1)
        hung = self.alive() or (self.tag is not None and bool(self.group()))
        while left := self.group():
            self.signal(signal.SIGKILL, left)
            self.alive()
            time.sleep(0.05)
        while self.alive():
            time.sleep(0.01)
        texts = [(self.folder / name).read_text(errors="replace") for name in ("stdout", "stderr")]
        return Ended(self._code if self._code is not None else -signal.SIGKILL, *texts, hung)


def _environments() -> Iterator[tuple[int, dict[str, str]]]:
    """(pid, environment) of every process of ours that is no zombie."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "environ").read_bytes().decode(errors="replace")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if TAG in text and state != "Z":
            yield int(folder.name), dict(one.partition("=")[::2] for one in text.split("\0") if one)


def environment(temporary: Path) -> dict[str, str]:
    """The environment of a command: one thread, no GPU, nothing fetched, its temporary files in a folder of its own."""
    kept = {key: value for key, value in os.environ.items() if key not in UNSET}
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return kept | SET | {"TMPDIR": str(temporary), "XDG_CACHE_HOME": str(temporary.parent.parent / "xdg")}


def fork(work: Callable[[], int | None], logs: Path, temporary: Path, max_file: int | None = None) -> Running:
    """Run ``work`` in a fork of this process, in a session of its own, as an entry point is run.

    Args:
        work: its result is the exit code.
        logs: folder of its stdout and stderr.
        temporary: its TMPDIR.
        max_file: bytes that a file may grow to (RLIMIT_FSIZE).
    """
    for folder in (logs, temporary):
        folder.mkdir(parents=True, exist_ok=True)
    for name in ("stdout", "stderr"):
        (logs / name).write_bytes(b"")
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Running(pid, logs)
    code = 1
    try:
        _become(logs, temporary, max_file)
        code = _finish(work)
    finally:
        os._exit(code)


def _become(logs: Path, temporary: Path, max_file: int | None) -> None:
    os.setsid()
    atexit._clear()  # what the parent registered is the parent's
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    for number, name in ((1, "stdout"), (2, "stderr")):
        handle = os.open(logs / name, os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    given = environment(temporary)
    os.environ.clear()
    os.environ.update(given)
    os.chdir(ROOT)
    import tempfile

    tempfile.tempdir = None  # asked for again, under the new TMPDIR
    _unshare_bars()
    if max_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails with EFBIG, as Python has it by default
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file, max_file))


def _unshare_bars() -> None:
    """Give tqdm a lock of this process: its own is shared by all forks, and a killed one may hold it for ever."""
    from tqdm import tqdm

    kinds, lock = [tqdm], threading.RLock()
    for kind in kinds:  # each class may have a lock of its own
        kinds += kind.__subclasses__()
        kind.set_lock(lock)


def _finish(work: Callable[[], int | None]) -> int:
    """The exit code; the interpreter's own last steps are taken as well, so that a thread that never ends is seen."""
    try:
        code: Any = work()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    return code if isinstance(code, int) else int(code is not None)


def launch(words: Sequence[str], logs: Path, temporary: Path) -> Running:
    """Start a command with all that it will start, tagged so that every process of it can be found."""
    for folder in (logs, temporary):
        folder.mkdir(parents=True, exist_ok=True)
    tag = uuid.uuid4().hex
    with open(logs / "stdout", "wb") as out, open(logs / "stderr", "wb") as err:
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment(temporary) | {TAG: tag}, stdout=out, stderr=err, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
    process.returncode = 0  # waited for by Running, not by Popen
    return Running(process.pid, logs, tag)


def each(
    count: int, work: Callable[[int], dict[str, Any]], logs: Path, seconds: float, memory: int = 8 << 30
) -> Iterator[dict[str, Any]]:
    """``work(i)`` for every i below ``count``, in order, in forks of this process: it may crash, hang or eat memory.

    Args:
        work: returns a JSON object.
        logs: folder of the forks' stdout, stderr and temporary files.
        seconds: that one item may take; then the fork is killed, and the next item begins in another one.
        memory: bytes beyond those of this process that a fork may take (RLIMIT_AS).

    Yields:
        What the work returned; {"verdict": "hang"} or {"verdict": "traceback", "note"} for an item that did not return.
    """
    done = 0
    while done < count:
        reading, writing = os.pipe()

        def items(first: int = done, pipe: int = writing) -> None:
            now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (now + memory, now + memory))
            for number in range(first, count):
                os.write(pipe, json.dumps(work(number)).encode() + b"\n")

        running = fork(items, logs, logs / "tmp")
        os.close(writing)
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            buffer, hung = b"", False
            while True:
                if not select.select([pipe], [], [], seconds)[0]:
                    hung = True
                    break
                piece = pipe.read(1 << 16)
                if not piece:
                    break
                *lines, buffer = (buffer + piece).split(b"\n")
                for line in lines:
                    done += 1
                    yield json.loads(line)
        running.signal(signal.SIGKILL, running.group())
        ended = running.wait(10)
        if done < count:
            done += 1
            yield {"verdict": "hang" if hung else "traceback", "note": f"{seconds:g} s" if hung else ended.last_words}
