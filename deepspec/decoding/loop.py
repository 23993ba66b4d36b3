"""The draft-verify loop: R rows of at most B, each at its own position; finished rows leave and new prompts enter.

The live rows always come first: a prompt enters where one left, and when none waits the last row moves there.

A round: the draft proposes; the host reads once what the previous round committed and what is proposed now; finished
rows leave and the policy decides how many tokens of each row to verify; the target runs over exactly those tokens; they
are accepted or rejected on the device. That read is the only synchronisation of a round. The baseline, decoding
without a draft, is the same loop without a drafter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from deepspec.decoding.captured import Captured, cuda_rounds
from deepspec.decoding.clock import PhaseClock, StepTiming
from deepspec.decoding.kv import PackedBatch
from deepspec.decoding.paths import RowTarget, check_tree, open_rows
from deepspec.decoding.records import DecodeRequest, DecodeSettings, Generation, Round
from deepspec.decoding.scheduler import FixedLength, Policy, Threshold
from deepspec.decoding.tree import path_tokens, tree_of, walk
from deepspec.decoding.verify import Uniforms, VerifyResult, sample, verify_greedy, verify_sampled
from deepspec.errors import DataError
from deepspec.targets.load import Target
from deepspec.targets.positions import check_room

if TYPE_CHECKING:
    from deepspec.algorithms.base import Drafter, Proposal

PREFILL_CHUNK = 512  # prompt tokens of a row in one forward


def generate(
    target: Target,
    drafter: Drafter | None,
    prompts: Sequence[Sequence[int]],
    settings: DecodeSettings,
    batch_size: int = 1,
    policy: Policy | None = None,
    captured: Captured | None = None,
) -> list[Generation]:
    """Decode prompts (token ids; the sample id is the index in the list) and return their generations in that order.

    ``drafter`` None decodes the target alone; otherwise it was made for ``batch_size`` rows.

    Raises:
        DataError: an empty prompt, or one beyond the target's positions.
        EvaluationError: a draft tree that cannot be used.
    """
    decoder = Decoder(target, drafter, settings, batch_size, policy, captured=captured)
    requests = deque(DecodeRequest(tuple(prompt), number) for number, prompt in enumerate(prompts))
    return sorted(decoder.stream(requests), key=lambda generation: generation.request.sample_id)


@dataclass
class _Row:
    """The host's side of one row of the batch."""

    generation: Generation
    sent: tuple[int, ...] | None = None  # what the forward in flight verifies; None: the prompt's own forward
    length: int = 0
    confidence: tuple[float, ...] = ()


class Decoder:
    """Decodes requests as they come, at most ``batch_size`` together.

    Args:
        target: the target model.
        drafter: decoding state of a draft for ``batch_size`` rows, or None.
        settings: temperature, limits, seed.
        batch_size: B.
        policy: how many drafted tokens to verify; None: by ``settings.confidence_threshold``, or all.
        watch: called with a generation whenever it has new tokens.
        captured: captures rounds; None: in CUDA graphs on CUDA where ``settings.capture``, elsewhere not at all.

    Raises:
        EvaluationError: ``settings.tree`` cannot be used with these.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        settings: DecodeSettings,
        batch_size: int = 1,
        policy: Policy | None = None,
        watch: Callable[[Generation], object] | None = None,
        captured: Captured | None = None,
    ) -> None:
        self.watch = watch
        self.target, self.drafter, self.settings, self.batch_size = target, drafter, settings, batch_size
        threshold = settings.confidence_threshold
        self.policy: Policy = policy or (Threshold(threshold) if threshold > 0 and drafter else FixedLength())
        self.clock = PhaseClock(target.device)
        self._tree = tree_of(settings, drafter, policy is not None)
        check_tree(target, settings)
        self._slots = len(self._tree) - 1 if self._tree else drafter.max_draft if drafter else 0
        self._stops = frozenset(settings.stop_token_ids)
        # Nothing after a drafted stop token matters to the output. The released loop verifies it all the same where a
        # draft proposes all slots at once; one that goes token by token (it can draft a tree) stops there by itself.
        self._cuts_at_stops = not settings.release_counting or (drafter is not None and drafter.max_children > 0)
        self._scale = np.array(settings.confidence_temperatures or (1.0,) * self._slots)
        self._rows: list[_Row | None] = [None] * batch_size
        self._limit = settings.max_new_tokens + 2  # rows of the table of random numbers
        device = target.device
        # [B, 2]: drafted tokens that the last forward accepted (of a tree the last one's node), and the newest token
        self._outcome = torch.zeros(batch_size, 2, dtype=torch.long, device=device)
        self._last = self._outcome[:, 1]
        self._round = torch.zeros(batch_size, dtype=torch.long, device=device)  # [B] rounds of the row so far
        self._every_row = torch.arange(batch_size, device=device)
        width = 2 * self._slots + 1 if settings.temperature > 0 else 0
        self._table = torch.zeros(batch_size, self._limit, width, dtype=torch.float64, device=device)
        self._emitted = 0  # tokens that the host's last read added to outputs
        self._live = 0  # R: rows 0 .. R - 1 were not finished at the host's last read
        self._in_flight = np.zeros(batch_size, dtype=np.int64)  # [B] tokens of the last forward, not yet read
        self._packed: RowTarget | None = None
        captured = captured or (cuda_rounds(device) if settings.capture else None)
        self._captured = None if self._tree else captured  # a tree's rounds stay eager

    @torch.inference_mode()
    def stream(self, requests: deque[DecodeRequest]) -> Iterator[Generation]:
        """Yield generations as they finish. The caller may append to ``requests`` while it iterates (next turns)."""
        while requests or any(self._rows):
            start = self.clock.now()
            self._enter(requests)
            entered = self.clock.now()
            before = self.clock.row_rounds, self.clock.verified
            proposal = self._propose()
            finished = self._settle(proposal)
            self._verify(proposal)
            end = self.clock.now()
            self.clock.wall += end - start
            if self.clock.timings is not None:
                rows, verified = self.clock.row_rounds - before[0], self.clock.verified - before[1]
                self.clock.timings.append(StepTiming(rows, verified, self._emitted, end - entered))
            yield from finished

    def _enter(self, requests: deque[DecodeRequest]) -> None:
        """Fill free rows with waiting requests and run their prompts; close the gaps that stay."""
        entering: list[int] = []
        for row in range(self.batch_size):
            if self._rows[row] is None and requests:
                self._start(row, requests.popleft())
                entering.append(row)
        if entering:
            with self.clock.phase("prefill"):
                if self.drafter is not None:
                    self.drafter.reset_rows(torch.tensor(entering, device=self.target.device))
                self._prefill(entering)
        self._close_gaps()

    def _close_gaps(self) -> None:
        """Move the last live rows into rows that are free, so that nothing is computed for rows without a prompt."""
        live = [number for number, row in enumerate(self._rows) if row is not None]
        self._live = len(live)
        free = [number for number in range(self._live) if self._rows[number] is None]
        if not free:
            return
        moving = live[-len(free) :]
        for old, new in zip(moving, free, strict=True):
            self._rows[new], self._rows[old] = self._rows[old], None
        source, target = torch.tensor([moving, free], device=self.target.device)
        for state in (self._outcome, self._round, self._table):
            state[target] = state[source]
        max_context_len = int((self._target.cache.lengths + self._in_flight)[moving].max())
        self._target.cache.move_rows(moving, free, max_context_len)
        self._in_flight[free] = self._in_flight[moving]
        if self.drafter is not None:
            self.drafter.move_rows(source, target)

    def _start(self, row: int, request: DecodeRequest) -> None:
        if not request.prompt_ids:
            raise DataError("an empty prompt cannot be decoded", key=f"sample {request.sample_id}")
        positions = (len(request.prompt_ids), self.settings.max_new_tokens)
        check_room(self.target.spec.config, *positions, f"sample {request.sample_id}")
        if self._packed is None:
            layers = self.drafter.model.config.target_layers if self.drafter else ()
            room = len(request.prompt_ids) + min(self.settings.max_new_tokens, 512) + self._slots + 1
            self._packed = open_rows(self.target, layers, self.batch_size, room)
            if self._captured is not None:
                self._captured.open(self._packed, self.drafter, self.batch_size)
        self._packed.cache.clear(row)
        self._rows[row] = _Row(Generation(request))
        if self._table.shape[2]:
            key = np.array([self.settings.seed, request.sample_id], dtype=np.uint64)
            numbers = np.random.Generator(np.random.Philox(key=key)).random(self._table.shape[1:])
            self._table[row] = torch.from_numpy(numbers).to(self.target.device, non_blocking=True)
        self._round[row] = 0

    def _prefill(self, entering: list[int]) -> None:
        """Run the prompts of ``entering`` rows (ascending) in chunks, and sample each row's first token."""
        prompts = {row: self._rows[row].generation.request.prompt_ids for row in entering}  # type: ignore[union-attr]
        device = self.target.device
        for offset in range(0, max(map(len, prompts.values())), PREFILL_CHUNK):
            chunk = {row: ids[offset : offset + PREFILL_CHUNK + 1] for row, ids in prompts.items() if len(ids) > offset}
            rows = np.array(list(chunk))
            counts = np.array([min(len(ids), PREFILL_CHUNK) for ids in chunk.values()])
            batch = self._target.cache.plan(counts, rows)
            flat = [token for ids, count in zip(chunk.values(), counts, strict=True) for token in ids[:count]]
            output = self._target.forward(batch, torch.tensor(flat, device=device))
            complete = [index for index, ids in enumerate(chunk.values()) if len(ids) <= PREFILL_CHUNK]
            ending, own = torch.from_numpy(rows[complete]).to(device), torch.tensor(complete, device=device).long()
            if complete:
                self._last[ending] = self._first_tokens(output.last_hidden[batch.index[own, -1]], ending)
                self._round[ending] = 1
            if self.drafter is not None:
                after = torch.zeros(len(chunk), batch.queries, dtype=torch.long)
                for index, ids in enumerate(chunk.values()):
                    after[index, : len(ids) - 1] = torch.tensor(ids[1:])
                after = after.to(device)
                after[own, batch.counts[own] - 1] = self._last[ending]
                longest = int((self._target.cache.lengths + self._in_flight).max())
                max_context_len = max(longest, offset + batch.queries)
                own_rows = torch.from_numpy(rows).to(device)
                self.drafter.extend(output.features[batch.index], after, batch.counts, max_context_len, own_rows)
            self._target.cache.lengths[rows] += counts

    @property
    def _target(self) -> RowTarget:
        if self._packed is None:
            raise RuntimeError("no request has entered yet")
        return self._packed

    def _first_tokens(self, last_hidden: Tensor, rows: Tensor) -> Tensor:
        logits = self.target.logits(last_hidden)
        if self.settings.temperature <= 0:
            return logits.argmax(-1)
        weights = torch.softmax(logits.float() / self.settings.temperature, -1)
        return sample(weights, self._table[rows, 0, -1])

    def _propose(self) -> Proposal | None:
        """Draft for every row, also for those that the next read finds finished."""
        wanted = self.policy.max_draft
        slots = self._slots if wanted is None else min(self._slots, wanted)
        if self.drafter is None or not slots:
            return None
        with self.clock.phase("draft"):
            last = self._last[: self._live]
            if self._tree is not None:
                return self.drafter.propose_tree(last, self._tree)
            if self._captured is None:
                return self.drafter.propose(last, self._sample_draft, slots)
            return self._captured.propose(self._last, self._live, self._sample_draft, slots)

    def _uniforms(self, count: int) -> Uniforms:
        rows = self._every_row[:count]
        now = self._table[rows, self._round[:count].clamp_max(self._limit - 1)]
        return Uniforms(now[:, : self._slots], now[:, self._slots : 2 * self._slots], now[:, -1])

    def _sample_draft(self, logits: Tensor, slot: int) -> tuple[Tensor, Tensor | None]:
        """The draft's sampler: token [B] and, at a temperature, the distribution [B, V] it came from."""
        if self.settings.temperature <= 0:
            return logits.argmax(-1), None
        probs = torch.softmax(logits.float() / self.settings.temperature, -1)
        if slot == 0:
            self._now = self._uniforms(len(probs))
        return sample(probs, self._now.draft[:, slot]), probs

    def _settle(self, proposal: Proposal | None) -> list[Generation]:
        """Read the last outcome and this proposal (the only synchronisation) and plan what to verify.

        Returns the generations that are finished.
        """
        columns = [self._outcome[: self._live]]
        confidence, drafted = None, 0
        if proposal is not None:
            columns.append(proposal.tokens)
            confidence, drafted = proposal.confidence_logits, proposal.tokens.shape[1]
        if confidence is not None:
            columns = [*(column.double() for column in columns), confidence.double()]  # token ids are exact in float64
        packet = torch.cat(columns, dim=1).cpu().numpy()  # one copy brings all
        self.clock.collect()
        numbers = packet[:, : 2 + drafted].astype(np.int64)
        finished = self._record(numbers[:, 0], numbers[:, 1])
        self._admit(numbers[:, 2:], packet[:, 2 + drafted :] if confidence is not None else None)
        return finished

    def _record(self, accepted: np.ndarray, tokens: np.ndarray) -> list[Generation]:
        """Append what the last forward committed to each row; free the rows that are finished."""
        finished = []
        self._emitted = 0
        committed_counts = np.zeros(self._live, dtype=np.int64)
        for number, row in enumerate(self._rows[: self._live]):
            if row is None:
                continue
            if row.sent is None:
                self._append(row.generation, [int(tokens[number])])
            else:
                committed = self._accepted(row.sent, int(accepted[number]))
                count, length = len(committed), row.length
                committed_counts[number] = count + 1
                if not (committed and committed[-1] in self._stops):
                    committed.append(int(tokens[number]))
                elif self._tree is None:
                    length = count  # a stop token that was accepted ends the proposal too
                emitted = self._append(row.generation, committed)
                record = Round(row.sent, length, count, len(committed), emitted, row.confidence)
                row.generation.rounds.append(record)
            if self._is_full(row.generation):
                row.generation.finish = row.generation.finish or "length"
            if self.watch is not None:
                self.watch(row.generation)
            if row.generation.finish:
                finished.append(row.generation)
                self._rows[number] = None
        self._target.cache.commit(committed_counts)
        self._in_flight[:] = 0
        return finished

    def _accepted(self, sent: tuple[int, ...], last: int) -> list[int]:
        """The accepted drafts up to the first stop token: the first ``last``, or a tree's path to the node ``last``."""
        if self._tree is not None:
            return path_tokens(self._tree, last, sent, self._stops)
        return list(sent[: _up_to_stop(sent[:last], self._stops)])

    def _append(self, generation: Generation, tokens: list[int]) -> int:
        """Add tokens up to the limit and the first stop token; the number added."""
        before = len(generation.output_ids)
        for token in tokens:
            if len(generation.output_ids) >= self.settings.max_new_tokens:
                break
            generation.output_ids.append(token)
            if token in self._stops:
                generation.finish = "stop"
                break
        added = len(generation.output_ids) - before
        self._emitted += added
        return added

    def _is_full(self, generation: Generation) -> bool:
        if self.settings.release_counting:
            return sum(generation.acceptance_lengths) >= self.settings.max_new_tokens
        return len(generation.output_ids) >= self.settings.max_new_tokens

    def _admit(self, drafts: np.ndarray, logits: np.ndarray | None) -> None:
        """Let the policy choose how many drafts of each row to verify; none after a drafted stop token."""
        numbers = [number for number, row in enumerate(self._rows) if row is not None]
        if not numbers:
            return
        own = drafts[numbers]
        confidence = None
        if logits is not None:
            confidence = 1 / (1 + np.exp(-logits[numbers] / self._scale[: drafts.shape[1]]))
        lengths = self.policy.admit(confidence, own.shape[1], len(numbers)).tolist()
        for number, length, tokens in zip(numbers, lengths, own.tolist(), strict=True):
            row = self._rows[number]
            sent = tuple(tokens[:length])
            if self._tree is None and self._cuts_at_stops:
                length = _up_to_stop(sent, self._stops)
            row.sent, row.length = sent, length  # type: ignore[union-attr]
            row.confidence = () if logits is None else tuple(logits[number].tolist())  # type: ignore[union-attr]

    def _verify(self, proposal: Proposal | None) -> None:
        """Run the target over the newest token and the admitted drafts of each row, and accept on the device."""
        live = self._live
        counts = np.array([0 if row is None else row.length + 1 for row in self._rows[:live]], dtype=np.int64)
        if not counts.any():
            return
        if self._captured is not None and self._captured.verifies:
            with self.clock.phase("verify"):
                self._captured.verify(counts, proposal, self._run_target)
        else:
            batch = self._target.cache.plan(counts, tree=self._tree)
            width = batch.queries if self._tree is None else self._tree.path.shape[1]
            self._run_target(batch, proposal, int(self._target.cache.lengths[:live].max()) + width)
        self._in_flight[:live] = counts
        self.clock.rounds += 1
        self.clock.row_rounds += int((counts > 0).sum())
        self.clock.verified += int(counts.sum())

    def _run_target(self, batch: PackedBatch, proposal: Proposal | None, max_context_len: int) -> None:
        """The device's work of a planned forward: logits, acceptance, and the draft's extension.

        ``max_context_len``: no row is longer with the batch's tokens.
        """
        tokens = self._last[: batch.num_rows, None]
        if proposal is not None:
            tokens = torch.cat((tokens, proposal.tokens), dim=1)[:, : batch.queries]
        packed = tokens.flatten() if batch.rectangular else tokens.flatten()[batch.dense]
        with self.clock.phase("verify"):
            output = self._target.forward(batch, packed)
        with self.clock.phase("head"):
            logits = self.target.logits(output.last_hidden)
        result = self._accept(logits, tokens[:, 1:], proposal, batch)
        torch.stack((result.accepted, result.token), dim=1, out=self._outcome[: batch.num_rows])
        self._round += 1
        if self.drafter is not None:
            self._extend(output.features, tokens, batch, result, max_context_len)

    def _extend(
        self, features: Tensor, tokens: Tensor, batch: PackedBatch, result: VerifyResult, max_context_len: int
    ) -> None:
        """Give the accepted positions to the draft; of a tree the accepted path, which moves to the front of the cache.

        ``features`` are packed, ``tokens`` [R, Q] are those of the batch.
        """
        index, accepted = batch.index, result.accepted
        if self._tree is not None:
            path, accepted = self._tree.path[accepted], self._tree.depth[accepted]
            index, tokens = index.gather(1, path), tokens.gather(1, path)
            self._target.cache.keep_path(path)
        counts = torch.minimum(accepted + 1, batch.counts)  # none of a row that is finished
        after = torch.nn.functional.pad(tokens[:, 1:], (0, 1))
        after.scatter_(1, accepted[:, None], result.token[:, None])
        with self.clock.phase("draft"):
            self.drafter.extend(features[index], after, counts, max_context_len)  # type: ignore[union-attr]

    def _accept(self, logits: Tensor, drafts: Tensor, proposal: Proposal | None, batch: PackedBatch) -> VerifyResult:
        if self._tree is not None:
            return walk(self._tree, logits.argmax(-1)[batch.index], torch.nn.functional.pad(drafts, (1, 0)))
        lengths = (batch.counts - 1).clamp_min_(0)
        if self.settings.temperature <= 0:
            return verify_greedy(logits, drafts, batch.index, lengths)
        if proposal is None or proposal.probs is None:
            probs = logits.new_zeros(len(drafts), 0, logits.shape[-1])
        else:
            probs = proposal.probs[:, : drafts.shape[1]]
        now = self._uniforms(len(drafts))
        return verify_sampled(logits, drafts, probs, batch.index, lengths, self.settings.temperature, now)


def _up_to_stop(tokens: Sequence[int], stops: frozenset[int]) -> int:
    """How many of ``tokens`` there are up to and with the first stop token; all where there is none."""
    if stops.isdisjoint(tokens):
        return len(tokens)
    return next((count for count, token in enumerate(tokens, 1) if token in stops))
