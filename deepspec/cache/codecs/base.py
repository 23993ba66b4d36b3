"""The adapter between our codecs and zarr: a subclass gives encode and decode on plain arrays and its configuration."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from zarr.abc.codec import ArrayBytesCodec
from zarr.codecs import BytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.core.common import JSON


@dataclass(frozen=True)
class RowCodec(ArrayBytesCodec):
    """A zarr v3 array-to-bytes codec of chunks [T, C]: rows are tokens, columns channels."""

    is_fixed_size = False
    name: ClassVar[str]

    def encode_rows(self, chunk: NDArray[Any]) -> bytes:
        """The chunk's bytes."""
        raise NotImplementedError

    def decode_rows(self, data: NDArray[np.uint8], out: NDArray[Any], start: int, most: int) -> None:
        """Decode rows ``start`` .. ``start + len(out)`` of a chunk of at most ``most`` rows into ``out`` [n, C].

        Raises:
            ValueError: the bytes do not belong to this codec, or state more rows: memory is taken for what they state.
        """
        raise NotImplementedError

    def configuration(self) -> dict[str, JSON]:
        """Its configuration in zarr.json."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, data: dict[str, JSON]) -> Self:
        """The codec that a zarr.json describes."""
        return cls(**data.get("configuration", {}))  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, JSON]:
        """The codec's entry in zarr.json."""
        return {"name": self.name, "configuration": self.configuration()}

    async def _encode_single(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer | None:
        data = await asyncio.to_thread(self.encode_rows, np.ascontiguousarray(chunk_array.as_numpy_array()))
        return chunk_spec.prototype.buffer.from_bytes(data)

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        out = np.empty(chunk_spec.shape, chunk_spec.dtype.to_native_dtype())
        await asyncio.to_thread(self.decode_rows, chunk_bytes.as_numpy_array(), out, 0, len(out))
        return chunk_spec.prototype.nd_buffer.from_numpy_array(out)

    def compute_encoded_size(self, _input_byte_length: int, _chunk_spec: ArraySpec) -> int:
        """Not known before encoding."""
        raise NotImplementedError


class RawCodec:
    """``raw``: the values as they are. In zarr's terms its own ``bytes`` codec: any Zarr reader opens such arrays."""

    name: ClassVar[str] = "bytes"
    serializer = BytesCodec(endian="little")  # what zarr.json names

    @classmethod
    def calibrate(cls, _sample: NDArray[Any]) -> RawCodec:
        """No table from a sample."""
        return cls()

    @classmethod
    def from_dict(cls, _data: dict[str, Any]) -> RawCodec:
        """The codec that a zarr.json describes."""
        return cls()

    def encode_rows(self, chunk: NDArray[Any]) -> bytes:
        """The chunk's bytes."""
        return np.ascontiguousarray(chunk).tobytes()

    def decode_rows(self, data: NDArray[np.uint8], out: NDArray[Any], start: int, _most: int) -> None:
        """Rows ``start`` .. of the chunk into ``out``."""
        row = out[:1].nbytes
        out.view(np.uint8).reshape(-1)[:] = data[start * row : start * row + out.nbytes]


def check_rows(rows: int, most: int) -> None:
    """Refuse a chunk's header that states more rows than a chunk has.

    Raises:
        ValueError: it does.
    """
    if rows > most:
        raise ValueError(f"its header states {rows} rows of at most {most}")


def stored_rows(chunk: NDArray[Any]) -> int:
    """Rows up to the last that is not all zero bits: the zeros that fill up an array's last chunk are not stored."""
    rows = len(chunk)
    while rows and not chunk[rows - 1].view(np.uint8).any():
        rows -= 1
    return rows
