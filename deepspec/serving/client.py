"""A running server of an engine, as the evaluator sees it: a prompt in, tokens, rounds and times out.

What an engine's replies and counters mean stands in its own file, a row of ``registry.CLIENTS``.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from deepspec import registry
from deepspec.errors import EvaluationError, shown
from deepspec.http import MAX_BYTES, NoReply, Reply, check_url, request, without_password

TOKEN_BYTES = 4096  # that a streamed reply may take for a token
SHORT = 30.0  # seconds for a reply that generates nothing
UNKNOWN = -1  # in place of a token that the server did not tell
REMEDY = "the server must reply in its documented form: look at its log, or name another --engine"


class Counted(NamedTuple):
    """A draft-verify round, by the measures of :class:`deepspec.decoding.records.Round`."""

    proposed: int
    accepted: int
    committed: int


@dataclass(frozen=True)
class Question:
    """A prompt and how to answer it.

    Args:
        prompt: token ids.
        max_tokens: of the answer.
        temperature: 0 is greedy; above it nothing else shapes the distribution.
        seed: of the engine's own random numbers.
        stop_token_ids: that end an answer.
        drafted: whether rounds and the time of the first token are wanted.
    """

    prompt: Sequence[int]
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    drafted: bool = True


@dataclass
class Answer:
    """What came back. The first token comes of the prefill and belongs to no round."""

    tokens: list[int]  # those that the server did not tell are UNKNOWN
    finish: str  # "stop" or "length"
    seconds: float  # of the request
    first: float  # seconds to the first token
    rounds: list[Counted] = field(default_factory=list)  # empty where only the server's counters tell them

    @property
    def each(self) -> float | None:
        """Seconds a token after the first; None of one token."""
        return (self.seconds - self.first) / (len(self.tokens) - 1) if len(self.tokens) > 1 else None


def most_first(histogram: Sequence[int]) -> list[int]:
    """What every round accepted, by how many accepted 0, 1, ...: in no known order."""
    return [accepted for accepted, count in enumerate(histogram) for _ in range(count)][::-1]


def spread(accepted: Sequence[int], drafted: int) -> list[Counted]:
    """Rounds by what each accepted; what all of them ``drafted`` is spread evenly."""
    each = -(-drafted // max(1, len(accepted)))
    return [Counted(max(each, one), one, one + 1) for one in accepted]


def cut_at_stop(rounds: Sequence[Counted], answer: Answer) -> list[Counted]:
    """Rounds of ``answer`` by a server's counters, without what they count behind its stop token.

    The first token belongs to no round; a round that drafted the stop token has committed what it drafted up to it.
    """
    found, beyond = list(rounds), sum(one.committed for one in rounds) - (len(answer.tokens) - 1)
    if answer.finish == "stop" and beyond > 0:
        for place in reversed(range(len(found))):  # the order is not known: any that accepted so many
            if found[place].accepted >= beyond:
                kept = found[place].committed - beyond
                found[place] = Counted(kept, kept, kept)
                break
    return found


class EngineClient(ABC):
    """One server; its methods may be called from any thread, :meth:`since_last` by one at a time.

    Args:
        url: ``http://host:port``.
        seconds: one answer may take.

    Raises:
        EvaluationError: no address of a server.
    """

    def __init__(self, url: str, seconds: float) -> None:
        self.url, self.seconds = url.rstrip("/").removesuffix("/v1"), seconds
        check_url(self.url, "--server", EvaluationError)

    @abstractmethod
    def knows(self) -> bool:
        """Whether the server is one of this engine."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What of the model and of the engine decides the answers, as JSON values."""

    @abstractmethod
    def ask(self, question: Question) -> Answer:
        """One answer.

        Raises:
            EvaluationError: no complete reply, or not one of this engine.
        """

    def since_last(self) -> list[Counted]:
        """The rounds that the server's counters have gained since the last call; none where answers tell them."""
        return []

    def call(self, path: str, value: object = None, tokens: int = 0) -> Reply:
        """The reply, status 200, to a GET, or to a POST of ``value``.

        Args:
            path: such as ``/props``.
            value: sent as JSON.
            tokens: of the answer at most; they bound the body. 0: nothing is generated.

        Raises:
            EvaluationError: another status, none in time, or a body beyond its bound.
        """
        method, seconds = ("GET" if value is None else "POST"), (self.seconds if tokens else SHORT)
        try:
            reply = request(method, self.url + path, seconds, value, max_bytes=MAX_BYTES + tokens * TOKEN_BYTES)
        except NoReply as problem:
            remedy = "start the server, then run the same command again: prompts that are done stay done"
            raise EvaluationError(problem.problem, file=problem.file, remedy=remedy) from None
        if reply.status != 200:
            raise self.bad("the server refuses", reply.summary, "status 200", "look at its log, then run again")
        return reply

    def json(self, path: str, value: object = None, tokens: int = 0) -> dict[str, Any]:
        """The JSON object of :meth:`call`."""
        try:
            return self.call(path, value, tokens).json()
        except ValueError as problem:
            raise self.bad("a broken reply", str(problem), "a JSON object") from None

    def replies(self, path: str) -> dict[str, Any] | None:
        """The JSON object at ``path``; None where the server has none.

        Raises:
            EvaluationError: no server.
        """
        try:
            reply = request("GET", self.url + path, SHORT)
            return reply.json() if reply.status == 200 else None
        except ValueError:
            return None
        except NoReply as problem:
            raise EvaluationError(problem.problem, file=problem.file, remedy="start the server first") from None

    def events(self, reply: Reply) -> Iterator[dict[str, Any]]:
        """The JSON objects of a stream of server-sent events, ``[DONE]`` left out.

        Raises:
            EvaluationError: one that is none.
        """
        for line in reply.body.split(b"\n"):
            if not line.startswith(b"data:") or line.strip() == b"data: [DONE]":
                continue
            try:
                value = json.loads(line[5:])
            except (ValueError, RecursionError):
                value = None
            if not isinstance(value, dict) or "error" in value:
                found = line[5:300].decode(errors="replace").strip()
                raise self.bad("a broken event in a stream", found, "a JSON object")
            yield value

    def bad(self, problem: str, found: object, wanted: str, remedy: str = REMEDY) -> EvaluationError:
        """An error that names the server."""
        return EvaluationError(problem, file=without_password(self.url), found=found, wanted=wanted, remedy=remedy)

    def check_tokens(self, tokens: object) -> list[int]:
        """Token ids of a reply.

        Raises:
            EvaluationError: they are none.
        """
        if not isinstance(tokens, list) or not all(type(one) is int and one >= 0 for one in tokens):
            raise self.bad("no token ids in a reply", shown(tokens), "a list of integers")
        return list(tokens)


def find_client(name: str, url: str, seconds: float) -> tuple[str, EngineClient]:
    """The engine's name and a client of the server at ``url``.

    Args:
        name: a row of ``registry.CLIENTS``, or ``auto``: the first that knows the server.
        url: of the server.
        seconds: see :class:`EngineClient`.

    Raises:
        EvaluationError: no server, or one of another engine.
    """
    for one in registry.CLIENTS if name == "auto" else (name,):
        client: EngineClient = registry.client(one)(url, seconds)
        if client.knows():
            return one, client
    wanted = " or ".join(registry.CLIENTS) if name == "auto" else name
    remedy = "check the URL, or name the --engine"
    raise EvaluationError("not a server of this engine", file=without_password(url), wanted=wanted, remedy=remedy)
