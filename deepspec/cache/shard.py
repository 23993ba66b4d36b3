"""One array of a part = one Zarr shard: written chunk by chunk in order, read in runs of chunks.

zarr itself opens these files (a test compares). Reading and writing them here saves what costs zarr most: the shard
index fetched again at every read, a shard held in memory while it is written, and copies.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec
from zarr.storage import LocalStore

from deepspec.cache.codecs.base import RawCodec
from deepspec.cache.codecs.bits import scratch
from deepspec.cache.format import REBUILD, ArrayInfo, array_file, digest
from deepspec.cache.levels import CODECS
from deepspec.cache.store import Store
from deepspec.errors import CacheError

CALIBRATION_ROWS = 512  # rows at an array's beginning from which its codec makes its tables
UNDECODED = (ValueError, RuntimeError, struct.error, LookupError, TypeError)  # what a codec makes of foreign bytes
MOST_CHUNK = 1 << 16  # rows of a chunk: memory is taken for a whole one
RUN_BYTES = 16 << 20  # read by one call at most
IN_FLIGHT = 64 << 20  # bytes of rows given to the encoders and not yet written, of one array


class ShardWriter:
    """Writes one array of a part.

    Args:
        part: the part's folder.
        name: of the array.
        shape: of one row: () or (C,).
        dtype: numpy dtype as stored.
        chunk: rows of an inner chunk.
        calibrate: makes the codec from the array's first rows.
        pool: threads that encode.
    """

    def __init__(
        self,
        part: Path,
        name: str,
        shape: tuple[int, ...],
        dtype: str,
        chunk: int,
        calibrate: Callable[[NDArray[Any]], Any],
        pool: ThreadPoolExecutor,
    ) -> None:
        self.part, self.name, self.shape, self.dtype = part, name, shape, np.dtype(dtype)
        self.chunk, self.calibrate, self.pool = chunk, calibrate, pool
        self.rows = 0
        self._codec: Any = None
        self._early: list[NDArray[Any]] = []  # rows that wait for the codec
        self._open_chunk = np.zeros((chunk, *shape), self.dtype)
        self._filled = 0
        self._futures: deque[tuple[Future[bytes], int]] = deque()
        self._waiting = 0
        self._index: list[tuple[int, int]] = []
        self._checksums = bytearray()
        self._digest = hashlib.sha256()
        self._offset = 0
        path = part / array_file(name, 1 + len(shape))
        path.parent.mkdir(parents=True)
        self._file = open(path, "wb")  # noqa: SIM115 (closed by `finish` or `abandon`)

    def append(self, rows: NDArray[Any]) -> None:
        """Add rows [n, ...]; they must not change until they are written."""
        self.rows += len(rows)
        if self._codec is None:
            self._early.append(rows)
            if self.rows >= CALIBRATION_ROWS:
                self._begin()
        else:
            self._cut(rows)

    def _begin(self) -> None:
        early = self._early[0] if len(self._early) == 1 else np.concatenate(self._early)
        self._early = []
        self._codec = self.calibrate(early[:CALIBRATION_ROWS])
        self._cut(early)

    def _cut(self, rows: NDArray[Any]) -> None:
        start = 0
        while start < len(rows):
            if self._filled == 0 and len(rows) - start >= self.chunk:
                self._submit(rows[start : start + self.chunk])
                start += self.chunk
                continue
            count = min(self.chunk - self._filled, len(rows) - start)
            self._open_chunk[self._filled : self._filled + count] = rows[start : start + count]
            self._filled += count
            start += count
            if self._filled == self.chunk:
                self._submit(self._open_chunk)
                self._open_chunk, self._filled = np.zeros_like(self._open_chunk), 0

    def _submit(self, chunk: NDArray[Any]) -> None:
        self._futures.append((self.pool.submit(self._codec.encode_rows, chunk), chunk.nbytes))
        self._waiting += chunk.nbytes
        while self._waiting > IN_FLIGHT:
            self._write_oldest()

    def _write_oldest(self) -> None:
        future, size = self._futures.popleft()
        data = future.result()
        checksum = struct.pack("<I", google_crc32c.value(data))
        self._index.append((self._offset, len(data) + 4))
        self._write(data)
        self._write(checksum)
        self._checksums += checksum
        self._waiting -= size

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._offset += len(data)

    def finish(self, level: str) -> ArrayInfo:
        """Write what is left, the shard's index and zarr.json."""
        if self._codec is None and self.rows:
            self._begin()
        if self._filled:
            self._submit(self._open_chunk)
        while self._futures:
            self._write_oldest()
        if self._index:
            index = np.array(self._index, dtype="<u8").tobytes()
            self._write(index + struct.pack("<I", google_crc32c.value(index)))
        self._file.close()
        shape, metadata = (self.rows, *self.shape), digest(self._write_metadata())
        checksums = base64.b64encode(self._checksums).decode()
        return ArrayInfo(shape, str(self.dtype), level, self._offset, metadata, self._digest.hexdigest(), checksums)

    def _write_metadata(self) -> bytes:
        codec = self._codec or RawCodec()
        shards = max(1, len(self._index)) * self.chunk
        zarr.create_array(
            LocalStore(self.part),
            name=self.name,
            shape=(self.rows, *self.shape),
            dtype=self.dtype,
            chunks=(self.chunk, *self.shape),
            shards=(shards, *self.shape),
            serializer=codec.serializer if isinstance(codec, RawCodec) else codec,
            filters=None,
            compressors=Crc32cCodec(),
            fill_value=0,
            overwrite=False,
        )
        return (self.part / self.name / "zarr.json").read_bytes()

    def abandon(self) -> None:
        """Close the file; the part is given up."""
        for future, _ in self._futures:
            future.cancel()
        with suppress(OSError):  # on a full disk closing fails too
            self._file.close()


def _parse_metadata(data: bytes, file: str) -> tuple[int, Any, np.dtype[Any]]:
    """The chunk length, codec and dtype of a zarr.json.

    Raises:
        CacheError: not an array that this package writes.
    """
    try:
        sharding = json.loads(data)
        (shards,) = sharding["codecs"]
        settings = shards["configuration"]
        serializer, checksum = settings["codecs"]
        if shards["name"] != "sharding_indexed" or checksum["name"] != "crc32c":
            raise KeyError("crc32c inside sharding_indexed")
        codec = CODECS[serializer["name"]].from_dict(serializer)
        chunk, dtype = settings["chunk_shape"][0], np.dtype(sharding["data_type"])
        if type(chunk) is not int or not 1 <= chunk <= MOST_CHUNK or dtype.hasobject:
            raise ValueError(f"chunks of {chunk} rows of {dtype}")
        return chunk, codec, dtype
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as problem:
        raise CacheError(f"not an array of a target cache ({problem!r})", file=file) from None


class ShardReader:
    """Reads rows of one array; threads may share it.

    Args:
        store: the cache's.
        path: the array's folder in it, such as ``parts/00000/features``.
        info: its entry in the manifest.

    Raises:
        CacheError: a missing file, a size or digest other than the manifest's, or a broken index.

    Of the shard only the index is read here. Each chunk that is read later must have the checksum that the manifest
    names for it: a whole shard of another part or array is refused.
    """

    def __init__(self, store: Store, path: str, info: ArrayInfo) -> None:
        self.store, self.info = store, info
        self.file = array_file(path, len(info.shape))
        metadata = store.read(f"{path}/zarr.json")
        where = f"{store.url}/{path}/zarr.json"
        if digest(metadata) != info.metadata_sha256:
            raise self._broken("zarr.json differs from the manifest's digest", where)
        self.chunk, self.codec, self.dtype = _parse_metadata(metadata, where)
        if self.dtype != info.dtype:
            raise self._broken("of another type than the manifest says", where, found=self.dtype, wanted=info.dtype)
        self.row_bytes = self.dtype.itemsize * int(np.prod(info.shape[1:], dtype=np.int64))
        self.offsets, self.sizes = self._read_index()
        self.checksums = self._named_checksums()

    def _broken(self, problem: str, file: str | None = None, key: object = None, **facts: Any) -> CacheError:
        return CacheError(problem, file=file or f"{self.store.url}/{self.file}", key=key, remedy=REBUILD, **facts)

    def _named_checksums(self) -> list[int] | None:
        """Every chunk's CRC-32C by part.json; None of an older cache."""
        if self.info.checksums is None:
            return None
        found: list[int] = np.frombuffer(base64.b64decode(self.info.checksums), "<u4").tolist()
        if len(found) != len(self.sizes):
            raise self._broken("not a checksum for each chunk", found=len(found), wanted=len(self.sizes))
        return found

    def _read_index(self) -> tuple[list[int], list[int]]:
        size = self.store.size(self.file)
        if size is None:
            raise self._broken("shard missing")  # zarr itself would read it as zeros
        if size != self.info.bytes:
            raise self._broken("shard of another size", found=size, wanted=f"{self.info.bytes} bytes")
        chunks = -(-self.info.shape[0] // self.chunk)
        if not chunks:
            return [], []
        if chunks * 16 + 4 > size:
            raise self._broken("shard too small for its rows", found=size, wanted=f"an index of {chunks} chunks")
        data = bytearray(chunks * 16 + 4)
        self.store.read_into(self.file, size - len(data), [memoryview(data)])
        if struct.pack("<I", google_crc32c.value(bytes(data[:-4]))) != data[-4:]:
            raise self._broken("the shard's index does not match its checksum")
        index = np.frombuffer(data[:-4], "<u8").reshape(chunks, 2)
        whole = self.chunk * self.row_bytes + 4 if isinstance(self.codec, RawCodec) else 0
        outside = (index > size).any() or (index.sum(axis=1) > size).any()  # both: the sum of two may wrap around
        if outside or (index[:, 1] < 4).any() or (whole and (index[:, 1] != whole).any()):
            raise self._broken("the shard's index names chunks that are not in the file")
        return index[:, 0].tolist(), index[:, 1].tolist()

    def sha256(self) -> str:
        """Hex SHA-256 of the shard's bytes: all of them are read."""
        found = hashlib.sha256()
        for start in range(0, self.info.bytes, RUN_BYTES):
            data = scratch("digest", min(RUN_BYTES, self.info.bytes - start)).data
            self.store.read_into(self.file, start, [data])
            found.update(data)
        return found.hexdigest()

    def read(self, start: int, out: NDArray[Any]) -> None:
        """Rows ``start`` .. ``start + len(out)`` into ``out`` [n, ...], which must be contiguous.

        Raises:
            CacheError: a chunk that does not match its checksum or cannot be decoded, named by its number.
        """
        stop = start + len(out)
        chunk = start // self.chunk
        while chunk * self.chunk < stop:
            last = self._run_end(chunk, -(-stop // self.chunk))
            if isinstance(self.codec, RawCodec):
                self._read_raw(chunk, last, start, out)
            else:
                self._read_coded(chunk, last, start, out)
            chunk = last

    def _run_end(self, first: int, limit: int) -> int:
        """The end of the run of chunks from ``first`` on that are adjacent in the file."""
        last, size = first + 1, self.sizes[first]
        while last < limit and self.offsets[last] == self.offsets[last - 1] + self.sizes[last - 1]:
            size += self.sizes[last]
            if size > RUN_BYTES:
                break
            last += 1
        return last

    def _read_coded(self, first: int, last: int, start: int, out: NDArray[Any]) -> None:
        origin = self.offsets[first]
        size = self.offsets[last - 1] + self.sizes[last - 1] - origin
        data = scratch("shard", size)
        self.store.read_into(self.file, origin, [data.data])
        for chunk in range(first, last):
            begin = self.offsets[chunk] - origin
            coded = data[begin : begin + self.sizes[chunk]]
            self._check(chunk, google_crc32c.value(coded[:-4]), coded[-4:].tobytes())
            from_row, to_row = max(start, chunk * self.chunk), min(start + len(out), (chunk + 1) * self.chunk)
            rows = out[from_row - start : to_row - start]
            try:
                self.codec.decode_rows(coded[:-4], rows, from_row - chunk * self.chunk, self.chunk)
            except UNDECODED as problem:
                raise self._broken(f"cannot decode the chunk ({problem})", key=f"chunk {chunk}") from None

    def _read_raw(self, first: int, last: int, start: int, out: NDArray[Any]) -> None:
        """Straight into ``out``; what a chunk holds besides (needed for its checksum) goes to scratch."""
        flat = out.reshape(-1).view(np.uint8)
        begin, end = start * self.row_bytes, (start + len(out)) * self.row_bytes
        chunk_bytes = self.chunk * self.row_bytes
        spare, sums = scratch("raw", 2 * chunk_bytes), scratch("checksums", 4 * (last - first))
        pieces: list[list[NDArray[np.uint8]]] = []
        for chunk in range(first, last):
            low, high = chunk * chunk_bytes, (chunk + 1) * chunk_bytes
            inner_low, inner_high = max(low, begin), min(high, end)
            inside = flat[inner_low - begin : inner_high - begin]
            before, behind = spare[: inner_low - low], spare[chunk_bytes : chunk_bytes + high - inner_high]
            pieces.append([piece for piece in (before, inside, behind) if len(piece)])
        buffers: list[memoryview] = []
        for number, group in enumerate(pieces):
            buffers += [piece.data for piece in (*group, sums[4 * number : 4 * number + 4])]
        self.store.read_into(self.file, self.offsets[first], buffers)
        for number, group in enumerate(pieces):
            self._check(first + number, _checksum(group), sums[4 * number : 4 * number + 4].tobytes())

    def _check(self, chunk: int, found: int, stored: bytes) -> None:
        problem = None
        if struct.pack("<I", found) != stored:
            problem = "chunk does not match its checksum"
        elif self.checksums is not None and self.checksums[chunk] != found:
            problem = "chunk of another array or part, by its checksum in part.json"
        if problem is not None:
            rows = f"chunk {chunk} (rows {chunk * self.chunk}..{(chunk + 1) * self.chunk - 1})"
            raise self._broken(problem, key=rows)


def _checksum(pieces: Sequence[NDArray[np.uint8]]) -> int:
    value: int = google_crc32c.value(pieces[0])
    for piece in pieces[1:]:
        value = google_crc32c.extend(value, piece)
    return value
