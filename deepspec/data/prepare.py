"""Prompts for training: read, clean, drop duplicates and what the evaluation tasks hold, split, all in one pass."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepspec.data.conversations import UNFINISHED, ConversationWriter
from deepspec.data.messages import Message, Unusable
from deepspec.data.sources import columns_read, read_source, row_tools, to_messages
from deepspec.data.words import grams, normal, says_something
from deepspec.errors import DataError
from deepspec.files import refuse_same, sync, write_json
from deepspec.locks import one_writer
from deepspec.progress import Progress

log = logging.getLogger(__name__)
# columns that hold prompts, however short these are
_ASKED = ("turns", "prompt", "prompts", "question", "instruction", "problem", "query")


def key_of(text: str) -> int:
    """64 bits of the text's SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def user_text(messages: Iterable[Message]) -> list[str]:
    """The normal form of every user turn."""
    texts = [message["content"] for message in messages if message["role"] == "user"]
    return [normal(text) or text for text in texts]  # a text of punctuation alone stays as it is


class Contamination:
    """The prompts of the evaluation tasks, and every run of 13 words in them."""

    def __init__(self) -> None:
        self.prompts: set[int] = set()
        self.grams: set[int] = set()

    def add(self, text: str) -> None:
        """Add an evaluation prompt."""
        words = normal(text).split()
        if words:
            self.prompts.add(key_of(" ".join(words)))
        self.grams.update(grams(words))

    def add_file(self, path: str | Path) -> None:
        """Add every prompt of a JSONL or Parquet file: its messages, or all of its text columns.

        Raises:
            DataError: no such file, a line that cannot be read, or no text in it.
        """
        before = len(self.prompts)
        for row in read_source(str(path)):
            if isinstance(row, Unusable):
                raise DataError(str(row), file=path, key=row.where, wanted="a JSON object with an evaluation prompt")
            for text in _texts(row):
                self.add(text)
        if len(self.prompts) == before:
            raise DataError("no evaluation prompt in the file", file=path, wanted="rows with text")

    def overlap(self, texts: Sequence[str]) -> str | None:
        """ "exact" or "n-gram" where a user turn (in normal form) is in the tasks, else None."""
        if self.prompts and any(key_of(text) in self.prompts for text in texts):
            return "exact"
        if self.grams and any(gram in self.grams for text in texts for gram in grams(text.split())):
            return "n-gram"
        return None


def _texts(value: Any, asked: bool = False) -> Iterator[str]:
    """Every text in a row that may be (part of) a prompt; ``asked``: it is one, however short."""
    if isinstance(value, str):
        if asked or says_something(value):  # names, ids and dates are no prompts
            yield value
    elif isinstance(value, Mapping):
        role = value.get("role") or value.get("from")
        for key, one in value.items():
            user = role in ("user", "human") and key in ("content", "value")
            yield from _texts(one, user or (asked and role is None) or key in _ASKED)
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one, asked)


def mix(sources: Mapping[str, Iterable[Any]], weights: Mapping[str, float], seed: int) -> Iterator[tuple[str, Any]]:
    """(source, row) drawn by weight until every source is empty; an empty source leaves the others' ratio as it is."""
    rng = random.Random(seed)
    left = {name: iter(rows) for name, rows in sources.items()}
    while left:
        names = list(left)
        if len(names) == 1:  # nothing to draw
            yield from ((names[0], row) for row in left[names[0]])
            return
        name = rng.choices(names, [weights[one] for one in names])[0]
        try:
            yield name, next(left[name])
        except StopIteration:
            del left[name]


@dataclass
class Report:
    """What became of the rows that were read."""

    read: dict[str, int] = field(default_factory=dict)  # source -> rows
    kept: dict[str, int] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> rows
    first: dict[str, str] = field(default_factory=dict)  # reason -> path and line of its first row
    left_out: Counter[str] = field(default_factory=Counter)  # of rows that are kept: what -> how many
    unread: Counter[str] = field(default_factory=Counter)  # column that nothing is made of -> kept rows that fill it
    train: int = 0
    held_out: int = 0

    def drop(self, reason: Unusable, source: str) -> None:
        """Count a row that cannot be used."""
        self.dropped[str(reason)] += 1
        self.first.setdefault(str(reason), f"{source}: {reason.where or f'row {self.read[source]}'}")

    def lines(self) -> list[str]:
        """For the terminal."""
        shares = [f"  {name}: {self.kept.get(name, 0)} of {rows} rows kept" for name, rows in self.read.items()]
        reasons = [
            f"  dropped, {reason}: {count} (first: {self.first[reason]})"
            for reason, count in self.dropped.most_common()
        ]
        reasons += [f"  left out of rows that are kept, {what}: {count}" for what, count in self.left_out.most_common()]
        columns = ", ".join(f"{name} ({count} rows)" for name, count in self.unread.most_common(12))
        reasons += [f"  columns that are not read: {columns}"] * bool(columns)
        return [f"{self.train} conversations to train on, {self.held_out} held out", *shares, *reasons]


@dataclass(frozen=True)
class PrepareOptions:
    """What to read and what to make of it."""

    sources: Mapping[str, float]  # hub id or file -> weight
    held_out: float = 0.05
    exclude: tuple[str, ...] = ()  # files with evaluation prompts
    limit: int | None = None  # conversations to keep
    split: str = "train"  # of hub datasets
    seed: int = 0
    tasks: Mapping[str, Sequence[str]] = field(default_factory=dict)  # name -> its evaluation prompts


def prepare(options: PrepareOptions, output: str | Path) -> Report:
    """Write ``train.jsonl`` and ``held_out.jsonl`` with their manifests, and ``report.json``, into a folder.

    A conversation is held out by the hash of its first user turn, so that no prompt is on both sides whatever the
    order, the sources or the limit. Both files become this run's together: a kill in between leaves two that are
    refused, and the next run repairs them. Memory holds one row, 8 bytes of hash a kept row, and the evaluation
    prompts.

    Raises:
        DataError: a source that cannot be read, nothing left to train on, or another process that works in the folder.
    """
    with one_writer(output, "prepare", DataError):
        return _prepare(options, Path(output))


def _prepare(options: PrepareOptions, output: Path) -> Report:
    tasks = Contamination()
    for name in ("train.jsonl", "held_out.jsonl", "report.json"):
        refuse_same(output / name, [*options.sources, *options.exclude], DataError)
    for path in options.exclude:
        tasks.add_file(path)
    for text in itertools.chain(*options.tasks.values()):
        tasks.add(text)
    report, seen = Report(), set[int]()
    sources = {name: read_source(name, options.split) for name in options.sources}
    provenance = {"made_by": "prepare_data", "sources": dict(options.sources), "held_out": options.held_out}
    provenance |= {"exclude": [*options.exclude, *options.tasks], "limit": options.limit, "seed": options.seed}
    progress = Progress("prepare", options.limit, unit="characters")
    with contextlib.ExitStack() as stack:
        train = stack.enter_context(ConversationWriter(output / "train.jsonl", provenance))
        held_out: ConversationWriter | None = None
        for source, raw in mix(sources, options.sources, options.seed):
            report.read[source] = report.read.get(source, 0) + 1
            try:
                row, border = _keep(raw, source, tasks, seen, report)
            except Unusable as reason:
                report.drop(reason, source)
                continue
            report.kept[source] = report.kept.get(source, 0) + 1
            if border < options.held_out:
                held_out = held_out or stack.enter_context(ConversationWriter(output / "held_out.jsonl", provenance))
                held_out.write(row)
                report.held_out += 1
            else:
                train.write(row)
                report.train += 1
            progress.add(1, sum(len(message["content"]) for message in row["messages"]))
            if report.train + report.held_out == options.limit:
                break
        if not report.train:
            raise DataError("nothing is left to train on", file=output, found="; ".join(map(str.strip, report.lines())))
        for writer in filter(None, (train, held_out)):
            writer.flush()
        write_json(output / UNFINISHED, ["train.jsonl", "held_out.jsonl"])  # until both are of this run, none is read
    progress.finish()
    if held_out is None:
        _remove_earlier(output / "held_out.jsonl")
    (output / UNFINISHED).unlink()
    sync(output)
    write_json(output / "report.json", vars(report))
    return report


def _remove_earlier(path: Path) -> None:
    """Remove an earlier run's held-out file: beside the new train.jsonl it could hold prompts of it."""
    for one in (Path(f"{path}.manifest.json"), path):
        if one.exists():
            one.unlink()
            log.warning("removed %s of an earlier run; this one holds nothing out", one)


def _keep(raw: Any, source: str, tasks: Contamination, seen: set[int], report: Report) -> tuple[dict[str, Any], float]:
    """(the row to write, the number in [0, 1) by which it is split).

    Raises:
        Unusable: it is to be dropped.
    """
    notes: list[str] = []
    messages = to_messages(raw, notes)
    tools = row_tools(raw)
    texts = user_text(messages)
    duplicate_key = key_of("\n".join(texts))
    if duplicate_key in seen:
        raise Unusable("a duplicate")
    overlap = tasks.overlap(texts)
    if overlap is not None:
        raise Unusable(f"in an evaluation task ({overlap})")
    seen.add(duplicate_key)
    if notes:
        report.left_out.update(notes)
    unread = raw.keys() - columns_read(raw) - {"id"}
    if unread:
        report.unread.update(key for key in unread if raw[key] not in (None, "", []))
    row: dict[str, Any] = {"id": f"{duplicate_key:016x}", "messages": messages, "source": source}
    return row | ({"tools": tools} if tools else {}), key_of(f"split\0{texts[0]}") / 2**64
