"""Answers by the target itself, in this process: batched sampling over the Hugging Face model with a key/value cache.

What a prompt is answered depends on (seed, sample id, turn), never on the batch it falls in: every row has its own
uniform numbers, one for each token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

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
        self, model: Any, stop_token_ids: Sequence[int], sampling: RegenerateSection, seed: int, batch_size: int
    ) -> None:
        self.model, self.sampling, self.seed, self.batch_size = model, sampling, seed, batch_size
        self.device = model.get_input_embeddings().weight.device
        self.stop = torch.tensor(sorted(stop_token_ids), device=self.device)
        self.keeps_cache = continues(model)  # else the complete text runs for every token

    def answer(self, requests: Sequence[SamplingRequest]) -> Iterator[Generated]:
        """Every request's answer, in the order in which they end; prompts of like length share a batch."""
        ordered = sorted(requests, key=lambda request: (-len(request.input_ids), request.key))  # the largest first
        for start in range(0, len(ordered), self.batch_size):
            yield from self._batch(ordered[start : start + self.batch_size])

    @torch.inference_mode()
    def _batch(self, requests: Sequence[SamplingRequest]) -> Iterator[Generated]:
        limit = self.sampling.max_tokens
        cached: dict[str, Any] = new_cache(self.model) if self.keeps_cache else {"use_cache": False}
        width = max(len(request.input_ids) for request in requests)
        ids = torch.zeros(len(requests), width, dtype=torch.long)  # [B, P], padded on the left
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, width - len(request.input_ids) :] = torch.tensor(request.input_ids)
            mask[row, width - len(request.input_ids) :] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        numbers = np.stack([uniforms(self.seed, request.key, limit) for request in requests])
        random = torch.from_numpy(numbers).to(self.device)  # [B, max_tokens]
        rows = np.arange(len(requests))  # the number of the request of each row still in the batch
        live = np.ones(len(requests), dtype=bool)  # rows whose answer is not complete
        answers: list[list[int]] = [[] for _ in requests]
        places = takes(self.model, "position_ids")
        for step in range(limit):
            given = cached | ({"position_ids": positions} if places else {})
            output = self.model(input_ids=ids, attention_mask=mask, logits_to_keep=1, **given)
            logits = output.logits[:, -1]  # [B, V]
            token = sample(logits, self.sampling, random[:, step])
            ended = torch.isin(token, self.stop).cpu().numpy()
            for number, value, on, end in zip(rows.tolist(), token.tolist(), live, ended, strict=True):
                if on and end:
                    yield Generated(requests[number], answers[number], "stop")
                elif on:
                    answers[number].append(value)
            live &= ~ended
            if not live.any():
                return
            if live.mean() < 0.9:  # the rows that ended leave; not at once, for leaving copies the cache
                keep = torch.from_numpy(live.nonzero()[0]).to(self.device)
                if self.keeps_cache:
                    # not batch_select_indices, which transformers has for keys and values alone, not for states
                    next(iter(cached.values())).reorder_cache(keep)
                token, mask, positions, random, ids = (x[keep] for x in (token, mask, positions, random, ids))
                rows, live = rows[live], live[live]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
            after, ids_after = positions[:, -1:] + 1, token[:, None]
            whole = not self.keeps_cache
            ids = torch.cat([ids, ids_after], -1) if whole else ids_after
            positions = torch.cat([positions, after], -1) if whole else after
        for number in rows[live].tolist():
            yield Generated(requests[number], answers[number], "length")


class LocalEngine:
    """The target in this process, turn by turn over chunks of conversations."""

    def __init__(self, model: Any, renderer: Renderer, sampling: RegenerateSection, seed: int, batch_size: int) -> None:
        self.renderer, self.config = renderer, model.config.get_text_config().to_dict()
        self.most_new_tokens = sampling.max_tokens
        self.sampler = LocalSampler(model, renderer.stop_token_ids, sampling, seed, batch_size)
        self.chunk = 8 * batch_size  # enough that prompts of like length find each other

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
                    yield Outcome(dialogue)

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
