"""Signs of life: what every command says before it imports what is slow, while it is silent, and at its end."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_signs
import pytest

from deepspec import log, progress
from deepspec.arguments import Parser
from deepspec.cli import VERBS
from deepspec.errors import DeepSpecError, run_main
from deepspec.progress import Progress, byte_size, comes_next, duration, made, waiting

ROOT = Path(__file__).parents[2]
FIRST = """
import io, json, runpy, shlex, sys
from deepspec import cli
from deepspec.arguments import parser_of
from deepspec.errors import run_main

class Opened(BaseException):
    pass

class Terminal(io.StringIO):
    def isatty(self):
        return True
    def write(self, text):
        raise Opened(text)

def first(words, main):
    sys.argv, sys.stderr, sys.stdout = words, Terminal(), Terminal()
    try:
        main()
    except Opened as line:
        found.append((str(line), [name for name in ("torch", "transformers", "deepspeed") if name in sys.modules]))
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__

found = []
for verb in cli.VERBS:
    example = parser_of(cli.function_of(verb), verb).example
    first(["deepspec", *verb.split(), *shlex.split(example)], lambda: run_main(cli.main))
for path in ("launch/train.py", "tools/build_cache.py"):
    first([path, "--recipe", "dspark_qwen3_4b", "--output", "o", "--data", "d"][: 3 if "launch" in path else 7],
          lambda: runpy.run_path(path, run_name="__main__"))
first(["x", "--target", "t", "--draft", "d"], lambda: runpy.run_module("deepspec.evaluate", run_name="__main__"))
from deepspec.recipe import load_recipe
load_recipe("dspark_qwen3_4b")
found.append(("a recipe is read", [name for name in ("transformers", "deepspeed") if name in sys.modules]))
print(json.dumps(found))
"""


def test_the_first_line_comes_before_the_slow_imports() -> None:
    """What takes seconds is the import of torch and what needs it; the line is out before any of it begins."""
    import json

    done = subprocess.run([sys.executable, "-c", FIRST], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    wanted = [f"deepspec {verb}: " for verb in VERBS]
    wanted += ["python launch/train.py: ", "python tools/build_cache.py: ", "python -m deepspec.evaluate: "]
    wanted += ["a recipe is read"]
    assert [text for (text, _), start in zip(found, wanted, strict=True) if not text.startswith(start)] == []
    assert [text for text, imported in found if imported] == []


def command(monkeypatch: pytest.MonkeyPatch, work: Any, *words: str, **parser: Any) -> None:
    """Run a command of one option as an entry point."""

    def main() -> int | None:
        made = Parser(prog="deepspec try", description="Try it. And more.", **parser)
        made.add_argument("--data", nargs="*", default=[])
        made.add_argument("--output")
        return work(made.parse_args())

    monkeypatch.setattr(sys, "argv", ["deepspec try", *words])
    monkeypatch.setattr(progress.time, "monotonic", lambda: 100.0)
    with pytest.raises(SystemExit):
        run_main(main)


def test_a_command_says_what_it_reads_what_it_made_and_what_comes_next(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    Path("in/a").write_bytes(bytes(1500))
    words = ("--data", "in", "nothing", "x", "y", "--output", "out")
    following = "deepspec next {output} {recipe}"
    command(monkeypatch, lambda given: Path("out").write_bytes(bytes(12)) and None, *words, following=following)
    assert tuple(capsys.readouterr()) == ("", (
        "deepspec try: Try it.\n  data in (1.5 kB) nothing x and 1 more -> out\n"
        "made out (12 bytes) in 0 ms; next: deepspec next out RECIPE\n"
    ))  # fmt: skip
    command(monkeypatch, lambda given: made("s3://there"))
    assert capsys.readouterr().err == "deepspec try: Try it.\nmade s3://there in 0 ms\n"
    command(monkeypatch, lambda given: comes_next("deepspec next"), following="deepspec other")
    assert capsys.readouterr().err.endswith("done in 0 ms; next: deepspec next\n")
    command(monkeypatch, lambda given: None, "--output", "absent")
    assert capsys.readouterr().err.endswith("-> absent\ndeepspec try: done in 0 ms\n")


def test_who_asked_for_silence_or_for_data_gets_it(monkeypatch, capsys) -> None:
    command(monkeypatch, lambda given: print("data"), "--quiet")
    command(monkeypatch, lambda given: print("data"), piped=True)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    command(monkeypatch, lambda given: print("data"))
    assert tuple(capsys.readouterr()) == ("data\ndata\ndata\n", "")


def test_a_command_that_fails_ends_with_its_error(monkeypatch, capsys) -> None:
    def refuse(given: object) -> None:
        raise DeepSpecError("no")

    command(monkeypatch, refuse)
    assert capsys.readouterr().err == "deepspec try: Try it.\nerror: no\n"
    command(monkeypatch, lambda given: 1)
    assert capsys.readouterr().err == "deepspec try: Try it.\n"


def test_without_a_command_nothing_is_said(capsys) -> None:
    Parser(prog="x").parse_args([])
    with waiting("loading", 10):
        made("y")
    assert tuple(capsys.readouterr()) == ("", "")


def test_a_silent_command_says_what_it_waits_for(monkeypatch, capsys) -> None:
    """The watch looks three times: nothing was silent for long, a job waits, no job is there."""
    silences = iter([1.0, 6.0, 7.0])
    looks = iter([False, False, False, True])
    now = progress._Command("deepspec try", {}, "")
    now.over = SimpleNamespace(wait=lambda _: next(looks))
    monkeypatch.setattr(progress, "_commands", [now])
    monkeypatch.setattr(progress, "_jobs", {})
    monkeypatch.setattr(progress, "silent_for", lambda: next(silences))
    counts = iter([100, 350])
    with waiting("loading T", 1000, lambda: next(counts)) as job:
        job._start -= 5
        monkeypatch.setattr(progress.time, "monotonic", lambda begun=job._start: begun + 5)
        now.begun = job._start
        silences_of_job = iter([False, False, True])
        now.over = SimpleNamespace(wait=lambda _: next(silences_of_job))
        now.watch()
    now.over = SimpleNamespace(wait=lambda _: next(looks))
    silences = iter([7.0, 1.0, 1.0])
    now.watch()
    assert capsys.readouterr().err.splitlines() == [
        "loading T: 250 bytes of 1 kB, 50 bytes/s, 0:00:15 left", "deepspec try: 0:00:05",
    ]  # fmt: skip


def test_on_a_terminal_a_line_takes_the_place_of_the_one_before(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    job = Progress("build", 4, noun="parts", every=0.0)
    job.add(2, 0)
    log.show("stays", sys.stdout)
    job.finish()
    out, err = capsys.readouterr()
    assert out == "stays\n"
    assert err.startswith("[##########          ] build: 2/4 parts, 0 tokens/s")
    assert "\r\x1b[Kbuild: 2 parts in 0:00:00" in err


def test_units_are_sensible() -> None:
    assert [byte_size(n) for n in (12, 1500, 312e6, 29.2e12, 47_110e12)] == [
        "12 bytes", "1.5 kB", "312 MB", "29.2 TB", "47,110 TB",
    ]  # fmt: skip
    assert [duration(n) for n in (0.0013, 0.3, 41, 3723, 1e6)] == ["1.3 ms", "0.3 s", "41 s", "1:02:03", "11.6 days"]


@pytest.mark.slow
def test_every_verb_under_a_pseudo_terminal(tmp_path: Path) -> None:
    """The pipeline as a user runs it: no traceback, no line of a library, the last line names what was made."""
    bench_signs.inputs(tmp_path)
    found = [
        bench_signs.record(one, tmp_path, 20.0 if one.verb in bench_signs.LONG else 900.0)
        for one in bench_signs.commands()
    ]
    assert [(one.command.verb, one.faults, one.text[-1000:]) for one in found if one.faults] == []
    assert not [one.command.verb for one in found if not one.lines[0].startswith(f"deepspec {one.command.verb}: ")]
    assert os.path.isdir(tmp_path / "draft")


def test_ctrl_c_ends_a_command_with_a_word(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_main(interrupted)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "stopped\n"


def test_no_thread_of_it_outlives_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has called torch, and lives when the interpreter ends, aborts the process after its last line."""
    alive = []
    command(monkeypatch, lambda given: alive.extend(one.name for one in threading.enumerate()))
    assert "signs of life" in alive
    assert "signs of life" not in [one.name for one in threading.enumerate()]
