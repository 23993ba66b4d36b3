"""Signs of life of every verb, recorded under a pseudo-terminal: first output, longest silence, last line.

    python benchmarks/bench_signs.py [--only VERB ...] [--json FILE]

The verbs run in the order of the pipeline on the trust suite's tiny target, so that each makes what later ones read.
A verb that needs hours, another engine or the hub is ended after ``--long`` seconds: its last line is not judged.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bars import Bars, at_most, write_bars
from start import Benchmark

from deepspec.arguments import POSITIVE
from deepspec.cli import VERBS
from deepspec.errors import run_main
from deepspec.tables import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / name) for name in ("helpers", "trust")]
DEMOS = ("real", "finetune", "ablate", "drafters", "results")
LONG = ("quickstart", *(f"demo {name}" for name in DEMOS), "serve-check", "push")
FIRST, SILENCE = 2.0, 10.0  # seconds
CONTROL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
FOREIGN = re.compile(r"\w+Warning\b|\[WARNING\]|\[INFO\]|\[W\d|\[rank\d|it/s\]|\d%\|")  # of a library


@dataclass(frozen=True)
class Command:
    """One verb with its words, and what it makes, if it makes something."""

    verb: str
    words: tuple[object, ...]
    makes: object = None
    typed: str = ""  # into it, once it has said something


@dataclass(frozen=True)
class Recorded:
    """What a terminal saw of a command; the code is None where it was ended."""

    command: Command
    code: int | None
    first: float  # seconds until the first output
    silence: float  # the longest, from start to end
    text: str

    @property
    def lines(self) -> list[str]:
        """What stood on the terminal, without what was written over."""
        shown = CONTROL.sub("", self.text.replace("\r\n", "\n"))
        return [line.rpartition("\r")[2] for line in shown.split("\n") if line.rpartition("\r")[2].strip()]

    @property
    def faults(self) -> list[str]:
        """What should not be there."""
        found = ["a traceback"] if "Traceback (most recent call last)" in self.text else []
        found += [f"of a library: {line}" for line in self.lines if FOREIGN.search(line)]
        if self.command.verb not in LONG:
            if self.code != 0:
                found.append(f"exit code {self.code}")
            last, makes = (self.lines or [""])[-1], self.command.makes
            if not (str(makes) in last if makes else last.startswith(f"deepspec {self.command.verb}: done in")):
                found.append("the last line does not name what was made")
        return found


def record(command: Command, folder: Path, seconds: float) -> Recorded:
    """Run a command under a pseudo-terminal; after ``seconds`` it is asked to end."""
    own, other = pty.openpty()
    words = [sys.executable, "-m", "deepspec", *command.verb.split(), *map(str, command.words)]
    begun = last = time.monotonic()
    process = subprocess.Popen(
        words, cwd=folder, stdin=other, stdout=other, stderr=other, env=environment(folder), start_new_session=True
    )
    os.close(other)
    first, silence, data, ended = 0.0, 0.0, b"", False
    while True:
        ready = select.select([own], [], [], 0.2)[0]
        if not ended and time.monotonic() - begun > seconds:
            ended = True
            os.killpg(process.pid, signal.SIGTERM)
        if not ready:
            if process.poll() is not None:
                break
            continue
        try:
            piece = os.read(own, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not data and command.typed:
            os.write(own, command.typed.encode())
        now = time.monotonic()
        first, silence, last = first or now - begun, max(silence, now - last), now
        data += piece
    code = process.wait()
    os.close(own)
    silence = max(silence, time.monotonic() - last)
    return Recorded(command, None if ended else code, first, silence, data.decode(errors="replace"))


def environment(folder: Path) -> dict[str, str]:
    """As the trust suite's: one thread, nothing fetched; this checkout's code."""
    from processes import SET, UNSET

    kept = {key: value for key, value in os.environ.items() if key not in UNSET}
    return kept | SET | {"PIP_NO_INDEX": "1", "XDG_CACHE_HOME": str(folder / "xdg"), "TERM": "xterm", "COLUMNS": "160"}


def inputs(folder: Path) -> None:
    """A tiny target, conversations, a task and a recipe."""
    import cache_tools
    import torch
    import yaml
    from evaluate_tools import write_task
    from stages import recipe

    cache_tools.make_target(folder / "target", torch.float32)
    cache_tools.write_conversations(folder / "data.jsonl", cache_tools.conversation_rows(20), {})
    cache_tools.write_conversations(folder / "more.jsonl", cache_tools.conversation_rows(12, seed=1), {})
    write_task(folder / "tasks" / "short.jsonl", [["What is one?"], ["What is two?"]])
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(folder)))


def commands() -> list[Command]:
    """Every verb, each after those that make its inputs."""
    recipe, half = ("--recipe", "recipe.yaml"), ("--set", "target.dtype=bfloat16")
    build = (*recipe, "--data", "data.jsonl", "--output")
    measure = ("--target", "target", "--draft", "draft", "--tasks", "tasks", "--max-new-tokens", 12, "--output")
    found = [
        Command("recipes list", ()),
        Command("recipes show", ("dspark_qwen3_4b",)),
        Command("recipes copy", ("dspark_qwen3_4b", "copied"), "copied/dspark_qwen3_4b.yaml"),
        Command("completion", ("bash",)),
        Command("prepare", ("--source", "data.jsonl", "--held-out", 0.4, "--output", "prompts"), "prompts"),
        Command("regenerate", (*recipe, "--prompts", "prompts/train.jsonl", "--max-failed", 1, "--output", "a.jsonl"),
                "a.jsonl"),
        Command("inspect", ("data.jsonl", *recipe)),
        Command("estimate", (*recipe, "--data", "data.jsonl")),
        Command("cache estimate", ("--tokens", 1e9, "--hidden-size", 4096)),
        Command("cache build", (*build, "cache"), "cache"),
        Command("train", recipe, "run"),
        Command("consolidate", ("run", "draft"), "draft"),
        Command("finetune", (*recipe, "--init", "draft", "--set", "output=tuned"), "tuned"),
        Command("evaluate", (*measure, "r0", "--temperature", 1), "r0"),
        Command("evaluate", (*measure, "r1", "--temperature", 1, "--seed", 1), "r1"),
        Command("chat", ("--target", "target", "--draft", "draft", "--max-new-tokens", 12), typed="One?\n/exit\n"),
        Command("compare", ("r0", "r1")),
        Command("calibrate", ("--draft", "draft", "--results", "r0", "r1"), "draft/sts.json"),
        Command("study", (*measure, "study", "--concurrency", 1, 2), "study"),
        Command("export", ("draft", "served", "--format", "vllm"), "served"),
        Command("import", ("served", "imported", "--target", "target"), "imported"),
        Command("cache append", (*recipe, "--data", "more.jsonl", "--output", "cache"), "cache"),
        Command("cache inspect", ("cache",)),
        Command("cache verify", ("cache",)),
        Command("cache recode", ("cache", "near", "--level", "near"), "near"),
        Command("cache build", (*build, "cache16", *half), "cache16"),
        Command("cache export", ("cache16", "raw"), "raw"),
        Command("cache import", ("raw", "ours", *recipe, *half), "ours"),
        Command("push", ("served", "owner/draft")),
        *(Command(verb, ()) for verb in LONG if verb != "push"),
    ]  # fmt: skip
    missing = set(VERBS) - {one.verb for one in found}
    if missing:
        raise ValueError(f"no command of {sorted(missing)}")
    return found


def bars_of(found: list[Recorded]) -> Bars:
    """The bars of the issue."""
    return {
        "seconds until the first output": at_most(max(one.first for one in found), FIRST),
        "seconds of silence": at_most(max(one.silence for one in found), SILENCE),
        "tracebacks, library lines, last lines without the output": at_most(sum(len(one.faults) for one in found), 0),
    }


def measure(given: argparse.Namespace, folder: Path) -> list[Recorded]:
    """Record the verbs one after the other, a line each as they end."""
    inputs(folder)
    found = []
    for command in commands():
        if given.only and command.verb not in given.only:
            continue
        found.append(record(command, folder, given.long if command.verb in LONG else given.limit))
        one = found[-1]
        print(
            f"{command.verb}: {one.first:.2f} s, {one.silence:.1f} s | {one.lines[-1] if one.lines else ''}", flush=True
        )
        print("".join(f"  {fault}\n" for fault in one.faults), end="", flush=True)
    return found


def main() -> int:
    """Record, print, write."""
    bars = f"first output within {FIRST:g} s, no silence above {SILENCE:g} s, no library's lines"
    parser = Benchmark(__doc__, bars=bars, takes="10 to 20 minutes")
    parser.add_argument("--only", action="append", choices=tuple(VERBS), help="this verb; may be repeated")
    parser.add_argument("--long", type=POSITIVE, default=30.0, help="seconds of a verb that needs more than is here")
    parser.add_argument("--limit", type=POSITIVE, default=600.0, help="seconds of every other verb")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="deepspec-signs-") as folder:
        found = measure(given, Path(folder))
    rows = [
        [one.command.verb, f"{one.first:.2f}", f"{one.silence:.1f}", (one.lines or [""])[-1][:100], len(one.faults)]
        for one in found
    ]
    print(Table(["verb", "first output s", "longest silence s", "last line", "faults"], rows).markdown())
    bars = bars_of(found)
    write_bars(given.json, bars)
    return int(not all(bar["holds"] for bar in bars.values()))


if __name__ == "__main__":
    run_main(main)
