"""A command in a fork ends as one in an interpreter of its own does."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
from pathlib import Path

import fork_server
import pytest

PROGRAMS = {
    "prints": "import sys; print(1, sys.argv[1:]); print(2, file=sys.stderr)",
    "exit code": "raise SystemExit(3)",
    "last words": "import sys; sys.exit('no')",
    "traceback": "{}['key']",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "at exit": "import atexit; atexit.register(print, 'end')",
    "thread": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()",
    "folder": "import os; print(os.getcwd(), os.environ['MINE'], 'HOME' in os.environ)",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_fork_ends_as_an_interpreter_does(name: str, tmp_path: Path) -> None:
    command, environment = [sys.executable, "-c", PROGRAMS[name], "a", "b"], {"MINE": "x"}
    wanted = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    found = fork_server.run(command, environment, tmp_path)
    assert (found.returncode, found.stdout) == (wanted.returncode, wanted.stdout)
    assert found.stderr.splitlines()[-1:] == wanted.stderr.splitlines()[-1:]


def test_a_signal_ends_a_fork_and_its_code_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    job = fork_server.start(command, subprocess.DEVNULL, subprocess.DEVNULL)
    assert job.poll() is None
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == -signal.SIGTERM


def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    program = "import os, time; os.environ['RANK'] == '1' and 1 / 0; time.sleep(60)"
    done = fork_server.run_ranks([sys.executable, "-c", program], 2, 1, {})
    assert done.returncode != 0
    assert "ZeroDivisionError" in done.stdout


def test_a_fork_of_the_test_itself_leaves_the_server_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ""]
    assert fork_server.run(command).returncode == 0
    child = os.fork()
    if child == 0:
        atexit._run_exitfuncs()
        os._exit(0)
    os.waitpid(child, 0)
    assert fork_server.run(command).returncode == 0
