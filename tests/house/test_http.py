"""The HTTP client against servers that do wrong: deadline, size, redirects, passwords."""

from __future__ import annotations

import base64
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from raw_server import RawServer

from deepspec.errors import DeepSpecError
from deepspec.http import NoReply, check_url, request, without_password

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Name: 1\r\n\r\nok"


@pytest.fixture
def serve() -> Iterator[Callable[[Any], RawServer]]:
    servers = list[RawServer]()

    def start(act: Any) -> RawServer:
        servers.append(RawServer(act if callable(act) else lambda connection: connection.sendall(act)))
        return servers[-1]

    yield start
    for one in servers:
        one.listener.close()


def drip(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(1000):
        connection.sendall(b" ")
        time.sleep(0.02)


def drip_headers(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    for number in range(1000):
        connection.sendall(f"X-{number}: 1\r\n".encode())
        time.sleep(0.02)


@pytest.mark.parametrize("act", [drip, drip_headers, lambda connection: time.sleep(5)])
def test_a_call_ends_at_its_deadline_however_the_server_dawdles(serve: Any, act: Any) -> None:
    server = serve(act)
    with pytest.raises(NoReply, match=rf"http://{server.address}/x: no complete reply within 0\.2 s") as caught:
        request("GET", f"http://{server.address}/x", 0.2)
    assert not caught.value.refused


def test_a_reply_comes_with_status_headers_and_body_to_many_threads(serve: Any) -> None:
    server = serve(OK)
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda n: request("POST", f"http://{server.address}", 5, {"n": n}), range(64)))
    assert {(one.status, one.body, one.headers["x-name"]) for one in replies} == {(200, b"ok", "1")}
    assert {json.loads(one.partition(b"\r\n\r\n")[2])["n"] for one in server.requests} == set(range(64))


@pytest.mark.parametrize(
    ("sent", "named"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nok", "RemoteProtocolError"),  # cut
        (b"", "RemoteProtocolError"),
        (b"no HTTP\r\n\r\n", "RemoteProtocolError"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n" + bytes(99), "a reply of more than 50 bytes"),
    ],
)
def test_a_broken_or_long_reply_is_none(serve: Any, sent: bytes, named: str) -> None:
    with pytest.raises(NoReply, match=named):
        request("GET", f"http://{serve(sent).address}", 5, max_bytes=50)


def test_a_redirect_is_not_followed_but_told(serve: Any) -> None:
    other = serve(OK)
    moved = f"HTTP/1.1 307 Moved\r\nLocation: http://u:secret@{other.address}/\r\nContent-Length: 0\r\n\r\n"
    reply = request("GET", f"http://{serve(moved.encode()).address}", 5)
    assert reply.summary == f"307, a redirect to http://{other.address}/"
    assert not other.requests


def test_a_password_is_sent_and_never_told(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    server = serve(OK)
    assert request("GET", f"http://me:secret@{server.address}/x", 5).status == 200
    assert base64.b64encode(b"me:secret") in server.requests[0]
    with pytest.raises(NoReply) as refused:
        request("GET", "http://me:secret@127.0.0.1:9", 5)
    assert refused.value.refused
    with pytest.raises(DeepSpecError) as wrong:
        check_url("http://me:secret@host:port", "--server", DeepSpecError)
    for text in (str(refused.value), str(wrong.value), caplog.text):
        assert "secret" not in text
    assert without_password("me:secret@host:1") == "host:1"


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://[::1", "http://host:x", ""])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(DeepSpecError, match=r"--server: not the address of a server.*wanted http://host:port"):
        check_url(url, "--server", DeepSpecError)
