"""The feature server by itself: what it refuses, how it batches, what it holds at most, what it tells."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_tools import LAYERS, make_target
from feature_server import RunningServer

from deepspec.arguments import parser_of
from deepspec.cli.features import serve_features
from deepspec.errors import DeepSpecError
from deepspec.http import request
from deepspec.identity import target_fields
from deepspec.streaming import server as servers
from deepspec.streaming.batcher import Batcher, Full, Limits, QueuedRequest
from deepspec.streaming.client import FeatureRequest, States, StreamClient, Wanted
from deepspec.targets import Target, load_target

GIVEN = tuple(LAYERS)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return load_target(make_target(tmp_path_factory.mktemp("server") / "target", torch.float32), torch.float32)


@pytest.fixture(scope="module")
def server(target: Target) -> Iterator[RunningServer]:
    running = RunningServer(target, max_length=64)
    yield running
    running.stop()


def ask(server: RunningServer, **changes: Any) -> tuple[int, str]:
    body = {"tokens": [5, 6, 7], "supervised": [[1, 3]], "layers": [0], "last_hidden": True, "level": "raw"}
    reply = request("POST", f"{server.url}/v1/features", 10, body | changes)
    return reply.status, reply.body.decode(errors="replace")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tokens": []}, "0 tokens; this server takes 1 to 64"),
        ({"tokens": [1] * 65}, "65 tokens; this server takes 1 to 64"),
        ({"tokens": [1] * 200_000}, "a request of more than"),
        ({"tokens": [1, -1]}, "outside the vocabulary of 1536"),
        ({"tokens": [1, 1536]}, "outside the vocabulary of 1536"),
        ({"tokens": [1, 2.5]}, "not a request"),
        ({"tokens": [1, True]}, "not a request"),
        ({"tokens": "abc"}, "not a request"),
        ({"supervised": [[2, 4]]}, "supervised tokens 2 to 4 of 3"),
        ({"supervised": [[2, 1]]}, "supervised tokens 2 to 1 of 3"),
        ({"supervised": [[2]]}, "not a request"),
        ({"layers": [9]}, "target layers do not exist"),
        ({"layers": [0, 0]}, "distinct"),
        ({"level": "x" * 99}, "this server has raw, lossless"),
        ({"last_hidden": 1}, "not a request"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_with_the_reason(
    server: RunningServer, changes: dict[str, Any], told: str
) -> None:
    status, text = ask(server, **changes)
    assert status == 400
    assert told in text
    assert ask(server)[0] == 200


def test_the_secret_is_asked_of_who_reads_the_target_and_not_of_who_looks_after_it(target: Target) -> None:
    server = RunningServer(target, secret="open sesame")
    for path in ("v1/target", "v1/features"):
        verb = "GET" if path == "v1/target" else "POST"
        for sent in ({}, {"Authorization": "Bearer no"}, {"Authorization": "open sesame at the end"}):
            assert request(verb, f"{server.url}/{path}", 5, {} if verb == "POST" else None, sent).status == 401
    given = {"Authorization": "Bearer open sesame"}
    assert request("GET", f"{server.url}/v1/target", 5, headers=given).status == 200
    assert request("GET", f"{server.url}/health", 5).body == b"ok\n"
    assert request("GET", f"{server.url}/metrics", 5).status == 200
    server.stop()


def test_metrics_count_what_was_done(target: Target) -> None:
    server = RunningServer(target)
    for _ in range(3):
        ask(server)
    text = request("GET", f"{server.url}/metrics", 5).body.decode()
    found = {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", text, re.MULTILINE)}
    assert found["deepspec_conversations_total"] == 3
    assert found["deepspec_tokens_total"] == 9
    assert found["deepspec_raw_bytes_total"] == 3 * (3 + 2) * 32 * 4  # features of 3 tokens, the last states of 2
    assert found["deepspec_queue_tokens"] == found["deepspec_unsent_bytes"] == 0
    assert found["deepspec_sent_bytes_total"] > 0
    assert len(re.findall(r"^# TYPE deepspec_\w+ (counter|gauge)$", text, re.MULTILINE)) == len(found)
    server.stop()


class Held:
    """A target whose forwards wait for the test."""

    def __init__(self, target: Target) -> None:
        self.target, self.batches = target, list[int]()
        self.go, self.entered = threading.Event(), threading.Event()
        self.device, self.spec, self.dtype = target.device, target.spec, target.dtype

    def forward(self, ids: torch.Tensor, *rest: Any, **options: Any) -> Any:
        self.entered.set()
        self.go.wait(20)
        self.batches.append(len(ids))
        return self.target.forward(ids, *rest, **options)


def work_of(length: int, layers: tuple[int, ...] = (0,)) -> QueuedRequest:
    return QueuedRequest([3] * length, [0] + [1] * (length - 1), layers, True)


def wait_until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_waits_is_batched_in_its_order_within_the_budget_of_padded_tokens(target: Target) -> None:
    held = Held(target)
    batcher = Batcher(held, Limits(batch_tokens=40))  # type: ignore[arg-type]
    works = [work_of(5), *map(work_of, (10, 8, 10, 10, 9, 50, 2)), work_of(4, (1,)), work_of(2)]
    for number, work in enumerate(works):
        batcher.submit(work)
        if number == 0:
            wait_until(lambda: batcher.queued == 0)  # the target works on the first alone
    held.go.set()
    results = [work.result.result(20) for work in works]
    assert held.batches == [1, 4, 1, 1, 2, 1]  # 5 | 10 8 10 10 | 9 | 50 | 2 .. 2 of the same layers | 4 of others
    assert batcher.unsent == sum(one.features.nbytes + one.last_hidden.nbytes for one in results)
    for work, result in zip(works, results, strict=True):  # the plain twin: each alone
        alone = target.forward(torch.tensor([work.tokens]), work.layers)
        np.testing.assert_allclose(result.features, alone.features[0].numpy(), rtol=0, atol=1e-5)
        np.testing.assert_allclose(result.last_hidden, alone.last_hidden[0, :-1].numpy(), rtol=0, atol=1e-5)
        batcher.give_up(work)
        batcher.give_up(work)  # once counts
    assert batcher.unsent == batcher.queued == 0
    batcher.close()


def test_the_queue_and_what_is_not_sent_are_bounded(target: Target) -> None:
    held = Held(target)
    batcher = Batcher(held, Limits(batch_tokens=10, queue_tokens=20, unsent_bytes=1))  # type: ignore[arg-type]
    first, second, third = (work_of(10) for _ in range(3))
    batcher.submit(first)
    wait_until(lambda: batcher.queued == 0)
    batcher.submit(second)
    batcher.submit(third)
    with pytest.raises(Full):
        batcher.submit(work_of(1))
    held.go.set()
    first.result.result(20)
    time.sleep(0.1)
    assert len(held.batches) == 1  # the first is not sent yet
    batcher.give_up(second)  # its reader left
    batcher.give_up(first)
    assert third.result.result(20) is not None
    batcher.give_up(third)
    assert len(held.batches) == 2
    assert batcher.counts.refused == 1
    assert batcher.unsent == batcher.queued == 0
    batcher.close()


def test_a_full_queue_is_told_with_a_time_to_come_again(target: Target) -> None:
    server = RunningServer(target, limits=Limits(queue_tokens=1, batch_tokens=1))
    held = Held(target)
    server.server.batcher.target = held  # type: ignore[assignment]
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(ask, server)
        wait_until(held.entered.is_set)
        second = pool.submit(ask, server)
        wait_until(lambda: server.server.batcher.queued == 3)
        assert ask(server) == (503, '{"error":"the queue is full"}')
        held.go.set()
        assert first.result()[0] == second.result()[0] == 200
    server.stop()


def test_hidden_states_that_are_not_finite_and_a_target_that_fails_are_told(
    server: RunningServer, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = target.forward(torch.tensor([[5, 6, 7]]), [0])
    made.features[0, 1, 3] = float("nan")
    monkeypatch.setattr(server.server.batcher, "target", Held(target))
    monkeypatch.setattr(server.server.batcher.target, "forward", lambda *_, **__: made)
    assert "not finite" in ask(server)[1]

    def no_memory(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(server.server.batcher.target, "forward", no_memory)
    assert "RuntimeError: CUDA out of memory" in ask(server)[1]
    assert server.server.batcher.alive


def test_signs_of_life_come_while_a_conversation_waits(
    server: RunningServer, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "BEAT", 0.05)
    monkeypatch.setattr("deepspec.streaming.client.STALL", 0.5)
    held = Held(target)
    monkeypatch.setattr(server.server.batcher, "target", held)
    client = StreamClient(server.url, Wanted(target, target_fields(target.spec), GIVEN, timeout=20.0))
    client.check()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(client.fetch, FeatureRequest(0, np.arange(4, 14), np.arange(10) > 3))
        time.sleep(1.0)  # twice what the reader bears without a byte
        held.go.set()
        assert isinstance(coming.result(), States)


def test_a_reader_that_stops_reading_is_left_and_its_memory_freed(
    target: Target, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(servers, "SLOW", 0.3)
    server = RunningServer(target, max_length=400)
    server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    asked = {"tokens": [3] * 400, "supervised": [], "layers": [-1, 0, 1, 2], "last_hidden": False, "level": "raw"}
    body, batcher = json.dumps(asked).encode(), server.server.batcher
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(b"POST /v1/features HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        wait_until(lambda: batcher.counts.conversations == 1 and batcher.unsent == 0)
    assert "a reader took more than 0.3 s for a message" in caplog.text
    assert ask(server)[0] == 200
    server.stop()


def test_levels_that_round_give_the_same_values_whoever_asks_first(target: Target) -> None:
    """Two servers that have served others before: their tables come of the conversation alone."""
    found = []
    for first in (9, 40):
        server = RunningServer(target)
        wanted = Wanted(target, target_fields(target.spec), GIVEN, level="near")
        client = StreamClient(server.url, wanted)
        client.check()
        client.fetch(FeatureRequest(1, np.full(first, 9), np.arange(first) > 3))
        found.append(client.fetch(FeatureRequest(0, np.arange(4, 34), np.arange(30) > 3)))
        server.stop()
    assert torch.equal(found[0].features, found[1].features)
    exact = target.forward(torch.arange(4, 34)[None], GIVEN).features[0]
    assert not torch.equal(found[0].features, exact)
    torch.testing.assert_close(found[0].features, exact, rtol=0.05, atol=0.05)


def test_another_address_than_the_loopback_wants_a_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DEEPSPEC_SERVER_TOKEN", raising=False)
    monkeypatch.setattr("sys.argv", ["deepspec serve-features", "--recipe", str(tmp_path), "--host", "0.0.0.0"])
    with pytest.raises(DeepSpecError, match=r"--host: other machines would need no secret; found '0\.0\.0\.0'"):
        serve_features()
    assert parser_of(serve_features, "deepspec serve-features").get_default("host") == "127.0.0.1"


def test_a_conversation_without_a_supervised_token_has_no_last_states(target: Target) -> None:
    batcher = Batcher(target, Limits())
    work = QueuedRequest([3, 4, 5], [0, 0, 0], (0,), True)
    batcher.submit(work)
    assert work.result.result(20).last_hidden.shape == (0, 32)
    batcher.close()
