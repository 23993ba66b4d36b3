"""Hidden states of one conversation as messages: what a feature server sends, and how a reader takes it.

A reply is a HELLO (JSON: which target, of which tokens, in which codecs; the answers where prompts were answered), rows
of FEATURES and LAST_HIDDEN in order, each message coded for itself, and an END; BEATs come while nothing else does.
Every message has a CRC-32C over its header and payload. Nothing of a message is believed before its checksum is right,
and no memory is taken for more than the conversation needs.

S tokens, R of them with a supervised next token, C = L*D values of the L layers, D hidden size.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from deepspec.cache.codecs.bits import scratch
from deepspec.cache.levels import CODECS
from deepspec.cache.shard import UNDECODED

PROTOCOL = 1
MAGIC = b"DSPF"
MESSAGE_BYTES = 2 << 20  # of rows before coding: each message costs work of its own, and its coded bytes a buffer
MOST_JSON = 16 << 20  # of a HELLO: it holds the codecs' tables
_HEADER = struct.Struct("<4sBxxxIII")  # magic, kind, first row, rows, bytes of the payload
_CHECKSUM = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CHECKSUM.size


class MessageKind(IntEnum):
    """What a message holds."""

    HELLO = 0
    FEATURES = 1
    LAST_HIDDEN = 2
    END = 3
    BEAT = 4  # the request waits, or is computed
    FAILED = 5  # JSON: {"error": line}


class WireError(Exception):
    """A reply that is not what was asked for; the text says why."""


@dataclass(frozen=True)
class Arrays:
    """The hidden states of a conversation as the cache stores them: bf16 as uint16."""

    features: NDArray[Any]  # [S, C]
    last_hidden: NDArray[Any] | None  # [R, D]; None where the loss does not read them

    def of(self, kind: MessageKind) -> NDArray[Any] | None:
        """The array that messages of this kind carry rows of."""
        return self.features if kind == MessageKind.FEATURES else self.last_hidden


@dataclass(frozen=True)
class Sampled:
    """An answer of the target, without the stop token."""

    token_ids: list[int]
    finish_reason: str  # "stop", or "length"


def tokens_digest(tokens: Sequence[int] | NDArray[Any]) -> str:
    """Hex SHA-256 of token ids."""
    return hashlib.sha256(np.ascontiguousarray(tokens, "<i4").tobytes()).hexdigest()


# -- sending -----------------------------------------------------------------------------------------------------------


def message(kind: MessageKind, payload: bytes = b"", first: int = 0, rows: int = 0) -> bytes:
    """One message."""
    head = _HEADER.pack(MAGIC, kind, first, rows, len(payload))
    checksum = google_crc32c.extend(google_crc32c.value(head), payload)
    return b"".join((head, _CHECKSUM.pack(checksum), payload))


def json_message(kind: MessageKind, value: Mapping[str, Any]) -> bytes:
    """A message with a JSON object."""
    return message(kind, json.dumps(value).encode())


def codec_entry(codec: Any) -> dict[str, Any]:
    """A codec with its tables, as a HELLO states it."""
    return {"name": codec.name, "configuration": codec.configuration() if hasattr(codec, "configuration") else {}}


def rows_a_message(array: NDArray[Any]) -> int:
    """Rows of an array that one message carries."""
    return max(2, MESSAGE_BYTES // max(1, array[:1].nbytes) // 2 * 2)


def data_messages(arrays: Arrays, codecs: Mapping[MessageKind, Any]) -> Iterator[Callable[[], bytes]]:
    """What makes each message of rows: calls, so that any thread may encode."""
    for kind, codec in codecs.items():
        array = arrays.of(kind)
        if array is None:
            continue
        step = rows_a_message(array)
        for first in range(0, len(array), step):
            rows = array[first : first + step]
            yield lambda k=kind, c=codec, f=first, r=rows: message(k, c.encode_rows(r), f, len(r))  # type: ignore[misc]


# -- receiving ---------------------------------------------------------------------------------------------------------


class Reader:
    """Reads one reply into arrays that the caller has.

    Args:
        read_into: fills a piece of memory with what the server sends next.
        target: the digest by which the server named its target in the handshake.
        dtype: of the hidden states, ``bfloat16`` or ``float32``.
    """

    def __init__(self, read_into: Callable[[memoryview], None], target: str, dtype: str) -> None:
        self.read_into, self.target, self.dtype = read_into, target, dtype
        self._head = bytearray(HEADER_BYTES)
        self._stated: dict[str, Any] | None = None

    def answers(self, count: int, longest: int, vocab_size: int) -> list[Sampled]:
        """The answers of ``count`` prompts, before their states are read.

        Args:
            count: of the prompts.
            longest: tokens that an answer may have.
            vocab_size: of the target.

        Raises:
            WireError: see :meth:`read`; or no such answers.
        """
        found = self._hello().get("answers")
        try:
            answers = [Sampled(list(ids), str(reason)) for ids, reason in found or ()]
        except (TypeError, ValueError):
            raise WireError("no answers of the prompts") from None
        fits = all(len(one.token_ids) <= longest and one.finish_reason in ("stop", "length") for one in answers)
        known = all(type(token) is int and 0 <= token < vocab_size for one in answers for token in one.token_ids)
        if len(answers) != count or not fits or not known:
            raise WireError(f"{len(answers)} answers that are not those of the {count} prompts")
        return answers

    def read(self, arrays: Arrays, tokens: Sequence[int] | NDArray[Any]) -> None:
        """Fill ``arrays``, whose every row must come, with the hidden states of ``tokens`` [S].

        Raises:
            WireError: another target, other tokens, a wrong checksum, rows missing, twice or too many, or the server
                says that it failed.
        """
        codecs, done = self._codecs(arrays, tokens), {MessageKind.FEATURES: 0, MessageKind.LAST_HIDDEN: 0}
        while True:
            kind, first, rows, size = self._header()
            if kind == MessageKind.BEAT:
                self._payload(size, 0)
            elif kind in codecs:
                self._rows(kind, codecs[kind], first, rows, size, arrays, done)
            elif kind == MessageKind.END:
                self._payload(size, 0)
                break
            else:
                self._fail(kind, size)
        for kind in codecs:
            array = arrays.of(kind)
            if array is not None and done[kind] != len(array):
                raise WireError(f"{done[kind]} of {len(array)} rows of {kind.name.lower()}")

    def _hello(self) -> dict[str, Any]:
        """What the reply begins with, read once."""
        if self._stated is not None:
            return self._stated
        kind, _, _, size = self._header()
        while kind == MessageKind.BEAT:
            self._payload(size, 0)
            kind, _, _, size = self._header()
        if kind != MessageKind.HELLO:
            self._fail(kind, size)
        self._stated = self._json(size)
        return self._stated

    def _codecs(self, arrays: Arrays, tokens: Sequence[int] | NDArray[Any]) -> dict[MessageKind, Any]:
        hello = self._hello()
        wanted = {"target": self.target, "tokens": tokens_digest(tokens), "dtype": self.dtype}
        for name, value in wanted.items():
            if hello.get(name) != value:
                what = {"target": "another target than before", "tokens": "hidden states of other tokens"}
                raise WireError(what.get(name, f"{name} {str(hello.get(name))[:80]!r} instead of {value}"))
        codecs = {}
        for kind in (MessageKind.FEATURES, MessageKind.LAST_HIDDEN):
            array = arrays.of(kind)
            if array is not None and len(array):
                codecs[kind] = _codec(hello, kind)
        return codecs

    def _header(self) -> tuple[MessageKind, int, int, int]:
        self.read_into(memoryview(self._head))
        magic, kind, first, rows, size = _HEADER.unpack_from(self._head)
        if magic != MAGIC or kind not in iter(MessageKind):
            raise WireError("not a message of a feature server")
        return MessageKind(kind), first, rows, size

    def _payload(self, size: int, most: int) -> NDArray[np.uint8]:
        """The payload, once its checksum is right; valid until the next one is read."""
        if size > most:
            raise WireError(f"a message of {size:,} bytes, of which at most {most:,} can be right")
        data = scratch("wire", size)
        if size:
            self.read_into(data.data)
        found = google_crc32c.value(bytes(self._head[: _HEADER.size]))
        found = google_crc32c.extend(found, data) if size else found
        if _CHECKSUM.unpack_from(self._head, _HEADER.size)[0] != found:
            raise WireError("a message does not match its checksum")
        return data

    def _json(self, size: int) -> dict[str, Any]:
        try:
            value = json.loads(self._payload(size, MOST_JSON).tobytes())
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise WireError("not a JSON object")
        return value

    def _fail(self, kind: MessageKind, size: int) -> None:
        if kind == MessageKind.FAILED:
            raise WireError(f"it failed: {str(self._json(size).get('error'))[:300]}")
        raise WireError(f"a message of kind {kind.name} where none belongs")

    def _rows(
        self,
        kind: MessageKind,
        codec: Any,
        first: int,
        rows: int,
        size: int,
        arrays: Arrays,
        done: dict[MessageKind, int],
    ) -> None:
        array = arrays.of(kind)
        if array is None or first != done[kind] or not 0 < rows <= len(array) - first:
            raise WireError(f"rows {first} to {first + rows} of {kind.name.lower()} after {done[kind]} rows")
        raw = rows * array[:1].nbytes
        out = array[first : first + rows]
        try:
            codec.decode_rows(self._payload(size, 2 * raw + 4096), out, 0, rows)
        except UNDECODED as problem:
            raise WireError(f"rows that cannot be decoded ({problem})") from None
        done[kind] += rows


def _codec(hello: Mapping[str, Any], kind: MessageKind) -> Any:
    """The codec that a HELLO states for ``kind``.

    Raises:
        WireError: an unknown one, or none.
    """
    try:
        entry = hello["codecs"][kind.name.lower()]
        return CODECS[entry["name"]].from_dict(entry)
    except UNDECODED as problem:
        raise WireError(f"no codec of {kind.name.lower()} that can be used ({problem})") from None
