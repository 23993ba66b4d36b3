"""JSON lines: what cannot be written again is refused by its line, everywhere; harmless marks are read past."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec.cache.plan import read_rows, scan
from deepspec.data.conversations import read_conversations, write_conversations
from deepspec.data.lines import DEPTH, NotJSON, parse_json, value_problem
from deepspec.data.prepare import Contamination, PrepareOptions, prepare
from deepspec.errors import DataError, DeepSpecError
from deepspec.evaluate.tasks import load_tasks
from deepspec.rows import dump_row

GOOD = {
    "id": "a",
    "messages": [{"role": "user", "content": "What is two plus two?"}],
    "turns": ["What is two plus two?"],
}
BAD = {
    "half a pair": '"\\ud83d"',
    "half a pair as a key": '{"\\uDC00": 1}',
    "NaN": "NaN",
    "infinity": "[-Infinity]",
    "beyond floats": "1e999",
    "a huge integer": "9" * 5000,
    "deep lists": "[" * 50_000 + "]" * 50_000,
    "deep objects": '{"a":' * (DEPTH + 1) + "1" + "}" * (DEPTH + 1),
    "unfinished": '{"a": ',
    "not UTF-8": b'"\xff\xfe"',
    "a surrogate in bytes": b'"\xed\xa0\x80"',
}


def with_bad_line(path: Path, bad: str | bytes) -> Path:
    """A good row, an empty line, and a row (line 3) with the bad value in a field that no stage needs."""
    line = json.dumps(GOOD).encode()
    value = bad.encode() if isinstance(bad, str) else bad
    path.write_bytes(line + b"\n\n" + line[:-1].replace(b'"a"', b'"b"') + b', "extra": ' + value + b"}\n")
    return path


def conversations(path: Path) -> list[Any]:
    return [row["id"] for row in read_conversations(path)]


def rows_of_a_build(path: Path) -> list[Any]:
    source = scan(path)
    rows = [row for _, row in read_rows(path, source.offsets[0], 0, source.rows)]
    return [row if isinstance(row, str) else row["id"] for row in rows]


def tasks(path: Path) -> list[Any]:
    return [turns[0] for turns in load_tasks([str(path)], None, 0)[0].prompts.values()]


def excluded(path: Path) -> list[Any]:
    Contamination().add_file(path)
    return []


READERS = [conversations, rows_of_a_build, tasks, excluded]


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_a_bad_line_by_its_number(
    reader: Callable[[Path], list[Any]], bad: str | bytes, tmp_path: Path
) -> None:
    path = with_bad_line(tmp_path / "x.jsonl", bad)
    with pytest.raises(DeepSpecError, match=r"x.jsonl: line 3: "):
        reader(path)


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_prepare_counts_a_bad_line_and_says_where_it_stands(bad: str | bytes, tmp_path: Path) -> None:
    path = with_bad_line(tmp_path / "x.jsonl", bad)
    report = prepare(PrepareOptions({str(path): 1.0}, 0.0), tmp_path / "out")
    assert (report.train, report.dropped.total()) == (1, 1)
    (where,) = report.first.values()
    assert where == f"{path}: line 3"
    assert conversations(tmp_path / "out" / "train.jsonl")


@pytest.mark.parametrize("reader", READERS)
def test_byte_order_marks_crlf_and_empty_lines_are_read_past(
    reader: Callable[[Path], list[Any]], tmp_path: Path
) -> None:
    rows = [GOOD, GOOD | {"id": "b", "turns": ["half\u2028line"]}]
    plain, marked = tmp_path / "plain.jsonl", tmp_path / "marked.jsonl"
    plain.write_bytes(b"".join(dump_row(row) for row in rows))
    lines = b"".join(b"\xef\xbb\xbf" + dump_row(row).rstrip() + b"\r\n\r\n" for row in rows)
    marked.write_bytes(lines + b"\xef\xbb\xbf\n  \n")
    assert reader(marked) == reader(plain)


def test_writers_refuse_what_readers_would(tmp_path: Path) -> None:
    for extra in ("\ud83d", float("nan"), {1, 2}):
        with pytest.raises(DataError, match=r"x\.jsonl: a: "):
            write_conversations(tmp_path / "x.jsonl", [GOOD | {"extra": extra}], {})
    assert not list(tmp_path.iterdir())


TEXTS = st.text(st.sampled_from("ab\u00e9\\[{\ud83d\ude00\udc00"), max_size=6)
VALUES = st.recursive(
    TEXTS | st.integers() | st.none() | st.floats(allow_nan=True),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(VALUES, st.sampled_from([0, 1, DEPTH - 2, DEPTH - 1, DEPTH, DEPTH + 1]))
def test_lines_that_look_plain_are_read_as_those_that_are_looked_into(value: Any, levels: int) -> None:
    """A line of bytes is looked into only where its text asks for it; a text always is."""
    text = "[" * levels + json.dumps(value) + "]" * levels

    def read(given: bytes | str) -> str:
        try:
            return repr(parse_json(given))
        except NotJSON as problem:
            return f"refused: {problem}"

    assert read(text.encode()) == read(text)


def test_values_that_are_read_are_written_to_the_same(tmp_path: Path) -> None:
    value = {"n": 10**3999, "x": 1e308, "deep": json.loads("[" * 90 + "]" * 90), "text": "é \u2028 😀 \u0000"}
    assert parse_json(dump_row(value)) == value
    assert value_problem(value) is None
    with pytest.raises(NotJSON, match="not JSON"):
        parse_json("{'a': 1}")
