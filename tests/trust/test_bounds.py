"""Inputs that are too large are refused before they cost their size many times over."""

from __future__ import annotations

import os
import resource
import shutil
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import data_tools as tools
import numpy as np
import pytest
import torch
from cache_tools import make_cache

from deepspec.cache import shard, store
from deepspec.cache.codecs.bits import pack
from deepspec.cache.codecs.lossless import LosslessCodec
from deepspec.cache.codecs.uniform import UniformCodec
from deepspec.cache.format import ArrayInfo
from deepspec.cache.reader import TargetCache
from deepspec.data import lines, sources
from deepspec.data.chat import CUT_CHARACTERS, Renderer, render_row
from deepspec.data.conversations import read_conversations
from deepspec.data.refusals import TOO_LONG
from deepspec.data.sources import read_source
from deepspec.errors import CacheError, DataError


def chat(text: str, **fields: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": text, **fields}]


def test_a_megabyte_is_refused_by_its_characters_before_a_tokenizer_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    case = tools.small_case("chatml")
    renderer = Renderer(case.tokenizer, case.family, max_length=256)
    within = renderer.conversation(chat("word " * 1000))
    assert len(within.input_ids) == 256  # what is merely long is cut, as ever
    monkeypatch.setattr(renderer, "_encode", None)
    monkeypatch.setattr(renderer, "_render", None)
    wide = "x" * (CUT_CHARACTERS * 256 + 1)
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": [wide]}}}
    for messages in (chat(wide), chat("a", reasoning_content=wide), chat("a", tool_calls=[call])):
        with pytest.raises(DataError, match=rf"{TOO_LONG}; found .3\d+ characters.; wanted at most 32768"):
            renderer.conversation(messages)
    assert render_row(renderer, {"messages": chat("a"), "tools": [{"name": wide}]}, 1) == TOO_LONG
    renderer._positions = 100  # as of a target with so many
    with pytest.raises(DataError, match=f"{TOO_LONG}.*32 for each of 100 tokens"):
        renderer.prompt_text([{"role": "user", "content": "x" * 3201}])


def test_a_line_without_end_is_refused_by_its_number_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with open(path, "wb") as handle:
        handle.write(b'{"id": "a", "messages": [{"role": "user", "content": "Why?"}]}\n')
        handle.truncate(2 << 30)  # zeros, which take no room
    rows = read_conversations(path)
    assert next(rows)["id"] == "a"
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"rows\.jsonl: line 2: a line too long; wanted at most 16,777,216 bytes"):
            next(rows)
        assert tracemalloc.get_traced_memory()[1] < 4 * lines.LINE_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("codec", "header"),
    [(LosslessCodec("AAAA"), "<II"), (UniformCodec("AACAPwAAgD8AAIA/"), "<IIII"),
     (UniformCodec("AACAPwAAgD8AAIA/", 4), "<IIII")],
    ids=["lossless", "uniform", "uniform-4"],
)  # fmt: skip
def test_no_memory_is_taken_for_what_a_codecs_header_states(codec: LosslessCodec | UniformCodec, header: str) -> None:
    frame = pack(np.zeros(1 << 20, np.uint8))
    out = np.empty((4, 3), np.uint16)
    for rows in (5, 1 << 20, 2**32 - 1):
        numbers = (rows, len(frame)) if header == "<II" else (rows, 0, len(frame), 0)
        data = np.frombuffer(struct.pack(header, *numbers) + frame + bytes(1 << 10), np.uint8)
        tracemalloc.start()
        with pytest.raises(ValueError, match=f"its header states {rows} rows of at most 4"):
            codec.decode_rows(data, out, 0, 4)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


@pytest.mark.parametrize("shape", [(2**62, 6), (-1, 6), (1, 0), (1, 2, 3), (1.5, 6), ("x", 6), ()], ids=str)
def test_the_sizes_of_a_manifest_are_checked_before_memory_is_taken(shape: tuple[int, ...], tmp_path: Path) -> None:
    make_cache(tmp_path / "c", samples=2)
    cache = TargetCache.open(tmp_path / "c")
    old = cache.manifest.table_info
    with pytest.raises(CacheError, match=r"not an array of a cache|shard too small for its rows"):
        shard.ShardReader(cache.store, cache.manifest.table, ArrayInfo(shape, old.dtype, old.level, old.bytes,
                                                                       old.metadata_sha256))  # fmt: skip


@pytest.fixture
def few_files() -> Iterator[int]:
    """Room for a quarter of the limit, which the pool may take, and 18 more beside what is open now."""
    store._pool.shrink(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest * 4 // 3 + 24, hard))
    yield highest
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_many_caches_share_a_bounded_number_of_open_files(tmp_path: Path, few_files: int) -> None:
    caches = []
    for number in range(3):
        make_cache(tmp_path / str(number), samples=6, samples_per_part=1)
        caches.append(TargetCache.open(tmp_path / str(number)))
    samples = [[cache.sample(number) for number in range(6)] for cache in caches]  # 72 files
    assert torch.equal(samples[0][3].features, caches[0].sample(3).features)
    assert len(store._pool._files) <= store.OPEN_FILES
    store._pool.shrink(5)
    assert len(store._pool._files) == 5
    del caches
    assert len(store._pool._files) == 0  # a store that goes takes its files along


def test_a_cache_made_again_at_the_same_place_is_read_from_its_new_files(tmp_path: Path) -> None:
    make_cache(tmp_path / "c", samples=2, seed=0)
    old = TargetCache.open(tmp_path / "c")
    before = old.sample(0).features
    shutil.rmtree(tmp_path / "c")
    make_cache(tmp_path / "c", samples=2, seed=1)
    after = TargetCache.open(tmp_path / "c").sample(0).features
    assert before.shape != after.shape or not torch.equal(before, after)


def write_parquet(path: Path, texts: list[str], categories: bool) -> Path:
    """Prompts; with categories every text stands once in the file's dictionary, which Arrow keeps in memory."""
    import pyarrow
    import pyarrow.parquet

    column = pyarrow.array(texts)
    table = pyarrow.table({"prompt": column.dictionary_encode() if categories else column})
    pyarrow.parquet.write_table(table, path)
    return path


@pytest.mark.parametrize("categories", [False, True])
def test_a_row_of_parquet_is_bounded_as_a_line_is(
    categories: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "LINE_BYTES", 1000)
    texts = ["x" * 900 + str(number) for number in range(70)]  # together more than a row may have
    found = read_source(str(write_parquet(tmp_path / "within.parquet", texts, categories)))
    assert [row["prompt"] for row in found] == texts  # type: ignore[index]
    texts[41] = "x" * 1001
    found = read_source(str(write_parquet(tmp_path / "one.parquet", texts, categories)))
    with pytest.raises(DataError, match=r"one\.parquet: row 42: a row too long; wanted at most 1,000 bytes; leave"):
        assert [next(found)["prompt"] for _ in range(70)]  # type: ignore[index]


def test_nested_rows_of_parquet_count_with_all_they_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(sources, "LINE_BYTES", 3000)
    rows = [chat("a" * 100), chat("a" * 100), chat("a" * 3000), chat("a")]
    pyarrow.parquet.write_table(pyarrow.table({"messages": rows}), tmp_path / "chats.parquet")
    found = read_source(str(tmp_path / "chats.parquet"))
    assert [next(found), next(found)] == [{"messages": one} for one in rows[:2]]
    with pytest.raises(DataError, match=r"row 3: a row too long"):
        next(found)


def test_a_row_of_a_hub_s_dataset_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(sources, "LINE_BYTES", 1000)
    rows = [{"messages": chat("a")}, {"messages": chat("a" * 1000)}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter(rows))
    found = read_source("acme/chats")
    assert next(found) == rows[0]
    with pytest.raises(DataError, match=r"acme/chats: row 2: a row too long"):
        next(found)


def test_a_date_beyond_pythons_in_a_parquet_file_is_one_line(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "dates.parquet"
    table = pyarrow.table({"prompt": ["a"], "day": pyarrow.array([2**31 - 1], pyarrow.date32())})
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(DataError, match=r"dates\.parquet: cannot read the Parquet file \(days="):
        list(read_source(str(path)))
