"""A server of hidden states: the target in this process, its states over HTTP to trainings on other machines.

    GET  /v1/target    the handshake: which target, to the last byte of its weights, and in which dtype
    POST /v1/features  {"tokens", "supervised", "layers", "last_hidden", "level"} -> messages of ``wire``;
                       with "lengths" the tokens are several conversations, which are one batch of the target
    POST /v1/answers   {"tokens", "lengths", "keys", "sampling", "seed", ...}: prompts -> the target's answers, and the
                       hidden states that it computed while it sampled them
    GET  /health       200 while the target runs
    GET  /metrics      counters as Prometheus reads them

An ASGI application; ``serve`` runs it under uvicorn. The first three want the shared secret, where one is set.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from deepspec.cache.levels import LEVELS
from deepspec.cache.shard import CALIBRATION_ROWS
from deepspec.errors import DeepSpecError
from deepspec.files import sha256_json
from deepspec.identity import target_fields
from deepspec.recipe import RegenerateSection
from deepspec.sections import parse_section
from deepspec.streaming.batcher import Batcher, Full, Limits, QueuedRequest
from deepspec.streaming.sampling import Answering
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
from deepspec.targets import Target
from deepspec.targets.positions import positions_of

log = logging.getLogger(__name__)
BEAT = 5.0  # seconds between signs of life while a conversation waits or is computed
SLOW = 60.0  # seconds that a reader may take for one message
MOST_TABLES = 64  # kept
TOKEN_CHARACTERS = 24  # that a request may have a token
MOST_POSITIONS = 1 << 20  # of a prompt and its answer, for targets that state no limit
AsgiResponse = Callable[..., Any]  # an ASGI response


class BadRequest(Exception):
    """A request that cannot be answered; the text says why."""


class FeatureServer:
    """The target, its queue, and what the routes answer.

    Args:
        target: the model.
        limits: of batch and queues.
        max_length: tokens of a conversation.
        secret: that a reader must show; empty: none.
        encoders: threads that encode.
    """

    def __init__(self, target: Target, limits: Limits, *, max_length: int, secret: str = "", encoders: int = 2) -> None:
        self.target, self.max_length, self.secret = target, max_length, secret
        self.fields = target_fields(target.spec)
        self.digest = sha256_json(self.fields)
        self.dtype = str(target.dtype).removeprefix("torch.")
        self.batcher = Batcher(target, limits)
        self.encoders = ThreadPoolExecutor(encoders, "encoder")
        self._exact: dict[tuple[Any, ...], Any] = {}  # codecs whose tables change no value: made once

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/v1/target", self.handshake),
            Route("/v1/features", self.features, methods=["POST"]),
            Route("/v1/answers", self.answers, methods=["POST"]),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
        ]

        @asynccontextmanager
        async def lifespan(_app: Starlette) -> AsyncIterator[None]:
            yield
            self.close()

        return Starlette(routes=routes, lifespan=lifespan)

    def close(self) -> None:
        """End the target's thread and the encoders."""
        self.batcher.close()
        self.encoders.shutdown(cancel_futures=True)

    # -- routes ----------------------------------------------------------------------------------------------------

    async def handshake(self, request: Request) -> Response:
        """Which target this is."""
        if not self._admits(request):
            return _refusal(401, f"deepspec: the shared secret is {'wrong' if _secret(request) else 'missing'}")
        hello = {"deepspec": PROTOCOL, "target": self.fields, "digest": self.digest, "dtype": self.dtype}
        limits = {"max_length": self.max_length, "batch_tokens": self.batcher.limits.batch_tokens}
        return JSONResponse(hello | limits | {"levels": list(LEVELS), "answers": self.batcher.limits.answers})

    async def health(self, _request: Request) -> Response:
        """Whether conversations are computed."""
        alive = self.batcher.alive
        return PlainTextResponse("ok\n" if alive else "the target has stopped\n", 200 if alive else 503)

    async def metrics(self, _request: Request) -> Response:
        """Counters, and the two queues."""
        lines = []
        for name, value in asdict(self.batcher.counts).items():
            lines += [f"# TYPE deepspec_{name}_total counter", f"deepspec_{name}_total {value}"]
        for name, value in {"queue_tokens": self.batcher.queued, "unsent_bytes": self.batcher.unsent}.items():
            lines += [f"# TYPE deepspec_{name} gauge", f"deepspec_{name} {value}"]
        return PlainTextResponse("\n".join([*lines, ""]), media_type="text/plain; version=0.0.4")

    async def features(self, request: Request) -> AsgiResponse:
        """One conversation's hidden states."""
        return await self._take(request, lambda body: self._work(read_request(body)))

    async def answers(self, request: Request) -> AsgiResponse:
        """Answers to prompts, with the hidden states of both."""
        return await self._take(request, lambda body: self._answer_work(read_answering(body)))

    # -- a reply ---------------------------------------------------------------------------------------------------

    async def _take(self, request: Request, read: Callable[[bytes], tuple[QueuedRequest, str]]) -> AsgiResponse:
        if not self._admits(request):
            return _refusal(401, "the shared secret is missing or wrong")
        try:
            work, level = read(await self._body(request))
            self.batcher.submit(work)
        except BadRequest as problem:
            return _refusal(400, str(problem))
        except Full:
            return _refusal(503, "the queue is full", {"Retry-After": "1"})
        return partial(self._reply, work, level)

    async def _body(self, request: Request) -> bytes:
        body, most = bytearray(), TOKEN_CHARACTERS * max(self.max_length, self.batcher.limits.batch_tokens) + (1 << 16)
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise BadRequest(f"a request of more than {most:,} bytes")
        return bytes(body)

    def _work(self, asked: Mapping[str, Any]) -> tuple[QueuedRequest, str]:
        """The conversation that a request asks about, checked, and the level that it wants it at.

        Raises:
            BadRequest: it cannot be computed.
        """
        tokens = asked["tokens"]
        self._check_lengths(asked["lengths"] or [len(tokens)], len(tokens), self.max_length)
        self._check(asked)
        mask = [0] * len(tokens)
        for start, stop in asked["supervised"]:
            if not 0 <= start < stop <= len(tokens):
                raise BadRequest(f"supervised tokens {start} to {stop} of {len(tokens)}")
            mask[start:stop] = [1] * (stop - start)
        lengths = asked["lengths"] and tuple(asked["lengths"])
        return QueuedRequest(tokens, mask, tuple(asked["layers"]), asked["last_hidden"], lengths), asked["level"]

    def _answer_work(self, asked: Mapping[str, Any]) -> tuple[QueuedRequest, str]:
        """The prompts that a request wants answered, checked, and the level of their hidden states.

        Raises:
            BadRequest: they cannot be answered.
        """
        tokens, answering, limits = asked["tokens"], asked["answering"], self.batcher.limits
        room = (positions_of(self.target.spec.config) or MOST_POSITIONS) - answering.sampling.max_tokens
        self._check_lengths(asked["lengths"], len(tokens), room)
        self._check({**asked, "tokens": [*tokens, *answering.stop, *answering.tail]})
        if len(asked["lengths"]) > limits.answers:
            raise BadRequest(f"{len(asked['lengths'])} prompts; this server answers {limits.answers} at a time")
        if not 1 <= answering.most <= self.max_length:
            raise BadRequest(f"states of {answering.most} tokens; this server sends those of 1 to {self.max_length}")
        lengths, mask = tuple(asked["lengths"]), [0] * len(tokens)
        layers, last_hidden = tuple(asked["layers"]), asked["last_hidden"]
        return QueuedRequest(tokens, mask, layers, last_hidden, lengths, answering), asked["level"]

    def _check(self, asked: Mapping[str, Any]) -> None:
        level = asked["level"]
        if not all(0 <= token < self.target.spec.vocab_size for token in asked["tokens"]):
            raise BadRequest(f"tokens outside the vocabulary of {self.target.spec.vocab_size}")
        if level not in LEVELS:
            raise BadRequest(f"level {level!r:.40}; this server has {', '.join(LEVELS)}")
        try:
            self.target.spec.check_layers(asked["layers"])
        except DeepSpecError as problem:
            raise BadRequest(str(problem)) from None

    def _check_lengths(self, lengths: list[int], tokens: int, longest: int) -> None:
        wrong = next((length for length in lengths if not 1 <= length <= longest), None)
        if wrong is not None:
            raise BadRequest(f"{wrong} tokens; this server takes 1 to {longest}")
        padded, most = max(lengths) * len(lengths), self.batcher.limits.batch_tokens
        if len(lengths) > 1 and padded > most:
            raise BadRequest(f"a batch of {padded} tokens with padding; this server takes {most} (--batch-tokens)")
        if sum(lengths) != tokens:
            raise BadRequest(f"lengths of {sum(lengths)} tokens in all, and {tokens} tokens")

    async def _reply(self, work: QueuedRequest, level: str, _scope: Any, _receive: Any, send: Any) -> None:
        """Send a conversation's messages as they come to be; a reader that is gone or too slow ends it."""
        head = [(b"content-type", b"application/octet-stream"), (b"cache-control", b"no-store")]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": head})
            async for part in self._messages(work, level):
                async with asyncio.timeout(SLOW):
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                self.batcher.counts.sent_bytes += len(part)
            await send({"type": "http.response.body", "body": b""})
        except TimeoutError:
            log.warning("a reader took more than %g s for a message, and is left", SLOW)
        except OSError:
            log.debug("a reader of %d tokens left", len(work.tokens))
        finally:
            self.batcher.give_up(work)

    async def _messages(self, work: QueuedRequest, level: str) -> AsyncIterator[bytes]:
        result = asyncio.wrap_future(work.result)
        while not result.done():
            yield message(MessageKind.BEAT)
            await asyncio.wait([result], timeout=BEAT)
        if (problem := result.exception()) is not None:
            log.warning("a conversation of %d tokens failed: %s", len(work.tokens), problem)
            yield json_message(MessageKind.FAILED, {"error": f"{type(problem).__name__}: {str(problem)[:200]}"})
            return
        arrays, run = result.result(), partial(asyncio.get_running_loop().run_in_executor, self.encoders)
        codecs = await run(self._codecs, arrays, level, work.layers)
        tables = {kind.name.lower(): codec_entry(codec) for kind, codec in codecs.items()}
        facts: dict[str, Any] = {"target": self.digest, "dtype": self.dtype, "tokens": tokens_digest(work.tokens)}
        if work.answers is not None:
            facts["answers"] = [(one.token_ids, one.finish_reason) for one in work.answers]
        yield json_message(MessageKind.HELLO, facts | {"codecs": tables})
        coming: asyncio.Future[bytes] | None = None
        for make in data_messages(arrays, codecs):  # the next one is encoded while this one is sent
            before, coming = coming, run(make)
            if before is not None:
                yield await before
        if coming is not None:
            yield await coming
        yield message(MessageKind.END)

    def _codecs(self, arrays: Arrays, level: str, layers: tuple[int, ...]) -> dict[MessageKind, Any]:
        """The codec of each array. Tables of a level that rounds come of the conversation alone, so that every server
        sends the same values."""
        codecs, chosen = {}, LEVELS[level]
        calibrations = {MessageKind.FEATURES: chosen.features, MessageKind.LAST_HIDDEN: chosen.last_hidden}
        for kind, calibrate in calibrations.items():
            array = arrays.of(kind)
            if array is None or not len(array):
                continue
            key = (kind, level, layers)
            codec = self._exact.get(key) or calibrate(array[:CALIBRATION_ROWS])
            if chosen.exact and len(self._exact) < MOST_TABLES:
                self._exact[key] = codec
            codecs[kind] = codec
        return codecs

    def _admits(self, request: Request) -> bool:
        return not self.secret or hmac.compare_digest(_secret(request).encode(), self.secret.encode())


def _secret(request: Request) -> str:
    return request.headers.get("Authorization", "").removeprefix("Bearer ")


def _refusal(status: int, problem: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"error": problem}, status, headers)


def read_request(body: bytes) -> dict[str, Any]:
    """The fields of a request, each of its type.

    Raises:
        BadRequest: it is none.
    """
    try:
        given = json.loads(body)
        tokens, layers = given["tokens"], given["layers"]
        supervised, last, level = given["supervised"], given["last_hidden"], given["level"]
        lengths = given.get("lengths")
        pairs = [(start, stop) for start, stop in supervised]
        numbers = [*tokens, *layers, *(lengths or ()), *(number for pair in pairs for number in pair)]
        if not {type(number) for number in numbers} <= {int} or not isinstance(last, bool) or type(level) is not str:
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadRequest("not a request for hidden states") from None
    found = {"tokens": tokens, "layers": layers, "supervised": pairs, "last_hidden": last, "level": level}
    return found | {"lengths": lengths}


def read_answering(body: bytes) -> dict[str, Any]:
    """The fields of a request for answers, each of its type; how they are sampled as "answering".

    Raises:
        BadRequest: it is none.
    """
    try:
        given = json.loads(body)
        tokens, lengths, layers, keys = (given[name] for name in ("tokens", "lengths", "layers", "keys"))
        seed, stop, tail, most = (given[name] for name in ("seed", "stop", "tail", "most"))
        last, level = given["last_hidden"], given["level"]
        numbers = [*tokens, *lengths, *layers, *stop, *tail, seed, most]
        texts = {type(text) for text in [*keys, level]}
        if not {type(number) for number in numbers} <= {int} or not isinstance(last, bool) or texts != {str}:
            raise TypeError
        if not lengths or len(set(keys)) != len(lengths):
            raise ValueError
        sampling = parse_section(RegenerateSection, given["sampling"], "sampling")
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadRequest("not a request for answers") from None
    except DeepSpecError as problem:
        raise BadRequest(str(problem)) from None
    found = {"tokens": tokens, "lengths": lengths, "layers": layers, "last_hidden": last, "level": level}
    return found | {"answering": Answering(sampling, seed, tuple(stop), tuple(tail), most, tuple(keys))}


def serve(server: FeatureServer, host: str, port: int) -> None:
    """Answer until SIGINT or SIGTERM; requests under way are finished.

    Raises:
        OSError: the address is taken, or not this machine's.
    """
    import socket

    import uvicorn

    with socket.create_server((host, port), backlog=256) as listener:
        address = listener.getsockname()
        log.info("serves hidden states of %s at http://%s:%d", server.target.spec.path, host, address[1])
        config = uvicorn.Config(server.app(), log_level="warning", access_log=False, timeout_graceful_shutdown=30)
        uvicorn.Server(config).run(sockets=[listener])
