"""Benchmark prompts: the tasks of tasks.yaml, from the hub, or any local JSONL of ``{"turns": [...]}``."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from deepspec.arguments import COUNT
from deepspec.data.lines import read_jsonl
from deepspec.errors import EvaluationError, nearest
from deepspec.files import sha256_json
from deepspec.targets.positions import at_most

ROW = '{"turns": ["...", ...]}'


@dataclass(frozen=True)
class Task:
    """A named choice of prompts.

    Args:
        name: the registered name, or the file's.
        prompts: the turns of each prompt, by its index in the file or data set. The index names a prompt in the results
            and is the key of its random numbers, so neither depends on which other prompts were chosen.
        source: file or hub id.
        too_long: prompts that were left out.
    """

    name: str
    prompts: dict[int, tuple[str, ...]]
    source: str
    too_long: int = 0

    @property
    def digest(self) -> str:
        """SHA-256 of the prompts and their indices."""
        return sha256_json([[index, list(turns)] for index, turns in self.prompts.items()])

    @property
    def turns(self) -> int:
        """The most turns of a prompt."""
        return max(map(len, self.prompts.values()))

    def messages(self, index: int, answers: Sequence[str]) -> list[dict[str, Any]]:
        """The conversation of a prompt up to its next turn, after the turns before it and their answers."""
        messages: list[dict[str, Any]] = []
        for turn, answer in zip(self.prompts[index], answers, strict=False):
            messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": self.prompts[index][len(answers)]}]

    def first_turns(self) -> Task:
        """The same prompts without their later turns."""
        return Task(self.name, {index: turns[:1] for index, turns in self.prompts.items()}, self.source)


def leave_out(task: Task, room: int | None, max_new_tokens: int, length: Callable[[Task, int], int]) -> Task:
    """The task without the prompts whose first turn has more than ``room`` tokens; None: there is no limit.

    Args:
        task: a task.
        room: the target's positions less the new tokens.
        max_new_tokens: those.
        length: tokens of the prompt of an index.

    Raises:
        EvaluationError: none is left.
    """
    if room is None:
        return task
    lengths = {index: length(task, index) for index in task.prompts}
    fitting = {index: turns for index, turns in task.prompts.items() if lengths[index] <= room}
    if not fitting:
        raise EvaluationError(
            "no prompt fits the target's positions", file=task.source, key=task.name,
            found=f"the shortest has {min(lengths.values())} tokens", wanted=at_most(room, max_new_tokens),
            remedy="lower --max-new-tokens",
        )  # fmt: skip
    return Task(task.name, fitting, task.source, too_long=len(lengths) - len(fitting))


def load_tasks(names: Sequence[str], samples: int | None, seed: int, first_turn: bool = False) -> list[Task]:
    """Load tasks by name, by file, or all files of a folder.

    Args:
        names: registered names, ``*.jsonl`` files, folders of such, or empty for all registered tasks.
        samples: at most so many prompts of each task; None takes the task's own count.
        seed: which prompts are taken where there are more.
        first_turn: without their later turns.

    Raises:
        EvaluationError: samples below 1, an unknown name, a missing file, two tasks of one name, or a malformed line,
            by its number.
    """
    COUNT.check("samples", samples, EvaluationError)
    known = registered_tasks()
    tasks: list[Task] = []
    for name in names or list(known):
        path = Path(name)
        if path.is_dir():
            files = sorted(path.glob("*.jsonl"))
            if not files:
                raise EvaluationError("no task file", file=path, wanted="*.jsonl files")
            tasks += [_local(file, samples, seed) for file in files]
        elif path.suffix == ".jsonl":
            tasks.append(_local(path, samples, seed))
        elif name in known:
            tasks.append(_from_hub(name, samples, seed))
        else:
            raise EvaluationError("unknown task", found=name, remedy=f"{nearest(name, known)}, or name a .jsonl file")
    sources: dict[str, str] = {}
    for task in tasks:
        if task.name in sources:
            found = f"{sources[task.name]} and {task.source}"
            raise EvaluationError("two tasks of one name", key=task.name, found=found, remedy="rename one file")
        sources[task.name] = task.source
    return [task.first_turns() for task in tasks] if first_turn else tasks


def missing_tasks(names: Sequence[str]) -> dict[str, str]:
    """The registered tasks that a given folder of benchmarks lacks: name -> folder.

    A folder with none of the registered tasks is somebody's own and lacks nothing.
    """
    known = registered_tasks()
    missing: dict[str, str] = {}
    for folder in (Path(name) for name in names if Path(name).is_dir()):
        there = {file.stem for file in folder.glob("*.jsonl")}
        if there & set(known):
            missing |= {name: str(folder) for name in known if name not in there}
    given = {Path(name).stem for name in names}
    return {name: folder for name, folder in missing.items() if name not in given}


@cache
def registered_tasks() -> dict[str, dict[str, Any]]:
    """The rows of tasks.yaml, by name."""
    return dict(yaml.safe_load(Path(__file__).with_name("tasks.yaml").read_text(encoding="utf-8")))


def _take(name: str, rows: list[tuple[str, ...]], samples: int | None, seed: int, source: str) -> Task:
    """As many prompts as requested, else the task's own number, else all."""
    chosen: Iterable[int] = range(len(rows))
    count = registered_tasks().get(name, {}).get("samples", len(rows)) if samples is None else samples
    if len(rows) > count:
        chosen = sorted(random.Random(f"{seed}:{name}").sample(range(len(rows)), count))
    return Task(name, {index: rows[index] for index in chosen}, source)


def _local(path: Path, samples: int | None, seed: int) -> Task:
    if not path.exists():
        raise EvaluationError("no such file", file=path, wanted=f"a JSONL of {ROW}")
    rows = [_turns(path, number, row) for number, row in read_jsonl(path, EvaluationError, ROW)]
    if not rows:
        raise EvaluationError("empty file", file=path, wanted=f"rows of {ROW}")
    return _take(path.stem, rows, samples, seed, str(path))


def _turns(path: Path, number: int, row: Any) -> tuple[str, ...]:
    turns = row.get("turns") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise EvaluationError("malformed line", file=path, key=f"line {number}", wanted=ROW)
    return tuple(turns)


def _from_hub(name: str, samples: int | None, seed: int) -> Task:
    row = registered_tasks()[name]
    rows = _all_rows(name, turns_of, "give a local file or folder of task files with --tasks")
    return _take(name, rows, samples, seed, row["path"])


def bare_prompts(name: str) -> list[str]:
    """Every prompt of a registered task as its data set has it, without the words that the task puts around it.

    Raises:
        EvaluationError: the hub does not give it.
    """
    remedy = "give a local file of its prompts with --exclude"
    return [text for texts in _all_rows(name, _bare, remedy) for text in texts]


def _bare(row: dict[str, Any], item: dict[str, Any]) -> tuple[str, ...]:
    if "turns" in row:
        return turns_of(row, item)
    named = [key for _, key, _, _ in Formatter().parse(row["text"]) if key]
    return ("\n".join(str(item[key]) for key in named),)


def _all_rows(
    name: str, read: Callable[[dict[str, Any], dict[str, Any]], tuple[str, ...]], remedy: str
) -> list[tuple[str, ...]]:
    row = registered_tasks()[name]
    try:
        return [read(row, item) for item in _hub_rows(row)]
    except (OSError, ValueError, ConnectionError) as problem:
        first = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise EvaluationError(f"cannot load the task ({first})", key=name, found=row["path"], remedy=remedy) from None


def _hub_rows(row: dict[str, Any]) -> Iterable[dict[str, Any]]:
    from huggingface_hub import hf_hub_download

    files = row.get("jsonl", row.get("parquet", ()))
    paths = [hf_hub_download(row["path"], file, repo_type="dataset") for file in files]
    if "jsonl" in row:
        for path in paths:
            yield from (item for _, item in read_jsonl(path, EvaluationError))
        return
    import datasets

    if paths:
        yield from datasets.load_dataset("parquet", data_files=paths, split="train")
    else:
        yield from datasets.load_dataset(row["path"], row.get("name"), split=row["split"])


def turns_of(row: dict[str, Any], item: dict[str, Any]) -> tuple[str, ...]:
    """The turns of one item of a data set by a task's row of tasks.yaml."""
    if "turns" in row:
        turns = item[row["turns"]]
        return (turns,) if isinstance(turns, str) else tuple(turns)
    text = row["text"].format(**item)
    if "ending" in row:
        kind = "filled" if item[row["ending"]["column"]] else "empty"
        text += row["ending"][kind].format(**item)
    return (text.strip(),)
