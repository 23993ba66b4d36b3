"""Rows of conversations from anywhere, one at a time, in one form: hub datasets, JSONL, Parquet; OpenAI or ShareGPT."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from deepspec.data.conversations import ROLES, Message
from deepspec.errors import DataError

_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "tool_response": "tool",
} | {role: role for role in ROLES}
_KEPT = ("tool_calls", "tool_call_id", "name", "reasoning_content", "weight")


class Unusable(Exception):
    """A row that cannot be used; the text is the reason it is counted under."""


def read_source(name: str, split: str = "train") -> Iterator[Mapping[str, Any] | None]:
    """The raw rows of a local ``.jsonl``/``.json``/``.parquet`` file or a hub dataset; None for a line that is no JSON.

    Raises:
        DataError: no such file or dataset.
    """
    path = Path(name)
    if path.suffix in (".jsonl", ".json", ".parquet"):
        if not path.is_file():
            raise DataError("no such file", file=path, wanted="JSONL, Parquet or the id of a hub dataset")
        yield from _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path)
        return
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split, streaming=True)
    except Exception as problem:  # datasets raises many kinds, its own and those of the network below
        first = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        remedy = "check the id, the split and the network, or give a local JSONL or Parquet file"
        raise DataError(f"cannot read the dataset ({first})", file=name, key=split, remedy=remedy) from None
    yield from rows


def _read_jsonl(path: Path) -> Iterator[Mapping[str, Any] | None]:
    with open(path, "rb") as handle:
        for line in handle:
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            yield row if isinstance(row, dict) else None


def _read_parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as problem:
        raise DataError(f"not a Parquet file ({problem})", file=path) from None


def to_messages(row: Mapping[str, Any] | None) -> list[Message]:
    """A raw row as clean OpenAI messages: known roles, text without white space at its ends, a user turn first.

    Raises:
        Unusable: it is none; the reason is one of a few words, to be counted.
    """
    if row is None:
        raise Unusable("not a JSON object")
    given = row.get("messages") or row.get("conversations") or row.get("conversation")
    if given is None:
        given = _single_prompt(row)
    if not isinstance(given, list) or not given:
        raise Unusable("no messages")
    messages = [_message(one) for one in given]
    head = [one for one in messages[:1] if one["role"] in ("system", "developer")]
    rest = messages[len(head) :]
    while rest and rest[0]["role"] != "user":  # ShareGPT rows that begin with an answer to nothing
        rest = rest[1:]
    if not rest:
        raise Unusable("no user turn")
    for one, following in pairwise(rest):
        if one["role"] == following["role"] != "tool":
            raise Unusable("two turns of one role in a row")
        if following["role"] in ("system", "developer"):
            raise Unusable("a system message in the middle")
    return head + rest


def _single_prompt(row: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """Rows with one prompt in a column (Alpaca's ``instruction`` and ``input``, ``prompt``, ``question``)."""
    for key in ("prompt", "instruction", "question"):
        if isinstance(row.get(key), str):
            extra = row.get("input")
            text = row[key] + (f"\n\n{extra}" if isinstance(extra, str) and extra.strip() else "")
            return [{"role": "user", "content": text}]
    return None


def _message(given: Any) -> Message:
    if not isinstance(given, Mapping):
        raise Unusable("a message is not an object")
    role = _SHAREGPT_ROLES.get(str(given.get("role") or given.get("from")))
    if role is None:
        raise Unusable("unknown role")
    content = given["content"] if "content" in given else given.get("value")
    if isinstance(content, list):  # OpenAI's content parts
        if any(not isinstance(part, Mapping) or part.get("type") != "text" for part in content):
            raise Unusable("content other than text")
        content = "".join(str(part.get("text", "")) for part in content)
    message = {key: given[key] for key in _KEPT if given.get(key) is not None}
    if content is None and "tool_calls" in message:
        content = ""
    if not isinstance(content, str):
        raise Unusable("content other than text")
    content = content.strip()
    if not content and role == "user":
        raise Unusable("an empty user turn")
    if not content and role == "assistant" and "tool_calls" not in message:
        raise Unusable("an empty answer")
    return {"role": role, "content": content, **message}
