"""``deepspec.uniform``: hidden states rounded to a multiple of their channel's step, Huffman coded.

Features want a step proportional to their channel's spread, last_hidden ONE step for all channels (what is lost then
weighs equally in every logit). Values too large for the code (the first token's are, thousands of times the median)
are kept exactly beside it. docs/cache-format.md describes the bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from zarr.core.common import JSON

from deepspec.cache.codecs.base import RowCodec, check_rows, stored_rows
from deepspec.cache.codecs.bits import Bytes, blocks, decode_table, encode_table, pack, scratch, unpack

Floats = NDArray[np.float32]
_HEADER = struct.Struct("<IIII")  # stored rows, outliers, bytes of the frame, 0
_ALIGN = 8
_NIBBLE = 4
_SIGMA = 0.6745  # median of |x| for a normal x of unit spread


def to_float(values: NDArray[Any]) -> Floats:
    """bf16 bits (uint16) as float32; float32 as it is."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values


def channel_spread(sample: NDArray[Any]) -> Floats:
    """[C] robust standard deviation of each channel: from the median, which outliers do not move."""
    values = np.abs(to_float(sample))
    spread = np.median(values, axis=0) / _SIGMA
    mean = np.sqrt(np.square(values, dtype=np.float64).mean(axis=0))
    spread = np.where(spread > 0, spread, mean)  # a channel that is mostly zero
    usable = np.isfinite(spread) & (spread > 1e-30)
    return np.where(usable, spread, 1.0).astype(np.float32)


@dataclass(frozen=True)
class UniformCodec(RowCodec):
    """Chunks of bf16 bits (uint16) or float32, decoded to the nearest multiples of the steps.

    Args:
        steps: base64 of [C] float32. Powers of two where ``low_bits`` is 0.
        low_bits: 0: codes of 8 bits, all Huffman coded. 4: codes of 12 bits, whose lower 4 are stored uncompressed.
    """

    name: ClassVar[str] = "deepspec.uniform"
    steps: str
    low_bits: int = 0

    @classmethod
    def per_channel(cls, sample: NDArray[Any], levels: float) -> UniformCodec:
        """A step of each channel's spread / ``levels``, as a power of two: its multiples are bf16 values exactly."""
        steps = np.exp2(np.round(np.log2(channel_spread(sample) / levels)))
        return cls(encode_table(steps.astype("<f4")), 0)

    @classmethod
    def constant(cls, sample: NDArray[Any], levels: float) -> UniformCodec:
        """One step for all channels: the geometric mean of their rms / ``levels``."""
        rms = np.sqrt(np.square(to_float(sample), dtype=np.float64).mean(axis=0))
        rms = rms[np.isfinite(rms) & (rms > 1e-30)]
        step = float(np.exp(np.log(rms).mean())) / levels if len(rms) else 1.0
        return cls(encode_table(np.full(sample.shape[1], step, "<f4")), _NIBBLE)

    @cached_property
    def step_table(self) -> Floats:
        """[C] the steps."""
        if self.low_bits not in (0, _NIBBLE):
            raise ValueError(f"low_bits {self.low_bits} is neither 0 nor {_NIBBLE}")
        return decode_table(self.steps, "<f4").astype(np.float32)

    def configuration(self) -> dict[str, JSON]:
        """Its configuration in zarr.json."""
        return {"steps": self.steps, "low_bits": self.low_bits}

    def encode_rows(self, chunk: NDArray[Any]) -> bytes:
        """Header, positions and values of the outliers, plane of low bits, frame of high bits, padding."""
        rows = stored_rows(chunk)
        chunk = np.ascontiguousarray(chunk[:rows])
        with np.errstate(all="ignore"):
            codes = np.rint(to_float(chunk) / self.step_table)
            fits = np.abs(codes) <= (128 << self.low_bits) - 1  # False for NaN too
        places = np.flatnonzero(~fits).astype("<u4")
        codes = np.where(fits, codes, 0).astype(np.int16)
        frame = pack((codes >> self.low_bits).astype(np.int8).view(np.uint8))
        low = _pack_nibbles(codes) if self.low_bits else b""
        exact = chunk.reshape(-1)[places]
        length = _HEADER.size + places.nbytes + exact.nbytes + len(low) + len(frame)
        header = _HEADER.pack(rows, len(places), len(frame), 0)
        return b"".join((header, places.tobytes(), exact.tobytes(), low, frame, bytes(-(length + 4) % _ALIGN)))

    def decode_rows(self, data: Bytes, out: NDArray[Any], start: int, most: int) -> None:
        """Rows ``start`` .. of the chunk of ``most`` rows into ``out`` [n, C]."""
        rows, exact, frame_bytes, _ = _HEADER.unpack_from(data.data)
        check_rows(rows, most)
        channels, half = out.shape[1], (rows + 1) // 2
        ends = np.cumsum([_HEADER.size, 4 * exact, out.itemsize * exact, half * channels * bool(self.low_bits)])
        if len(data) < ends[3] + frame_bytes:
            raise ValueError(f"chunk of {len(data)} bytes is too short for {rows} rows of {channels}")
        high = unpack(data[ends[3] : ends[3] + frame_bytes], rows * channels).view(np.int8).reshape(rows, channels)
        low = data[ends[2] : ends[3]].reshape(-1, channels)
        stop = min(start + len(out), rows)
        out[max(stop - start, 0) :] = 0
        for begin, end in ((start, min(stop, half)), (max(start, half), stop)):
            for first, last in blocks(begin, end, channels):
                codes: NDArray[Any] = high[first:last]
                if self.low_bits:
                    shift = 0 if first < half else half
                    codes = _join_nibbles(codes, low[first - shift : last - shift], first < half)
                self._dequantise(codes, out[first - start : last - start])
        places, values = data[ends[0] : ends[1]].view("<u4"), data[ends[1] : ends[2]].view(out.dtype)
        chosen = slice(*np.searchsorted(places, (start * channels, stop * channels)))
        out.reshape(-1)[places[chosen].astype(np.int64) - start * channels] = values[chosen]

    def _dequantise(self, codes: NDArray[Any], out: NDArray[Any]) -> None:
        if out.dtype == np.float32:
            np.multiply(codes, self.step_table, out=out)
            return
        values = scratch("values", 4 * out.size).view(np.float32).reshape(out.shape)
        np.multiply(codes, self.step_table, out=values)
        words = values.view(np.uint32)
        if self.low_bits:  # round to the nearest bf16, ties to even
            words += ((words >> 16) & 1) + 0x7FFF
        np.right_shift(words, 16, out=words)
        np.copyto(out, words, casting="unsafe")


def _pack_nibbles(codes: NDArray[np.int16]) -> bytes:
    """The lower 4 bits; row t shares its bytes with row t + half."""
    low = (codes & 15).astype(np.uint8)
    half = (len(low) + 1) // 2
    packed = low[:half].copy()
    packed[: len(low) - half] |= low[half:] << 4
    return packed.tobytes()


def _join_nibbles(high: NDArray[np.int8], low: Bytes, first: bool) -> NDArray[np.int16]:
    nibbles = low & 15 if first else low >> 4
    return (high.astype(np.int16) << _NIBBLE) | nibbles
