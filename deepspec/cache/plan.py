"""The plan of a build: which rows of which conversation file make which part. Ranks only cut the list of parts."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepspec.cache.format import FORMAT, PLAN, from_json, to_json
from deepspec.cache.store import Store
from deepspec.data.chat import Renderer, render_row
from deepspec.data.conversations import WANTED, check_manifest, note_id, usable_row
from deepspec.data.lines import is_blank, numbered_lines, parse_line
from deepspec.errors import CacheError, DataError

PART_BYTES = 8 << 30  # of hidden states before coding: 1,200 parts for 10 TB
MIN_SAMPLES, MIN_PARTS = 64, 32  # small data sets are cut finer, so that ranks and a restart have something of it
PROBED_ROWS = 64  # rendered to learn the mean length


@dataclass(frozen=True)
class PlannedPart:
    """A run of rows of one source."""

    name: str
    source: int
    first: int  # row
    rows: int
    offset: int  # byte of the first row
    first_sample: int  # sample id of the first row


@dataclass(frozen=True)
class Plan:
    """All that decides a cache's bytes."""

    fingerprint: dict[str, Any]
    tokens_per_batch: int
    mean_tokens: float  # of the probed rows
    parts: tuple[PlannedPart, ...]

    def to_bytes(self) -> bytes:
        """The content of plan.json."""
        return to_json({"format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, folder: Store) -> Plan:
        """Read a plan.

        Raises:
            CacheError: missing or unreadable.
        """
        values = from_json(folder, PLAN)
        try:
            values.pop("format")
            return cls(**{**values, "parts": tuple(PlannedPart(**part) for part in values["parts"])})
        except (TypeError, KeyError, AttributeError) as problem:
            raise CacheError(f"damaged plan ({problem})", file=f"{folder.url}/{PLAN}") from None


@dataclass(frozen=True)
class Source:
    """A conversation file, scanned once."""

    path: Path
    sha256: str
    offsets: array[int]  # byte of each row

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.offsets)

    def entry(self) -> dict[str, Any]:
        """What the fingerprint says of it."""
        return {"name": self.path.name, "rows": self.rows, "sha256": self.sha256}


def scan(path: str | Path) -> Source:
    """Digest a conversation file, note where its rows begin, and compare it with its manifest where it has one.

    Raises:
        DataError: missing or empty, a line that is not JSON, an id that comes twice, or a file that differs from its
            manifest (before anything is computed).
    """
    path, digest, offsets, offset = Path(path), hashlib.sha256(), array("Q"), 0
    seen = set[str]()
    for number, line in numbered_lines(path):
        digest.update(line)
        if not is_blank(line):
            note_id(seen, parse_line(line, path, number, DataError, WANTED), path, number)
            offsets.append(offset)
        offset += len(line)
    if not offsets:
        raise DataError("no conversation in the file", file=path)
    check_manifest(path, len(offsets), digest.hexdigest())
    return Source(path, digest.hexdigest(), offsets)


def read_rows(path: Path, offset: int, first: int, rows: int) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(row number, row or what is wrong with it) of a run of rows."""
    with open(path, "rb") as handle:
        handle.seek(offset)
        lines = (line for line in handle if not is_blank(line))
        for number, line in zip(range(first, first + rows), lines, strict=False):
            yield number, usable_row(line)


def mean_tokens(source: Source, renderer: Renderer, min_supervised: int) -> float:
    """Mean length of the usable ones among rows spread over the file; 0 when none is."""
    step = max(1, source.rows // PROBED_ROWS)
    lengths = []
    for row in range(0, source.rows, step):
        ((_, content),) = read_rows(source.path, source.offsets[row], row, 1)
        rendered = render_row(renderer, content, min_supervised)
        if not isinstance(rendered, str):
            lengths.append(len(rendered.input_ids))
    return sum(lengths) / len(lengths) if lengths else 0.0


def samples_per_part(rows: int, limit: int, mean: float, token_bytes: int) -> int:
    """Rows of one part: at most ``limit``, about PART_BYTES, and at least MIN_PARTS parts of MIN_SAMPLES rows."""
    by_bytes = int(PART_BYTES / max(1.0, mean * token_bytes))
    return max(1, min(limit, by_bytes, max(MIN_SAMPLES, -(-rows // MIN_PARTS))))


def cut(source: Source, number: int, first_part: int, first_sample: int, size: int) -> tuple[PlannedPart, ...]:
    """The parts of one source, ``size`` rows each."""
    return tuple(
        PlannedPart(
            f"{first_part + i:05d}",
            number,
            first,
            min(size, source.rows - first),
            source.offsets[first],
            first_sample + first,
        )
        for i, first in enumerate(range(0, source.rows, size))
    )


def batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Samples (places in ``lengths``) in batches of at most ``budget`` padded tokens, like lengths together."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    found: list[list[int]] = []
    for place in order:
        if found and (len(found[-1]) + 1) * lengths[place] <= budget:
            found[-1].append(place)
        else:
            found.append([place])
    return found
