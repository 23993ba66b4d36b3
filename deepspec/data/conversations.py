"""Conversations on disk: JSONL, one conversation a line, with a manifest written last.

A row is ``{"id": str, "messages": [{"role", "content", ...}, ...], ...}`` in OpenAI's form. Besides ``role`` and
``content`` a message may carry ``tool_calls``, ``reasoning_content``, ``finish_reason`` (how the target's answer ended;
``"length"``: it was cut; with ``content`` "" and ``reasoning_content``: inside its reasoning) and ``weight`` (0: this
answer is context only, never supervised). Readers get every row as :func:`deepspec.data.messages.normal_row` makes it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from deepspec.data.lines import NotJSON, is_blank, numbered_lines, parse_json, parse_line, value_problem
from deepspec.data.messages import Message as Message
from deepspec.data.messages import Unusable, medium_in, normal_row
from deepspec.errors import DataError
from deepspec.files import named, read_json, refuse_special, sealed, sync, write_json
from deepspec.processes import temporary_name
from deepspec.rows import dump_row

FORMAT = "deepspec.conversations/1"
ROLES = ("system", "developer", "user", "assistant", "tool")
WANTED = 'one JSON object a line: {"id": "...", "messages": [{"role": "user", "content": "..."}, ...]}'


UNFINISHED = ".unfinished.json"  # beside files that replace earlier ones together: their names, until all have


def manifest_path(path: str | Path) -> Path:
    """``<file>.manifest.json``."""
    return Path(f"{path}.manifest.json")


def row_problem(row: Any) -> tuple[str, object] | None:
    """(what is wrong, the value found) with a parsed row, or None."""
    if not isinstance(row, dict):
        return "a row must be an object", type(row).__name__
    if not isinstance(row.get("id"), str) or not row["id"]:
        return "a row needs an `id`, a non-empty string", row.get("id")
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        return "a row needs `messages`, a non-empty list", messages
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            found = message.get("role") if isinstance(message, dict) else message
            return f"a message needs a `role`, one of {', '.join(ROLES)}", found
        content = message.get("content")
        if medium := medium_in(content):
            return f"a message with {medium}: targets are given text alone", content
        beside = message.get("tool_calls") or message.get("function_call") or message.get("reasoning_content")
        if not isinstance(content, str) and not (content is None and beside):
            return "a message needs `content`, a string (or null beside tool_calls or reasoning_content)", content
    return None


def usable_row(line: bytes) -> dict[str, Any] | str:
    """The row of a line in its normal form, or why it cannot be used."""
    try:
        row = parse_json(line)
        fault = row_problem(row)
        return normal_row(row) if fault is None else fault[0]
    except (NotJSON, Unusable) as problem:
        return str(problem)


def read_conversations(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, one at a time; a file with a manifest is checked against it while it is read.

    Raises:
        DataError: no such file, an empty file, a malformed line (named by its number), an id that comes twice, or a
            file that differs from its manifest.
    """
    path, seen = Path(path), set[str]()
    for number, _, line in checked_lines(path):
        row = parse_line(line, path, number, DataError, WANTED)
        fault = row_problem(row)
        if fault is not None:
            raise DataError(fault[0], file=path, key=f"line {number}", found=fault[1], wanted=WANTED)
        note_id(seen, row, path, number)
        try:
            yield normal_row(row)
        except Unusable as problem:
            raise DataError(str(problem), file=path, key=f"line {number}") from None
    if not seen:
        raise DataError("no conversation in the file", file=path, wanted="one JSON object a line")


def checked_lines(path: Path, digest: hashlib._Hash | None = None) -> Iterator[tuple[int, int, bytes]]:
    """(number, first byte, line) of every line that is not blank; at the end the file is compared with its manifest.

    ``digest`` (SHA-256) is given the file's bytes.

    Raises:
        DataError: no such file, one that differs from its manifest, or one of several that are not all there yet.
    """
    refuse_unfinished(path)
    digest, rows, offset = digest or hashlib.sha256(), 0, 0
    for number, line in numbered_lines(path):
        digest.update(line)
        if not is_blank(line):
            rows += 1
            yield number, offset, line
        offset += len(line)
    _check_manifest(path, rows, digest.hexdigest())


def refuse_unfinished(path: Path) -> None:
    """Refuse a file of several that were to replace earlier ones together: the job was killed in between.

    Raises:
        DataError: it is one.
    """
    marker = path.with_name(UNFINISHED)
    if marker.exists() and path.name in read_json(marker, DataError):
        problem = "the job that writes it together with others did not end: they may not belong together"
        raise DataError(problem, file=path, key=marker.name, remedy="run it again (prepare_data)")


def note_id(seen: set[str], row: Any, path: Path, number: int) -> None:
    """Add a row's id to ``seen``; a row without one is no conversation, and is refused or counted as that.

    Raises:
        DataError: the id came before.
    """
    name = row.get("id") if isinstance(row, dict) else None
    if not isinstance(name, str):
        return
    if name in seen:
        remedy = "give every conversation an id of its own (prepare_data does)"
        raise DataError("the same id twice", file=path, key=f"line {number}", found=name, remedy=remedy)
    seen.add(name)


def _check_manifest(path: Path, rows: int, sha256: str) -> None:
    """Compare a file that has been read to its end with its manifest; a file without one is taken as it is.

    Raises:
        DataError: the file has other rows or other bytes than its manifest.
    """
    if not manifest_path(path).exists():
        return
    manifest = read_json(manifest_path(path), DataError)
    for key, found in {"format": FORMAT, "rows": rows, "sha256": sha256}.items():
        stated = manifest.get(key) if isinstance(manifest, dict) else None
        if stated != found:
            raise DataError(
                "the file is not the one its manifest describes",
                file=manifest_path(path),
                key=key,
                found=found,
                wanted=f"{stated}, as the manifest says",
                remedy="the file was cut or edited after it was written: make it again, or delete the manifest",
            )


class ConversationWriter:
    """Writes conversations row by row under a temporary name; the manifest is written last.

    Used as a context manager. When the block raises, the temporary file goes and an older file of that name stays.
    """

    def __init__(self, path: str | Path, provenance: Mapping[str, Any]) -> None:
        self.path, self.provenance, self.rows = Path(path), dict(provenance), 0
        self._digest = hashlib.sha256()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        refuse_special(self.path)
        self._temporary = temporary_name(self.path)
        self._handle = open(self._temporary, "wb", buffering=1 << 20)  # noqa: SIM115 (closed by __exit__)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row.

        Raises:
            DataError: the row is not a conversation.
        """
        problem = value_problem(dict(row))
        fault = (problem, None) if problem is not None else row_problem(row)
        if fault is not None:
            raise DataError(fault[0], file=self.path, key=row.get("id"), found=fault[1])
        line = dump_row(row)
        self._digest.update(line)
        with named(self.path):
            self._handle.write(line)
        self.rows += 1

    def flush(self) -> None:
        """Have all rows on the disk.

        Raises:
            OSError: it is full, for instance.
        """
        with named(self.path):
            self._handle.flush()
            os.fsync(self._handle.fileno())

    def __enter__(self) -> ConversationWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._handle:
                self.flush()
        except OSError:
            self._temporary.unlink(missing_ok=True)
            raise
        if kind is not None or self.rows == 0:
            self._temporary.unlink()
            if kind is None:
                raise DataError("no conversation to write", file=self.path, wanted="at least one")
            return
        manifest_path(self.path).unlink(missing_ok=True)  # of an older file: it must not be taken for the new file's
        os.replace(self._temporary, self.path)
        sync(self.path.parent)
        manifest = {"format": FORMAT, "rows": self.rows, "sha256": self._digest.hexdigest()}
        write_json(manifest_path(self.path), sealed(manifest | {"provenance": self.provenance}))


def write_conversations(path: str | Path, rows: Iterable[Mapping[str, Any]], provenance: Mapping[str, Any]) -> int:
    """Write a file and its manifest; returns the number of rows.

    Raises:
        DataError: a row that is not a conversation, or no row at all.
    """
    with ConversationWriter(path, provenance) as writer:
        for row in rows:
            writer.write(row)
    return writer.rows
