"""What is asked: benchmarks (rows of tasks.yaml) from the hub or a folder, or any JSONL of {"turns": [...]}."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from deepspec.errors import EvaluationError, nearest
from deepspec.files import sha256_json

TABLE = Path(__file__).with_name("tasks.yaml")


@dataclass(frozen=True)
class TaskRow:
    """One row of tasks.yaml."""

    name: str
    hub: str
    samples: int
    config: str | None = None
    split: str = "test"
    files: tuple[str, ...] = ()
    prompt: str | None = None
    turns: str | None = None
    columns: dict[str, str] = field(default_factory=dict)

    def to_turns(self, row: dict[str, Any]) -> list[str]:
        """The user turns of one dataset row."""
        if self.turns is not None:
            return [str(turn) for turn in row[self.turns]]
        filled = {**row, **{key: row.get(key) or value for key, value in self.columns.items()}}
        return [(self.prompt or "").format_map(filled).strip()]


@dataclass(frozen=True)
class Task:
    """A task ready to run: its samples by their place in the source."""

    name: str
    source: str
    turns: dict[int, list[str]]  # place in the source -> user turns

    def digest(self) -> str:
        """SHA-256 over everything that is asked."""
        return sha256_json([[place, turns] for place, turns in sorted(self.turns.items())])


def known_tasks() -> dict[str, TaskRow]:
    """The rows of tasks.yaml."""
    raw = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return {
        name: TaskRow(name=name, **{key: tuple(value) if key == "files" else value for key, value in row.items()})
        for name, row in raw.items()
    }


def load_tasks(
    names: Sequence[str], folder: Path | None = None, samples: int | None = None, seed: int = 0
) -> list[Task]:
    """Load tasks by name, or JSONL files by path.

    Args:
        names: names of tasks.yaml or paths of JSONL files; commas separate too.
        folder: where ``<task>.jsonl`` is looked for before the hub is asked.
        samples: at most so many of each task; None takes the table's number, and all of a file of one's own.
        seed: which of a task's samples are taken, where not all are.

    Raises:
        EvaluationError: an unknown task, a task named twice, a malformed file, or a hub that cannot be reached.
    """
    rows = known_tasks()
    wanted = [part for name in names for part in name.split(",") if part]
    tasks = []
    for name in wanted:
        if name.endswith(".jsonl"):
            tasks.append(_take(Path(name).stem, name, read_turns(Path(name)), samples, seed))
        elif name not in rows:
            raise EvaluationError(
                "unknown task", key="--tasks", found=name, remedy=f"{nearest(name, rows)}; or a path ending in .jsonl"
            )
        else:
            local = None if folder is None else folder / f"{name}.jsonl"
            here = local is not None and local.exists()
            source, turns = (str(local), read_turns(local)) if here and local else (rows[name].hub, _fetch(rows[name]))
            tasks.append(_take(name, source, turns, samples or rows[name].samples, seed))
    twice = {task.name for task in tasks if [other.name for other in tasks].count(task.name) > 1}
    if twice:
        raise EvaluationError("a task comes twice", key="--tasks", found=sorted(twice), wanted="distinct names")
    if not tasks:
        raise EvaluationError("no task", key="--tasks", found=list(names), remedy=nearest("", rows))
    return tasks


def read_turns(path: Path) -> list[list[str]]:
    """The rows of a JSONL file of {"turns": [str, ...]}, or of conversations: the user's messages are then the turns.

    Raises:
        EvaluationError: no such file, or a line of another form, named by its number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise EvaluationError(f"cannot read the task ({problem})", file=path, wanted="JSONL of turns") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as problem:
            raise EvaluationError(f"not JSON ({problem})", file=path, key=f"line {number}") from None
        turns = _turns_of(row)
        if not turns or not all(isinstance(turn, str) and turn for turn in turns):
            raise EvaluationError(
                "a row needs turns", file=path, key=f"line {number}", found=str(row)[:80],
                wanted='{"turns": ["...", ...]} or {"messages": [{"role", "content"}, ...]}',
            )  # fmt: skip
        found.append(turns)
    if not found:
        raise EvaluationError("an empty task", file=path, wanted='rows of {"turns": [...]}')
    return found


def _turns_of(row: Any) -> list[Any] | None:
    if not isinstance(row, dict):
        return None
    if isinstance(row.get("turns"), list):
        return row["turns"]
    messages = row.get("messages")
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        return [message.get("content") for message in messages if message.get("role") == "user"]
    return None


def _take(name: str, source: str, turns: list[list[str]], samples: int | None, seed: int) -> Task:
    places = range(len(turns))
    if samples is not None and samples < len(turns):
        places = sorted(random.Random(f"{seed}/{name}").sample(places, samples))  # type: ignore[assignment]
    return Task(name, source, {place: turns[place] for place in places})


def _fetch(row: TaskRow) -> list[list[str]]:
    try:
        return [row.to_turns(one) for one in _rows(row)]
    except KeyError as missing:
        raise EvaluationError("the dataset lacks a column", file=row.hub, key=missing.args[0]) from None
    except (OSError, ValueError, ConnectionError, RuntimeError) as problem:
        first_line = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise EvaluationError(
            f"cannot load the task from the hub ({first_line})",
            file=row.hub,
            key=row.name,
            remedy=f"put {row.name}.jsonl into a folder and name it with --tasks-folder",
        ) from None


def _rows(row: TaskRow) -> Iterator[dict[str, Any]]:
    if row.files:
        from huggingface_hub import hf_hub_download

        for name in row.files:
            path = hf_hub_download(row.hub, name, repo_type="dataset")
            with open(path, encoding="utf-8") as lines:
                yield from (json.loads(line) for line in lines)
    else:
        from datasets import load_dataset

        yield from load_dataset(row.hub, row.config, split=row.split)
