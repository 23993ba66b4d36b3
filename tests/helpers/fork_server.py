"""Python commands in forks of a process that has imported torch already: seconds less each than an interpreter's start.

What a test says of the command alone (exit code, output, files, signals) is the same; what is about an interpreter's
start, or about a launcher, starts a real one. Each process of pytest has a server of its own, in one thread and without
a process group, which ends with it.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = (
    "deepspec.training.run", "deepspec.evaluate.run", "deepspec.cache.build", "deepspec.export.consolidate",
    # what these import late: DeepSpeed's optimizers the compiler, transformers the classes of a model type
    "deepspeed.runtime.zero.muon.muon_optimizer", "transformers.models.qwen3.modeling_qwen3", "pytest",
)  # fmt: skip
OWN = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}  # read when torch is imported


class Forked:
    """A command that runs; used as a ``subprocess.Popen`` is."""

    def __init__(
        self, command: Sequence[object], out: IO[Any] | int, err: IO[Any] | int, env: Mapping[str, str], cwd: object
    ) -> None:
        words = [str(word) for word in command]
        if words[0] != sys.executable:
            raise ValueError(f"not a command of this interpreter: {words[0]}")
        self.returncode: int | None = None
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(_address())
        question = json.dumps({"words": words[1:], "env": dict(env), "cwd": str(cwd)}).encode()
        with open(os.devnull, "wb") as nothing:
            handles = [nothing if one == subprocess.DEVNULL else one for one in (out, err)]
            socket.send_fds(self._socket, [len(question).to_bytes(4, "big")], [one.fileno() for one in handles])
        self._socket.sendall(question)
        self._answers = self._socket.makefile("rb", buffering=0)
        self.pid = int(self._answers.readline())

    def poll(self) -> int | None:
        """The exit code (-N: ended by signal N), None while it runs."""
        if self.returncode is None and select.select([self._socket], [], [], 0)[0]:
            self.returncode = int(self._answers.readline())
            self._socket.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end."""
        if self.returncode is None and not select.select([self._socket], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("a forked command", timeout or 0.0)
        code = self.poll()
        return -1 if code is None else code

    def send_signal(self, number: int) -> None:
        """Send it a signal; nothing where it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def start(
    command: Sequence[object],
    stdout: IO[Any] | int,
    stderr: IO[Any] | int,
    env: Mapping[str, str] | None = None,
    cwd: object = ROOT,
) -> Forked:
    """Start ``[sys.executable, FILE or -m MODULE, ...]`` in a session of its own."""
    return Forked(command, stdout, stderr, os.environ if env is None else env, cwd)


def run(
    command: Sequence[object],
    env: Mapping[str, str] | None = None,
    cwd: object = ROOT,
    timeout: float = 300.0,
) -> subprocess.CompletedProcess[str]:
    """Run such a command to its end, as ``subprocess.run(..., capture_output=True, text=True)`` does."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        job = start(command, out, err, env, cwd)
        try:
            code = job.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            raise
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(list(map(str, command)), code, *texts)


def run_ranks(
    command: Sequence[object], processes: int, port: int, env: Mapping[str, str], timeout: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """Run a command as so many ranks of one host, without a launcher; the others are killed when one fails."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    where["LOCAL_WORLD_SIZE"] = where["WORLD_SIZE"]
    with tempfile.TemporaryFile() as out:
        ranks = [
            start(command, out, out, {**env, **where, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(processes)
        ]
        end = time.monotonic() + timeout
        while any(rank.poll() is None for rank in ranks):
            if any(rank.poll() for rank in ranks) or time.monotonic() > end:
                for rank in ranks:
                    rank.kill()
            time.sleep(0.01)
        out.seek(0)
        text = out.read().decode()
    code = next((rank.returncode for rank in ranks if rank.returncode), 0)
    return subprocess.CompletedProcess(list(map(str, command)), code, text, "")


@functools.cache
def _address() -> str:
    """The socket of the server of this process, which is started first."""
    folder, owner = tempfile.mkdtemp(prefix="fork-"), os.getpid()
    address = f"{folder}/socket"
    environment = {**os.environ, **OWN}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        environment.pop(name, None)
    command = [sys.executable, str(Path(__file__)), address]
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    if server.stdin is None or server.stdout is None or server.stdout.readline() != b"ready\n":
        raise RuntimeError("no fork server")

    def end(stdin: IO[bytes] = server.stdin) -> None:
        if os.getpid() == owner:  # a test's own fork of this process may come here too
            stdin.close()
            server.wait()
            shutil.rmtree(folder)

    atexit.register(end)
    return address


# -- the server --------------------------------------------------------------------------------------------------------


def _serve(address: str) -> None:
    """Fork a keeper for every connection until standard input ends."""
    import importlib

    sys.path.insert(0, str(ROOT))
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # a job's collections, of which DeepSpeed asks for many, go over its own objects
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen(64)
    print("ready", flush=True)
    while True:
        ready = select.select([listening, 0], [], [], 1.0)[0]
        while _reaped():
            pass
        if 0 in ready:
            return
        if listening in ready:
            connection = listening.accept()[0]
            if os.fork() == 0:
                listening.close()
                os._exit(_keep(connection))
            connection.close()


def _reaped() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


def _keep(connection: socket.socket) -> int:
    """Fork the job, tell its process id and, when it has ended, its exit code."""
    length, handles, _, _ = socket.recv_fds(connection, 4, 2)
    size, question = int.from_bytes(length, "big"), b""
    while len(question) < size:
        question += connection.recv(size - len(question))
    job = os.fork()
    if job == 0:
        connection.close()
        os._exit(_become(json.loads(question), handles))
    for handle in handles:
        os.close(handle)
    connection.sendall(f"{job}\n".encode())
    _, status = os.waitpid(job, 0)
    try:
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    except OSError:  # who asked has ended
        return 1
    return 0


def _become(job: dict[str, Any], handles: list[int]) -> int:
    """Run the command as an interpreter would; its last steps are taken as well."""
    os.setsid()
    atexit._clear()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, handle in enumerate((nothing, *handles)):
        os.dup2(handle, number)
        os.close(handle)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    tempfile.tempdir = None  # asked for again, under the new TMPDIR
    code: Any = 1
    try:
        _execute(job["words"])
        code = 0
    except SystemExit as end:
        code = end.code
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code if isinstance(code, int) else int(code is not None)


def _execute(words: list[str]) -> None:
    import runpy

    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path[0] = str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    _serve(sys.argv[1])
