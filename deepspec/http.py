"""The one HTTP client: a deadline for each call, a bounded body, no redirect followed, no password in a message.

Nothing that a server sends costs more memory than ``MAX_BYTES`` and its parsing: a body that states a greater length is
not begun, one that grows beyond it is dropped, and a compressed one, which can grow a thousandfold, is refused.
A body of gigabytes is read by :func:`stream`, piece by piece into memory that the caller has.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException, HTTPResponse, IncompleteRead
from typing import Any

import httpx2 as httpx  # httpx as its maintainers continue it; huggingface_hub needs it too

from deepspec.errors import DeepSpecError

MAX_BYTES = 16 << 20  # of a reply's body
EXCERPT = 300  # characters of a reply in a message
_loops: dict[int, asyncio.AbstractEventLoop] = {}  # process id -> the loop of its thread
_lock = threading.Lock()


class NoReply(DeepSpecError):
    """A request without a complete reply. ``refused``: nothing listens at the address."""

    def __init__(self, problem: str, url: str, refused: bool = False) -> None:
        super().__init__(problem, file=without_password(url))
        self.refused = refused


@dataclass(frozen=True)
class Reply:
    """What a server sent."""

    status: int
    headers: Mapping[str, str]  # names in any case
    body: bytes
    first: float = 0.0  # seconds from the call to the first part of the body
    seconds: float = 0.0  # to its last

    @property
    def summary(self) -> str:
        """Status, and the beginning of the body or where it redirects to, for a message."""
        if 300 <= self.status < 400:
            return f"{self.status}, a redirect to {without_password(self.headers.get('Location', 'nowhere'))}"
        text = self.body[:EXCERPT].decode(errors="replace")
        return f"{self.status} {' '.join(text.split())}"

    def json(self) -> dict[str, Any]:
        """The body's JSON object.

        Raises:
            ValueError: it is none, holds NaN or an infinity, or is nested beyond Python's stack.
        """
        try:
            value = json.loads(self.body, parse_constant=_no_number)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise ValueError(f"not a JSON object: {self.summary}")
        return value


def _no_number(name: str) -> float:
    raise ValueError(name)


def without_password(url: str) -> str:
    """The URL without a user's name and password."""
    head, sign, tail = url.rpartition("@")
    if not sign:
        return url
    scheme, sign, _ = head.partition("://")
    return f"{scheme}://{tail}" if sign else tail


def check_url(url: str, key: str, error: type[DeepSpecError]) -> None:
    """Refuse what is no address of a server.

    Raises:
        DeepSpecError: of type ``error``.
    """
    try:
        parts = httpx.URL(url)
        good = parts.scheme in ("http", "https") and bool(parts.host)
    except (httpx.InvalidURL, ValueError):
        good = False
    if not good:
        raise error("not the address of a server", key=key, found=without_password(url), wanted="http://host:port")


def request(
    method: str,
    url: str,
    seconds: float,
    value: object = None,
    headers: Mapping[str, str] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Reply:
    """One request over a connection of its own; from any number of threads at a time.

    Args:
        method: such as ``"GET"``.
        url: a name and password in it are sent as basic authentication.
        seconds: of the call, from looking up the host to the last byte of the body.
        value: sent as JSON; None: no body.
        headers: to send.
        max_bytes: of the reply's body.

    Raises:
        NoReply: no server, none that replies in time, or a reply that is broken or too long.
    """
    coroutine = _exchange(method, url, seconds, value, headers, max_bytes)
    try:
        return asyncio.run_coroutine_threadsafe(coroutine, _loop()).result()
    except TimeoutError:
        raise NoReply(f"no complete reply within {seconds:g} s", url) from None
    except httpx.LocalProtocolError:  # its text would tell the header, which may be a key
        raise NoReply("a request that cannot be sent: its URL or a header holds control characters", url) from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as problem:
        if _is_refused(problem):
            raise NoReply("connection refused", url, refused=True) from None
        raise NoReply(f"{type(problem).__name__} {problem}", url) from None


async def _exchange(
    method: str, url: str, seconds: float, value: object, headers: Mapping[str, str] | None, max_bytes: int
) -> Reply:
    address = httpx.URL(url)
    login: Any = (address.username, address.password) if address.userinfo else None
    content = None if value is None else json.dumps(value).encode()
    start, first = time.monotonic(), 0.0
    kind = {} if content is None else {"Content-Type": "application/json"}
    sent = {"Accept-Encoding": "identity", **kind, **(headers or {})}
    address = address.copy_with(userinfo=b"")  # so that no log and no error of the library holds the password
    async with (
        asyncio.timeout(seconds),
        httpx.AsyncClient(auth=login, verify=_trust(), timeout=None, trust_env=False) as client,
        client.stream(method, address, content=content, headers=sent) as reply,
    ):
        if reply.headers.get("Content-Encoding", "identity") != "identity":
            raise NoReply("a compressed reply, which was not asked for", url)
        body, stated = bytearray(), reply.headers.get("Content-Length", "")
        too_long = NoReply(f"a reply of more than {max_bytes:,} bytes", url)
        if stated.isdecimal() and int(stated) > max_bytes:
            raise too_long
        async for part in reply.aiter_raw():
            first = first or time.monotonic() - start
            body += part
            if len(body) > max_bytes:
                raise too_long
        return Reply(reply.status_code, reply.headers, bytes(body), first, time.monotonic() - start)


class Body:
    """The body of a reply, read as it comes.

    Args:
        connection: that it comes from.
        url: for messages.
        stall: seconds without a byte after which the server counts as hung.
        seconds: for the complete body.
    """

    def __init__(self, connection: socket.socket, url: str, stall: float, seconds: float) -> None:
        self.url, self.received = url, 0
        timed = _Timed(connection, stall, time.monotonic() + seconds)
        self._reply = HTTPResponse(timed)  # type: ignore[arg-type]  # it asks a socket only for a file
        self._reply.begin()
        self.status = self._reply.status

    def read_into(self, memory: memoryview) -> None:
        """Fill ``memory``.

        Raises:
            NoReply: the body ends before, or does not come.
        """
        done = 0
        while done < len(memory):
            with _named(self.url), suppress(IncompleteRead):
                count = 0
                count = self._reply.readinto(memory[done:])
            if not count:
                raise NoReply(f"the reply ends after {self.received:,} bytes", self.url)
            done += count
            self.received += count

    def rest(self, most: int = EXCERPT) -> Reply:
        """Status and the beginning of the body, for a message."""
        with _named(self.url):
            return Reply(self.status, dict(self._reply.headers), self._reply.read(most))


class _Timed(io.RawIOBase):
    """A socket as a file, whose every read ends by a deadline: a server that drips bytes holds nobody up for long."""

    def __init__(self, connection: socket.socket, stall: float, end: float) -> None:
        self.connection, self.stall, self.end = connection, stall, end

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self, 1 << 16)

    def readable(self) -> bool:
        return True

    def readinto(self, memory: Any) -> int:
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError("it takes too long")
        self.connection.settimeout(min(left, self.stall))
        return self.connection.recv_into(memory)


@contextmanager
def stream(
    url: str, value: object, headers: Mapping[str, str], *, stall: float, seconds: float, receive: int | None = None
) -> Iterator[Body]:
    """POST a JSON value over a connection of its own, and read the reply's body as it comes.

    The client of :func:`request` parses a body in Python, at a third of the speed at which hidden states are decoded;
    this one has the system copy it once, into the caller's memory.

    Args:
        url: a name and password in it are sent as basic authentication.
        value: sent as JSON.
        headers: to send.
        stall: seconds without a byte after which the server counts as hung.
        seconds: of the call.
        receive: bytes that the system may hold for the reader; None: its own default.

    Raises:
        NoReply: no server, or none that replies in time.
    """
    address, text = httpx.URL(url), json.dumps(value).encode()
    head = [f"POST {address.raw_path.decode()} HTTP/1.1", f"Host: {address.netloc.decode().rpartition('@')[2]}"]
    sent = {"Accept-Encoding": "identity", "Connection": "close", "Content-Type": "application/json"} | dict(headers)
    if address.userinfo:
        login = f"{address.username}:{address.password}".encode()
        sent["Authorization"] = f"Basic {base64.b64encode(login).decode()}"
    head += [f"{name}: {line}" for name, line in sent.items()]
    if not "".join(head).isprintable():
        raise NoReply("a request that cannot be sent: its URL or a header holds control characters", url)
    port = address.port or (443 if address.scheme == "https" else 80)
    with _named(url):
        connection = socket.create_connection((address.host, port), min(stall, seconds))
    with closing(connection):
        with _named(url):
            if receive:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
            if address.scheme == "https":
                connection = _trust().wrap_socket(connection, server_hostname=address.host)
            connection.sendall("\r\n".join([*head, f"Content-Length: {len(text)}", "", ""]).encode() + text)
            body = Body(connection, url, stall, seconds)
        yield body


@contextmanager
def _named(url: str) -> Iterator[None]:
    """What the system and the parser refuse, as :class:`NoReply`."""
    try:
        yield
    except TimeoutError as late:
        raise NoReply(f"no reply in time ({late})", url) from None
    except (OSError, HTTPException, ValueError) as problem:
        if _is_refused(problem):
            raise NoReply("connection refused", url, refused=True) from None
        raise NoReply(f"{type(problem).__name__} {problem}", url) from None


def _is_refused(problem: BaseException | None) -> bool:
    while problem is not None and not isinstance(problem, ConnectionRefusedError):
        problem = problem.__cause__ or problem.__context__
    return problem is not None


@cache
def _trust() -> ssl.SSLContext:
    return ssl.create_default_context()


def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of this process, in a thread of its own: a fork does not take the thread along."""
    with _lock:
        if os.getpid() not in _loops:
            loop = _loops[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="http", daemon=True).start()
        return _loops[os.getpid()]
