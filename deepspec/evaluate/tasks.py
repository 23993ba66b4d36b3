"""Benchmark prompts: nine tasks of the hub, or any local JSONL of ``{"turns": [...]}``."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deepspec.errors import EvaluationError, nearest
from deepspec.files import sha256_json

TASK_FILE = Path(__file__).with_name("tasks.yaml")


@dataclass(frozen=True)
class Task:
    """A named list of prompts."""

    name: str
    prompts: tuple[tuple[str, ...], ...]  # the turns of each
    source: str

    @property
    def digest(self) -> str:
        """SHA-256 of the prompts."""
        return sha256_json([list(turns) for turns in self.prompts])


def load_tasks(names: Sequence[str], samples: int | None, seed: int) -> list[Task]:
    """Load tasks by name, by file, or all files of a folder.

    Args:
        names: registered names, ``*.jsonl`` files, folders of such, or empty for all registered tasks.
        samples: at most so many prompts of each task; None takes the task's own count.
        seed: which prompts are taken where there are more.

    Raises:
        EvaluationError: an unknown name, a missing file, or a malformed line, named by its number.
    """
    known = yaml.safe_load(TASK_FILE.read_text(encoding="utf-8"))
    tasks: list[Task] = []
    for name in names or list(known):
        path = Path(name)
        if path.is_dir():
            files = sorted(path.glob("*.jsonl"))
            if not files:
                raise EvaluationError("no task file", file=path, wanted="*.jsonl files")
            tasks += [_local(file, samples or known.get(file.stem, {}).get("samples"), seed) for file in files]
        elif path.suffix == ".jsonl":
            tasks.append(_local(path, samples or known.get(path.stem, {}).get("samples"), seed))
        elif name in known:
            tasks.append(_from_hub(name, known[name], samples or known[name]["samples"], seed))
        else:
            raise EvaluationError("unknown task", found=name, remedy=f"{nearest(name, known)}, or name a .jsonl file")
    return tasks


def _take(name: str, rows: list[tuple[str, ...]], samples: int | None, seed: int, source: str) -> Task:
    if samples is not None and len(rows) > samples:
        chosen = sorted(random.Random(f"{seed}:{name}").sample(range(len(rows)), samples))
        rows = [rows[i] for i in chosen]
    return Task(name, tuple(rows), source)


def _local(path: Path, samples: int | None, seed: int) -> Task:
    if not path.exists():
        raise EvaluationError("no such file", file=path, wanted='a JSONL of {"turns": [...]}')
    rows = []
    # not str.splitlines, which also cuts at U+2028 inside a text
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            rows.append(_turns(path, number, line))
    if not rows:
        raise EvaluationError("empty file", file=path, wanted='rows of {"turns": [...]}')
    return _take(path.stem, rows, samples, seed, str(path))


def _turns(path: Path, number: int, line: str) -> tuple[str, ...]:
    try:
        turns = json.loads(line)["turns"]
    except (json.JSONDecodeError, KeyError, TypeError):
        turns = None
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise EvaluationError("malformed line", file=path, key=f"line {number}", wanted='{"turns": ["...", ...]}')
    return tuple(turns)


def _from_hub(name: str, row: dict[str, Any], samples: int, seed: int) -> Task:
    try:
        rows = [_format(row, item) for item in _hub_rows(row)]
    except (OSError, ValueError, ConnectionError) as problem:
        first = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        remedy = "give a local file or folder of task files with --tasks"
        raise EvaluationError(f"cannot load the task ({first})", key=name, found=row["path"], remedy=remedy) from None
    return _take(name, rows, samples, seed, row["path"])


def _hub_rows(row: dict[str, Any]) -> Iterable[dict[str, Any]]:
    if "jsonl" in row:
        from huggingface_hub import hf_hub_download

        for file in row["jsonl"]:
            with open(hf_hub_download(row["path"], file, repo_type="dataset"), encoding="utf-8") as lines:
                yield from (json.loads(line) for line in lines)
        return
    import datasets

    yield from datasets.load_dataset(row["path"], row.get("name"), split=row["split"])


def _format(row: dict[str, Any], item: dict[str, Any]) -> tuple[str, ...]:
    return tuple(item[row["turns"]]) if "turns" in row else (row["text"].format(**item).strip(),)
