"""Answers by OpenAI-compatible servers (vLLM, SGLang, ``transformers serve``): many conversations in flight, several
servers, back-off where one fails. A request that failed is asked again with the same seed, on the server least busy.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deepspec.data.answer import read_answer
from deepspec.data.chat import Renderer
from deepspec.data.dialogue import Dialogue
from deepspec.data.local import Sampling, draw_seed
from deepspec.data.messages import THINK, Message, Unusable, opens_reasoning
from deepspec.data.outcome import Outcome
from deepspec.data.pool import Pool, Server
from deepspec.errors import DataError, DeepSpecError
from deepspec.http import NoReply, request
from deepspec.targets.date import server_keywords


@dataclass(frozen=True)
class ServerOptions:
    """Which servers, and how hard to press them."""

    urls: tuple[str, ...]  # http://host:port or http://host:port/v1
    model: str  # its name in requests
    concurrency: int = 64  # requests in flight on each server
    timeout: float = 900.0  # seconds a server may take for one answer
    attempts: int = 6  # of one request, before its conversation counts as failed
    patience: float = 300.0  # seconds without any server before the job stops
    api_key: str | None = None


class _Retry(Exception):
    """A request to be asked again. ``counted``: it used up one of its attempts; ``rest``: seconds for the server."""

    def __init__(self, reason: str, counted: bool = True, rest: float | None = None) -> None:
        super().__init__(reason)
        self.counted, self.rest = counted, rest


class _Refused(Exception):
    """A request without an answer; its conversation fails. ``again``: another start may have better luck."""

    def __init__(self, reason: str, again: bool = False) -> None:
        super().__init__(reason)
        self.again = again


class ServerEngine:
    """See :class:`deepspec.data.regenerate.Engine`: a thread a conversation, its turns one after the other.

    Args:
        options: the servers.
        renderer: of the target's tokenizer; its prompts are compared with what the servers say they were sent.
        sampling: temperature, top_p, top_k, min_p, max_tokens.
        seed: every request gets its own seed from it, its sample and its turn.
    """

    def __init__(self, options: ServerOptions, renderer: Renderer, sampling: Sampling, seed: int) -> None:
        self.options, self.renderer, self.sampling, self.seed = options, renderer, sampling, seed
        self._date = server_keywords(renderer.tokenizer.chat_template)
        if renderer.date is not None and not self._date:
            remedy = "serve the target with a template of a fixed date, or use --engine local"
            said = f"we write {renderer.date}, the servers write today's: {remedy}"
            print(f"note: the chat template writes the date; {said}", file=sys.stderr, flush=True)
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
                while waiting < threads + 8:  # a few beyond the threads, so that none waits for the prefetcher
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
        """Ask until there is an answer.

        Raises:
            _Refused: there will be none.
            DataError: the job cannot go on.
        """
        try:
            text = self.renderer.prompt_text(dialogue.messages, dialogue.tools)
            prompt_length, opened = len(self.renderer.prompt_ids(text)), opens_reasoning(text) == THINK
        except DataError as problem:
            raise _Refused(str(problem)) from None
        attempts = 0
        while True:
            server = self.pool.acquire()
            try:
                reply = self._ask(server, dialogue)
                message, reason, tokens = self._read_reply(server, dialogue, reply, prompt_length, opened)
            except _Retry as problem:
                attempts += problem.counted
                self.pool.release(server, str(problem), problem.rest)
                if attempts >= self.options.attempts:
                    raise _Refused(f"{attempts} attempts failed; the last: {problem}", again=True) from None
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
        if server.plain_fields:  # `transformers serve` takes the rest in one field only
            generation = {
                "do_sample": sampling.temperature > 0,
                "top_k": sampling.top_k,
                "min_p": sampling.min_p or None,
                "max_new_tokens": limit,
            }
            return body | {"generation_config": json.dumps(generation)}
        return body | {"top_k": sampling.top_k or -1, "min_p": sampling.min_p}

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
        status = reply.status
        if status in (429, 503):
            rest = _seconds(reply.headers.get("Retry-After"))
            raise _Retry(f"{server.name}: busy ({status})", counted=False, rest=rest)
        if status == 422 and b"Unexpected fields" in reply.body and "top_k" in body:
            server.plain_fields = True
            raise _Retry(f"{server.name} takes plain fields only", counted=False, rest=0.0)
        if status in (401, 403, 404) or 300 <= status < 400:
            remedy = "check the URL, --model and the API key"
            raise DataError("the server refuses us", file=server.name, found=reply.summary, remedy=remedy)
        if 400 <= status < 500 and status not in (408, 409, 425):
            raise _Refused(f"{server.name}: {reply.summary}")
        if status != 200:
            raise _Retry(f"{server.name}: {reply.summary}")
        try:
            value = json.loads(reply.body)
        except (ValueError, RecursionError):
            raise _Retry(f"{server.name}: broken JSON, {reply.summary}") from None
        if not isinstance(value, dict):
            raise _Retry(f"{server.name}: not a completion: {reply.summary}")
        return value

    def _read_reply(
        self, server: Server, dialogue: Dialogue, reply: Mapping[str, Any], prompt_length: int, opened: bool
    ) -> tuple[Message, str, int]:
        """(message, finish reason, completion tokens) of a completion.

        Raises:
            _Retry: it is not whole.
            _Refused: the target answered nothing that can be trained on.
            DataError: the server's prompt is not ours.
        """
        try:
            choice, usage = reply["choices"][0], reply.get("usage") or {}
            given, reason = choice["message"], choice["finish_reason"]
            content, thought = given.get("content") or "", given.get("reasoning_content") or given.get("reasoning")
            calls = [{"type": "function", "function": one["function"]} for one in given.get("tool_calls") or []]
            tokens, prompt_tokens = int(usage.get("completion_tokens") or 0), usage.get("prompt_tokens")
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise _Retry(f"{server.name}: not a completion: {str(reply)[:300]}") from None
        if not isinstance(content, str) or not isinstance(thought, str | None):
            raise _Retry(f"{server.name}: not a completion: {str(reply)[:300]}")
        if reason not in ("stop", "length", "tool_calls"):
            raise _Retry(f"{server.name}: finish_reason {reason!r}")
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


def _sent(message: Message) -> Message:
    """A message in OpenAI's form: arguments as JSON text, which servers check and parse before their template."""
    calls = []
    for call in message.get("tool_calls", []):
        arguments = call["function"].get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": text}})
    return message | ({"tool_calls": calls} if calls else {})


def _seconds(text: str | None) -> float | None:
    """A Retry-After header's seconds, where it gives them."""
    return float(text) if text and text.strip().isdigit() else None
