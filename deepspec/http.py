"""The one HTTP client: a deadline for each call, a bounded body, no redirect followed, no password in a message.

Nothing that a server sends costs more memory than ``MAX_BYTES`` and its parsing: a body that states a greater length is
not begun, one that grows beyond it is dropped, and a compressed one, which can grow a thousandfold, is refused.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
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
