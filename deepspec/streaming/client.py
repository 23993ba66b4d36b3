"""One server of hidden states as a reader sees it: a handshake, then whole conversations.

How a server is asked stands in its own class, a row of ``registry.FEATURE_SERVERS``; the first that knows a server is
taken. S tokens of a conversation, C = L*D values of the L layers, D hidden size.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepspec import registry
from deepspec.cache.levels import LEVELS
from deepspec.cache.memory import empty
from deepspec.cache.parts import next_supervised
from deepspec.cache.reader import read_supervised, stored_view
from deepspec.errors import RecipeError, TargetError, nearest, without_logins
from deepspec.http import NoReply, request, stream, without_password
from deepspec.identity import differences, target_fields
from deepspec.streaming.sampling import Answering
from deepspec.streaming.wire import PROTOCOL, Arrays, Reader, Sampled, WireError
from deepspec.targets import TargetEmbeddings
from deepspec.targets.served import REFUSALS, Extraction, RequestRefused

TOKEN = "DEEPSPEC_SERVER_TOKEN"  # the shared secret of servers and readers, in the environment of both
HANDSHAKE = 30.0  # seconds
STALL = 30.0  # seconds without a byte: a server that computes sends a sign of life every few seconds
RECEIVE = 4 << 20  # bytes that the system holds for a reader


@dataclass(frozen=True)
class Wanted:
    """What a reader asks every server for."""

    target: TargetEmbeddings  # whose states
    fields: Mapping[str, Any]  # the target's part of an identity
    layers: tuple[int, ...]
    revision: str | None = None
    last_hidden: bool = True  # whether the loss reads the last hidden state
    level: str = "lossless"  # that the states are coded at
    storage: str | None = None  # the folder that servers with a shared file system write to
    timeout: float = 600.0  # seconds for a conversation
    longest: int = 0  # tokens of the longest conversation
    batch_tokens: int = 0  # of what is to be one pass of the target, padding included; see `FeatureRequest.lengths`
    answering: Answering | None = None  # how prompts are to be answered; its keys are those of each request

    @property
    def dtype(self) -> str:
        """Of the hidden states, as recipes write it."""
        return str(self.target.dtype).removeprefix("torch.")

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's hidden states in memory."""
        width = self.target.spec.hidden_size * (len(self.layers) + self.last_hidden)
        return width * self.target.dtype.itemsize


@dataclass(frozen=True)
class FeatureRequest:
    """What a server is asked about."""

    number: int  # of the sample
    tokens: NDArray[Any]  # [S] int
    loss_mask: NDArray[np.bool_]  # [S]
    lengths: tuple[int, ...] | None = None  # of several, one after the other, that are to be one batch of the target

    @property
    def name(self) -> str:
        """In messages."""
        return f"sample {self.number}"

    def ask(self, client: FeatureClient) -> States:
        """What ``client`` gives for it; see :meth:`FeatureClient.fetch`."""
        return client.fetch(self)

    def ranges(self) -> list[list[int]]:
        """[start, stop) of the tokens that are supervised."""
        edges = np.flatnonzero(np.diff(np.concatenate(([0], self.loss_mask.astype(np.int8), [0]))))
        return edges.reshape(-1, 2).tolist()

    def last_rows(self) -> NDArray[np.bool_]:
        """[S] whether the next token is supervised: the rows of last_hidden that a loss reads."""
        return next_supervised(self.loss_mask, list(self.lengths or [len(self.tokens)]))


@dataclass(frozen=True)
class States:
    """What the target computes of one conversation."""

    features: Tensor  # [S, C]
    last_hidden: Tensor | None  # [S, D]; zeros where the next token is not supervised

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.features.nbytes + (0 if self.last_hidden is None else self.last_hidden.nbytes)


@dataclass(frozen=True)
class Answered:
    """An answer and what the target computed of prompt, answer and tail; s tokens."""

    sampled: Sampled
    tokens: NDArray[np.int32]  # [s]
    features: Tensor  # [s, C]
    last_hidden: Tensor | None  # [s, D]; zeros for the last token


@dataclass(frozen=True)
class AnswerRequest:
    """Prompts that a server is to answer as one batch."""

    number: int  # below 0: no sample's
    prompts: tuple[list[int], ...]
    keys: tuple[str, ...]  # what names each: all that with the seed decides its random numbers

    @property
    def name(self) -> str:
        """In messages."""
        return f"the prompts {self.keys[0]} to {self.keys[-1]}"

    @property
    def tokens(self) -> list[int]:
        """Of all prompts, one after the other."""
        return [token for prompt in self.prompts for token in prompt]

    def ask(self, client: FeatureClient) -> list[Answered]:
        """What ``client`` gives for it; see :meth:`FeatureClient.answer`."""
        return client.answer(self)


class ServerFault(Exception):
    """A server that did not give what it was asked for.

    Args:
        problem: what is wrong, for a person.
        settled: whether it is a matter of how the server was started, which waiting does not change.
        refuses: whether the server says that the request itself is wrong: it will say so again.
    """

    def __init__(self, problem: str, settled: bool = False, refuses: bool = False) -> None:
        super().__init__(without_logins(problem))
        self.settled, self.refuses = settled, refuses


class FeatureClient(ABC):
    """One server. Several threads may call :meth:`fetch`.

    Args:
        url: of the server.
        wanted: of every conversation.
    """

    concurrency: ClassVar[int] = 4  # conversations that it is asked for at a time

    def __init__(self, url: str, wanted: Wanted) -> None:
        self._url, self.wanted = url.rstrip("/"), wanted
        self.url = without_password(self._url)  # in messages

    @classmethod
    @abstractmethod
    def knows(cls, url: str) -> bool:
        """Whether the server at ``url`` is of this kind.

        Raises:
            NoReply: nothing answers there.
        """

    @abstractmethod
    def check(self) -> None:
        """The handshake: whether the server computes what is wanted.

        Raises:
            ServerFault: it does not, or does not answer.
        """

    @abstractmethod
    def fetch(self, conversation: FeatureRequest) -> States:
        """The hidden states of one conversation.

        Raises:
            ServerFault: what came was not what was asked for; none of it is used.
        """

    def answer(self, asked: AnswerRequest) -> list[Answered]:
        """The answers to prompts, with the states of both.

        Raises:
            ServerFault: what came was not what was asked for; none of it is used. Or it cannot answer.
        """
        raise ServerFault("it gives no hidden states of answers", settled=True)


def headers() -> dict[str, str]:
    """The shared secret, where there is one."""
    secret = os.environ.get(TOKEN, "")
    return {"Authorization": f"Bearer {secret}"} if secret else {}


def open_client(url: str, wanted: Wanted) -> FeatureClient:
    """The client of the server at ``url``, by what it answers.

    Raises:
        ServerFault: nothing answers there, or it is no server of a known kind.
    """
    try:
        for name in registry.FEATURE_SERVERS:
            kind: type[FeatureClient] = registry.feature_server(name)
            if kind.knows(url):
                return kind(url, wanted)
    except NoReply as none:
        raise ServerFault(none.problem) from None
    except TargetError as wrong:
        raise ServerFault(str(wrong), settled=True) from None
    raise ServerFault("not a server of hidden states", settled=True)


class StreamClient(FeatureClient):
    """A server that ``deepspec serve-features`` started: hidden states over the network."""

    @classmethod
    def knows(cls, url: str) -> bool:
        """By its handshake."""
        reply = request("GET", f"{url.rstrip('/')}/v1/target", HANDSHAKE, headers=headers())
        return reply.status in (200, 401) and b"deepspec" in reply.body

    def check(self) -> None:
        """See :meth:`FeatureClient.check`."""
        try:
            reply = request("GET", f"{self._url}/v1/target", HANDSHAKE, headers=headers())
            if reply.status != 200:
                raise ServerFault(reply.summary, settled=reply.status == 401)
            hello = reply.json()
        except NoReply as none:
            raise ServerFault(none.problem) from None
        except ValueError as problem:
            raise ServerFault(str(problem)) from None
        self._compare(hello)
        self._digest = str(hello.get("digest"))

    def _compare(self, hello: Mapping[str, Any]) -> None:
        wanted = self.wanted
        if hello.get("deepspec") != PROTOCOL:
            raise ServerFault(f"protocol {hello.get('deepspec')!r}, not {PROTOCOL}: another version of deepspec", True)
        if hello.get("dtype") != wanted.dtype:
            raise ServerFault(f"it computes in {hello.get('dtype')}, the recipe's target in {wanted.dtype}", True)
        served = hello.get("target")
        sides = ("server", "recipe")
        known = {"target": served if isinstance(served, dict) else {}}
        if lines := differences(known, {"target": wanted.fields}, sides):
            raise ServerFault(f"it serves another target: {'; '.join(lines[:3])}", True)
        most = hello.get("max_length", 0)
        if type(most) is not int or most < wanted.longest:
            problem = f"it takes conversations of {most!r:.20} tokens, the longest of the data has {wanted.longest}"
            raise ServerFault(f"{problem} (data.max_length of the recipe that it serves)", True)
        most = hello.get("batch_tokens", 0)
        if type(most) is not int or most < wanted.batch_tokens:
            problem = f"it takes batches of {most!r:.20} tokens, the cache that is written has such of"
            raise ServerFault(f"{problem} {wanted.batch_tokens} (its --batch-tokens, cache.tokens_per_batch)", True)
        if wanted.answering is not None:
            most = hello.get("answers", 0)
            if type(most) is not int or most < wanted.answering.sampling.batch_size:
                problem = (
                    f"it answers {most!r:.20} prompts at a time, the recipe {wanted.answering.sampling.batch_size}"
                )
                raise ServerFault(f"{problem} (regenerate.batch_size of the recipe that it serves)", True)

    def fetch(self, conversation: FeatureRequest) -> States:
        """See :meth:`FeatureClient.fetch`; decoded as it comes."""
        wanted, length = self.wanted, len(conversation.tokens)
        D, dtype = wanted.target.spec.hidden_size, wanted.target.dtype
        features = empty((length, D * len(wanted.layers)), dtype)
        receive = partial(self._receive, conversation, stored_view(features))
        if not wanted.last_hidden:
            receive(None)
            return States(features, None)
        last_hidden = empty((length, D), dtype)
        read_supervised(conversation.last_rows(), last_hidden, receive)
        return States(features, last_hidden)

    def _receive(self, conversation: FeatureRequest, features: NDArray[Any], last_hidden: NDArray[Any] | None) -> None:
        """Fill features [S, C] and the rows of last_hidden [R, D] that a loss reads.

        Raises:
            ServerFault: what came was not what was asked for.
        """
        body: dict[str, Any] = {"tokens": conversation.tokens.tolist(), "supervised": conversation.ranges()}
        if conversation.lengths is not None:
            body["lengths"] = list(conversation.lengths)
        with self._asking("features", body, self.wanted.timeout) as reader:
            reader.read(Arrays(features, last_hidden), conversation.tokens)

    def answer(self, asked: AnswerRequest) -> list[Answered]:
        """See :meth:`FeatureClient.answer`; a request may take ``timeout`` for each of its prompts."""
        wanted, how = self.wanted, cast(Answering, self.wanted.answering)
        body: dict[str, Any] = {"tokens": asked.tokens, "lengths": list(map(len, asked.prompts)), "keys": asked.keys}
        body |= {"sampling": asdict(how.sampling), "seed": how.seed, "stop": how.stop, "tail": how.tail}
        with self._asking("answers", body | {"most": how.most}, wanted.timeout * len(asked.keys)) as reader:
            spec, dtype = wanted.target.spec, wanted.target.dtype
            answers = reader.answers(len(asked.keys), how.sampling.max_tokens, spec.vocab_size)
            pairs = zip(asked.prompts, answers, strict=True)
            rows = [np.array([*prompt, *one.token_ids, *how.tail][: how.most], np.int32) for prompt, one in pairs]
            lengths, tokens = list(map(len, rows)), np.concatenate(rows)
            features = empty((len(tokens), spec.hidden_size * len(wanted.layers)), dtype)
            last = empty((len(tokens), spec.hidden_size), dtype) if wanted.last_hidden else None

            def fill(kept: NDArray[Any] | None) -> None:
                reader.read(Arrays(stored_view(features), kept), tokens)

            if last is None:
                fill(None)
            else:
                read_supervised(next_supervised(np.ones(len(tokens)), lengths), last, fill)
        last_rows = [None] * len(rows) if last is None else last.split(lengths)
        found = zip(answers, rows, features.split(lengths), last_rows, strict=True)
        return [Answered(*one) for one in found]

    @contextmanager
    def _asking(self, path: str, body: dict[str, Any], seconds: float) -> Iterator[Reader]:
        """The reply to a POST, to be read within the block.

        Raises:
            ServerFault: what came was not what was asked for.
        """
        wanted = self.wanted
        body |= {"layers": list(wanted.layers), "last_hidden": wanted.last_hidden, "level": wanted.level}
        limits: dict[str, Any] = {"stall": STALL, "seconds": seconds, "receive": RECEIVE}
        try:
            with stream(f"{self._url}/v1/{path}", body, headers(), **limits) as reply:
                if reply.status != 200:
                    raise ServerFault(reply.rest().summary, refuses=reply.status in REFUSALS)
                yield Reader(reply.read_into, self._digest, wanted.dtype)
        except NoReply as none:
            raise ServerFault(none.problem) from None
        except WireError as wrong:
            raise ServerFault(str(wrong)) from None


class ExtractionClient(FeatureClient):
    """A serving engine with hidden-state extraction, which writes files to a folder that both see."""

    concurrency = 8

    def __init__(self, url: str, wanted: Wanted) -> None:
        super().__init__(url, wanted)
        self._target = Extraction(
            url, wanted.target, wanted.layers, wanted.revision, wanted.timeout, storage=wanted.storage, attempts=1
        )

    @classmethod
    def knows(cls, url: str) -> bool:
        """By the models that it lists."""
        reply = request("GET", f"{url.rstrip('/')}/v1/models", HANDSHAKE, headers=headers())
        return reply.status == 200

    def check(self) -> None:
        """See :meth:`FeatureClient.check`; such a server tells no more than a name."""
        if self.wanted.answering is not None:
            problem = f"a server of {self._owner()} gives no hidden states of answers"
            remedy = "start deepspec serve-features, or make the answers with deepspec regenerate first"
            raise ServerFault(f"{problem} (data.answers): {remedy}", settled=True)
        try:
            self._target.connect()
        except TargetError as wrong:
            raise ServerFault(wrong.problem + (f" ({wrong.found})" if wrong.found else "")) from None

    def _owner(self) -> str:
        """Whose models it says it has."""
        try:
            return str(
                request("GET", f"{self._url}/v1/models", HANDSHAKE, headers=headers()).json()["data"][0]["owned_by"]
            )
        except (NoReply, ValueError, LookupError, TypeError):
            return "another engine"

    def fetch(self, conversation: FeatureRequest) -> States:
        """See :meth:`FeatureClient.fetch`."""
        try:
            ends = np.cumsum(conversation.lengths or [len(conversation.tokens)])[:-1]
            rows = [tokens.tolist() for tokens in np.split(conversation.tokens, ends)]
            made = [self._target.states(tokens, self.wanted.layers) for tokens in rows]
        except TargetError as wrong:
            raise ServerFault(str(wrong), refuses=isinstance(wrong, RequestRefused)) from None
        last = None
        if self.wanted.last_hidden:
            last = torch.cat([one.last_hidden for one in made])
            last = last.masked_fill(~torch.from_numpy(conversation.last_rows())[:, None], 0)
        return States(torch.cat([one.features for one in made]), last)


def wanted_of(recipe: Any, target: TargetEmbeddings, longest: int) -> Wanted:
    """What a recipe's training asks of ``data.servers``; ``longest``: tokens of its longest conversation.

    Raises:
        RecipeError: an unknown level.
    """
    data = recipe.data
    if data.server_level not in LEVELS:
        remedy = nearest(data.server_level, LEVELS)
        raise RecipeError("unknown level", key="data.server_level", found=data.server_level, remedy=remedy)
    keeps_last = registry.algorithm(recipe.algorithm).needs_last_hidden(recipe.draft)
    return Wanted(
        target, target_fields(target.spec), recipe.target.layers, recipe.target.revision, keeps_last,
        data.server_level, data.server_storage, data.server_timeout, longest,
        recipe.cache.tokens_per_batch if data.write_cache else 0,
    )  # fmt: skip
