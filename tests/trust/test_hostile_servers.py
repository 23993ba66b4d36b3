"""Servers that do their worst: each is named, memory is bounded, and the job goes on elsewhere or without a prompt."""

from __future__ import annotations

import gzip
import itertools
import json
import socket
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from raw_server import RawServer
from server_tools import FaultyServer, server_engine

from deepspec.data import server as server_module
from deepspec.data.dialogue import Dialogue, Outcome
from deepspec.data.server import _check_status, _Retry
from deepspec.errors import DataError
from deepspec.http import MAX_BYTES, NoReply, Reply, request

OK = b"HTTP/1.1 200 OK\r\n"
BLOCK = bytes(1 << 16)


def endless(head: bytes, part: bytes = BLOCK, pause: float = 0.0) -> Any:
    def act(connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in itertools.count():
            connection.sendall(part)
            time.sleep(pause)

    return act


def fixed(reply: bytes) -> Any:
    return lambda connection: connection.sendall(reply)


def with_body(body: bytes, *headers: str, status: str = "200 OK") -> Any:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return fixed("\r\n".join(lines).encode() + body)


BOMB = gzip.compress(bytes(64 << 20))
HOSTILE = {  # what the server does, and how a message calls it
    "a body without end": (endless(OK + b"\r\n"), "a reply of more than"),
    "chunks without end": (
        endless(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + BLOCK + b"\r\n"), "a reply of more than"
    ),
    "10 GB": (endless(OK + b"Content-Length: 10000000000\r\n\r\n"), "a reply of more than"),
    "a length of 5,000 digits": (fixed(OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n"), "RemoteProtocolError"),
    "a negative length": (fixed(OK + b"Content-Length: -1\r\n\r\n"), "RemoteProtocolError"),
    "headers byte by byte": (endless(OK, b"X", 0.01), "no complete reply within"),
    "a header without end": (endless(OK + b"X: ", b"x" * 65536), "RemoteProtocolError"),
    "headers without end": (endless(OK, b"X: 1\r\n" * 9000), "RemoteProtocolError"),
    "100-continue without end": (endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.01), "no complete reply within"),
    "a redirect": (with_body(b"", "Location: http://u:secret@127.0.0.1:9/", status="302 Found"), "a redirect to"),
    "a close in the middle": (fixed(OK + b"Content-Length: 50\r\n\r\n{"), "RemoteProtocolError"),
    "nothing": (fixed(b""), "RemoteProtocolError"),
    "a gzip bomb": (with_body(BOMB, "Content-Encoding: gzip"), "a compressed reply"),
    "a bomb in a bomb": (with_body(gzip.compress(BOMB), "Content-Encoding: gzip, gzip"), "a compressed reply"),
    "500 with HTML": (with_body(b"<html>\x1b[2Jno</html>", status="500 Oh"), "500 <html>"),
    "a list": (with_body(b"[1]"), "not a JSON object"),
    "100,000 levels": (with_body(b'{"a":' * 100_000), "not a JSON object"),
    "a page of nulls": (with_body(bytes(1000)), "not a JSON object"),
}  # fmt: skip


@pytest.fixture
def good() -> Iterator[FaultyServer]:
    server = FaultyServer([])
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "FIRST_REST", 0.01)
    monkeypatch.setattr(server_module, "LONGEST_REST", 0.05)
    monkeypatch.setattr(server_module, "LONGEST_ASKED", 0.05)


def answer(engine: Any, *questions: str) -> dict[str, Outcome]:
    rows = [{"id": one, "messages": [{"role": "user", "content": one}]} for one in questions]
    return {outcome.dialogue.id: outcome for outcome in engine.run(map(Dialogue, rows))}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_a_hostile_server_does_is_named_and_bounded_and_another_answers(
    kind: str, good: FaultyServer, caplog: pytest.LogCaptureFixture
) -> None:
    act, named = HOSTILE[kind]
    seconds = 1.0 if named.startswith("no complete") else 20.0
    bad = RawServer(act)
    tracemalloc.start()
    try:
        outcomes = answer(server_engine(f"http://{bad.address}", good.url, concurrency=1, timeout=seconds), *"abc")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        bad.listener.close()
    assert bad.requests
    assert all(outcome.error is None for outcome in outcomes.values())
    assert f"{bad.address}" in caplog.text
    assert named in caplog.text
    assert "secret" not in caplog.text
    assert peak < 3 * MAX_BYTES


def message(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": "x"} | fields, "finish_reason": "stop"}]}


def call(function: object) -> dict[str, Any]:
    return message(tool_calls=[{"function": function}])


ODD: list[Any] = [
    {}, {"choices": None}, {"choices": {}}, {"choices": [None]},
    {"choices": [{"message": [], "finish_reason": "stop"}]},
    message(tool_calls=[{}]), message(tool_calls=["x"]), message(tool_calls=7), message(tool_calls={"a": 1}),
    call(None), call([]), call({}), call({"name": 7}), call({"name": "f", "arguments": 7}),
    call({"name": "f", "arguments": "{" * 50_000}), call({"name": "f", "arguments": {"x": float("inf")}}),
    call({"name": "f", "arguments": '{"x": NaN}'}), call({"name": "f", "arguments": "9" * 5000}),
    message(content=["x"]), message(content=7), message(content={"a": "b"}), message(content=None),
    message(content="\ud800"), message(reasoning_content=7), message() | {"usage": {"completion_tokens": float("inf")}},
    message() | {"usage": {"prompt_tokens": float("nan")}}, message() | {"usage": {"prompt_tokens": "7"}},
    message() | {"usage": [1]}, {"choices": [{"message": {"content": "x"}, "finish_reason": {"a": []}}]},
    b'{"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}], "usage": {"completion_tokens": 1e999}}',
    b'{"choices": [{"message": {"content": ' + b"[" * 900 + b"]" * 900 + b'}, "finish_reason": "stop"}]}',
    b'{"choices": [' + b'{"a":' * 100_000, b'{"usage": ' + b"9" * 5000 + b"}", b"\xff\xfe", b"", b"null", b'"x"',
]  # fmt: skip


def test_an_odd_reply_costs_its_prompt_and_not_the_job(good: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = good.act

    def act(handler: Any, body: dict[str, Any], fault: str, strict: bool) -> None:
        question = body["messages"][-1]["content"]
        if question.startswith("odd "):
            value = ODD[int(question[4:])]
            good.send(handler, 200, value if isinstance(value, bytes) else json.dumps(value).encode())
        else:
            usual(handler, body, fault, strict)

    monkeypatch.setattr(good, "act", act)
    odd = [f"odd {number}" for number in range(len(ODD))]
    outcomes = answer(server_engine(good.url, attempts=2, timeout=5), "first", *odd, "last")
    assert (outcomes["first"].error, outcomes["last"].error) == (None, None)
    kept = [ODD[number] for number, name in enumerate(odd) if outcomes[name].error is None]
    assert not kept
    assert all(len(outcome.error or "") < 2000 for outcome in outcomes.values())


@pytest.mark.parametrize(
    ("after", "rest"),
    [("7", 7), ("0", None), ("-5", None), ("inf", None), ("nan", None), ("1e99", None), ("²", None), ("9" * 5000, None),
     ("999999999", 120), ("1.5", 1), ("Wed, 21 Oct 2099 07:28:00 GMT", None), ("", None), ("7, 8", None)],
)  # fmt: skip
def test_a_strange_time_to_wait_is_our_own_or_bounded(
    after: str, rest: float | None, good: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "LONGEST_ASKED", 120.0)
    with pytest.raises(_Retry) as caught:
        _check_status(server_module.Server(good.url), Reply(429, {"Retry-After": after}, b""))
    assert caught.value.rest == rest


def test_a_server_that_is_always_busy_does_not_hold_a_prompt_for_ever(
    good: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = good.act

    def act(handler: Any, body: dict[str, Any], fault: str, strict: bool) -> None:
        usual(handler, body, "429" if body["messages"][-1]["content"] == "held" else fault, strict)

    monkeypatch.setattr(good, "act", act)
    outcomes = answer(server_engine(good.url, attempts=1, timeout=5), "a", "held", "b")
    assert [outcomes[name].error is None for name in ("a", "held", "b")] == [True, False, True]
    assert outcomes["held"].again


def test_a_key_or_password_that_cannot_be_sent_is_not_told(good: FaultyServer) -> None:
    with pytest.raises(NoReply) as caught:
        request("GET", good.url, 5, headers={"Authorization": "Bearer se\ncret"})
    assert "cret" not in str(caught.value)
    bad = RawServer(with_body(b"who?", status="401 No"))
    with pytest.raises(DataError, match="the server refuses us"):
        answer(server_engine(f"http://me:secret@{bad.address}", attempts=2), "a")


def test_a_flood_of_100_continue_ends_at_the_deadline() -> None:
    bad = RawServer(endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 900))
    with pytest.raises(NoReply, match=r"no complete reply within 0\.2 s"):
        request("GET", f"http://{bad.address}", 0.2)
    bad.listener.close()
