"""Answers by the target itself, in this process: batched sampling over the Hugging Face model with a key/value cache.

What a prompt is answered depends on (seed, sample id, turn), never on the batch it falls in: every row has its own
uniform numbers, one for each token.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from deepspec.data.chat import Renderer
from deepspec.data.dialogue import Dialogue, Outcome, answer_text, call_mark, read_answer
from deepspec.data.messages import THINK, Unusable, opens_reasoning
from deepspec.errors import DataError
from deepspec.recipe import RegenerateSection
from deepspec.targets.adaptor import CACHE_NAMES, TOLERANCE, cache_keyword, takes
from deepspec.targets.positions import check_room


@dataclass(frozen=True)
class SamplingRequest:
    """A rendered prompt; ``key`` names it, for its random numbers too."""

    key: str  # sample id and turn
    input_ids: list[int]


@dataclass(frozen=True)
class Generated:
    """The sampled tokens, without the stop token."""

    request: SamplingRequest
    token_ids: list[int]
    finish_reason: str  # "stop", or "length" when max_tokens cut it
    states: Any = None  # hidden states of prompt and answer, of a sampler that keeps them


def draw_seed(seed: int, key: str) -> int:
    """64 bits from (seed, key): the start of a request's random numbers, here and on a server."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "surrogatepass")).digest()[:8], "big")


def uniforms(seed: int, key: str, count: int) -> np.ndarray:
    """[count] float32 in [0, 1): one for each token of the request's answer."""
    return np.random.Generator(np.random.Philox(key=draw_seed(seed, key))).random(count, dtype=np.float32)


def sample(logits: Tensor, sampling: RegenerateSection, uniform: Tensor) -> Tensor:
    """One token a row by inverse transform; filters in the order of the serving engines: min-p, top-k, top-p.

    Args:
        logits: [B, V].
        sampling: temperature (0: greedy), top_p, top_k (0: off), min_p.
        uniform: [B] in [0, 1).

    Returns:
        [B] int64.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits.float() / sampling.temperature, -1)  # [B, V]
    order = None
    if 0 < sampling.top_k < probs.shape[-1]:
        probs, order = probs.topk(sampling.top_k, -1)
    elif sampling.top_p < 1:
        probs, order = probs.sort(-1, descending=True)
    if sampling.min_p > 0:
        probs = probs * (probs >= sampling.min_p * probs.amax(-1, keepdim=True))
    if sampling.top_p < 1:  # keep a token while the mass before it is below top_p
        mass = probs.cumsum(-1)
        probs = probs * (mass - probs < sampling.top_p * mass[:, -1:])
    mass = probs.cumsum(-1, dtype=torch.float64)
    # strictly below the total, so that rounding never picks a token of probability 0 at the end
    point = (uniform.to(mass) * mass[:, -1]).minimum(torch.nextafter(mass[:, -1], mass.new_zeros(())))
    choice = torch.searchsorted(mass, point[:, None], right=True)  # [B, 1]
    return (choice if order is None else order.gather(-1, choice))[:, 0]


def new_cache(model: Any) -> dict[str, Any]:
    """An empty cache as the argument of ``model``."""
    from transformers import DynamicCache

    return {cache_keyword(model) or CACHE_NAMES[0]: DynamicCache(config=model.config)}


@torch.inference_mode()
def continues(model: Any) -> bool:
    """Whether a cache of transformers continues the text of ``model``: tried on a few tokens.

    The logits after two tokens beyond the cached ones are those over all of them, but for rounding.
    """
    weight = model.get_input_embeddings().weight
    ids = (torch.arange(3, 9, device=weight.device) % len(weight))[None]
    complete = model(input_ids=ids, use_cache=False).logits[0, -1].float()
    try:
        cached = new_cache(model)
        for start, end in ((0, 4), (4, 5), (5, 6)):
            mask = torch.ones_like(ids[:, :end])
            found = model(input_ids=ids[:, start:end], attention_mask=mask, **cached).logits[0, -1].float()
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # a cache of the model's own
        return False
    return float((found - complete).norm()) <= TOLERANCE.get(weight.dtype, 0.1) * float(complete.norm())


def in_batches(requests: Iterable[SamplingRequest], size: int) -> Iterator[list[SamplingRequest]]:
    """Requests in batches of like length, the longest first."""
    ordered = sorted(requests, key=lambda request: (-len(request.input_ids), request.key))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


@dataclass(eq=False)
class AnswerRow:
    """A request while it is answered."""

    request: SamplingRequest
    answer: list[int] = field(default_factory=list)
    reason: str | None = None  # why it ended
    ahead: deque[int] = field(default_factory=deque)  # tokens that still pass the model after the end
    complete: bool = False
    states: list[Any] = field(default_factory=list)  # of a sampler that keeps them: a piece a pass


class LocalSampler:
    """Samples answers for many prompts with the model in this process.

    Args:
        model: a causal LM of transformers, in eval mode.
        stop_token_ids: ids that end an answer.
        sampling: see :func:`sample`; ``max_tokens`` bounds an answer.
        seed: of all random numbers.
        batch_size: rows at a time.
    """

    def __init__(
        self, model: Any, stop_token_ids: Iterable[int], sampling: RegenerateSection, seed: int, batch_size: int
    ) -> None:
        self.model, self.sampling, self.seed, self.batch_size = model, sampling, seed, batch_size
        self.device = model.get_input_embeddings().weight.device
        self.stop = frozenset(stop_token_ids)
        self.keeps_cache = continues(model)  # else the complete text runs for every token

    def answer(self, requests: Sequence[SamplingRequest]) -> Iterator[Generated]:
        """Every request's answer, in the order in which they end; prompts of like length share a batch."""
        for batch in in_batches(requests, self.batch_size):
            yield from self.answer_batch(batch)

    def next_logits(
        self, rows: Sequence[AnswerRow], ids: Tensor, mask: Tensor, positions: Tensor, cached: dict[str, Any]
    ) -> Tensor:
        """One pass of the model over ``ids`` [B, n]: the logits after the last of them, [B, V]."""
        given = cached | ({"position_ids": positions} if takes(self.model, "position_ids") else {})
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask, logits_to_keep=1, **given).logits
        return logits[:, -1]

    def after_end(self, row: AnswerRow) -> Iterable[int]:
        """Tokens that pass the model once a row's answer has ended."""
        return ()

    @torch.inference_mode()
    def answer_batch(self, requests: Sequence[SamplingRequest]) -> Iterator[Generated]:
        """The answers of requests that are one batch of the model, in the order in which they end."""
        limit = self.sampling.max_tokens
        cached: dict[str, Any] = new_cache(self.model) if self.keeps_cache else {"use_cache": False}
        width = max(len(request.input_ids) for request in requests)
        ids = torch.zeros(len(requests), width, dtype=torch.long)  # [B, P], padded on the left
        mask = torch.zeros_like(ids)
        for number, request in enumerate(requests):
            ids[number, width - len(request.input_ids) :] = torch.tensor(request.input_ids)
            mask[number, width - len(request.input_ids) :] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        numbers = np.stack([uniforms(self.seed, request.key, limit) for request in requests])
        random = torch.from_numpy(numbers).to(self.device)  # [B, max_tokens]
        rows, step = [AnswerRow(request) for request in requests], 0
        while True:
            logits = self.next_logits(rows, ids, mask, positions, cached)
            token = sample(logits, self.sampling, random[:, min(step, limit - 1)])
            yield from self._advance(rows, token)
            step, live = step + 1, np.array([not row.complete for row in rows])
            if not live.any():
                return
            if live.mean() < 0.9:  # the rows that ended leave; not at once, for leaving copies the cache
                keep = torch.from_numpy(live.nonzero()[0]).to(self.device)
                if self.keeps_cache:
                    # not batch_select_indices, which transformers has for keys and values alone, not for states
                    next(iter(cached.values())).reorder_cache(keep)
                token, mask, positions, random, ids = (x[keep] for x in (token, mask, positions, random, ids))
                rows = [row for row in rows if not row.complete]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
            after, ids_after = positions[:, -1:] + 1, token[:, None]
            whole = not self.keeps_cache
            ids = torch.cat([ids, ids_after], -1) if whole else ids_after
            positions = torch.cat([positions, after], -1) if whole else after

    def _advance(self, rows: Sequence[AnswerRow], token: Tensor) -> Iterator[Generated]:
        """Give each row the token [B] that was drawn for it, or put there the next of those after its end."""
        given: dict[int, int] = {}
        for number, (row, value) in enumerate(zip(rows, token.tolist(), strict=True)):
            if row.reason is None:
                if value not in self.stop:
                    row.answer.append(value)
                if value in self.stop or len(row.answer) == self.sampling.max_tokens:
                    row.reason = "stop" if value in self.stop else "length"
                    row.ahead.extend(self.after_end(row))
            if row.ahead:
                given[number] = row.ahead.popleft()
            elif row.reason is not None and not row.complete:
                row.complete = True
                yield Generated(row.request, row.answer, row.reason, row.states or None)
        if given:
            token[list(given)] = torch.tensor(list(given.values()), device=token.device)


class AnswerSampler(Protocol):
    """Something that samples answers to rendered prompts."""

    def answer(self, requests: Sequence[SamplingRequest]) -> Iterator[Generated]:
        """Every request's answer, in any order."""


class SamplerEngine:
    """A sampler as an engine: turn by turn over chunks of conversations.

    Args:
        sampler: that answers.
        renderer: of the target.
        config: the target's flat config.
        most_new_tokens: of an answer.
        chunk: conversations at a time.
    """

    def __init__(
        self, sampler: AnswerSampler, renderer: Renderer, config: Mapping[str, Any], most_new_tokens: int, chunk: int
    ) -> None:
        self.sampler, self.renderer, self.config = sampler, renderer, config
        self.most_new_tokens, self.chunk = most_new_tokens, chunk

    def run(self, dialogues: Iterable[Dialogue]) -> Iterator[Outcome]:
        """See :class:`deepspec.data.dialogue.AnswerEngine`."""
        waiting = iter(dialogues)
        while chunk := list(islice(waiting, self.chunk)):
            yield from self._chunk(chunk)

    def _chunk(self, waiting: list[Dialogue]) -> Iterator[Outcome]:
        while waiting:
            requests, by_key = [], dict[str, tuple[Dialogue, bool]]()  # the answer begins inside its reasoning
            for dialogue in waiting:
                try:
                    text = self.renderer.prompt_text(dialogue.messages, dialogue.tools)
                    ids = self.renderer.prompt_ids(text)
                    check_room(self.config, len(ids), self.most_new_tokens, dialogue.key)
                except DataError as problem:
                    yield Outcome(dialogue, str(problem))
                    continue
                by_key[dialogue.key] = (dialogue, opens_reasoning(text) == THINK)
                requests.append(SamplingRequest(dialogue.key, ids))
            waiting = []
            for generated in self.sampler.answer(requests):
                dialogue, opened = by_key[generated.request.key]
                try:
                    self._add(dialogue, generated, opened)
                except Unusable as problem:
                    yield Outcome(dialogue, str(problem))
                    continue
                if dialogue.open:
                    waiting.append(dialogue)
                else:
                    yield Outcome(dialogue, states=generated.states)

    def _add(self, dialogue: Dialogue, generated: Generated, opened: bool) -> None:
        """Give a dialogue its answer.

        Raises:
            Unusable: there is nothing to train on.
        """
        tokenizer, ids, reason = self.renderer.tokenizer, generated.token_ids, generated.finish_reason
        text = answer_text(tokenizer, ids)
        mark = call_mark(self.renderer, dialogue.tools) if dialogue.tools else None
        if mark and mark in tokenizer.decode(ids, skip_special_tokens=False):
            if mark not in text:  # its marks are special tokens, which no text holds
                raise Unusable("the target called a tool, which only --engine server can read")
            reason = "tool_calls" if reason == "stop" else reason  # the call stays text, which renders to the same
        dialogue.answer(*read_answer(text, None, None, reason, opened), len(ids) + 1)


class LocalEngine(SamplerEngine):
    """The target in this process."""

    def __init__(self, model: Any, renderer: Renderer, sampling: RegenerateSection, seed: int, batch_size: int) -> None:
        sampler = LocalSampler(model, renderer.stop_token_ids, sampling, seed, batch_size)
        config = model.config.get_text_config().to_dict()
        super().__init__(sampler, renderer, config, sampling.max_tokens, 8 * batch_size)  # like lengths find each other
