"""JSON from files, line by line, in one strict reading for conversations, prompts and task files alike.

A line that the stages after this one could not write, render or hash again is refused here, by its number: a lone
surrogate (no UTF-8 holds it), NaN and Infinity (no JSON), nesting that exhausts the stack, an integer of thousands of
digits. A byte order mark, CRLF and empty lines are read past.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from deepspec.errors import DataError, DeepSpecError, system_error

DEPTH = 100  # levels of lists and objects; Python's own stack ends near 1,000
LINE_BYTES = 16 << 20  # a parsed line takes many times its bytes; a million tokens of text have six million
DIGITS = 4000  # of an integer; Python reads and writes 4,300
_CONTAINERS = (dict, list)
_BOM = b"\xef\xbb\xbf"


class NotJSON(ValueError):
    """Text that is not to be read; ``reason``: the same without positions, to be counted under."""

    def __init__(self, reason: str, detail: str | None = None) -> None:
        super().__init__(detail or reason)
        self.reason = reason


def _integer(text: str) -> int:
    if len(text) > DIGITS:
        raise NotJSON(f"an integer of more than {DIGITS} digits")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise NotJSON("a number beyond 64-bit floats")
    return value


def _constant(name: str) -> float:
    raise NotJSON("a number that JSON does not have (NaN or Infinity)")


_DECODER = json.JSONDecoder(parse_int=_integer, parse_float=_float, parse_constant=_constant)


def value_problem(value: Any) -> str | None:
    """Why a parsed value cannot be written as JSON again, or None. Arrow and servers bring such values too."""
    waiting = [(value, 0)]
    while waiting:
        one, depth = waiting.pop()
        if isinstance(one, str):
            if not one.isascii() and _lone_surrogate(one):
                return "half a surrogate pair"
        elif isinstance(one, _CONTAINERS):
            if depth == DEPTH:
                return f"nested more than {DEPTH} levels deep"
            for part in chain(one, one.values()) if isinstance(one, dict) else one:
                if not isinstance(part, str) or not part.isascii():  # most are only text, with which nothing is wrong
                    waiting.append((part, depth + 1))
        elif isinstance(one, float):
            if not math.isfinite(one):
                return "a number that JSON does not have (NaN or Infinity)"
        elif one is not None and not isinstance(one, int):
            return f"a value that JSON does not have ({type(one).__name__})"
    return None


def _lone_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def parse_json(text: bytes | str) -> Any:
    """One JSON value.

    Raises:
        NotJSON: it is none, or one that cannot be written again.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = _DECODER.decode(text.removeprefix("\ufeff"))
    except NotJSON:
        raise
    except RecursionError:
        raise NotJSON(f"nested more than {DEPTH} levels deep") from None
    except UnicodeDecodeError as problem:
        raise NotJSON("not UTF-8 text", f"not UTF-8 text ({problem.reason} at byte {problem.start})") from None
    except ValueError as problem:
        raise NotJSON("not a JSON object", f"not JSON ({problem})") from None
    fault = None if _is_plain(text) else value_problem(value)
    if fault is not None:
        raise NotJSON(fault)
    return value


def _is_plain(text: str) -> bool:
    """Whether the value of JSON text cannot have what :func:`value_problem` looks for: seen in the text, many times
    faster. No half of a surrogate pair without an escape, but in a str, and no depth without brackets, of which those
    inside strings are counted too."""
    shallow = text.count("{") + text.count("[") <= DEPTH
    return shallow and "\\u" not in text and (text.isascii() or not _lone_surrogate(text))


def is_blank(line: bytes) -> bool:
    """Whether a line holds nothing: no row, and no error either."""
    return not line.removeprefix(_BOM).strip()


def numbered_lines(path: str | Path, error: type[DeepSpecError] = DataError) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes) of every line, empty ones too, so that the bytes can be digested.

    Raises:
        error: the file cannot be read, or a line has more than LINE_BYTES, of which no more are read.
    """
    try:
        with open(path, "rb") as handle:
            for number, line in enumerate(iter(partial(handle.readline, LINE_BYTES + 1), b""), 1):
                if len(line) > LINE_BYTES:
                    wanted, remedy = f"at most {LINE_BYTES:,} bytes", "leave the row out, or cut it"
                    raise error("a line too long", file=path, key=f"line {number}", wanted=wanted, remedy=remedy)
                yield number, line
    except OSError as problem:
        raise system_error(problem, path, error) or problem from None


def read_jsonl(
    path: str | Path, error: type[DeepSpecError] = DataError, wanted: str = "one JSON object a line"
) -> Iterator[tuple[int, Any]]:
    """(line number, value) of a JSONL file.

    Raises:
        error: the file cannot be read, or a line, named by its number.
    """
    for number, line in numbered_lines(path, error):
        if not is_blank(line):
            yield number, parse_line(line, path, number, error, wanted)


def parse_line(
    line: bytes, path: str | Path, number: int, error: type[DeepSpecError] = DataError, wanted: str | None = None
) -> Any:
    """A line's value.

    Raises:
        error: it cannot be read; names file and line.
    """
    try:
        return parse_json(line)
    except NotJSON as problem:
        raise error(str(problem), file=path, key=f"line {number}", wanted=wanted) from None
