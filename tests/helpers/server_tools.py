"""A scripted completion server that does everything wrong, and the engine that asks it."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import data_tools as tools

from deepspec.data.chat import Renderer
from deepspec.data.server import ServerEngine, ServerOptions
from deepspec.recipe import RegenerateSection

SECTION = RegenerateSection(temperature=1.0, top_p=1.0, top_k=0, max_tokens=24, batch_size=8)


def renderer() -> Renderer:
    case = tools.small_case("chatml")
    return Renderer(case.tokenizer, case.family)


class FaultyServer:
    """Answers with the prompt's last words; every third exchange goes wrong in one of many ways."""

    def __init__(self, faults: list[str], every: int = 3, port: int = 0, strict: bool = False) -> None:
        self.answered, self.requests, self.bodies = Counter[str](), 0, []
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests += 1
                    number = outer.requests
                    outer.bodies.append(body)
                fault = faults[number // every % len(faults)] if faults and number % every == 0 else ""
                outer.act(self, body, fault, strict)

            def log_message(self, *args: Any) -> None:
                pass

            def handle(self) -> None:
                with contextlib.suppress(ConnectionError):  # a client that lost its patience
                    super().handle()

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def act(self, handler: Any, body: dict[str, Any], fault: str, strict: bool) -> None:
        question = body["messages"][-1]["content"]
        if strict and "top_k" in body:
            self.send(handler, 422, {"detail": "Unexpected fields in the request: {'top_k'}"})
        elif fault in ("500", "429", "503"):
            self.send(handler, int(fault), {"error": "on purpose"}, {"Retry-After": "0"} if fault != "500" else {})
        elif "too long" in question:
            self.send(handler, 400, {"error": "context length exceeded"})
        elif fault == "close":
            handler.connection.close()
        elif fault == "early":
            handler.send_response(200)
            handler.send_header("Content-Length", "5000")
            handler.end_headers()
            handler.wfile.write(b'{"choices": [')
            handler.wfile.flush()
            handler.connection.close()
        elif fault == "json":
            self.send(handler, 200, b'{"choices": [{"mess')
        elif fault == "shape":
            self.send(handler, 200, {"choices": []})
        else:
            time.sleep(1.2 if fault == "slow" else 0.002)
            ids = renderer().prompt(body["messages"])
            message = {"role": "assistant", "content": f"\n echo {question}"}
            usage = {"prompt_tokens": len(ids), "completion_tokens": 4}
            self.send(handler, 200, {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage})
            self.answered[question] += fault != "slow"  # that answer came too late for its client

    def send(self, handler: Any, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        for name, text in (headers or {}).items():
            handler.send_header(name, text)
        handler.end_headers()
        handler.wfile.write(data)

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()


def server_engine(*urls: str, **options: Any) -> ServerEngine:
    values = {"concurrency": 8, "timeout": 1.0, "attempts": 12, "patience": 5.0} | options
    return ServerEngine(ServerOptions(urls, "tiny", **values), renderer(), SECTION, 0)
