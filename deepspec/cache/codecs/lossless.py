"""``deepspec.lossless``: hidden states exactly, in two thirds of their bytes.

The mantissa of a hidden state is noise; its exponent, given the channel, has about 2.6 bits of entropy. Each word
minus its channel's usual exponent is split into a byte of exponent (Huffman coded) and the rest (stored as it is).
docs/cache-format.md describes the bytes.
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
from deepspec.cache.codecs.bits import Bytes, Words, blocks, decode_table, encode_table, pack, scratch, unpack

_HEADER = struct.Struct("<II")  # stored rows, bytes of the exponent frame
_ALIGN = 8  # encoded chunk + its 4-byte checksum are a multiple of this, so that every chunk in a shard is aligned


def usual_exponents(sample: NDArray[Any]) -> Bytes:
    """[C] median exponent byte of each channel over the rows of ``sample`` [T, C] (bf16 bits or float32)."""
    if sample.dtype == np.uint16:
        exponents = (sample >> 7).astype(np.uint8)
    else:
        exponents = (sample.view(np.uint32) >> 23).astype(np.uint8)
    middle = len(exponents) // 2
    return np.partition(exponents, middle, axis=0)[middle]


@dataclass(frozen=True)
class LosslessCodec(RowCodec):
    """Chunks of bf16 bits (uint16) or float32.

    Args:
        exponents: base64 of [C] uint8, the exponent subtracted from each channel.
    """

    name: ClassVar[str] = "deepspec.lossless"
    exponents: str

    @classmethod
    def calibrate(cls, sample: NDArray[Any]) -> LosslessCodec:
        """The codec for an array of which ``sample`` [T, C] is typical; values far from it only cost space."""
        return cls(encode_table(usual_exponents(sample)))

    @cached_property
    def bias(self) -> Words:
        """[C] the exponents as 16-bit words."""
        return decode_table(self.exponents, "<u1").astype(np.uint16)

    def configuration(self) -> dict[str, JSON]:
        """Its configuration in zarr.json."""
        return {"exponents": self.exponents}

    def encode_rows(self, chunk: NDArray[Any]) -> bytes:
        """Header, plane of signs and mantissas, frame of exponents, padding."""
        rows = stored_rows(chunk)
        split = _split_words if chunk.dtype == np.uint16 else _split_floats
        rest, high = split(chunk[:rows], self.bias)
        frame = pack(high)
        length = _HEADER.size + rest.nbytes + len(frame)
        return b"".join((_HEADER.pack(rows, len(frame)), rest.data, frame, bytes(-(length + 4) % _ALIGN)))

    def decode_rows(self, data: Bytes, out: NDArray[Any], start: int, most: int) -> None:
        """Rows ``start`` .. of the chunk of ``most`` rows into ``out`` [n, C]."""
        rows, frame_bytes = _HEADER.unpack_from(data.data)
        check_rows(rows, most)
        channels = out.shape[1]
        even = rows + rows % 2 if out.dtype == np.uint16 else rows
        rest_bytes = even * channels * (out.dtype.itemsize - 1)
        if len(data) < _HEADER.size + rest_bytes + frame_bytes:
            raise ValueError(f"chunk of {len(data)} bytes is too short for {rows} rows of {channels}")
        body = data[_HEADER.size :]
        high = unpack(body[rest_bytes : rest_bytes + frame_bytes], even * channels)
        stop = min(start + len(out), rows)
        out[max(stop - start, 0) :] = 0
        join = _join_words if out.dtype == np.uint16 else _join_floats
        join(body[:rest_bytes], high, self.bias, out, start, stop, even)


def _split_words(words: Words, bias: Words) -> tuple[Words, Bytes]:
    """Two rows share one row of each plane, so that both ways work on 16-bit words: row t with row t + half."""
    half = (len(words) + 1) // 2
    first, second = words[:half], np.zeros_like(words[:half])
    second[: len(words) - half] = words[half:]
    shifted = np.subtract(
        first, bias << 7, dtype=np.uint16
    )  # a borrow flips the sign bit, and the addition on reading flips it back
    rotated = np.subtract((second << 1) | (second >> 15), bias << 8, dtype=np.uint16)
    low_exponent, high_exponent = (shifted >> 7) & 0xFF, rotated >> 8
    high: Words = low_exponent | (high_exponent << 8)
    # Reading shifts 16-bit words and does not mask: the bits that come along are taken out of the noisy plane here.
    rest: Words = (shifted & 0x807F) ^ ((high_exponent & 1) << 15)
    rest |= ((rotated & 0xFF) ^ low_exponent) << 7
    return rest, high.view(np.uint8)


def _join_words(rest: Bytes, high: Bytes, bias: Words, out: Words, start: int, stop: int, even: int) -> None:
    channels, half = out.shape[1], even // 2
    if rest.ctypes.data % 2:
        rest = rest.copy()
    low_words = rest.view(np.uint16).reshape(half, channels)
    high_words = high.view(np.uint16).reshape(half, channels)
    bias_first, bias_second = bias << 7, bias << 8
    for first, last in blocks(start, min(stop, half), channels):
        target = out[first - start : last - start]
        spare = scratch("join", target.nbytes).view(np.uint16).reshape(target.shape)
        np.left_shift(high_words[first:last], 7, out=target)
        np.bitwise_and(low_words[first:last], 0x807F, out=spare)
        np.bitwise_xor(target, spare, out=target)
        np.add(target, bias_first, out=target)
    for first, last in blocks(max(start, half), stop, channels):
        target = out[first - start : last - start]
        spare = scratch("join", target.nbytes).view(np.uint16).reshape(target.shape)
        np.right_shift(low_words[first - half : last - half], 7, out=spare)
        np.bitwise_and(spare, 0xFF, out=spare)
        np.bitwise_xor(spare, high_words[first - half : last - half], out=spare)
        np.add(spare, bias_second, out=spare)
        np.right_shift(spare, 1, out=target)
        np.left_shift(spare, 15, out=spare)
        np.bitwise_xor(target, spare, out=target)


def _split_floats(values: NDArray[np.float32], bias: Words) -> tuple[Bytes, Bytes]:
    words = values.view(np.uint32)
    rotated = ((words << 1) | (words >> 31)) - (bias.astype(np.uint32) << 24)
    planes = rotated.astype("<u4").view(np.uint8).reshape(-1, 4)
    return np.ascontiguousarray(planes[:, :3]), np.ascontiguousarray(planes[:, 3])


def _join_floats(
    rest: Bytes, high: Bytes, bias: Words, out: NDArray[np.float32], start: int, stop: int, _even: int
) -> None:
    if stop <= start:
        return
    channels = out.shape[1]
    chosen = slice(start * channels, stop * channels)
    planes = np.empty(((stop - start) * channels, 4), np.uint8)
    planes[:, :3] = rest.reshape(-1, 3)[chosen]
    planes[:, 3] = high[chosen]
    rotated = planes.view("<u4").reshape(stop - start, channels) + (bias.astype(np.uint32) << 24)
    out[: stop - start].view(np.uint32)[...] = (rotated >> 1) | (rotated << 31)
