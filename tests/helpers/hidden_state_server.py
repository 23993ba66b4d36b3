"""A server that plays vLLM's part over a tiny real model: hidden states of a prompt in a file."""

from __future__ import annotations

import fcntl
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from deepspec.targets.load import Target


class FakeServer:
    """Answers completions with the target's raw layer outputs in a locked file; ``change`` spoils its answers."""

    def __init__(self, target: Target, folder: Path, layers: list[int]) -> None:
        self.target, self.folder, self.layers = target, folder, layers
        self.change: dict[str, Any] = {}
        self.requests: list[dict[str, Any]] = []
        self.one_at_a_time = threading.Lock()  # the hooks of two forwards side by side would mix
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._reply(200, {"data": [{"id": "tiny"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.requests.append(body)
                if codes := owner.change.get("codes"):
                    self._reply(codes.pop(0), {"error": "not now"})
                    return
                self._reply(200, {"choices": [{"text": ""}], "kv_transfer_params": owner.write(body["prompt"])})

            def _reply(self, code: int, value: dict[str, Any]) -> None:
                data = json.dumps(value).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def write(self, prompt: list[int]) -> dict[str, Any] | None:
        """As the engine does: the file comes to be after the answer, under a lock that is taken before it."""
        if self.change.get("no_params"):
            return None
        path = self.folder / f"{len(self.requests)}-{threading.get_ident()}.safetensors"
        lock = open(f"{path}.lock", "w")  # noqa: SIM115 - closed by the thread that writes
        fcntl.flock(lock, fcntl.LOCK_EX)
        threading.Thread(target=self._write, args=(path, lock, prompt)).start()
        return {"hidden_states_path": str(path)}

    def _write(self, path: Path, lock: Any, prompt: list[int]) -> None:
        time.sleep(0.05)
        ids = [layer - 1 for layer in self.layers]
        with self.one_at_a_time:
            made = self.target.forward(torch.tensor([prompt]), ids).features[0]
        hidden = made.view(len(prompt), len(ids), -1)
        tokens = torch.tensor(self.change.get("tokens", prompt))
        save_file({"hidden_states": hidden.contiguous(), "token_ids": tokens}, path)
        self.held = lock if self.change.get("hangs") else lock.close()
