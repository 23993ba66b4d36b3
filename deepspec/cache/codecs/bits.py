"""What the codecs share: entropy coding of byte planes, base64 for calibration tables, errors."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import zstandard
from numcodecs import zstd
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint16]
BLOCK_VALUES = 1 << 18  # values combined at a time: the block and its planes stay in the processor's cache

# Planes have skewed symbols and no repeats: Huffman coding does all the work, and looking for matches costs time and
# ratio (level 1 as it comes: 0.70 instead of 0.68 of raw). Any zstd decoder reads the frames.
_TUNING = {"strategy": 1, "min_match": 7, "window_log": 17, "hash_log": 10, "chain_log": 6, "search_log": 1}
_local = threading.local()


def pack(plane: Bytes) -> bytes:
    """A byte plane as one zstd frame."""
    if not hasattr(_local, "compressor"):
        parameters = zstandard.ZstdCompressionParameters(compression_level=1, target_length=0, **_TUNING)
        _local.compressor = zstandard.ZstdCompressor(compression_params=parameters)
    packed: bytes = _local.compressor.compress(plane.reshape(-1).data)
    return packed


def unpack(frame: Bytes, size: int) -> Bytes:
    """The ``size`` bytes of a zstd frame; valid until this thread's next call with the same size."""
    out = scratch("unpack", size)
    if size:  # numcodecs takes no empty frame
        zstd.decompress(frame, out)
    return out


def scratch(name: str, size: int) -> Bytes:
    """``size`` bytes that this thread reuses: new memory costs more time than decoding into it."""
    buffers: dict[str, Bytes] = _local.__dict__.setdefault("buffers", {})
    buffer = buffers.get(name)
    if buffer is None or len(buffer) < size:
        buffer = buffers[name] = np.empty(max(size, 1 << 16), np.uint8)
    return buffer[:size]


def encode_table(table: NDArray[Any]) -> str:
    """A calibration table as base64 text of its little-endian bytes, for a codec's JSON configuration."""
    return base64.b64encode(np.ascontiguousarray(table).tobytes()).decode("ascii")


def decode_table(text: str, dtype: str) -> NDArray[Any]:
    """The table of :func:`encode_table`."""
    return np.frombuffer(base64.b64decode(text), dtype=dtype)


def blocks(start: int, stop: int, channels: int) -> Iterator[tuple[int, int]]:
    """Row ranges of about BLOCK_VALUES values that cover ``start`` .. ``stop``."""
    step = max(1, BLOCK_VALUES // channels)
    for first in range(start, stop, step):
        yield first, min(first + step, stop)
