"""Reading: samples are what was written, plain zarr agrees, damage is named, workers and pickling change nothing."""

from __future__ import annotations

import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from cache_tools import make_cache
from torch.utils.data import DataLoader, Dataset

from deepspec.cache.format import array_file
from deepspec.cache.memory import BlockPool, empty
from deepspec.cache.reader import TargetCache
from deepspec.cache.shard import ShardReader
from deepspec.cache.verify import verify_cache
from deepspec.errors import CacheError


@pytest.mark.parametrize("level", ["raw", "lossless"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_samples_are_exactly_what_was_written(tmp_path: Path, level: str, dtype: str) -> None:
    truth = make_cache(tmp_path / "c", level=level, dtype=dtype)
    cache = TargetCache.open(tmp_path / "c")
    assert len(cache) == len(truth)
    assert cache.sample_ids.tolist() == [sample.sample_id for sample in truth]
    for number, wanted in enumerate(truth):
        found = cache.sample(number)
        assert found.sample_id == wanted.sample_id
        np.testing.assert_array_equal(found.input_ids, wanted.input_ids)
        np.testing.assert_array_equal(found.loss_mask, wanted.loss_mask)
        assert torch.equal(found.features, wanted.features)
        assert torch.equal(found.last_hidden, wanted.last_hidden)
        mask, length = cache.masks(number)
        np.testing.assert_array_equal(mask, wanted.loss_mask)
        assert length == cache.lengths[number] == len(wanted.input_ids)


def test_plain_zarr_gives_the_same_values(tmp_path: Path) -> None:
    for level in ("raw", "lossless", "near"):
        make_cache(tmp_path / level, level=level)
        cache = TargetCache.open(tmp_path / level)
        for number, entry in enumerate(cache.manifest.parts):
            group = zarr.open_group(tmp_path / level / "parts" / entry.name, mode="r")
            for name in ("input_ids", "loss_mask", "features", "last_hidden"):
                array = cache.part(number).array(name)
                found = np.empty(array.info.shape, array.dtype)
                array.read(0, found)
                np.testing.assert_array_equal(found, group[name][:])  # type: ignore[index]


def test_our_reader_reads_shards_that_zarr_wrote(tmp_path: Path) -> None:
    """Chunks in another order in the file, as zarr lays them out."""
    make_cache(tmp_path / "c", level="lossless")
    cache = TargetCache.open(tmp_path / "c")
    ours = cache.part(0).array("features")
    wanted = np.empty(ours.info.shape, ours.dtype)
    ours.read(0, wanted)
    part = tmp_path / "c" / "parts" / cache.manifest.parts[0].name
    array = zarr.open_array(part / "features", mode="r+")
    file = part / array_file("features", 2)
    file.unlink()
    array[:] = wanted
    info = type(ours.info)(**{**vars(ours.info), "bytes": file.stat().st_size})
    again = ShardReader(cache.store, f"parts/{part.name}/features", info)
    for start, stop in ((0, len(wanted)), (70, 199), (64, 128), (5, 6)):
        found = np.empty_like(wanted[start:stop])
        again.read(start, found)
        np.testing.assert_array_equal(found, wanted[start:stop])


def padded(cache: TargetCache, numbers: list[int], last_hidden: bool = True) -> tuple[torch.Tensor, Any]:
    """Features and last_hidden of samples side by side, decoded straight into the padded rows."""
    shape = (len(numbers), int(cache.lengths[numbers].max()))
    features = empty((*shape, 32), cache.dtype).zero_()
    last = empty((*shape, 16), cache.dtype).zero_() if last_hidden else None
    for row, number in enumerate(numbers):
        length = cache.lengths[number]
        cache.read_into(number, features[row, :length], None if last is None else last[row, :length])
    return features, last


def test_rows_of_a_padded_batch_are_read_as_samples_are(tmp_path: Path) -> None:
    make_cache(tmp_path / "c")
    cache = TargetCache.open(tmp_path / "c")
    numbers = [3, 0, 5]
    features, last = padded(cache, numbers)
    for row, number in enumerate(numbers):
        sample = cache.sample(number)
        length = len(sample.input_ids)
        assert torch.equal(features[row, :length], sample.features)
        assert torch.equal(last[row, :length], sample.last_hidden)
        assert not features[row, length:].any()
        assert not last[row, length:].any()
    assert torch.equal(padded(cache, numbers, last_hidden=False)[0], features)


class _Samples(Dataset):
    def __init__(self, cache: TargetCache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, numbers: list[int]) -> torch.Tensor:
        return padded(self.cache, numbers)[0]


def test_threads_worker_processes_and_pickling_read_the_same(tmp_path: Path) -> None:
    truth = make_cache(tmp_path / "c", samples=12)
    cache = TargetCache.open(tmp_path / "c")
    assert torch.equal(pickle.loads(pickle.dumps(cache)).sample(4).features, truth[4].features)
    with ThreadPoolExecutor(4) as pool:
        for number, sample in enumerate(pool.map(lambda n: cache.sample(n % 12), range(60))):
            assert torch.equal(sample.features, truth[number % 12].features)
    batches = [[1, 7], [3], [0, 11, 5]]
    wanted_batches = [padded(cache, numbers)[0] for numbers in batches]
    for workers in (0, 2):
        loader = DataLoader(_Samples(cache), batch_size=None, sampler=batches, num_workers=workers)
        for found, wanted in zip(loader, wanted_batches, strict=True):
            assert torch.equal(found, wanted)


def test_memory_is_used_again_only_when_nothing_refers_to_it() -> None:
    pool = BlockPool(kept=8 << 20)
    first = torch.from_numpy(pool.take(3 << 20))
    place, view = first.data_ptr(), first[100:200]
    del first
    other = pool.take(3 << 20)
    assert other.ctypes.data != place
    view.fill_(1)
    del view
    assert pool.take((3 << 20) - 5).ctypes.data == place
    blocks = [pool.take(3 << 20) for _ in range(5)]
    del blocks
    assert pool.free_bytes <= 8 << 20


def damage(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 0x10
    file.write_bytes(data)


@pytest.mark.parametrize("level", ["raw", "lossless", "near"])
def test_a_flipped_bit_anywhere_is_named(tmp_path: Path, level: str) -> None:
    make_cache(tmp_path / "c", samples=6, level=level, samples_per_part=3)
    part = tmp_path / "c" / "parts" / "00001"
    files = [path for path in part.rglob("*") if path.is_file() and path.parent != part]
    assert len(files) == 8
    dice = np.random.default_rng(0)
    for file in files:
        whole = file.read_bytes()
        for offset in (0, len(whole) - 1, int(dice.integers(len(whole)))):
            damage(file, offset)
            problems = verify_cache(tmp_path / "c", workers=1)
            assert [problem.part for problem in problems] == ["00001"], (file, offset)
            assert str(file.relative_to(tmp_path / "c")) in problems[0].text
            file.write_bytes(whole)
    assert verify_cache(tmp_path / "c") == []


def test_reading_a_broken_chunk_names_part_array_chunk_and_sample(tmp_path: Path) -> None:
    make_cache(tmp_path / "c", samples=6, samples_per_part=3)
    damage(tmp_path / "c/parts/00001/features/c/0/0", 40)
    cache = TargetCache.open(tmp_path / "c")
    cache.sample(0)
    last_of_part = 5  # written first, so that chunk 0 holds it
    with pytest.raises(CacheError) as caught:
        cache.sample(last_of_part)
    for word in ("parts/00001/features", "chunk 0", "sample 5 in part 00001", "checksum"):
        assert word in str(caught.value)


def test_missing_and_truncated_files_are_named(tmp_path: Path) -> None:
    """plain zarr reads a missing shard as zeros."""
    make_cache(tmp_path / "whole", samples=6, samples_per_part=3)

    def copy() -> Path:
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        return Path(shutil.copytree(tmp_path / "whole", tmp_path / "c"))

    shard = copy() / "parts/00000/last_hidden/c/0/0"
    shard.unlink()
    with pytest.raises(CacheError, match=r"last_hidden/c/0/0.*shard missing"):
        TargetCache.open(tmp_path / "c").sample(0)
    assert "shard missing" in verify_cache(tmp_path / "c")[0].text
    shard = copy() / "parts/00000/features/c/0/0"
    shard.write_bytes(shard.read_bytes()[:-300])
    with pytest.raises(CacheError, match=r"features/c/0/0.*another size"):
        TargetCache.open(tmp_path / "c").sample(0)
    shutil.rmtree(copy() / "parts/00001")
    with pytest.raises(CacheError, match=r"parts/00001.*part missing"):
        TargetCache.open(tmp_path / "c").sample(5)
    assert verify_cache(tmp_path / "c")[0].part == "00001"
    (copy() / "manifest.json").unlink()
    with pytest.raises(CacheError, match="not finished"):
        TargetCache.open(tmp_path / "c")
    with pytest.raises(CacheError, match=r"no cache here.*deepspec cache build"):
        TargetCache.open(tmp_path / "nothing")
    manifest = copy() / "manifest.json"
    manifest.write_text(manifest.read_text().replace("deepspec.cache/1", "deepspec.cache/0"))
    with pytest.raises(CacheError, match="not a cache manifest of this version"):
        TargetCache.open(tmp_path / "c")


def test_a_changed_part_manifest_and_a_stray_part_are_found(tmp_path: Path) -> None:
    make_cache(tmp_path / "c", samples=6, samples_per_part=3)
    file = tmp_path / "c/parts/00000/part.json"
    file.write_text(file.read_text().replace('"00000"', '"00009"'))
    shutil.copytree(tmp_path / "c/parts/00001", tmp_path / "c/parts/00007")
    assert [problem.part for problem in verify_cache(tmp_path / "c")] == ["00000", "00007"]
