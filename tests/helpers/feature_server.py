"""A feature server on a thread, and how it is spoilt."""

from __future__ import annotations

import socket
import threading
from typing import Any

import uvicorn

from deepspec.streaming.batcher import Limits
from deepspec.streaming.server import FeatureServer


class RunningServer:
    """Our feature server in this process.

    Args:
        target: that it serves.
        port: 0: any free one.
        options: of :class:`FeatureServer`.
    """

    def __init__(self, target: Any, port: int = 0, limits: Limits | None = None, **options: Any) -> None:
        self.server = FeatureServer(target, limits or Limits(), **{"max_length": 256, **options})
        self.listener = socket.create_server(("127.0.0.1", port))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(self.server.app(), log_level="error", timeout_graceful_shutdown=1, lifespan="off")
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._uvicorn.run, kwargs={"sockets": [self.listener]}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it; what is under way is cut off."""
        self._uvicorn.should_exit = self._uvicorn.force_exit = True
        self._thread.join()
        self.server.close()
