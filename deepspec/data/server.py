"""Answers by OpenAI-compatible servers (vLLM, SGLang, ``transformers serve``): many conversations in flight, several
servers, back-off where one fails. A request that failed is sent again with the same seed, on the server least busy.
"""

from __future__ import annotations

import json
import logging
import queue
import random
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deepspec.data.chat import Renderer
from deepspec.data.dialogue import Dialogue, Outcome, read_answer
from deepspec.data.local import draw_seed
from deepspec.data.messages import THINK, Message, Unusable, opens_reasoning
from deepspec.errors import DataError, DeepSpecError, shown
from deepspec.http import NoReply, Reply, check_url, request, without_password
from deepspec.recipe import RegenerateSection
from deepspec.targets.date import server_keywords

FIRST_REST, LONGEST_REST = 0.25, 15.0  # seconds that a server rests after a failure; doubled with each in a row
LONGEST_ASKED = 120.0  # seconds that it rests at most when it asks for more (Retry-After)
BUSY_SHARE = 1 / 20  # of an attempt: what a busy or absent server costs a request
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerOptions:
    """Which servers, how many requests at a time, and how long to wait."""

    urls: tuple[str, ...]  # http://host:port or http://host:port/v1
    model: str  # its name in requests
    concurrency: int = 64  # requests in flight on each server
    timeout: float = 900.0  # seconds a server may take for one answer
    attempts: int = 6  # of one request, before its conversation counts as failed
    patience: float = 300.0  # seconds without any server before the job stops
    api_key: str | None = None


class Server:
    """One server: its address and its state. Changed under its pool's lock only."""

    def __init__(self, url: str) -> None:
        url = url.rstrip("/")
        self.url = url if url.endswith("/v1") else f"{url}/v1"
        check_url(self.url, "--server", DataError)
        self.name = without_password(self.url)  # in messages
        self.in_flight, self.failures, self.answered = 0, 0, 0
        self.rests_until = 0.0
        self.refusal: DataError | None = None  # why it takes none of our requests
        self.plain_fields = False  # refuses fields beyond OpenAI's (see ServerEngine)


class Pool:
    """Servers that come and go: gives the least busy one that is not resting."""

    def __init__(self, servers: list[Server], concurrency: int, patience: float) -> None:
        if not servers:
            raise DataError("no server given", wanted="at least one --server URL")
        self.servers, self.concurrency, self.patience = servers, concurrency, patience
        self._changed = threading.Condition()
        self._last_good = time.monotonic()
        self._closed = False

    def acquire(self) -> Server:
        """A server with room, waiting for one.

        Raises:
            DataError: none has answered for ``patience`` seconds, or the pool is closed.
        """
        with self._changed:
            while True:
                now = time.monotonic()
                if self._closed:
                    raise DataError("the job has ended")
                if all(server.failures for server in self.servers) and now - self._last_good > self.patience:
                    raise DataError(
                        f"no server has answered for {self.patience:.0f} s",
                        file=", ".join(server.name for server in self.servers),
                        remedy="start the servers, then run the same command again: what is answered is kept",
                    )
                ready = [server for server in self.servers if self._has_room(server, now)]
                if ready:
                    server = min(ready, key=lambda one: (one.in_flight, one.answered))
                    server.in_flight += 1
                    return server
                self._changed.wait(0.05 + 0.05 * random.random())

    def _has_room(self, server: Server, now: float) -> bool:
        """A server that failed is tried with one request before it gets its share again."""
        room = 1 if server.failures else self.concurrency
        return server.rests_until <= now and server.in_flight < room

    def refuse(self, server: Server, refusal: DataError) -> None:
        """A server takes none of our requests: the others get them.

        Raises:
            DataError: ``refusal``, where all servers refuse.
        """
        with self._changed:
            server.refusal = refusal
            if all(one.refusal for one in self.servers):
                raise refusal

    def release(self, server: Server, problem: str | None = None, rest: float | None = None) -> None:
        """Give a server back; with a problem it rests, longer each time (or for ``rest`` seconds)."""
        with self._changed:
            server.in_flight -= 1
            if problem is None:
                server.failures, server.rests_until, server.refusal = 0, 0.0, None
                server.answered += 1
                self._last_good = time.monotonic()
            elif rest != 0:
                server.failures += 1
                pause = min(FIRST_REST * 2 ** min(server.failures - 1, 10), LONGEST_REST) if rest is None else rest
                now = time.monotonic()
                if server.rests_until <= now:  # the first of many that fail together
                    server.rests_until = now + pause * (0.75 + 0.5 * random.random())
                    log.warning("%s; it rests for %.1f s", problem, pause)
            self._changed.notify()

    def close(self) -> None:
        """Wake all waiting threads; their wait ends in an error."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class _Retry(Exception):
    """A request to be sent again. ``counted``: it used up one of its attempts; ``rest``: seconds for the server."""

    def __init__(self, reason: str, counted: bool = True, rest: float | None = None) -> None:
        super().__init__(reason)
        self.counted, self.rest = counted, rest


class _RefusesUs(_Retry):
    """A request for another server: this one refuses the job, as ``problem`` says."""

    def __init__(self, problem: DataError) -> None:
        super().__init__(str(problem), counted=False, rest=LONGEST_REST)
        self.problem = problem


class _Refused(Exception):
    """A request without an answer; its conversation fails. ``again``: another start may succeed."""

    def __init__(self, reason: str, again: bool = False) -> None:
        super().__init__(reason)
        self.again = again


class ServerEngine:
    """See :class:`deepspec.data.dialogue.AnswerEngine`: a thread a conversation, its turns one after the other.

    Args:
        options: the servers.
        renderer: of the target's tokenizer; its prompts are compared with the token ids that the servers report.
        sampling: temperature, top_p, top_k, min_p, max_tokens.
        seed: every request gets its own seed from it, its sample and its turn.
    """

    def __init__(self, options: ServerOptions, renderer: Renderer, sampling: RegenerateSection, seed: int) -> None:
        self.options, self.renderer, self.sampling, self.seed = options, renderer, sampling, seed
        self._date = server_keywords(renderer.tokenizer.chat_template)
        if renderer.date is not None and not self._date:
            log.warning(
                "the chat template writes the date: we write %s, the servers write today's; serve the target with a "
                "template of a fixed date, or use --engine local", renderer.date,
            )  # fmt: skip
        self.pool = Pool([Server(url) for url in options.urls], options.concurrency, options.patience)

    def run(self, dialogues: Iterable[Dialogue]) -> Iterator[Outcome]:
        """Every dialogue's outcome, as they come.

        Raises:
            DataError: no server for too long, a server without the model, or one that renders prompts otherwise.
        """
        todo: queue.SimpleQueue[Dialogue | None] = queue.SimpleQueue()
        done: queue.SimpleQueue[Outcome | DeepSpecError] = queue.SimpleQueue()
        threads = self.options.concurrency * len(self.options.urls)
        for _ in range(threads):
            threading.Thread(target=self._work, args=(todo, done), daemon=True).start()
        source, waiting = iter(dialogues), 0
        try:
            while True:
                while waiting < threads + 8:  # a few beyond the threads, so that none waits for this one
                    dialogue = next(source, None)
                    if dialogue is None:
                        break
                    todo.put(dialogue)
                    waiting += 1
                if waiting == 0:
                    return
                outcome = done.get()
                waiting -= 1
                if isinstance(outcome, DeepSpecError):
                    raise outcome
                yield outcome
        finally:
            self.pool.close()
            for _ in range(threads):
                todo.put(None)

    def _work(self, todo: queue.SimpleQueue[Dialogue | None], done: queue.SimpleQueue[Outcome | DeepSpecError]) -> None:
        while (dialogue := todo.get()) is not None:
            try:
                while dialogue.open:
                    self._answer_turn(dialogue)
                done.put(Outcome(dialogue))
            except _Refused as problem:
                done.put(Outcome(dialogue, str(problem), problem.again))
            except DeepSpecError as problem:
                done.put(problem)
            except Exception as problem:  # a defect of ours must stop the job, not hang it
                done.put(DeepSpecError(f"regeneration failed ({problem!r})", key=dialogue.id))

    def _answer_turn(self, dialogue: Dialogue) -> None:
        """Send until there is an answer.

        Raises:
            _Refused: there will be none.
            DataError: the job cannot go on.
        """
        try:
            text = self.renderer.prompt_text(dialogue.messages, dialogue.tools)
            prompt_length, opened = len(self.renderer.prompt_ids(text)), opens_reasoning(text) == THINK
        except DataError as problem:
            raise _Refused(str(problem)) from None
        attempts = 0.0
        while True:
            server = self.pool.acquire()
            try:
                reply = self._ask(server, dialogue)
                message, reason, tokens = self._read_reply(server, dialogue, reply, prompt_length, opened)
            except _Retry as problem:
                attempts += 1 if problem.counted else BUSY_SHARE
                self.pool.release(server, str(problem), problem.rest)
                if isinstance(problem, _RefusesUs):
                    self.pool.refuse(server, problem.problem)
                if attempts >= self.options.attempts:
                    raise _Refused(f"{attempts:.0f} attempts failed; the last: {problem}", again=True) from None
            except BaseException:
                self.pool.release(server)
                raise
            else:
                self.pool.release(server)
                dialogue.answer(message, reason, tokens)
                return

    def _body(self, server: Server, dialogue: Dialogue) -> dict[str, Any]:
        sampling, limit = self.sampling, self.sampling.max_tokens
        body: dict[str, Any] = {
            "model": self.options.model,
            "messages": [_sent(message) for message in self.renderer.with_system(dialogue.messages)],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": limit,
            "seed": draw_seed(self.seed, dialogue.key) % 2**31,
            "chat_template_kwargs": self.renderer.template_kwargs | self._date,
        }
        if dialogue.tools:
            body["tools"] = dialogue.tools
        if not server.plain_fields:
            return body | {"top_k": sampling.top_k or -1, "min_p": sampling.min_p}
        # `transformers serve` takes the rest in one field only
        rest = {"do_sample": sampling.temperature > 0, "top_k": sampling.top_k, "min_p": sampling.min_p or None}
        return body | {"generation_config": json.dumps(rest | {"max_new_tokens": limit})}

    def _ask(self, server: Server, dialogue: Dialogue) -> Mapping[str, Any]:
        """One request.

        Raises:
            _Retry, _Refused, DataError: see :meth:`_answer_turn`.
        """
        body, key = self._body(server, dialogue), self.options.api_key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            reply = request("POST", f"{server.url}/chat/completions", self.options.timeout, body, headers)
        except NoReply as problem:
            raise _Retry(str(problem), counted=not problem.refused) from None
        if reply.status == 422 and b"Unexpected fields" in reply.body and "top_k" in body:
            server.plain_fields = True
            raise _Retry(f"{server.name} takes only OpenAI's fields", counted=False, rest=0.0)
        _check_status(server, reply)
        try:
            return reply.json()
        except ValueError as problem:
            raise _Retry(f"{server.name}: {problem}") from None

    def _read_reply(
        self, server: Server, dialogue: Dialogue, reply: Mapping[str, Any], prompt_length: int, opened: bool
    ) -> tuple[Message, str, int]:
        """(message, finish reason, completion tokens) of a completion.

        Raises:
            _Retry: it is not complete.
            _Refused: the target answered nothing that can be trained on.
            DataError: the server's prompt is not ours.
        """
        try:
            choice, usage = reply["choices"][0], reply.get("usage") or {}
            given, reason = choice["message"], choice["finish_reason"]
            content, thought = given.get("content") or "", given.get("reasoning_content") or given.get("reasoning")
            calls = [{"type": "function", "function": one["function"]} for one in given.get("tool_calls") or []]
            tokens, prompt_tokens = usage.get("completion_tokens") or 0, usage.get("prompt_tokens")
            texts = isinstance(content, str) and isinstance(thought, str | None)
            if not texts or type(tokens) is not int or type(prompt_tokens) not in (int, type(None)):
                raise TypeError
        except (KeyError, IndexError, TypeError, AttributeError):
            raise _Retry(f"{server.name}: not a completion: {shown(reply)}") from None
        if reason not in ("stop", "length", "tool_calls"):
            raise _Retry(f"{server.name}: finish_reason {shown(reason)}")
        if prompt_tokens not in (None, prompt_length) and not dialogue.tools:  # tools: servers normalise the schemas
            raise DataError(
                "the server renders the prompt otherwise than we do",
                file=server.name,
                key=dialogue.id,
                found=f"{prompt_tokens} prompt tokens",
                wanted=f"{prompt_length}",
                remedy="serve the recipe's target with its own chat template, and set data.thinking as it is served",
            )
        try:
            return *read_answer(content, thought, calls, reason, opened), tokens
        except Unusable as problem:
            raise _Refused(str(problem)) from None


def _check_status(server: Server, reply: Reply) -> None:
    """Raise what a status other than 200 means: see :meth:`ServerEngine._answer_turn`."""
    status = reply.status
    if status in (429, 503):
        after = re.fullmatch(r" *([0-9]{1,9})(\.[0-9]*)? *", reply.headers.get("Retry-After") or "")
        rest = min(float(after[1]), LONGEST_ASKED) if after else 0  # a date, a negative number: our own back-off
        raise _Retry(f"{server.name}: busy ({status})", counted=False, rest=rest or None)
    if status in (401, 403, 404) or 300 <= status < 400:
        remedy = "check the URL, --model and the API key"
        raise _RefusesUs(DataError("the server refuses us", file=server.name, found=reply.summary, remedy=remedy))
    if 400 <= status < 500 and status not in (408, 409, 425):
        raise _Refused(f"{server.name}: {reply.summary}")
    if status != 200:
        raise _Retry(f"{server.name}: {reply.summary}")


def _sent(message: Message) -> Message:
    """A message in OpenAI's form: arguments as JSON text, which servers check and parse before their template."""
    calls = []
    for call in message.get("tool_calls", []):
        arguments = call["function"].get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": text}})
    return message | ({"tool_calls": calls} if calls else {})
