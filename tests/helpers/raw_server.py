"""A server of raw bytes: what no HTTP library would send."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Callable


class RawServer:
    """Reads one request a connection and lets ``act`` write what it likes."""

    def __init__(self, act: Callable[[socket.socket], None]) -> None:
        self.act, self.requests = act, list[bytes]()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    def answer(self, connection: socket.socket) -> None:
        with connection:
            head, _, body = connection.recv(1 << 16).partition(b"\r\n\r\n")
            size = int(found[1]) if (found := re.search(rb"(?i)content-length: (\d+)", head)) else 0
            while len(body) < size:
                body += connection.recv(1 << 16)
            self.requests.append(head + b"\r\n\r\n" + body)
            with contextlib.suppress(OSError):
                self.act(connection)
