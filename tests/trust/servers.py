"""Hostile servers: what asks them ends in time and in bounded memory, and pays with the prompt at most."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from counts import Row
from processes import each
from replies import BUSY, JOB, Pieces, completion, completions, sized, transport, value
from safetensors.torch import save_file
from stages import Place

from deepspec.data import regenerate as regeneration
from deepspec.data.conversations import read_conversations, write_conversations
from deepspec.data.server import ServerOptions
from deepspec.errors import DeepSpecError, as_os_error
from deepspec.recipe import load_recipe
from deepspec.targets import load_target, served

SECONDS, MEGABYTES = 30.0, 300  # that one reply may cost
TIMEOUT = 0.6  # seconds, of a request
BAD = "the hostile one"
Act = Callable[[bytes, dict[str, Any]], Pieces]  # path and body of a request -> what is sent


class Server:
    """A server of raw bytes on a port of its own, a thread a connection."""

    def __init__(self, act: Act) -> None:
        self.act, self.socket = act, socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            data = b""
            while b"\r\n\r\n" not in data:
                data += connection.recv(1 << 16) or b"\r\n\r\n"
            top, _, body = data.partition(b"\r\n\r\n")
            found = re.search(rb"content-length: (\d+)", top.lower())
            while len(body) < int(found[1] if found else 0):
                body += connection.recv(1 << 16)
            path = (top.split() or [b"", b""])[1]
            for piece in self.act(path, json.loads(body) if body else {}):
                if isinstance(piece, float):
                    time.sleep(piece)
                else:
                    connection.sendall(piece)

    def stop(self) -> None:
        """Listen no more."""
        self.socket.close()


def polite(path: bytes, body: dict[str, Any]) -> Pieces:
    """Answers every prompt, the same one each time."""
    return iter([value(completion({"content": f"echo {body['messages'][-1]['content']}"}))])


def hostile_server(kind: str, place: Place, share: float = 1.0) -> Row:
    """Every odd reply once, to the regeneration (``kind`` "regenerate") or to a served target ("served target").

    Right: the prompt failed, or its answer is one; the prompts beside it are answered. Refused: one line of ours.

    Returns:
        The counts.
    """
    good = json.dumps(completion()).encode()
    if kind == "regenerate":
        table = transport(good) | {name: (lambda v=v: iter([value(v)])) for name, v in completions().items()}
        work: Callable[..., dict[str, str]] = _regenerate
    else:
        table = transport(b'{"choices": [{}]}') | _file_replies(place)
        work = _serve
    names = list(table)
    names = names[:: max(1, round(1 / share))]
    row, logs = Row("hostile", kind), place.root / "work" / "hostile-logs"
    shutil.rmtree(place.work("hostile"), ignore_errors=True)
    place.work("hostile").mkdir(parents=True)

    def one(number: int) -> dict[str, str]:
        return _measured(lambda: work(names[number], table[names[number]], place))

    for name, found in zip(names, each(len(names), one, logs, SECONDS), strict=True):
        row.add({found["verdict"]: f"{name}: {found.get('note', '')}"})
    return row


def _measured(work: Callable[[], dict[str, str]]) -> dict[str, str]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory begins anew
    before = _peak()
    try:
        found = work()
    except DeepSpecError as error:
        found = {"verdict": "lost", "note": f"it cost the job: {str(error)[:200]}"}
    except Exception as problem:
        found = {
            "verdict": "refused" if as_os_error(problem) else "traceback",
            "note": f"{type(problem).__name__}: {str(problem)[:200]}",
        }
    grown = _peak() - before
    return {"verdict": "lost", "note": f"{grown} MB of memory"} if grown > MEGABYTES else found


def _peak() -> int:
    """Megabytes."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) >> 10 if found else 0


def _regenerate(name: str, reply: Callable[[], Pieces], place: Place) -> dict[str, str]:
    folder = place.work("hostile") / "regenerate"
    shutil.rmtree(folder, ignore_errors=True)
    rows = [{"id": text, "messages": [{"role": "user", "content": text}]} for text in ("one", BAD, "two")]
    write_conversations(folder / "prompts.jsonl", rows, {})

    def act(path: bytes, body: dict[str, Any]) -> Pieces:
        return reply() if body["messages"][-1]["content"] == BAD else polite(path, body)

    server, plan = Server(act), regeneration.RegenerationPlan.of_recipe(load_recipe(place.recipe))
    engine = plan.server_engine(ServerOptions((server.url,), "tiny", 2, TIMEOUT, 2, 4.0))
    output = folder / "answers.jsonl"
    try:
        regeneration.regenerate(folder / "prompts.jsonl", output, engine, {}, 1.0)
    except DeepSpecError as error:
        if name in JOB | BUSY:
            return {"verdict": "refused", "note": str(error)}
        raise
    finally:
        server.stop()
    answered = {row["id"] for row in read_conversations(output)}
    right = {"one", "two"} <= answered
    return {"verdict": "right" if right else "lost", "note": f"answered: {sorted(answered)}"}


# -- a served target ---------------------------------------------------------------------------------------------------


@cache
def _truth(place: Place) -> tuple[list[int], Any, torch.Tensor]:
    """Tokens, what the target computes for them, and the raw layers that a server would write [S, layers, D]."""
    target = load_target(place.given / "target", torch.float32)
    tokens = list(range(5, 17))
    ids = torch.tensor([tokens])
    layers = [one - 1 for one in served.server_layers([0, 2], target.spec)]
    raw = target.forward(ids, layers).features[0].view(len(tokens), len(layers), -1)
    return tokens, target.forward(ids, [0, 2]), raw.contiguous()


def _file_replies(place: Place) -> dict[str, Callable[[], Pieces]]:
    """Replies of a server that names a file of hidden states, by name."""
    tokens, _, raw = _truth(place)
    folder = place.work("hostile") / "files"

    def reply(path: Any) -> Pieces:
        return iter([value({"choices": [{"text": ""}], "kv_transfer_params": {"hidden_states_path": path}})])

    def file(name: str, change: Callable[[dict[str, torch.Tensor]], None] = lambda found: None) -> Pieces:
        found = {"hidden_states": raw.clone(), "token_ids": torch.tensor(tokens)}
        change(found)
        save_file(found, folder / name)
        (folder / f"{name}.lock").touch()
        return reply(str(folder / name))

    def special(name: str, make: Callable[[Path], None]) -> Pieces:
        make(folder / name)
        (folder / f"{name}.lock").touch()
        return reply(str(folder / name))

    outside = place.given / "draft" / "model.safetensors"
    return {
        "a right file": lambda: file("right"),
        "no parameters": lambda: iter([value({"choices": []})]),
        "parameters are a text": lambda: iter([value({"kv_transfer_params": "odd"})]),
        "parameters are a list": lambda: iter([value({"kv_transfer_params": [1]})]),
        "a number as path": lambda: reply(7), "a list as path": lambda: reply(["x"]),
        "NUL in a path": lambda: reply("\0"),
        "a path of 10,000 letters": lambda: reply("/" + "x" * 10_000),
        "no such file": lambda: reply(str(folder / "none")),
        "a file outside": lambda: reply(str(outside)),
        "a file above": lambda: reply(f"{folder}/../../../given/recipe.yaml"),
        "a device": lambda: reply("/dev/zero"), "the folder itself": lambda: reply(str(folder)),
        "a link": lambda: special("link", lambda path: path.symlink_to(outside)),
        "a pipe": lambda: special("pipe", os.mkfifo),
        "an empty file": lambda: special("empty", Path.touch),
        "a header of 2^60 bytes": lambda: special("huge", lambda path: path.write_bytes(b"\0" * 7 + b"\x10" + b"{}")),
        "other tokens": lambda: file("tokens", lambda found: found["token_ids"].add_(1)),
        "another shape": lambda: file("shape", lambda found: found.update(hidden_states=raw[:, :1].contiguous())),
        "fewer rows": lambda: file("rows", lambda found: found.update(hidden_states=raw[1:].contiguous())),
        "integers": lambda: file("integers", lambda found: found.update(hidden_states=raw.long())),
        "NaN": lambda: file("nan", lambda found: found["hidden_states"].fill_(float("nan"))),
        "infinities": lambda: file("inf", lambda found: found["hidden_states"][0].fill_(float("inf"))),
        "other names": lambda: file("names", lambda found: found.update(hidden=found.pop("hidden_states"))),
    }  # fmt: skip


def _serve(name: str, reply: Callable[[], Pieces], place: Place) -> dict[str, str]:
    folder = place.work("hostile") / "files"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    before = {path: path.read_bytes() for path in (place.recipe, place.given / "draft" / "model.safetensors")}

    def act(path: bytes, body: dict[str, Any]) -> Pieces:
        return iter([sized(b'{"data": [{"id": "tiny"}]}')]) if path.endswith(b"/models") else reply()

    served.PAUSE = 0.05  # of ours: between attempts
    server = Server(act)
    options: Any = {"storage": folder} if "storage" in served.ServedTarget.__init__.__annotations__ else {}
    tokens, wanted, _ = _truth(place)
    try:
        target = served.ServedTarget(
            server.url, place.given / "target", [0, 2], torch.float32, timeout=TIMEOUT, **options
        )
        found = target.forward(torch.tensor([tokens]), [0, 2])
    except DeepSpecError as error:
        return _untouched(before) or {"verdict": "refused", "note": str(error)}
    finally:
        server.stop()
    close = torch.allclose(found.features, wanted.features, atol=1e-4)
    close &= torch.allclose(found.last_hidden, wanted.last_hidden, atol=1e-4)
    return _untouched(before) or {"verdict": "right" if close else "lost", "note": "other hidden states, and no word"}


def _untouched(before: dict[Path, bytes]) -> dict[str, str] | None:
    gone = [path for path, data in before.items() if not path.exists() or path.read_bytes() != data]
    for path in gone:
        path.write_bytes(before[path])
    return {"verdict": "lost", "note": f"it changed {gone[0]}"} if gone else None


@contextlib.contextmanager
def polite_server() -> Iterator[str]:
    """The URL of a server that answers, for the stages that need one."""
    server = Server(polite)
    try:
        yield server.url
    finally:
        server.stop()
