"""Rows of conversations from anywhere, one at a time, in one form: hub datasets, JSONL, Parquet; OpenAI or ShareGPT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from deepspec.data.conversations import ROLES, checked_lines
from deepspec.data.lines import LINE_BYTES, NotJSON, parse_json, value_problem
from deepspec.data.messages import (
    SYSTEM_COLUMNS,
    Message,
    Unusable,
    arguments_are_objects,
    characters,
    medium_in,
    normal_calls,
    normal_message,
    normal_tools,
    split_reasoning,
    with_system_columns,
)
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
_CHATS = ("messages", "conversations", "conversation")
_PROMPTS = ("prompt", "instruction", "question")
_TOOLS = ("tools", "functions")
NOT_TEXT = "content other than text"
_PARQUET_ROWS = 32  # read at a time: of the largest rows, half a gigabyte
_KEPT = ("tool_calls", "tool_call_id", "name", "reasoning_content", "finish_reason", "weight")


def read_source(name: str, split: str = "train") -> Iterator[Mapping[str, Any] | Unusable]:
    """The raw rows of a local ``.jsonl``/``.json``/``.parquet`` file or a hub dataset; for a line that cannot be
    read, the reason why.

    Raises:
        DataError: no such file or dataset, one that breaks off, or a row of more than LINE_BYTES.
    """
    path = Path(name)
    if path.suffix in (".jsonl", ".json", ".parquet"):
        if not path.is_file():
            raise DataError("no such file", file=path, wanted="JSONL, Parquet or the id of a hub dataset")
        yield from _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path)
        return
    import datasets

    try:
        for number, row in enumerate(datasets.load_dataset(name, split=split, streaming=True), 1):
            if characters(row) > LINE_BYTES:
                raise _too_long(name, number)
            yield row
    except DataError:
        raise
    except Exception as problem:  # datasets raises many kinds, its own and those of the network below
        first = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        remedy = "check the id, the split and the network, or give a local JSONL or Parquet file"
        raise DataError(f"cannot read the dataset ({first})", file=name, key=split, remedy=remedy) from None


def _read_jsonl(path: Path) -> Iterator[Mapping[str, Any] | Unusable]:
    for number, _, line in checked_lines(path):  # of conversations that an earlier command wrote, too
        try:
            row = parse_json(line)
        except NotJSON as problem:
            yield Unusable(problem.reason, f"line {number}")
        else:
            yield row if isinstance(row, dict) else Unusable("not a JSON object", f"line {number}")


def _too_long(name: str | Path, number: int) -> DataError:
    wanted, remedy = f"at most {LINE_BYTES:,} bytes", "leave the row out, or cut it"
    return DataError("a row too long", file=name, key=f"row {number}", wanted=wanted, remedy=remedy)


def _read_parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                encoded = any(pyarrow.types.is_dictionary(field.type) for field in batch.schema)  # values stand once
                large = encoded or batch.nbytes > LINE_BYTES
                for part in (batch.slice(row, 1) for row in range(batch.num_rows)) if large else (batch,):
                    if large and _arrow_bytes(part) > LINE_BYTES:
                        raise _too_long(path, number + 1)
                    number += part.num_rows
                    yield from part.to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError, OSError) as problem:  # dates beyond Python's, too
        raise DataError(f"cannot read the Parquet file ({problem})", file=path) from None


def _arrow_bytes(row: Any) -> int:
    """Of a batch of one row, with the values of its dictionaries that it holds."""
    columns = ((one, hasattr(one, "dictionary_decode")) for one in row.columns)
    return sum((one.dictionary_decode() if encoded else one).nbytes for one, encoded in columns)


def columns_read(row: Mapping[str, Any]) -> set[str]:
    """The columns of a row whose content is used in some form."""
    chat = next((key for key in _CHATS if row.get(key)), None)
    prompt = next((key for key in _PROMPTS if isinstance(row.get(key), str)), None)
    tools = next((key for key in _TOOLS if row.get(key)), None)
    return {chat or prompt or "", "" if chat or not prompt else "input", tools or "", *SYSTEM_COLUMNS}


def row_tools(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tools of a row's ``tools`` (or ``functions``) column.

    Raises:
        Unusable: they cannot be read.
    """
    return normal_tools(next((row[key] for key in _TOOLS if row.get(key)), None))


def to_messages(row: Mapping[str, Any] | Unusable | None, notes: list[str] | None = None) -> list[Message]:
    """A raw row as clean OpenAI messages: known roles, text without white space at its ends, a user turn first.

    Args:
        row: of :func:`read_source`.
        notes: called with what was left out of a row that is used.

    Raises:
        Unusable: it is none; the reason is one of a few words, to be counted.
    """
    if isinstance(row, Unusable):
        raise row
    if row is None:
        raise Unusable("not a JSON object")
    given = next((row[key] for key in _CHATS if row.get(key)), None)
    if given is None:
        given = _single_prompt(row)
    if not isinstance(given, list) or not given:
        raise Unusable("no messages")
    found = [] if notes is None else notes
    messages = with_system_columns(row, [_message(one, found) for one in given])
    head = 1 if messages[0]["role"] in ("system", "developer") else 0
    first = next((i for i, one in enumerate(messages) if i >= head and one["role"] == "user"), None)
    if first is None:
        raise Unusable("no user turn")
    messages[head:first] = []  # ShareGPT rows that begin with an answer to nothing
    for one, following in pairwise(messages[head:]):
        if one["role"] == following["role"] != "tool":
            raise Unusable("two turns of one role in a row")
        if following["role"] in ("system", "developer"):
            raise Unusable("a system message in the middle")
    return messages


def _single_prompt(row: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """Rows with one prompt in a column (Alpaca's ``instruction`` and ``input``, ``prompt``, ``question``)."""
    for key in _PROMPTS:
        if isinstance(row.get(key), str):
            extra = row.get("input")
            text = row[key] + (f"\n\n{extra}" if isinstance(extra, str) and extra.strip() else "")
            return [{"role": "user", "content": text}]
    return None


def _message(given: Any, notes: list[str]) -> Message:
    if not isinstance(given, Mapping):
        raise Unusable("a message is not an object")
    name = str(given.get("role") or given.get("from"))
    role = _SHAREGPT_ROLES.get(name)
    if role is None:
        raise Unusable("unknown role")
    content = given.get("content")
    text = _text(given["value"] if content is None and "value" in given else content, notes)
    if text is None or len(given) > 2 or name == "function_call":
        message = _with_fields(given, name, role, text)
    else:  # a role and a text, as most are
        message = {"role": role, "content": text.strip()}
    if role == "assistant":
        return _answer(message)
    if not message["content"] and role == "user":
        raise Unusable("an empty user turn")
    return message


def _with_fields(given: Mapping[str, Any], name: str, role: str, text: str | None) -> Message:
    """A message with tool calls, reasoning and its other used fields."""
    full = normal_message({**given, "role": role, "content": text})
    message: Message = {"role": role, "content": (text or "").strip()}
    message |= {key: full[key] for key in _KEPT if key in full}
    if not isinstance(message.get("finish_reason", ""), str):
        del message["finish_reason"]
    if name == "function_call" and "tool_calls" not in message:  # ShareGPT's: the calls are the text
        message |= {"content": "", "tool_calls": normal_calls(text)}
    if not isinstance(message.get("reasoning_content", ""), str):
        raise Unusable("reasoning other than text")
    calls = message.get("tool_calls", [])
    if text is None and not calls and not message.get("reasoning_content"):
        raise Unusable(NOT_TEXT)
    if not arguments_are_objects(calls):
        raise Unusable("tool arguments that are not a JSON object")
    problem = value_problem(message)  # of Arrow's rows; those of JSON were read strictly
    if problem is not None:
        raise Unusable(problem)
    return message


def _answer(message: Message) -> Message:
    """An assistant's message with its reasoning apart, cut inside it or with an answer after it."""
    message = split_reasoning(message)
    for key in ("content", "reasoning_content"):
        if isinstance(message.get(key), str):
            message[key] = message[key].strip()
    cut = message.get("finish_reason") == "length" and message.get("reasoning_content")
    if not message["content"] and not message.get("tool_calls") and not cut:
        raise Unusable("an empty answer")
    return message


def _text(content: Any, notes: list[str]) -> str | None:
    """A message's text, OpenAI's content parts joined; None where there is none at all."""
    if content is None or isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    if medium := medium_in(parts):
        raise Unusable(f"a message with {medium}: targets are given text alone")
    if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in parts):
        raise Unusable(NOT_TEXT)
    texts = [part.get("text") for part in parts]
    if not all(isinstance(text, str | None) for text in texts):
        raise Unusable(NOT_TEXT)
    notes.extend("a text part that is null" for text in texts if text is None)
    return "".join(text for text in texts if text is not None)
