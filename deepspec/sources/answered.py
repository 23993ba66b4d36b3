"""Training on answers that the feature servers sample: ``data.answers``.

Before the first step rank 0 has every prompt answered, as ``deepspec regenerate`` would, and keeps the hidden states
that the servers computed meanwhile; the run then reads the finished file, and takes what was kept into the cache that
it writes. States are on the disk before their answer is in the file: what a killed run has answered is not asked again.

S tokens, R of them with a supervised next token, C = L*D values of the L layers, D hidden size.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import lru_cache
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch

from deepspec.cache.fingerprint import fingerprint_of
from deepspec.cache.format import PARTS, SPOOL
from deepspec.cache.forward import RenderedConversation
from deepspec.cache.parts import Block, PartWriter, is_complete, layout_of, next_supervised, sweep
from deepspec.cache.reader import OPEN_PARTS, PartReader, stored_view
from deepspec.cache.store import FolderStore
from deepspec.data.chat import Rendered, load_renderer, render_row
from deepspec.data.dialogue import Dialogue, Outcome
from deepspec.data.local import Generated, SamplerEngine, SamplingRequest
from deepspec.data.regenerate import RegenerationPlan, regenerate
from deepspec.errors import SourceLost
from deepspec.files import sha256_json
from deepspec.recipe import Recipe
from deepspec.sources.written import cache_folder
from deepspec.streaming.client import Answered, AnswerRequest, wanted_of
from deepspec.streaming.pool import ServerPool
from deepspec.streaming.sampling import Answering
from deepspec.targets import TargetEmbeddings, TargetSpec, load_spec

log = logging.getLogger(__name__)
KEPT_BYTES, KEPT_SECONDS = 256 << 20, 20.0  # of states that a kill may cost: as much, or as long, is one part on disk
CHUNK = 32  # batches of prompts that are looked at together, so that like lengths find each other


def answer_prompts(recipe: Recipe) -> None:
    """Have the recipe's prompts answered into ``data.answers``, as far as they are not; on one rank.

    Raises:
        RecipeError: a cache that a run cannot write.
        DataError: unusable prompts, or a file of other settings.
        TargetError: no server, or one that cannot answer.
        SourceLost: no server is left; what was answered is kept.
    """
    data, spec = recipe.data, load_spec(recipe.target.path, recipe.target.revision)
    cache_folder(recipe, data.files)
    engine = ServedAnswers(recipe.for_target(spec), spec)
    settings = RegenerationPlan.of_recipe(recipe).settings() | {"engine": "local"}  # whose sampling servers do
    without = f"take those out of {data.prompts}"
    regenerate(Path(str(data.prompts)), Path(str(data.answers)), engine, settings, without=without)


def kept_store(recipe: Recipe, spec: TargetSpec) -> FolderStore:
    """Where states wait for the cache: in a folder that goes when that is finished, named by what they depend on."""
    renderer = load_renderer(recipe, spec)
    fingerprint = fingerprint_of(recipe, spec, renderer.tokenizer, [])
    name = f"answers-{sha256_json(fingerprint)[:12]}"
    return FolderStore(Path(str(recipe.data.write_cache)) / SPOOL / name)


class ServedAnswers:
    """The feature servers as an engine that answers conversations; the states of the answers are kept.

    Args:
        recipe: names servers, sampling and rendering.
        spec: of its target.
    """

    def __init__(self, recipe: Recipe, spec: TargetSpec) -> None:
        self.recipe, self.spec, self.renderer = recipe, spec, load_renderer(recipe, spec)
        self.store = kept_store(recipe, spec)
        self.layout = layout_of(fingerprint_of(recipe, spec, self.renderer.tokenizer, []))
        self._waiting: list[Outcome] = []  # answered; their states are not on the disk yet
        self._blocks: list[Block] = []
        self._since = time.monotonic()
        self.answered = self.kept = 0

    def run(self, dialogues: Iterable[Dialogue]) -> Iterator[Outcome]:
        """See :class:`deepspec.data.dialogue.AnswerEngine`; without a dialogue no server is asked."""
        iterator = iter(dialogues)
        first = next(iterator, None)
        if first is None:
            return
        sweep(self.store)
        with closing(self._pool()) as pool, ThreadPoolExecutor(min(4, os.cpu_count() or 1), "encoder") as encoders:
            section = self.recipe.regenerate
            sampler = PoolSampler(pool, section.batch_size, self.recipe.cache.tokens_per_batch)
            chunk = CHUNK * section.batch_size
            engine = SamplerEngine(sampler, self.renderer, self.spec.config, section.max_tokens, chunk)
            try:
                for outcome in engine.run(chain([first], iterator)):
                    self._take(outcome)
                    size = sum(one.features.nbytes for one in self._blocks)
                    if not size or size >= KEPT_BYTES or time.monotonic() - self._since > KEPT_SECONDS:
                        yield from self._flush(encoders)
            except SourceLost:
                yield from self._flush(encoders)
                raise
            yield from self._flush(encoders)
        log.info(
            "hidden states of %d of %d answers were kept as they were sampled; the others are tokenised otherwise than "
            "they were sampled, cannot be used, or failed", self.kept, self.answered,
        )  # fmt: skip

    def _pool(self) -> ServerPool:
        """The servers.

        Raises:
            TargetError: none answers, or one cannot do what is wanted.
        """
        recipe, data, spec = self.recipe, self.recipe.data, self.spec
        none = torch.empty(0, spec.hidden_size, dtype=getattr(torch, recipe.target.dtype))
        target = TargetEmbeddings(spec, none, none)  # the servers run it; of this one only spec and dtype are read
        stop, tail = self.renderer.stop_token_ids, self.renderer.after_answer
        how = Answering(recipe.regenerate, recipe.seed, stop, tail, data.max_length, ())
        wanted = replace(wanted_of(recipe, target, data.max_length), answering=how)
        return ServerPool(data.servers, wanted, limit=data.server_memory, patience=data.server_patience)

    def _take(self, outcome: Outcome) -> None:
        """Keep the states of an answered dialogue, where they are those of its rendered conversation."""
        self.answered += 1
        answered: Answered | None = outcome.states
        self._waiting.append(replace(outcome, states=None))
        if outcome.error is not None or answered is None:
            return
        row = outcome.dialogue.result()
        rendered = render_row(self.renderer, row, self.recipe.data.min_supervised)
        if isinstance(rendered, str):
            return
        size = len(rendered.input_ids)
        if answered.tokens[:size].tolist() != rendered.input_ids:
            return
        self._blocks.append(_block(row["id"], rendered, answered, self.layout.keeps_last))
        self.kept += 1

    def _flush(self, encoders: ThreadPoolExecutor) -> Iterator[Outcome]:
        """Write what was kept as a part; its answers may then be recorded."""
        if self._blocks:
            names = [int(name) for name in self.store.names(PARTS)]
            writer = PartWriter(self.store, f"{max(names, default=-1) + 1:05d}", self.layout, encoders)
            try:
                for block in self._blocks:
                    writer.append(block)
                writer.finish()
            except BaseException:
                writer.abandon()
                raise
        waiting, self._waiting, self._blocks, self._since = self._waiting, [], [], time.monotonic()
        yield from waiting


def _block(name: str, rendered: Rendered, answered: Answered, keeps_last: bool) -> Block:
    size, mask = len(rendered.input_ids), np.array(rendered.loss_mask, np.uint8)
    last = None
    if keeps_last and answered.last_hidden is not None:
        last = stored_view(answered.last_hidden[:size])[next_supervised(mask, [size])]
    ids, features = np.array(rendered.input_ids, np.int32), stored_view(answered.features[:size])
    return Block([0], [name], [size], ids, mask, features, last)


class PoolSampler:
    """Answers from any of a pool's servers, two batches of prompts a server at a time.

    Args:
        pool: whose requests say how to answer.
        size: prompts of a batch, at most.
        budget: tokens of the prompts of a batch with padding; a longer prompt is one of its own.
    """

    def __init__(self, pool: ServerPool, size: int, budget: int) -> None:
        self.pool, self.size, self.budget = pool, size, budget
        self._numbers = count(-1, -1)

    def answer(self, requests: Sequence[SamplingRequest]) -> Iterator[Generated]:
        """Every request's answer, with its :class:`Answered` as states.

        Raises:
            SourceLost: no server is left, or all fail at one of these.
        """
        threads = ThreadPoolExecutor(2 * self.pool.size, "answers")
        asked: deque[Future[list[Generated]]] = deque()
        try:
            for batch in self._batches(requests):
                asked.append(threads.submit(self._ask, batch))
                if len(asked) == 2 * self.pool.size:
                    yield from asked.popleft().result()
            while asked:
                yield from asked.popleft().result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def _batches(self, requests: Sequence[SamplingRequest]) -> Iterator[list[SamplingRequest]]:
        """Of like length, the longest first."""
        batch: list[SamplingRequest] = []
        for request in sorted(requests, key=lambda one: (-len(one.input_ids), one.key)):
            if batch and (len(batch) == self.size or len(batch[0].input_ids) * (len(batch) + 1) > self.budget):
                yield batch
                batch = []
            batch.append(request)
        if batch:
            yield batch

    def _ask(self, batch: Sequence[SamplingRequest]) -> list[Generated]:
        prompts, keys = tuple(one.input_ids for one in batch), tuple(one.key for one in batch)
        (answers,) = self.pool.take([AnswerRequest(next(self._numbers), prompts, keys)])
        pairs = zip(batch, answers, strict=True)
        return [Generated(one, made.sampled.token_ids, made.sampled.finish_reason, made) for one, made in pairs]


class KeptStates:
    """The states that were kept of answers, by conversation.

    Args:
        store: where :class:`ServedAnswers` wrote them.
    """

    def __init__(self, store: FolderStore) -> None:
        self._part = lru_cache(OPEN_PARTS)(lambda name: PartReader(store, name))
        self._places: dict[
            str, tuple[str, int, int]
        ] = {}  # conversation -> part, first token, first row of last_hidden
        for part in store.names(PARTS):
            if is_complete(store, part):
                manifest = self._part(part).manifest
                token = row = 0
                sizes = zip(manifest.conversations, manifest.lengths, manifest.rows, strict=True)
                for conversation, length, rows in sizes:
                    self._places[conversation] = part, token, row
                    token, row = token + length, row + rows

    def find(self, conversation: RenderedConversation, keeps_last: bool) -> Block | None:
        """The states of a conversation; None where none of exactly its tokens were kept.

        Raises:
            CacheError: a broken chunk.
        """
        sample, name, rendered = conversation
        if name not in self._places:
            return None
        part, token, row = self._places[name]
        ids, mask = np.array(rendered.input_ids, np.int32), np.array(rendered.loss_mask, np.uint8)
        reader, sizes = self._part(part), {"input_ids": len(ids), "loss_mask": len(ids), "features": len(ids)}
        if keeps_last:
            sizes["last_hidden"] = int(next_supervised(mask, [len(ids)]).sum())
        values = {}
        for array, size in sizes.items():
            opened = reader.array(array)
            values[array] = np.empty((size, *opened.info.shape[1:]), opened.dtype)
            opened.read(row if array == "last_hidden" else token, values[array])
            if array in ("input_ids", "loss_mask") and not np.array_equal(
                values[array], (ids, mask)[array == "loss_mask"]
            ):
                return None
        return Block([sample], [name], [len(ids)], ids, mask, values["features"], values.get("last_hidden"))
