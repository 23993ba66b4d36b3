"""Codecs: exact where they say so, within half a step where they do not, and readable by plain zarr."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec

from deepspec.cache.codecs.base import stored_rows
from deepspec.cache.codecs.bits import decode_table
from deepspec.cache.codecs.lossless import LosslessCodec, usual_exponents
from deepspec.cache.codecs.uniform import UniformCodec, to_float
from deepspec.cache.levels import LEVELS, codec_for
from deepspec.errors import CacheError


def hidden_states(rows: int, channels: int, seed: int, dtype: str = "uint16") -> np.ndarray:
    """Normal values of very different spreads by channel, some massive ones, NaN, infinities, both zeros."""
    random = np.random.default_rng(seed)
    values = random.normal(size=(rows, channels)) * np.exp(random.normal(size=channels) * 2)
    values = values.astype(np.float32)
    strange = [25_000.0, np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40]
    for place in random.integers(0, values.size, min(values.size, 7)):
        values.reshape(-1)[place] = strange[int(place) % len(strange)]
    if dtype == "float32":
        return values
    return torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint32) if values.dtype == np.float32 else values


def decode(codec: object, data: bytes, like: np.ndarray, start: int = 0, stop: int | None = None) -> np.ndarray:
    out = np.full_like(like[start:stop], 7)
    codec.decode_rows(np.frombuffer(data, np.uint8), out, start, 1 << 20)  # type: ignore[attr-defined]
    return out


def plain_lossless(data: bytes, exponents: np.ndarray, rows_out: int) -> np.ndarray:
    """A reader written from docs/cache-format.md, one value at a time."""
    rows, frame_bytes = np.frombuffer(data[:8], "<u4")
    channels, half = len(exponents), -(-int(rows) // 2)
    rest = np.frombuffer(data[8 : 8 + half * channels * 2], "<u2").reshape(half, channels)
    import zstandard

    start = 8 + half * channels * 2
    high = zstandard.ZstdDecompressor().decompress(data[start : start + int(frame_bytes)])
    high = np.frombuffer(high, np.uint8).reshape(half, channels, 2)
    out = np.zeros((rows_out, channels), np.uint16)
    for t in range(int(rows)):
        for c in range(channels):
            pair, second = t % half if half else 0, t >= half
            first_exponent, second_exponent = (int(x) for x in high[pair, c])
            word, bias = int(rest[pair, c]), int(exponents[c])
            if not second:
                sign = (word >> 15) ^ (second_exponent & 1)
                value = (sign << 15 | first_exponent << 7 | (word & 0x7F)) + (bias << 7)
            else:
                byte = ((word >> 7) & 0xFF) ^ first_exponent
                turned = ((second_exponent << 8 | byte) + (bias << 8)) & 0xFFFF
                value = turned >> 1 | (turned & 1) << 15
            out[t, c] = value & 0xFFFF
    return out


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 40), channels=st.integers(1, 9), seed=st.integers(0, 10**6), stored=st.integers(0, 40))
def test_lossless_equals_its_plain_twin(rows: int, channels: int, seed: int, stored: int) -> None:
    values = hidden_states(rows, channels, seed)
    values[stored:] = 0
    codec = LosslessCodec.calibrate(values)
    data = codec.encode_rows(values)
    assert (len(data) + 4) % 8 == 0
    np.testing.assert_array_equal(decode(codec, data, values), values)
    np.testing.assert_array_equal(plain_lossless(data, usual_exponents(values), rows), values)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_lossless_gives_any_run_of_rows(dtype: str) -> None:
    values = hidden_states(13, 5, 1, dtype)
    codec = LosslessCodec.calibrate(values[:3])
    data = codec.encode_rows(values)
    for start in range(13):
        for stop in range(start, 14):
            found = decode(codec, data, values, start, stop)
            np.testing.assert_array_equal(bits(found), bits(values[start:stop]))


def plain_uniform(codec: UniformCodec, values: np.ndarray) -> np.ndarray:
    """Rounded values, by the definition."""
    numbers, step = to_float(values), codec.step_table
    with np.errstate(all="ignore"):
        codes = np.rint(numbers / step)
        kept = ~(np.abs(codes) <= (2047 if codec.low_bits else 127))
        rounded = (np.where(kept, 0, codes) * step).astype(np.float32) + np.float32(0)  # codes know one zero
    if values.dtype == np.uint16:
        rounded = torch.from_numpy(rounded).bfloat16().view(torch.uint16).numpy()
    return np.where(kept, values, rounded)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    channels=st.integers(1, 9),
    seed=st.integers(0, 10**6),
    array=st.sampled_from(["features", "last_hidden"]),
    level=st.sampled_from(["near", "compact", "smallest"]),
    dtype=st.sampled_from(["uint16", "float32"]),
)
def test_near_lossless_equals_its_plain_twin(
    rows: int, channels: int, seed: int, array: str, level: str, dtype: str
) -> None:
    values = hidden_states(rows, channels, seed, dtype)
    codec = codec_for(array, level)(values)
    data = codec.encode_rows(values)
    found = decode(codec, data, values)
    wanted = plain_uniform(codec, values)
    np.testing.assert_array_equal(found, wanted)
    start = rows // 3
    np.testing.assert_array_equal(decode(codec, data, values, start, rows - 1), wanted[start : rows - 1])


def test_steps_are_proportional_for_features_and_one_for_last_hidden() -> None:
    values = hidden_states(512, 8, 3)
    features = codec_for("features", "near")(values).step_table
    assert set(np.log2(features) % 1) == {0.0}
    assert len(set(features)) > 1
    assert len(set(codec_for("last_hidden", "near")(values).step_table)) == 1


def test_a_dead_channel_and_one_of_nan_do_not_break_calibration() -> None:
    values = hidden_states(64, 4, 4)
    values[:, 0], values[:, 1] = 0, 0x7FC0
    for level in LEVELS:
        for array in ("features", "last_hidden"):
            codec = codec_for(array, level)(values)
            found = decode(codec, codec.encode_rows(values), values)
            np.testing.assert_array_equal(found[:, :2], values[:, :2])


def test_truncated_bytes_are_refused() -> None:
    values = hidden_states(16, 64, 5)
    for level in ("lossless", "near"):
        codec = codec_for("features", level)(values)
        data = codec.encode_rows(values)
        with pytest.raises((ValueError, RuntimeError)):
            decode(codec, data[: len(data) // 2], values)


def test_trailing_zero_bits_are_not_stored_but_minus_zero_is() -> None:
    chunk = np.zeros((5, 3), np.float32)
    assert stored_rows(chunk) == 0
    chunk[2, 1] = -0.0
    assert stored_rows(chunk) == 3


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_plain_zarr_writes_and_reads_with_the_codecs(tmp_path: Path, level: str, dtype: str) -> None:
    values = hidden_states(100, 6, 6, dtype)
    codec = codec_for("features", level)(values)
    serializer = codec.serializer if level == "raw" else codec
    array = zarr.create_array(
        tmp_path / "a",
        shape=values.shape,
        dtype=dtype,
        chunks=(16, 6),
        shards=(64, 6),
        serializer=serializer,
        compressors=Crc32cCodec(),
    )
    array[:] = values
    found = np.asarray(zarr.open_array(tmp_path / "a", mode="r")[:])
    wanted = values if level in ("raw", "lossless") else plain_uniform(codec, values)
    np.testing.assert_array_equal(bits(found), bits(wanted))


def test_configuration_is_plain_json_and_round_trips() -> None:
    values = hidden_states(32, 4, 7)
    codec = UniformCodec.per_channel(values, 16)
    again = UniformCodec.from_dict(codec.to_dict())
    assert again == codec
    assert decode_table(again.steps, "<f4").shape == (4,)


def test_an_unknown_level_names_the_known_ones() -> None:
    with pytest.raises(CacheError, match="did you mean 'lossless'"):
        codec_for("features", "losless")


def test_zero_bits_of_minus_zero_stay_in_lossless_floats() -> None:
    values = np.array([[0.0, -0.0], [1.0, -2.0]], np.float32)
    codec = LosslessCodec.calibrate(values)
    np.testing.assert_array_equal(bits(decode(codec, codec.encode_rows(values), values)), bits(values))
