"""The cache's names and manifests; docs/cache-format.md is the specification.

A cache is a folder of parts. A part is a Zarr v3 group whose arrays hold the tokens of a run of samples, one after the
other. `part.json`, written last, completes a part, `manifest.json` the cache.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from deepspec.cache.store import Store
from deepspec.errors import CacheError
from deepspec.files import sealed, unsealed

FORMAT = "deepspec.cache/1"
MANIFEST, PART_MANIFEST, PLAN, PARTS = "manifest.json", "part.json", "plan.json", "parts"
REJECTED = "rejected.jsonl"
SPOOL = "spool"  # batches that wait for the others of their part, see `write_through.py`
HIDDEN_CHUNK = 64  # tokens of one inner chunk of features and last_hidden: what a random read must decode too much
TOKEN_CHUNK = 1024  # tokens of one inner chunk of input_ids and loss_mask
REBUILD = "deepspec cache verify names all broken parts and has them rebuilt"
SAMPLE_COLUMNS = ("sample_id", "part", "start", "length", "row_start", "rows")
_ITEM_BYTES = {"uint8": 1, "uint16": 2, "int32": 4, "float32": 4, "int64": 8}
STORED_DTYPES = {"bfloat16": "uint16", "float32": "float32"}  # Zarr has no bfloat16: its bits are kept


def to_json(value: dict[str, Any]) -> bytes:
    """JSON bytes that depend on the value alone, sealed: the value's own digest is in them."""
    return (json.dumps(sealed(value), indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()


def from_json(store: Store, name: str) -> Any:
    """A JSON file of the cache without its seal; older files have none.

    Raises:
        CacheError: missing, unreadable, or changed since it was written.
    """
    try:
        values = json.loads(store.read(name))
    except (ValueError, RecursionError) as problem:
        raise CacheError(f"not a JSON file ({problem})", file=f"{store.url}/{name}") from None
    ours = isinstance(values, dict) and values.get("format") == FORMAT  # another format's seal is not known
    return unsealed(values, f"{store.url}/{name}", CacheError) if ours else values


def digest(data: bytes) -> str:
    """Hex SHA-256."""
    return hashlib.sha256(data).hexdigest()


def array_file(array: str, dimensions: int) -> str:
    """An array's only shard, by Zarr's chunk key."""
    return f"{array}/c/" + "/".join("0" * dimensions)


def check_part_name(name: object) -> None:
    """Refuse a part's name that is not one of ours: folders are made, read and removed by it.

    Raises:
        CacheError: it is not a number of five digits or more.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[0-9]{5,}", name):
        raise CacheError(
            "not the name of a part", key="name", found=name, wanted="digits, such as 00012", remedy=REBUILD
        )


@dataclass(frozen=True)
class ArrayInfo:
    """A part's manifest: one array."""

    shape: tuple[int, ...]  # [T] or [T, C]
    dtype: str
    level: str
    bytes: int  # of the shard
    metadata_sha256: str  # of zarr.json, which holds the codec's calibration
    sha256: str | None = None  # of the shard; None: in an older cache
    checksums: str | None = None  # base64 of every chunk's CRC-32C: binds the chunks to this part and array

    def __post_init__(self) -> None:
        sizes = (*self.shape, self.bytes)
        good = all(type(size) is int and 0 <= size < 2**63 for size in sizes) and len(self.shape) in (1, 2)
        if not good or 0 in self.shape[1:] or self.dtype not in list(_ITEM_BYTES):
            found = (self.shape, self.dtype, self.bytes)
            raise CacheError("not an array of a cache", key="arrays", found=found, remedy=REBUILD)

    @property
    def raw_bytes(self) -> int:
        """Bytes of the values without a codec."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class PartManifest:
    """A part's samples in the order of its token axis, and its arrays."""

    name: str
    sample_ids: tuple[int, ...]
    conversations: tuple[str, ...]  # the `id` of each sample's conversation
    lengths: tuple[int, ...]  # tokens
    rows: tuple[int, ...]  # rows of last_hidden: tokens whose next token is supervised
    arrays: dict[str, ArrayInfo]
    rejected: tuple[tuple[int, str, str], ...] = ()  # (sample id, conversation id, reason)

    @property
    def coded_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(info.bytes for info in self.arrays.values())

    @property
    def raw_bytes(self) -> int:
        """Bytes of the same arrays without codecs."""
        return sum(info.raw_bytes for info in self.arrays.values())

    def to_bytes(self) -> bytes:
        """The content of part.json."""
        return to_json({"format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, store: Store, name: str, sha256: str | None = None) -> PartManifest:
        """Read a part's manifest; ``sha256`` is its digest in the cache's manifest.

        Raises:
            CacheError: missing, unreadable, of another format, or not the part that the cache was made of.
        """
        file = f"{PARTS}/{name}/{PART_MANIFEST}"
        if store.size(file) is None:
            raise CacheError("part missing", file=f"{store.url}/{PARTS}/{name}", remedy=REBUILD)
        if sha256 is not None and digest(store.read(file)) != sha256:
            raise CacheError("part.json differs from the cache's manifest", file=f"{store.url}/{file}", remedy=REBUILD)
        values = _checked(from_json(store, file), f"{store.url}/{file}")
        if values.get("name") != name:
            found = values.get("name")
            raise CacheError(
                "another part", file=f"{store.url}/{file}", key="name", found=found, wanted=name, remedy=REBUILD
            )
        try:
            arrays = {key: _array_info(info) for key, info in values["arrays"].items()}
            lists = {key: tuple(values[key]) for key in ("sample_ids", "conversations", "lengths", "rows")}
            rejected = tuple((int(i), str(c), str(r)) for i, c, r in values["rejected"])
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as problem:
            found = f"damaged part.json ({problem})"
            raise CacheError(found, file=f"{store.url}/{file}", remedy=REBUILD) from None
        return cls(name=name, arrays=arrays, rejected=rejected, **lists)


@dataclass(frozen=True)
class PartEntry:
    """A part in the cache's manifest."""

    name: str
    samples: int
    tokens: int
    rows: int
    bytes: int
    sha256: str  # of part.json

    def __post_init__(self) -> None:
        check_part_name(self.name)


@dataclass(frozen=True)
class CacheManifest:
    """What completes a cache: its parts and what they hold."""

    fingerprint: dict[str, Any]
    samples: int
    tokens: int
    rows: int
    rejected: dict[str, int]  # reason -> samples
    coded_bytes: int  # of all shards
    raw_bytes: int  # of the same arrays without codecs
    table: str  # folder of the sample table
    table_info: ArrayInfo  # [N, 6] int64, columns SAMPLE_COLUMNS, by ascending sample_id
    parts: tuple[PartEntry, ...]
    versions: dict[str, str] = field(default_factory=dict)
    plan_sha256: str | None = None  # of plan.json; None: in an older cache

    def __post_init__(self) -> None:
        if not re.fullmatch(r"samples-[0-9a-f]{12}", self.table):
            wanted = "samples- and 12 hex digits"
            raise CacheError("not a table of samples", key="table", found=self.table, wanted=wanted, remedy=REBUILD)

    def to_bytes(self) -> bytes:
        """The content of manifest.json."""
        return to_json({"format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, store: Store) -> CacheManifest:
        """Read the manifest.

        Raises:
            CacheError: no cache there, an unfinished one, or another format.
        """
        if store.size(MANIFEST) is None:
            begun = store.size(PLAN) is not None
            raise CacheError(
                "the cache is not finished: it has no manifest.json" if begun else "no cache here: no manifest.json",
                file=store.url,
                remedy="run deepspec cache build again, it continues" if begun else "build one: deepspec cache build",
            )
        values = _checked(from_json(store, MANIFEST), f"{store.url}/{MANIFEST}")
        values.pop("format")
        try:
            parts = tuple(PartEntry(**part) for part in values["parts"])
            return cls(**{**values, "parts": parts, "table_info": _array_info(values["table_info"])})
        except (TypeError, KeyError) as problem:
            raise CacheError(f"damaged manifest ({problem})", file=f"{store.url}/{MANIFEST}") from None


def _array_info(values: dict[str, Any]) -> ArrayInfo:
    return ArrayInfo(**{**values, "shape": tuple(values["shape"])})


def _checked(values: Any, file: str) -> dict[str, Any]:
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise CacheError("not a cache manifest of this version", file=file, found=found, wanted=FORMAT)
    result: dict[str, Any] = values
    return result
