"""Streaming of hidden states over loopback: bytes a CPU second of the client, the trainer's wait, memory.

A server in a process of its own sends replies that were coded once (a target that costs nothing); the client is the one
that training uses. What limits it is measured piece by piece on the same bytes: receiving, checksums, decoding. The
trainer's wait is that of its own prefetching, with steps that last as long as four conversations take. A server that
never stops sending, in each of three ways, is read until the client refuses it.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import socket
import threading
import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any

import google_crc32c
import numpy as np
import torch
from bars import at_least, at_most, write_bars
from start import Benchmark, tell

from deepspec.batch import LossPlan, Supervision
from deepspec.cache.levels import LEVELS
from deepspec.distributed import World
from deepspec.errors import run_main
from deepspec.http import NoReply, stream
from deepspec.sources.served import ServedSource
from deepspec.streaming import client as clients
from deepspec.streaming.client import FeatureRequest, ServerFault, StreamClient, Wanted
from deepspec.streaming.pool import ServerPool
from deepspec.streaming.wire import (
    PROTOCOL,
    Arrays,
    MessageKind,
    codec_entry,
    data_messages,
    json_message,
    message,
    tokens_digest,
)
from deepspec.tables import Table
from deepspec.training.plan import RunPlan
from deepspec.training.prefetch import Prefetcher

D, LAYERS, LENGTH = 2560, (1, 9, 17, 25, 33), 1024  # of Qwen3-4B; tokens of a conversation
CHUNK = b"200000\r\n"  # of an endless body: 2 MiB
SPEED, WAIT, GROWN = 1.5, 0.05, 64.0  # GB/s a core, share of the time, MB: the bars


def hidden_states(rows: int, columns: int) -> np.ndarray:
    """Random bf16 bits [rows, columns] whose channels differ in size as a real model's do."""
    random = np.random.default_rng(0)
    values = random.normal(size=(rows, columns)).astype(np.float32) * np.exp(random.normal(size=columns))
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def coded_reply(tokens: np.ndarray, level: str) -> bytes:
    """The messages of a conversation all of whose tokens but the first are supervised."""
    arrays = Arrays(hidden_states(LENGTH, D * len(LAYERS)), hidden_states(LENGTH - 1, D))
    chosen = LEVELS[level]
    codecs = {MessageKind.FEATURES: chosen.features(arrays.features)}
    if arrays.last_hidden is not None:
        codecs[MessageKind.LAST_HIDDEN] = chosen.last_hidden(arrays.last_hidden)
    tables = {kind.name.lower(): codec_entry(codec) for kind, codec in codecs.items()}
    hello = {"target": "of the benchmark", "dtype": "bfloat16", "tokens": tokens_digest(tokens), "codecs": tables}
    parts = [
        json_message(MessageKind.HELLO, hello),
        *(make() for make in data_messages(arrays, codecs)),
        message(MessageKind.END),
    ]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def send_for_ever(connection: socket.socket, kind: str, reply: bytes) -> None:
    """A body without an end, of BEATs, of rows that were sent before, or of one message of 4 GiB."""
    if kind == "beats":
        beats = message(MessageKind.BEAT) * 4096
        while True:
            connection.sendall(b"%x\r\n%b\r\n" % (len(beats), beats))
    if kind == "rows":
        connection.sendall(reply.removesuffix(b"0\r\n\r\n"))
    elif kind == "one message":
        head = bytearray(message(MessageKind.HELLO))
        head[16:20] = b"\xff\xff\xff\xff"
        connection.sendall(b"%x\r\n%b\r\n" % (len(head), bytes(head)))
    while True:
        connection.sendall(CHUNK + bytes(0x200000) + b"\r\n")


def serve(listener: socket.socket, reply: bytes) -> None:
    """Send the reply to every request, or what the path ``/KIND/...`` asks for."""
    handshake = json.dumps({"deepspec": PROTOCOL, "dtype": "bfloat16", "target": {}, "digest": "of the benchmark"})
    plain = f"HTTP/1.1 200 OK\r\nContent-Length: {len(handshake)}\r\n\r\n{handshake}".encode()

    def answer(connection: socket.socket) -> None:
        with connection:
            data = connection.recv(1 << 20)
            while b"\r\n\r\n" not in data or (data.startswith(b"POST") and not data.endswith(b"}")):
                data += connection.recv(1 << 20)
            path = data.split()[1].decode()
            try:
                if path.endswith("/v1/target"):
                    connection.sendall(plain)
                    return
                connection.sendall(HEAD)
                if path.startswith("/endless"):
                    send_for_ever(connection, path.split("/")[2].replace("-", " "), reply)
                connection.sendall(reply)
            except OSError:
                return

    while True:
        threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()


def wanted() -> Wanted:
    """What training would ask for."""
    target: Any = SimpleNamespace(spec=SimpleNamespace(hidden_size=D), dtype=torch.bfloat16)
    return Wanted(target, {}, LAYERS)


class FixedSource(ServedSource):
    """A served source of equal conversations, without a recipe."""

    def __init__(self, pool: ServerPool, tokens: np.ndarray, count: int) -> None:
        self.pool, self.last_hidden, self.written = pool, True, None
        mask = np.arange(LENGTH) > 0
        self._ids, self._masks, self._sample_ids = [tokens] * count, [mask] * count, list(range(count))
        self.lengths, self.group_sizes = np.full(count, LENGTH), (count,)


def measure_client(url: str, one: FeatureRequest, seconds: float) -> dict[str, float]:
    """GB/s of raw hidden states a CPU second of the client: best, and median, of conversations; and a second."""
    client = StreamClient(url, wanted())
    client.check()
    client.fetch(one)
    cpu, begun, raw = list[float](), time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        before = time.process_time()
        fetched = client.fetch(one).nbytes
        cpu.append(fetched / (time.process_time() - before) / 1e9)
        raw += fetched
    return {"cpu": max(cpu), "median": median(cpu), "wall": raw / (time.perf_counter() - begun) / 1e9}


def measure_parts(url: str, reply: bytes, raw: int, level: str) -> dict[str, float]:
    """GB/s of raw hidden states a CPU second, of each part of the client's work alone."""
    memory = np.empty(len(reply), np.uint8)

    def receive() -> None:
        with stream(f"{url}/v1/features", {}, {}, stall=30, seconds=60, receive=clients.RECEIVE) as body:
            try:
                for start in range(0, len(memory), 1 << 20):
                    body.read_into(memory[start : start + (1 << 20)].data)
            except NoReply:
                return  # the chunks' own headers are not part of it

    features = hidden_states(64, D * len(LAYERS))
    codec = LEVELS[level].features(features)
    coded, out = np.frombuffer(codec.encode_rows(features), np.uint8), np.empty_like(features)
    return {
        "receiving": raw / _cpu(receive, 8) / 1e9,
        "checksums": raw / _cpu(lambda: google_crc32c.value(reply), 8) / 1e9,
        "decoding": features.nbytes / _cpu(lambda: codec.decode_rows(coded, out, 0, len(out)), 200) / 1e9,
    }


def _cpu(work: Callable[[], Any], times: int) -> float:
    """CPU seconds of one call, the least of three rounds."""
    rounds = []
    for _ in range(3):
        begun = time.process_time()
        for _ in range(times):
            work()
        rounds.append((time.process_time() - begun) / times)
    return min(rounds)


def measure_wait(url: str, tokens: np.ndarray, steps: int, step_seconds: float) -> dict[str, float]:
    """The share of a training loop's time that it waits for data, the first step apart."""
    pool = ServerPool([url], wanted(), limit=256 << 20, patience=10.0)
    source = FixedSource(pool, tokens, 4 * steps)
    plan = RunPlan(source.lengths, source.group_sizes, seed=0, global_batch=1)
    prefetcher = Prefetcher(source, plan, _plan, seed=0, world=World(), workers=2)
    begun = 0.0
    for number, step in enumerate(prefetcher.steps(0, steps)):
        for _ in step.batches:
            time.sleep(step_seconds)  # the device's, which leaves the processor to the readers
        if number == 0:
            prefetcher.wait_seconds, begun = 0.0, time.perf_counter()
    share = prefetcher.wait_seconds / (time.perf_counter() - begun)
    source.close()
    return {"wait": share, "held": pool.peak / 1e6, "limit": pool.limit / 1e6}


def _plan(supervision: Supervision) -> LossPlan:
    return LossPlan(supervision.loss_mask.sum().float())


def measure_endless(url: str, one: FeatureRequest, kind: str, seconds: float) -> dict[str, Any]:
    """How the client ends a body that has no end, and the megabytes of memory that it took beyond the limit."""
    client = StreamClient(url, wanted())
    client.check()
    client._url = f"{url}/endless/{kind.replace(' ', '-')}"
    limits = Wanted(client.wanted.target, {}, LAYERS, timeout=seconds)
    client.wanted = limits
    before, begun = _peak(), time.perf_counter()
    try:
        client.fetch(one)
        said = "taken"  # the rows were complete; what follows is not read
    except ServerFault as fault:
        said = str(fault)
    return {"kind": kind, "said": said, "seconds": time.perf_counter() - begun, "grown": _peak() - before}


def _peak() -> float:
    """Megabytes resident at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure, print, write the bars."""
    bars = "1.5 GB/s raw equivalent a CPU second, lossless; the trainer waits under 5 %; memory stays bounded"
    parser = Benchmark(__doc__, bars=bars, takes="a minute")
    parser.add_argument("--seconds", type=float, default=8.0, help="of the client's measurement")
    given = parser.parse_args()
    torch.set_num_threads(1)
    tokens = np.arange(LENGTH, dtype=np.int32)
    one = FeatureRequest(0, tokens, np.arange(LENGTH) > 0)
    raw = LENGTH * wanted().token_bytes
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    reply = coded_reply(tokens, "lossless")
    process = multiprocessing.get_context("fork").Process(target=serve, args=(listener, reply), daemon=True)
    process.start()
    try:
        tell(f"a conversation: {LENGTH} tokens, {raw / 1e6:.1f} MB raw, {len(reply) / 1e6:.1f} MB coded")
        speed, parts = measure_client(url, one, given.seconds), measure_parts(url, reply, raw, "lossless")
        step = 4 * raw / 1e9 / speed["wall"]
        wait = measure_wait(url, tokens, 40, step)
        endless = [measure_endless(url, one, kind, 3.0) for kind in ("beats", "rows", "one message")]
    finally:
        process.kill()
    _report(speed, parts, wait, endless, given.json)


def _report(
    speed: dict[str, float], parts: dict[str, float], wait: dict[str, float], endless: list[dict[str, Any]], file: Any
) -> None:
    rows = [["a CPU second, the best conversation", f"{speed['cpu']:.2f}"]]
    rows += [["the median one", f"{speed['median']:.2f}"], ["a second, one connection", f"{speed['wall']:.2f}"]]
    rows += [[f"{name} alone, a CPU second", f"{value:.2f}"] for name, value in parts.items()]
    print(Table(["the client, lossless", "GB/s raw equivalent"], rows).text())
    print(f"what limits it: {min(parts, key=lambda name: parts[name])}")
    print(f"in flight while training: {wait['held']:.0f} MB at most, the limit {wait['limit']:.0f} MB\n")
    rows = [[one["kind"], f"{one['seconds']:.1f} s", f"{one['grown']:.1f} MB", one["said"]] for one in endless]
    print(Table(["a server that never stops", "ended after", "memory grown", "the client says"], rows).text())
    found = {"client, GB/s raw equivalent a CPU second": at_least(speed["cpu"], SPEED)}
    found["share of its time that the trainer waits"] = at_most(wait["wait"], WAIT)
    found["in flight over the limit"] = at_most(wait["held"] / wait["limit"], 1.0)
    found["MB grown by a server that never stops"] = at_most(max(one["grown"] for one in endless), GROWN)
    write_bars(file, found)


if __name__ == "__main__":
    run_main(main)
