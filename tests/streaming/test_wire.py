"""The messages of a reply: equal to the arrays that were sent, and nothing else is ever taken for them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec.cache.levels import LEVELS
from deepspec.streaming.wire import (
    HEADER_BYTES,
    MESSAGE_BYTES,
    Arrays,
    MessageKind,
    Reader,
    WireError,
    codec_entry,
    data_messages,
    json_message,
    message,
    tokens_digest,
)

TOKENS = np.arange(40, dtype=np.int32)
WIDTH = 16


def arrays_of(rows: int, last: int | None, dtype: str, seed: int = 0) -> Arrays:
    random = np.random.default_rng(seed)

    def one(count: int, width: int) -> np.ndarray:
        values = random.normal(size=(count, width)).astype(np.float32)
        return values if dtype == "float32" else (values.view(np.uint32) >> 16).astype(np.uint16)

    return Arrays(one(rows, WIDTH * 2), None if last is None else one(last, WIDTH))


def empty_like(arrays: Arrays) -> Arrays:
    last = arrays.last_hidden
    return Arrays(np.zeros_like(arrays.features), None if last is None else np.zeros_like(last))


def codecs_of(arrays: Arrays, level: str) -> dict[MessageKind, Any]:
    found = {MessageKind.FEATURES: LEVELS[level].features(arrays.features)}
    if arrays.last_hidden is not None and len(arrays.last_hidden):
        found[MessageKind.LAST_HIDDEN] = LEVELS[level].last_hidden(arrays.last_hidden)
    return found


def hello(made: Mapping[MessageKind, Any], dtype: str, **changes: Any) -> bytes:
    tables = {kind.name.lower(): codec_entry(codec) for kind, codec in made.items()}
    said = {"target": "t", "dtype": dtype, "tokens": tokens_digest(TOKENS), "codecs": tables}
    return json_message(MessageKind.HELLO, said | changes)


def parts_of(arrays: Arrays, level: str, dtype: str) -> list[bytes]:
    codecs = codecs_of(arrays, level)
    return [hello(codecs, dtype), *(make() for make in data_messages(arrays, codecs)), message(MessageKind.END)]


def read(data: bytes, into: Arrays, dtype: str = "bfloat16") -> None:
    stream = io.BytesIO(data)

    def fill(memory: memoryview) -> None:
        if stream.readinto(memory) != len(memory):
            raise WireError("short")

    Reader(fill, "t", dtype).read(into, TOKENS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("last", [None, 0, 1, 25])
@pytest.mark.parametrize("level", ["raw", "lossless", "near"])
def test_what_is_sent_is_what_comes(level: str, last: int | None, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspec.streaming.wire.MESSAGE_BYTES", 300)  # several messages an array
    sent = arrays_of(40, last, dtype)
    come = empty_like(sent)
    parts = parts_of(sent, level, dtype)
    read(message(MessageKind.BEAT) + parts[0] + message(MessageKind.BEAT) + b"".join(parts[1:]), come, dtype)
    for kind, codec in codecs_of(sent, level).items():
        array, found = sent.of(kind), come.of(kind)
        assert array is not None
        wanted = np.empty_like(array)  # the plain twin: the codec over the complete array
        codec.decode_rows(np.frombuffer(codec.encode_rows(array), np.uint8), wanted, 0, len(wanted))
        np.testing.assert_array_equal(found, wanted)
        if LEVELS[level].exact:
            np.testing.assert_array_equal(found, array)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_no_flipped_bit_and_no_cut_is_taken_for_hidden_states(data: Any) -> None:
    sent = arrays_of(40, 25, "bfloat16")
    whole = b"".join(parts_of(sent, "lossless", "bfloat16"))
    place = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        spoilt = bytearray(whole)
        spoilt[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        spoilt = bytearray(whole[:place])
    come = empty_like(sent)
    with pytest.raises(WireError):
        read(bytes(spoilt), come)


def changed(change: Callable[[list[bytes], dict[MessageKind, Any]], list[bytes]]) -> bytes:
    sent = arrays_of(40, 25, "bfloat16")
    codecs = codecs_of(sent, "lossless")
    return b"".join(change(parts_of(sent, "lossless", "bfloat16"), codecs))


NAMES = ("features", "last_hidden")
LONG = bytearray(message(MessageKind.BEAT))
LONG[16:20] = (1 << 31).to_bytes(4, "little")
CHANGES: dict[str, tuple[Callable[[list[bytes], dict[MessageKind, Any]], list[bytes]], str]] = {
    "no rows": (lambda parts, _: [parts[0], parts[-1]], "0 of 40 rows of features"),
    "no last hidden": (lambda parts, _: [*parts[:2], parts[-1]], "0 of 25 rows of last_hidden"),
    "rows twice": (lambda parts, _: [*parts[:2], *parts[1:]], "rows 0 to 40 of features after 40 rows"),
    "rows first": (lambda parts, _: parts[1:], "a message of kind FEATURES where none belongs"),
    "no rows in a message": (
        lambda parts, c: [parts[0], message(MessageKind.FEATURES, b"", 0, 0), *parts[1:]], "rows 0 to 0 of features"
    ),
    "two hellos": (lambda parts, _: [parts[0], *parts], "a message of kind HELLO where none belongs"),
    "other tokens": (
        lambda parts, c: [hello(c, "bfloat16", tokens=tokens_digest([1])), *parts[1:]], "hidden states of other tokens"
    ),
    "another target": (lambda parts, c: [hello(c, "bfloat16", target="u"), *parts[1:]], "another target than before"),
    "another dtype": (lambda parts, c: [hello(c, "float32"), *parts[1:]], "dtype 'float32' instead of bfloat16"),
    "no codecs": (lambda parts, c: [hello(c, "bfloat16", codecs={}), *parts[1:]], "no codec of features"),
    "an unknown codec": (
        lambda parts, c: [hello(c, "bfloat16", codecs={"features": {"name": "x"}}), *parts[1:]], "no codec of features"
    ),
    "a narrow table": (
        lambda parts, c: [
            hello(c, "bfloat16", codecs=dict.fromkeys(NAMES, codec_entry(c[MessageKind.LAST_HIDDEN]))),
            *parts[1:],
        ],
        "rows that cannot be decoded",
    ),
    "not JSON": (lambda parts, _: [message(MessageKind.HELLO, b"["), *parts[1:]], "not a JSON object"),
    "a list": (lambda parts, _: [message(MessageKind.HELLO, b"[]"), *parts[1:]], "not a JSON object"),
    "it failed": (
        lambda parts, _: [json_message(MessageKind.FAILED, {"error": "no memory"})], "it failed: no memory"
    ),
    "a message of 2 GiB": (lambda parts, _: [parts[0], bytes(LONG)], "a message of 2,147,483,648 bytes"),
    "HTML": (lambda parts, _: [b"<html>".ljust(HEADER_BYTES)], "not a message of a feature server"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_server_does_wrong_is_told(name: str) -> None:
    change, told = CHANGES[name]
    with pytest.raises(WireError, match=told):
        read(changed(change), empty_like(arrays_of(40, 25, "bfloat16")))


def test_an_array_is_cut_into_messages_of_bounded_size() -> None:
    sent = Arrays(np.zeros((1000, 4096), np.uint16), None)
    sizes = [len(make()) for make in data_messages(sent, codecs_of(sent, "raw"))]
    assert len(sizes) == 4
    assert max(sizes) <= MESSAGE_BYTES + HEADER_BYTES
    assert json.loads(json_message(MessageKind.HELLO, {"a": 1})[HEADER_BYTES:]) == {"a": 1}
