"""Rows of an unfinished job: what a kill leaves is read, a row that rotted or differs is refused."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from deepspec.errors import DataError
from deepspec.rows import DIGEST, RowLog, dump_row, sealed_row


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
    assert log.own.read_bytes() == sealed_row({"settings": 1}, "rows.jsonl") + sealed_row({"id": "a"}, "rows.jsonl")


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
    path.write_bytes(2 * sealed_row({"id": "a", "n": 1}, "rows.jsonl"))
    assert len(open_log(tmp_path)) == 1
    path.write_bytes(path.read_bytes() + sealed_row({"id": "a", "n": 2}, "rows.jsonl"))
    with pytest.raises(DataError, match=r"rows\.jsonl: line 3: another row for a than before; remove the line"):
        open_log(tmp_path)


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(
        sealed_row({"id": "a"}, "rows.jsonl") + b"no json\n" + sealed_row({"id": "b"}, "rows.jsonl")
    )
    with pytest.raises(DataError, match=r"rows\.jsonl: line 2: not a row of results"):
        open_log(tmp_path)
    (tmp_path / "rows.jsonl").write_bytes(sealed_row({"id": ["a"]}, "rows.jsonl"))  # of a list, which is no key
    with pytest.raises(DataError, match=r"rows\.jsonl: line 1: not a row of results"):
        open_log(tmp_path)


def test_no_flipped_bit_of_a_row_is_gone_on_with(tmp_path: Path) -> None:
    log = open_log(tmp_path, header={"settings": 1.5})
    for name in "abc":
        log.append({"id": name, "text": "caf\u00e9", "n": 12, DIGEST: "a row's own"})
    log.close()
    intact, data = dict(log), log.own.read_bytes()
    assert intact["a"][DIGEST] == "a row's own"
    header, seen = len(data.splitlines(keepends=True)[0]), list[Any]()
    for bit in random.Random(1).sample(range(8 * len(data)), 600):
        spoilt = bytearray(data)
        spoilt[bit // 8] ^= 1 << bit % 8
        log.own.write_bytes(spoilt)
        with contextlib.suppress(DataError):  # or a row is missing, and made again
            found = dict(open_log(tmp_path, header={}, check=seen.append))
            assert bit // 8 < header or found != intact
            assert all(found[key] == intact[key] for key in found)
    assert {one["settings"] for one in seen} == {1.5}


def test_a_row_that_rots_while_the_job_runs_is_not_read(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append({"id": "a", "n": 12})
    log.close()
    log.own.write_bytes(log.own.read_bytes().replace(b"12", b"13"))
    with pytest.raises(DataError, match=r"rows\.jsonl: byte 0: a row that changed"):
        log["a"]
    with pytest.raises(DataError, match=r"line 1: not a row of results, or one that changed; remove the line"):
        open_log(tmp_path)


def test_rows_of_an_earlier_version_are_made_again_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(dump_row({"id": "a", "n": 1}) + dump_row({"id": "b", "n": 1}))
    assert dict(open_log(tmp_path, unsealed=True)) == {name: {"id": name, "n": 1} for name in "ab"}
    log = open_log(tmp_path)
    assert "rows.jsonl: rows without a digest, of an earlier version: 2, made again" in caplog.text
    log.append({"id": "b", "n": 2})
    log.append({"id": "a", "n": 2})
    log.close()
    log.merge()
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [2, 2]
    assert sorted(open_log(tmp_path)) == ["a", "b"]


def test_rows_under_another_name_are_refused(tmp_path: Path) -> None:
    """Rows of the draft and of the plain decoding have one form: swapped, they would be taken for each other."""
    log = open_log(tmp_path)
    log.append({"id": "a", "n": 1})
    log.close()
    (tmp_path / "rows.jsonl").rename(tmp_path / "plain.jsonl")
    with pytest.raises(DataError, match=r"plain\.jsonl: line 1: .*one that changed"):
        RowLog(tmp_path / "plain.jsonl", lambda row: row["id"], DataError)
