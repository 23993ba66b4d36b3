"""Rows of an unfinished job: what a kill leaves is read, a row that differs from an earlier one is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deepspec.errors import DataError
from deepspec.rows import RowLog, dump_row


def open_log(folder: Path, rank: int = 0, **more: Any) -> RowLog[str]:
    return RowLog(folder / "rows.jsonl", lambda row: row["id"], DataError, rank=rank, **more)


def test_a_killed_job_goes_on_after_its_last_complete_row(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    assert not list(tmp_path.iterdir())  # a log that is only read makes no file
    log.append({"id": "a", "text": "half a pair \ud800, and one\u2028line"})
    log.close()
    with open(log.own, "ab") as handle:
        handle.write(b'{"id": "b", "te')
    again = open_log(tmp_path)
    assert dict(again) == {"a": {"id": "a", "text": "half a pair \ud800, and one\u2028line"}}
    again.append({"id": "b"})
    assert again["b"] == {"id": "b"}
    again.close()
    assert list(open_log(tmp_path)) == ["a", "b"]


def test_the_header_is_written_once_and_checked_by_every_start(tmp_path: Path) -> None:
    seen: list[Any] = []
    for name in ("a", "b"):
        log = open_log(tmp_path, header={"settings": name}, check=seen.append)
        log.append({"id": name})
        log.close()
    assert seen == [{"settings": "a"}]
    assert list(open_log(tmp_path, header={}, check=seen.append)) == ["a", "b"]


def test_a_header_that_a_kill_cut_is_written_again(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"settings": ')
    log = open_log(tmp_path, header={"settings": 1})
    log.append({"id": "a"})
    log.close()
    assert log.own.read_bytes() == dump_row({"settings": 1}) + dump_row({"id": "a"})


def test_ranks_read_each_other_and_are_merged_in_order(tmp_path: Path) -> None:
    for rank, name in enumerate("cba"):
        log = open_log(tmp_path, rank)
        log.append({"id": name})
        log.close()
    assert sorted(open_log(tmp_path, 7)) == ["a", "b", "c"]
    log = open_log(tmp_path)
    log.merge()
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert list(log) == list(open_log(tmp_path)) == ["a", "b", "c"]


def test_a_row_that_comes_twice_counts_once_unless_its_copies_differ(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(2 * dump_row({"id": "a", "n": 1}))
    assert len(open_log(tmp_path)) == 1
    path.write_bytes(path.read_bytes() + dump_row({"id": "a", "n": 2}))
    with pytest.raises(DataError, match=r"rows\.jsonl: line 3: another row for a than before; remove the line"):
        open_log(tmp_path)


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(dump_row({"id": "a"}) + b"no json\n" + dump_row({"id": "b"}))
    with pytest.raises(DataError, match=r"rows\.jsonl: line 2: not a row of results"):
        open_log(tmp_path)
