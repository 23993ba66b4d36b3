"""A reader written from docs/cache-format.md alone, without deepspec and without zarr, reads what the cache reads."""

from __future__ import annotations

import base64
import json
import struct
from hashlib import sha256
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch
import zstandard
from cache_tools import make_cache

from deepspec.cache.reader import TargetCache


def read_array(place: Path, shape: list[int], size: int, digest: str) -> np.ndarray:
    """A whole array."""
    metadata = (place / "zarr.json").read_bytes()
    assert sha256(metadata).hexdigest() == digest
    about = json.loads(metadata)
    inner = about["codecs"][0]["configuration"]
    rows, dtype, chunk = shape[0], np.dtype(about["data_type"]), inner["chunk_shape"][0]
    data = (place / "c" / "/".join("0" * len(shape))).read_bytes()
    assert len(data) == size
    count = -(-rows // chunk)
    index = data[-16 * count - 4 :]
    assert struct.unpack("<I", index[-4:])[0] == google_crc32c.value(index[:-4])
    out = []
    for number in range(count):
        offset, length = struct.unpack_from("<QQ", index, 16 * number)
        coded = data[offset : offset + length]
        assert struct.unpack("<I", coded[-4:])[0] == google_crc32c.value(coded[:-4])
        out.append(decode(inner["codecs"][0], coded[:-4], (chunk, *shape[1:]), dtype))
    return np.concatenate(out)[:rows]


def decode(codec: dict[str, Any], data: bytes, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """One chunk."""
    if codec["name"] == "bytes":
        return np.frombuffer(data, dtype).reshape(shape)
    out = np.zeros(shape, dtype)
    work = {"deepspec.lossless": lossless_words, "deepspec.uniform": uniform_words}[codec["name"]]
    values = work(codec["configuration"], data, shape[1])
    out[: len(values)] = values
    return out


def lossless_words(settings: dict[str, Any], data: bytes, channels: int) -> np.ndarray:
    rows, frame = struct.unpack_from("<II", data)
    half = -(-rows // 2)
    bias = np.frombuffer(base64.b64decode(settings["exponents"]), np.uint8).astype(np.int64)
    rest = np.frombuffer(data, "<u2", half * channels, 8).reshape(half, channels).astype(np.int64)
    start = 8 + 2 * half * channels
    high = zstandard.ZstdDecompressor().decompress(data[start : start + frame])
    high = np.frombuffer(high, "<u2").reshape(half, channels).astype(np.int64)
    first = (((high << 7) ^ (rest & 0x807F)) + (bias << 7)) % 65536
    turned = ((((rest >> 7) & 0xFF) ^ high) + (bias << 8)) % 65536
    second = turned >> 1 | (turned & 1) << 15
    return np.concatenate([first, second])[:rows].astype(np.uint16)


def uniform_words(settings: dict[str, Any], data: bytes, channels: int) -> np.ndarray:
    rows, exact, frame, _ = struct.unpack_from("<IIII", data)
    steps = np.frombuffer(base64.b64decode(settings["steps"]), "<f4")
    places = np.frombuffer(data, "<u4", exact, 16)
    kept = np.frombuffer(data, "<u2", exact, 16 + 4 * exact)
    start, half = 16 + 6 * exact, -(-rows // 2)
    nibbles = np.zeros((2 * half, channels), np.int64)
    if settings["low_bits"]:
        low = np.frombuffer(data, np.uint8, half * channels, start).reshape(half, channels)
        nibbles = np.concatenate([low & 15, low >> 4]).astype(np.int64)
        start += half * channels
    upper = zstandard.ZstdDecompressor().decompress(data[start : start + frame])
    codes = np.frombuffer(upper, np.int8).reshape(rows, channels).astype(np.int64)
    codes = 16 * codes + nibbles[:rows] if settings["low_bits"] else codes
    values = torch.from_numpy(codes.astype(np.float32) * steps).bfloat16().view(torch.uint16).numpy().copy()
    values.reshape(-1)[places] = kept
    return values


@pytest.mark.parametrize("level", ["raw", "lossless", "near", "smallest"])
def test_a_reader_written_from_the_specification(tmp_path: Path, level: str) -> None:
    make_cache(tmp_path / "c", samples=7, level=level, samples_per_part=3)
    manifest = json.loads((tmp_path / "c/manifest.json").read_text())
    assert manifest["format"] == "deepspec.cache/1"
    info = manifest["table_info"]
    table = read_array(tmp_path / "c" / manifest["table"], info["shape"], info["bytes"], info["metadata_sha256"])
    cache = TargetCache.open(tmp_path / "c")
    parts = []
    for entry in manifest["parts"]:
        place = tmp_path / "c/parts" / entry["name"]
        assert sha256((place / "part.json").read_bytes()).hexdigest() == entry["sha256"]
        arrays = json.loads((place / "part.json").read_text())["arrays"].items()
        parts.append({k: read_array(place / k, a["shape"], a["bytes"], a["metadata_sha256"]) for k, a in arrays})
    for number, (sample_id, part, start, length, row_start, rows) in enumerate(table.tolist()):
        arrays, sample = parts[part], cache.sample(number)
        assert sample.sample_id == sample_id
        tokens = slice(start, start + length)
        np.testing.assert_array_equal(arrays["input_ids"][tokens], sample.input_ids)
        np.testing.assert_array_equal(arrays["loss_mask"][tokens] != 0, sample.loss_mask)
        np.testing.assert_array_equal(arrays["features"][tokens], sample.features.view(torch.uint16).numpy())
        last = np.zeros((length, 16), np.uint16)
        last[:-1][arrays["loss_mask"][tokens][1:] != 0] = arrays["last_hidden"][row_start : row_start + rows]
        np.testing.assert_array_equal(last, sample.last_hidden.view(torch.uint16).numpy())
