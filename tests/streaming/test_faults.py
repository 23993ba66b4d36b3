"""Servers that die, hang, lie or never end: retried elsewhere, named, never trained on, in bounded memory."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_tools import LAYERS, make_target
from feature_server import RunningServer
from hidden_state_server import FakeServer
from raw_server import RawServer
from safetensors.torch import save_file

from deepspec.errors import SourceLost, TargetError
from deepspec.identity import target_fields
from deepspec.streaming import client as clients
from deepspec.streaming import pool as pools
from deepspec.streaming.client import FeatureRequest, Wanted
from deepspec.streaming.pool import ServerPool
from deepspec.streaming.wire import MessageKind, json_message, message, tokens_digest
from deepspec.targets import Target, load_target
from deepspec.targets.served import server_layers

GIVEN = tuple(LAYERS)
Send = Callable[[bytes], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("faults") / "target", torch.float32)


@pytest.fixture(scope="module")
def target(folder: Path) -> Target:
    return load_target(folder, torch.float32)


@pytest.fixture(scope="module")
def good(folder: Path) -> Iterator[RunningServer]:
    server = RunningServer(load_target(folder, torch.float32))
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "REST", 0.05)
    monkeypatch.setattr(pools, "LONGEST_REST", 0.1)
    monkeypatch.setattr(pools, "LOOK", 0.02)
    monkeypatch.setattr(clients, "STALL", 0.4)
    monkeypatch.setattr(clients, "HANDSHAKE", 1.0)


def wanted_of(target: Target, **changes: Any) -> Wanted:
    return Wanted(target, target_fields(target.spec), GIVEN, timeout=1.0, **changes)


def conversations(count: int) -> list[FeatureRequest]:
    random = np.random.default_rng(4)
    made = []
    for number in range(count):
        length = int(random.integers(5, 60))
        made.append(FeatureRequest(number, random.integers(0, 900, length), random.random(length) < 0.5))
    return made


def check(pool: ServerPool, target: Target, asked: list[FeatureRequest]) -> None:
    """What the pool gives is what the target computes."""
    pool.announce(asked)
    for one, states in zip(asked, pool.take(asked), strict=True):
        made = target.forward(torch.from_numpy(one.tokens)[None], GIVEN)
        torch.testing.assert_close(states.features, made.features[0], rtol=0, atol=1e-5)
        rows = torch.from_numpy(one.last_rows())
        assert states.last_hidden is not None
        torch.testing.assert_close(states.last_hidden[rows], made.last_hidden[0][rows], rtol=0, atol=1e-5)
        assert not states.last_hidden[~rows].any()


class Liar:
    """A server with the right handshake, whose replies are what ``act`` sends."""

    def __init__(self, good: RunningServer, act: Callable[[Send, dict[str, Any], dict[str, Any]], None]) -> None:
        self.good, self.act, self.asked = good, act, 0
        self.raw = RawServer(self.answer)
        self.url = f"http://{self.raw.address}"

    def answer(self, connection: socket.socket) -> None:
        head, _, body = self.raw.requests[-1].partition(b"\r\n\r\n")
        server = self.good.server
        said = {"deepspec": 1, "target": server.fields, "digest": server.digest, "dtype": server.dtype}
        if head.startswith(b"GET"):
            text = json.dumps(said).encode()
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text))
            return
        self.asked += 1
        self.act(connection.sendall, json.loads(body), said)


def begin(send: Send) -> None:
    send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")


def chunk(send: Send, data: bytes) -> None:
    send(b"%x\r\n%b\r\n" % (len(data), data))


def hello(said: dict[str, Any], asked: dict[str, Any], **changes: Any) -> bytes:
    facts = {"target": said["digest"], "dtype": said["dtype"], "tokens": tokens_digest(asked["tokens"])}
    bytes_codec = {"name": "bytes", "configuration": {}}
    return json_message(
        MessageKind.HELLO, facts | {"codecs": {"features": bytes_codec, "last_hidden": bytes_codec}} | changes
    )


def short(send: Send, asked: dict[str, Any], said: dict[str, Any]) -> None:
    begin(send)
    chunk(send, hello(said, asked))


def checksum(send: Send, asked: dict[str, Any], said: dict[str, Any]) -> None:
    begin(send)
    rows = bytearray(message(MessageKind.FEATURES, bytes(len(asked["tokens"]) * 32 * 4 * 2), 0, len(asked["tokens"])))
    rows[-1] ^= 1
    chunk(send, hello(said, asked) + bytes(rows))


def other_tokens(send: Send, asked: dict[str, Any], said: dict[str, Any]) -> None:
    begin(send)
    chunk(send, hello(said, asked, tokens=tokens_digest([1, 2])))


def other_model(send: Send, asked: dict[str, Any], said: dict[str, Any]) -> None:
    begin(send)
    chunk(send, hello(said, asked, target="0" * 64))


def hang(send: Send, asked: dict[str, Any], said: dict[str, Any]) -> None:
    begin(send)
    time.sleep(3)


def beats(send: Send, asked: dict[str, Any], said: dict[str, Any]) -> None:
    begin(send)
    while True:
        chunk(send, message(MessageKind.BEAT) * 500)
        time.sleep(0.01)  # the good server is a thread of this process too


def long_message(send: Send, asked: dict[str, Any], said: dict[str, Any]) -> None:
    begin(send)
    head = bytearray(message(MessageKind.FEATURES, b"", 0, 2))
    head[16:20] = (1 << 31).to_bytes(4, "little")
    chunk(send, hello(said, asked) + bytes(head))
    while True:
        chunk(send, bytes(1 << 20))


def endless_chunk(send: Send, asked: dict[str, Any], said: dict[str, Any]) -> None:
    begin(send)
    while True:
        send(b"1" * 70_000)


def redirect(send: Send, asked: dict[str, Any], said: dict[str, Any]) -> None:
    send(b"HTTP/1.1 307 Moved\r\nLocation: http://me:secret@127.0.0.1:9/x\r\nContent-Length: 0\r\n\r\n")


def broken(send: Send, asked: dict[str, Any], said: dict[str, Any]) -> None:
    send(b"HTTP/1.1 500 Oh\r\nContent-Length: 3\r\n\r\nbad")


def endless_head(send: Send, asked: dict[str, Any], said: dict[str, Any]) -> None:
    send(b"HTTP/1.1 200 OK\r\n")
    while True:
        send(b"X: 1\r\n")


FAULTS = [
    (short, "the reply ends"), (checksum, "does not match its checksum"),
    (other_tokens, "hidden states of other tokens"), (other_model, "another target than before"),
    (hang, "no reply in time"), (beats, "no reply in time"), (long_message, "a message of 2,147,483,648 bytes"),
    (endless_chunk, "LineTooLong"), (redirect, "307, a redirect to http://127.0.0.1:9/x"), (broken, "500 bad"),
    (endless_head, "got more than 100 headers"),
]  # fmt: skip


@pytest.mark.parametrize(("act", "told"), FAULTS)
def test_a_fault_is_named_and_its_conversation_computed_elsewhere(
    act: Any, told: str, good: RunningServer, target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    liar = Liar(good, act)
    pool = ServerPool([liar.url, good.url], wanted_of(target), limit=1 << 20, patience=5.0)
    with caplog.at_level(logging.WARNING):
        check(pool, target, conversations(6))
    pool.close()
    liar.raw.listener.close()
    assert liar.asked > 0
    assert f"server {liar.url}: " in caplog.text
    assert told in caplog.text
    assert "secret" not in caplog.text
    assert pool.peak <= pool.limit + sum(len(one.tokens) for one in conversations(6)) * pool.wanted.token_bytes


def test_a_file_outside_the_shared_folder_is_neither_read_nor_removed_nor_trained_on(
    good: RunningServer, target: Target, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "states").mkdir()
    fake = FakeServer(load_target(target.spec.path, torch.float32), tmp_path / "states",
                      server_layers(GIVEN, target.spec))  # fmt: skip
    asked = conversations(6)
    victims = [tmp_path / "outside.safetensors", tmp_path / "states" / "link.safetensors"]
    for one in asked:  # right in all but the place
        save_file({"hidden_states": torch.zeros(len(one.tokens), 3, 32), "token_ids": torch.from_numpy(one.tokens)},
                  victims[0])  # fmt: skip
    victims[1].symlink_to(victims[0])
    for victim in victims:
        Path(f"{victim}.lock").touch()
    wanted = wanted_of(target, storage=str(tmp_path / "states"))
    for victim in victims:
        fake.write = lambda prompt, victim=victim: {"hidden_states_path": str(victim)}  # type: ignore[method-assign]
        pool = ServerPool([fake.url, good.url], wanted, limit=1 << 20, patience=5.0)
        with caplog.at_level(logging.WARNING):
            check(pool, target, asked)
        pool.close()
    fake.server.shutdown()
    assert "outside its folder" in caplog.text
    assert "a link in its path" in caplog.text
    assert all(os.path.lexists(victim) for victim in victims)


def test_a_server_that_dies_and_comes_back_works_again(
    folder: Path, target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    first = RunningServer(load_target(folder, torch.float32))
    pool = ServerPool([first.url], wanted_of(target), limit=1 << 20, patience=20.0)
    check(pool, target, conversations(3))
    first.stop()
    asked = conversations(4)
    pool.announce(asked)
    time.sleep(0.3)
    second = RunningServer(load_target(folder, torch.float32), first.port)
    with caplog.at_level(logging.WARNING):
        assert len(list(pool.take(asked))) == 4
    pool.close()
    second.stop()
    assert "answers again" in caplog.text


def test_a_server_that_restarts_with_another_model_gets_no_more_work_and_is_named(
    folder: Path, good: RunningServer, target: Target, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = RunningServer(load_target(folder, torch.float32))
    pool = ServerPool([first.url, good.url], wanted_of(target), limit=1 << 20, patience=5.0)
    check(pool, target, conversations(3))
    first.stop()
    other = load_target(make_target(tmp_path / "other", torch.float32, seed=6), torch.float32)
    second = RunningServer(other, first.port)
    with caplog.at_level(logging.WARNING):
        check(pool, target, conversations(12))
        end = time.monotonic() + 10
        while "it serves another target: target.weights: server" not in caplog.text:
            assert time.monotonic() < end
            time.sleep(0.05)
        check(pool, target, conversations(12))
    assert second.server.batcher.counts.conversations <= clients.StreamClient.concurrency  # those of one moment
    pool.close()
    with pytest.raises(TargetError, match=rf"{second.url}: data\.servers: it serves another target: target\.weights"):
        ServerPool([good.url, second.url], wanted_of(target), limit=1, patience=1.0)
    second.stop()


def test_without_a_server_every_reader_is_told_why(good: RunningServer, target: Target) -> None:
    liar = Liar(good, broken)
    pool = ServerPool([liar.url], wanted_of(target), limit=1 << 20, patience=0.3)
    liar.raw.listener.close()
    asked = conversations(4)
    pool.announce(asked)
    for _ in range(2):  # the second time at once
        with pytest.raises(SourceLost, match=rf"no server is left \({liar.url}: connection refused\)"):
            list(pool.take(asked))
    pool.close()
    with pytest.raises(TargetError, match=r"data\.servers: no server answers.*connection refused.*serve-features"):
        ServerPool([liar.url], wanted_of(target), limit=1 << 20, patience=0.3)


def test_a_conversation_at_which_every_server_fails_is_named(good: RunningServer, target: Target) -> None:
    liar = Liar(good, broken)
    pool = ServerPool([liar.url], wanted_of(target), limit=1 << 20, patience=30.0)
    with pytest.raises(SourceLost, match=rf"{pools.ATTEMPTS} attempts failed at sample 0, the last with: 500 bad"):
        list(pool.take(conversations(1)))
    pool.close()
    liar.raw.listener.close()
    assert liar.asked == pools.ATTEMPTS


def test_a_request_that_every_server_refuses_is_asked_once_of_each(good: RunningServer, target: Target) -> None:
    def refuses(send: Send, _asked: dict[str, Any], _said: dict[str, Any]) -> None:
        send(b"HTTP/1.1 400 No\r\nContent-Length: 8\r\n\r\ntoo long")

    liars = [Liar(good, refuses), Liar(good, refuses)]
    pool = ServerPool([liar.url for liar in liars], wanted_of(target), limit=1 << 20, patience=30.0)
    with pytest.raises(SourceLost, match="2 attempts failed at sample 0, the last with: 400 too long"):
        list(pool.take(conversations(1)))
    pool.close()
    for liar in liars:
        liar.raw.listener.close()
    assert [liar.asked for liar in liars] == [1, 1]


def test_a_server_for_shorter_conversations_is_refused_at_the_start(good: RunningServer, target: Target) -> None:
    with pytest.raises(TargetError, match=r"takes conversations of 256 tokens, the longest of the data has 257"):
        ServerPool([good.url], wanted_of(target, longest=257), limit=1 << 20, patience=0.3)


@pytest.mark.parametrize("limit", [1, 20_000])
def test_what_is_in_flight_stays_within_the_limit_and_all_comes_in_order(
    good: RunningServer, target: Target, limit: int
) -> None:
    pool = ServerPool([good.url], wanted_of(target), limit=limit, patience=5.0)
    asked = conversations(20)
    pool.announce(asked)
    for one in asked:
        (states,) = pool.take([one])
        assert len(states.features) == len(one.tokens)
    largest = max(len(one.tokens) for one in asked) * pool.wanted.token_bytes
    assert pool.peak <= max(limit, largest) + largest  # one more where a reader waits for it
    assert pool.held == 0
    pool.close()


def test_a_run_that_needs_a_secret_and_has_none_is_told(
    folder: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = RunningServer(load_target(folder, torch.float32), secret="open sesame")
    for given, told in (("", "missing"), ("wrong", "wrong")):
        monkeypatch.setenv(clients.TOKEN, given)
        with pytest.raises(TargetError, match=rf"the shared secret is {told}"):
            ServerPool([server.url], wanted_of(target), limit=1, patience=1.0)
    monkeypatch.setenv(clients.TOKEN, "open sesame")
    pool = ServerPool([server.url], wanted_of(target), limit=1, patience=1.0)
    check(pool, target, conversations(2))
    pool.close()
    server.stop()
