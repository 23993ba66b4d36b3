"""``raw``: the values as they are; in zarr's terms its own ``bytes`` codec, so any Zarr reader opens such arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from zarr.codecs import BytesCodec


@dataclass(frozen=True)
class RawCodec:
    """The reading side of zarr's ``bytes`` codec, with the methods that the reader asks of every codec."""

    name: ClassVar[str] = "bytes"

    @staticmethod
    def serializer() -> BytesCodec:
        """What zarr.json names."""
        return BytesCodec(endian="little")

    @classmethod
    def calibrate(cls, sample: NDArray[Any]) -> RawCodec:
        """Nothing to learn from a sample."""
        return cls()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RawCodec:
        """The codec that a zarr.json describes."""
        return cls()

    def encode_rows(self, chunk: NDArray[Any]) -> bytes:
        """The chunk's bytes."""
        return np.ascontiguousarray(chunk).tobytes()

    def decode_rows(self, data: NDArray[np.uint8], out: NDArray[Any], start: int) -> None:
        """Rows ``start`` .. of the chunk into ``out``."""
        row = out[:1].nbytes if out.ndim > 1 else out.dtype.itemsize
        out.view(np.uint8).reshape(-1)[:] = data[start * row : start * row + out.nbytes]
