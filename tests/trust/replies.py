"""Replies that no server should send: in bytes on the wire, and as completions of odd content."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any

Pieces = Iterator[bytes | float]  # bytes to send, seconds to wait
JOB = {"401", "403", "404", "a redirect to itself", "a redirect to a file", "a redirect with a login", "other prompt"}
BUSY = {"429", "503", "429 for ever", "429 of a negative time", "503 of an infinite time", "429 of odd digits"}


def head(status: str = "200 OK", *lines: str) -> bytes:
    """Status line and headers."""
    return ("\r\n".join([f"HTTP/1.1 {status}", "Connection: close", *lines]) + "\r\n\r\n").encode("latin-1")


def sized(data: bytes, status: str = "200 OK", *lines: str) -> bytes:
    """A complete reply."""
    return head(status, f"Content-Length: {len(data)}", "Content-Type: application/json", *lines) + data


def value(content: Any) -> bytes:
    """A complete reply of a JSON value; Infinity and NaN as Python writes them."""
    return sized(json.dumps(content).encode())


def bomb() -> bytes:
    """A gigabyte of spaces, deflated."""
    packer = zlib.compressobj(9, wbits=31)
    parts = [packer.compress(b" " * (1 << 20)) for _ in range(1024)]
    return b"".join([*parts, packer.flush()])


def transport(good: bytes) -> dict[str, Callable[[], Pieces]]:
    """Replies by name, on the wire; ``good`` is the body of a right one."""
    one: dict[str, bytes] = {
        "nothing": b"",
        "no HTTP": b"\x00\x01\x02SSH-2.0-x\r\n",
        "another version": sized(good).replace(b"HTTP/1.1", b"HTTP/9.9", 1),
        "status 999": sized(good, "999 Odd"),
        "a status of letters": sized(good, "abc"),
        "a negative length": head("200 OK", "Content-Length: -1") + good,
        "two lengths": head("200 OK", "Content-Length: 3", "Content-Length: 7") + good,
        "a length of letters": head("200 OK", "Content-Length: many") + good,
        "a body that is cut": head("200 OK", f"Content-Length: {len(good) + 9}") + good,
        "chunks of a negative size": head("200 OK", "Transfer-Encoding: chunked") + b"-5\r\nabc\r\n0\r\n\r\n",
        "no content": head("204 No Content"),
        "an empty body": sized(b""),
        "zero bytes": sized(bytes(100)),
        "a header without a colon": head("200 OK", "Odd") + good,
        "a header of 1 MB": head("200 OK", f"X: {'y' * (1 << 20)}") + good,
        "plain text called gzip": sized(good, "200 OK", "Content-Encoding: gzip"),
        "an unknown encoding": sized(good, "200 OK", "Content-Encoding: odd"),
        "a page": sized(b"<html>busy</html>", "502 Bad Gateway"),
        "500": sized(b"{}", "500 Odd"),
        "400": sized(b'{"error": "\x1b[2J"}', "400 Bad"),
        "401": sized(b"{}", "401 Odd"),
        "404": sized(b"{}", "404 Odd"),
        "429": sized(b"{}", "429 Odd", "Retry-After: 0"),
        "429 for ever": sized(b"{}", "429 Odd", "Retry-After: 99999999999"),
        "429 of a negative time": sized(b"{}", "429 Odd", "Retry-After: -1"),
        "429 of odd digits": sized(b"{}", "429 Odd", "Retry-After: \xb2"),
        "503 of an infinite time": sized(b"{}", "503 Odd", "Retry-After: inf"),
        "a redirect to itself": sized(b"", "302 Found", "Location: /v1/chat/completions"),
        "a redirect to a file": sized(b"", "302 Found", "Location: file:///etc/passwd"),
        "UTF-16": sized(good.decode().encode("utf-16")),
        "JSON that is cut": sized(good[:-2]),
        "JSON of 100,000 levels": sized(b"[" * 100_000),
        "a number of 100,000 digits": sized(b"1" * 100_000),
    }
    many: dict[str, Callable[[], Pieces]] = {
        "silence": lambda: repeat(0.1),
        "silence after the status": lambda: iter([b"HTTP/1.1 200 OK\r\n", *[0.1] * 100]),
        "slow headers": lambda: (piece for _ in range(400) for piece in (b"X", 0.05)),
        "endless headers": lambda: iter_of(b"HTTP/1.1 200 OK\r\n", b"X-Odd: y\r\n" * 100),
        "a length of 10 GB": lambda: iter([head("200 OK", "Content-Length: 10000000000"), *[0.1] * 100]),
        "10 GB": lambda: iter_of(head("200 OK", "Content-Length: 10000000000"), b" " * (1 << 16)),
        "an endless body": lambda: iter_of(head(), b" " * (1 << 16)),
        "endless chunks": lambda: iter_of(head("200 OK", "Transfer-Encoding: chunked"), b"4\r\n    \r\n" * 4096),
        "a slow body": lambda: (piece for _ in range(400) for piece in (b" ", 0.05)),
        "100 Continue for ever": lambda: iter_of(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
        "a gigabyte in a megabyte": lambda: iter([sized(bomb(), "200 OK", "Content-Encoding: gzip")]),
    }
    return {name: (lambda data=data: iter([data])) for name, data in one.items()} | many


def iter_of(first: bytes, rest: bytes) -> Pieces:
    """Something, and then something else without an end."""
    yield first
    yield from repeat(rest)


def completion(message: Any = None, **changes: Any) -> dict[str, Any]:
    """A chat completion."""
    message = {"role": "assistant", "content": "yes"} if message is None else message
    return {"choices": [{"message": message, "finish_reason": "stop"}], **changes}


def completions() -> dict[str, Any]:
    """Odd chat completions by name."""
    call = {"name": "f", "arguments": "{"}
    said = {"content": "yes"}
    return {
        "a list": [], "a text": "yes", "null": None, "Infinity": float("inf"), "no choices": {},
        "an empty list of choices": completion(choices=[]), "choices are null": completion(choices=None),
        "choices are an object": completion(choices={"0": 1}), "a choice is a text": completion(choices=["yes"]),
        "a message is a list": completion([]), "content is a number": completion({"content": 5}),
        "content is a list": completion({"content": [{"type": "text"}]}),
        "content is true": completion({"content": True}),
        "no finish reason": completion(choices=[{"message": said}]),
        "an unknown finish reason": completion(choices=[{"message": said, "finish_reason": "odd"}]),
        "a list as finish reason": completion(choices=[{"message": said, "finish_reason": ["stop"]}]),
        "an empty call": completion({"content": "", "tool_calls": [{}]}),
        "a null call": completion({"content": "", "tool_calls": [None]}),
        "calls are a text": completion({"content": "", "tool_calls": "odd"}),
        "a call of nothing": completion({"content": "", "tool_calls": [{"function": {}}]}),
        "a call of broken arguments": completion({"content": "", "tool_calls": [{"function": call}]}),
        "a call of a number": completion({"content": "", "tool_calls": [{"function": {"name": 1, "arguments": {}}}]}),
        "usage is a text": completion(usage="odd"), "usage of a text": completion(usage={"completion_tokens": "many"}),
        "usage of Infinity": completion(usage={"completion_tokens": float("inf")}),
        "usage of NaN": completion(usage={"completion_tokens": float("nan")}),
        "negative usage": completion(usage={"completion_tokens": -5}),
        "other prompt": completion(usage={"prompt_tokens": 1}),
        "reasoning is an object": completion({"content": "yes", "reasoning_content": {}}),
        "white space": completion({"content": " \n"}), "nothing said": completion({"content": None}),
        "a lone surrogate": completion({"content": "\ud800 yes"}), "a NUL": completion({"content": "a\0b"}),
        "escapes of a terminal": completion({"content": "\x1b[2J\x1b]0;x\x07 yes"}),
        "a megabyte": completion({"content": "yes " * (1 << 18)}),
        "NaN in a call": completion({"tool_calls": [{"function": {"name": "f", "arguments": {"x": float("nan")}}}]}),
    }  # fmt: skip
