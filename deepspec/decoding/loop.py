"""The draft-verify loop: B rows, each at its own place; rows leave when done and new prompts enter.

A round is: the draft proposes; the host reads once what the previous round committed and what is proposed now; finished
rows leave and the policy says how many tokens of each row to verify; the target runs over exactly those tokens; they
are accepted or rejected on the device. That one reading is the only synchronisation of a round. Plain decoding of the
target is the same loop without a drafter.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from deepspec.decoding.clock import PhaseClock
from deepspec.decoding.kv import PackedTarget, Step
from deepspec.decoding.records import DecodeSettings, Generation, Request, Round
from deepspec.decoding.scheduler import FixedLength, Policy, Threshold
from deepspec.decoding.verify import Uniforms, Verdict, sample, verify_greedy, verify_sampled
from deepspec.errors import DataError
from deepspec.targets.load import Target

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
) -> list[Generation]:
    """Decode prompts (token ids; the sample id is the place in the list) and return their generations in that order.

    ``drafter`` None decodes the target alone; otherwise it was made for ``batch_size`` rows.

    Raises:
        DataError: an empty prompt.
    """
    decoder = Decoder(target, drafter, settings, batch_size, policy)
    requests = deque(Request(tuple(prompt), number) for number, prompt in enumerate(prompts))
    done = sorted(decoder.stream(requests), key=lambda generation: generation.request.sample_id)
    return list(done)


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
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        settings: DecodeSettings,
        batch_size: int = 1,
        policy: Policy | None = None,
    ) -> None:
        self.target, self.drafter, self.settings, self.batch_size = target, drafter, settings, batch_size
        threshold = settings.confidence_threshold
        self.policy: Policy = policy or (Threshold(threshold) if threshold > 0 and drafter else FixedLength())
        self.clock = PhaseClock(target.device)
        self._slots = drafter.max_draft if drafter else 0
        if self.policy.max_draft is not None:
            self._slots = min(self._slots, self.policy.max_draft)
        self._stops = frozenset(settings.stop_token_ids)
        self._stop_array = np.array(sorted(self._stops), dtype=np.int64)
        self._rows: list[_Row | None] = [None] * batch_size
        self._limit = settings.max_new_tokens + 2  # rows of the table of random numbers
        device = target.device
        self._last = torch.zeros(batch_size, dtype=torch.long, device=device)  # [B] newest committed token
        self._verdict = Verdict(self._last, self._last)
        self._round = torch.zeros(batch_size, dtype=torch.long, device=device)  # [B] rounds of the row so far
        self._every_row = torch.arange(batch_size, device=device)
        width = 2 * self._slots + 1 if settings.temperature > 0 else 0
        self._table = torch.zeros(batch_size, self._limit, width, dtype=torch.float64, device=device)
        self._packed: PackedTarget | None = None

    @torch.inference_mode()
    def stream(self, requests: deque[Request]) -> Iterator[Generation]:
        """Yield generations as they finish. The caller may append to ``requests`` while it iterates (next turns)."""
        while requests or any(self._rows):
            start = time.perf_counter()
            self._enter(requests)
            proposal = self._propose()
            finished, drafts = self._settle(proposal)
            self._verify(proposal, drafts)
            self.clock.wall += time.perf_counter() - start
            yield from finished

    def _enter(self, requests: deque[Request]) -> None:
        """Fill free rows with waiting requests and run their prompts."""
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

    def _start(self, row: int, request: Request) -> None:
        if not request.prompt_ids:
            raise DataError("an empty prompt cannot be decoded", key=f"sample {request.sample_id}")
        if self._packed is None:
            layers = self.drafter.model.config.target_layers if self.drafter else ()  # type: ignore[attr-defined]
            room = len(request.prompt_ids) + min(self.settings.max_new_tokens, 512) + self._slots + 1
            self._packed = PackedTarget(self.target, layers, self.batch_size, room)
        self._packed.cache.clear(row)
        self._rows[row] = _Row(Generation(request))
        if self._table.shape[2]:
            key = np.array([self.settings.seed, request.sample_id], dtype=np.uint64)
            numbers = np.random.Generator(np.random.Philox(key=key)).random(self._table.shape[1:])
            self._table[row] = torch.from_numpy(numbers).to(self.target.device, non_blocking=True)
        self._round[row] = 0

    def _prefill(self, entering: list[int]) -> None:
        """Run the prompts of ``entering`` rows in chunks, and sample each row's first token."""
        prompts = {row: self._rows[row].generation.request.prompt_ids for row in entering}  # type: ignore[union-attr]
        device = self.target.device
        for offset in range(0, max(map(len, prompts.values())), PREFILL_CHUNK):
            chunk = {row: ids[offset : offset + PREFILL_CHUNK + 1] for row, ids in prompts.items() if len(ids) > offset}
            counts = np.zeros(self.batch_size, dtype=np.int64)
            for row, ids in chunk.items():
                counts[row] = min(len(ids), PREFILL_CHUNK)
            step = self._target.cache.plan(counts)
            flat = [token for row in sorted(chunk) for token in chunk[row][: counts[row]]]
            output = self._target.forward(step, torch.tensor(flat, device=device))
            ending = torch.tensor([row for row, ids in chunk.items() if len(ids) <= PREFILL_CHUNK], device=device)
            if len(ending):
                ends = step.starts[ending] + step.counts[ending] - 1
                self._last[ending] = self._first_tokens(output.last_hidden[ends], ending)
                self._round[ending] = 1
            if self.drafter is not None:
                after = torch.zeros(self.batch_size, step.queries, dtype=torch.long)
                for row, ids in chunk.items():
                    after[row, : len(ids) - 1] = torch.tensor(ids[1:])
                after = after.to(device)
                after[ending, step.counts[ending] - 1] = self._last[ending]
                self.drafter.extend(self._per_row(output.features, step, step.counts), after, step.counts)
            self._target.cache.commit(counts)
        self._verdict = Verdict(self._verdict.accepted, self._last.clone())

    @property
    def _target(self) -> PackedTarget:
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
        """Draft for every row; rows that turn out to be finished drafted in vain."""
        if self.drafter is None or not self._slots:
            return None
        with self.clock.phase("draft"):
            return self.drafter.propose(self._last, self._sample_draft, self._slots)

    def _uniforms(self) -> Uniforms:
        now = self._table[self._every_row, self._round.clamp_max(self._limit - 1)]
        return Uniforms(now[:, : self._slots], now[:, self._slots : 2 * self._slots], now[:, -1])

    def _sample_draft(self, logits: Tensor, slot: int) -> tuple[Tensor, Tensor | None]:
        """The draft's sampler: token [B] and, at a temperature, the distribution [B, V] it came from."""
        if self.settings.temperature <= 0:
            return logits.argmax(-1), None
        probs = torch.softmax(logits.float() / self.settings.temperature, -1)
        if slot == 0:
            self._now = self._uniforms()
        return sample(probs, self._now.draft[:, slot]), probs

    def _settle(self, proposal: Proposal | None) -> tuple[list[Generation], np.ndarray]:
        """Read the last verdict and this proposal (the one synchronisation) and plan what to verify.

        Returns the generations that are finished, and the drafts [B, K] on the host.
        """
        columns = [self._verdict.accepted[:, None], self._verdict.token[:, None]]
        confidence = None
        if proposal is not None:
            columns.append(proposal.tokens)
            confidence = proposal.confidence_logits
        parts = [column.double() for column in columns]  # token ids are exact in float64, so one copy brings all
        if confidence is not None:
            parts.append(confidence.double())
        packet = torch.cat(parts, dim=1).cpu().numpy()
        self.clock.collect()
        drafted = 0 if proposal is None else proposal.tokens.shape[1]
        numbers = packet[:, : 2 + drafted].astype(np.int64)
        accepted, tokens, drafts = numbers[:, 0], numbers[:, 1], numbers[:, 2:]
        finished = self._record(accepted, tokens)
        self._admit(drafts, packet[:, 2 + drafted :] if confidence is not None else None)
        return finished, drafts

    def _record(self, accepted: np.ndarray, tokens: np.ndarray) -> list[Generation]:
        """Append what the last forward committed to each row; free the rows that are finished."""
        finished = []
        kept = np.zeros(self.batch_size, dtype=np.int64)
        for number, row in enumerate(self._rows):
            if row is None:
                continue
            if row.sent is None:
                self._append(row.generation, [int(tokens[number])])
            else:
                count = int(accepted[number])
                kept[number] = count + 1
                committed = list(row.sent[:count])
                if not (committed and committed[-1] in self._stops):
                    committed.append(int(tokens[number]))
                emitted = self._append(row.generation, committed)
                record = Round(row.sent, row.length, count, len(committed), emitted, row.confidence)
                row.generation.rounds.append(record)
            if self._is_full(row.generation):
                row.generation.finish = row.generation.finish or "length"
            if row.generation.finish:
                finished.append(row.generation)
                self._rows[number] = None
        if self._packed is not None:
            self._packed.cache.commit(kept)
        return finished

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
        return len(generation.output_ids) - before

    def _is_full(self, generation: Generation) -> bool:
        if self.settings.published_limit:
            return sum(generation.acceptance_lengths) >= self.settings.max_new_tokens
        return len(generation.output_ids) >= self.settings.max_new_tokens

    def _admit(self, drafts: np.ndarray, logits: np.ndarray | None) -> None:
        """Let the policy choose how many drafts of each row to verify; nothing behind a drafted stop token is."""
        numbers = [number for number, row in enumerate(self._rows) if row is not None]
        if not numbers:
            return
        own = drafts[numbers]
        confidence = None
        if logits is not None:
            scale = np.ones(drafts.shape[1])
            if self.settings.confidence_temperatures is not None:
                scale = np.asarray(self.settings.confidence_temperatures[: drafts.shape[1]])
            confidence = 1 / (1 + np.exp(-logits[numbers] / scale))
        lengths = self.policy.admit(confidence, own.shape[1], len(numbers)) if own.shape[1] else [0] * len(numbers)
        stops = np.isin(own, self._stop_array) if len(self._stop_array) and own.shape[1] else None
        for place, number in enumerate(numbers):
            row = self._rows[number]
            sent = tuple(own[place, : lengths[place]].tolist())
            length = len(sent)
            if stops is not None and stops[place, :length].any():
                length = int(stops[place].argmax()) + 1
            row.sent, row.length = sent, length  # type: ignore[union-attr]
            row.confidence = () if logits is None else tuple(logits[number].tolist())  # type: ignore[union-attr]

    def _verify(self, proposal: Proposal | None, drafts: np.ndarray) -> None:
        """Run the target over the newest token and the admitted drafts of each row, and accept on the device."""
        counts = np.array([0 if row is None else row.length + 1 for row in self._rows], dtype=np.int64)
        if not counts.any():
            return
        step = self._target.cache.plan(counts)
        tokens = self._last[:, None]
        if proposal is not None:
            tokens = torch.cat((tokens, proposal.tokens), dim=1)
        with self.clock.phase("verify"):
            output = self._target.forward(step, tokens[:, : step.queries].reshape(-1)[step.grid])
        with self.clock.phase("head"):
            logits = self.target.logits(output.last_hidden)
        verdict = self._judge(logits, proposal, step)
        active = step.counts > 0
        self._last = torch.where(active, verdict.token, self._last)
        self._round += active
        self._verdict = verdict
        if self.drafter is not None:
            kept = torch.where(active, verdict.accepted + 1, 0)
            after = torch.nn.functional.pad(tokens[:, 1 : step.queries], (0, 1))
            after.scatter_(1, verdict.accepted[:, None], verdict.token[:, None])
            with self.clock.phase("draft"):
                self.drafter.extend(self._per_row(output.features, step, kept), after, kept)
        self.clock.rounds += 1
        self.clock.row_rounds += int((counts > 0).sum())
        self.clock.verified += int(counts.sum())

    def _judge(self, logits: Tensor, proposal: Proposal | None, step: Step) -> Verdict:
        lengths = (step.counts - 1).clamp_min(0)
        sent = step.queries - 1
        drafts = self._last.new_zeros(self.batch_size, 0) if proposal is None else proposal.tokens[:, :sent]
        if self.settings.temperature <= 0:
            return verify_greedy(logits, drafts, step.starts, lengths)
        if proposal is None or proposal.probs is None:
            probs, self._now = logits.new_zeros(self.batch_size, 0, logits.shape[-1]), self._uniforms()
        else:
            probs = proposal.probs[:, :sent]
        return verify_sampled(logits, drafts, probs, step.starts, lengths, self.settings.temperature, self._now)

    @staticmethod
    def _per_row(features: Tensor, step: Step, counts: Tensor) -> Tensor:
        """Packed features [T, F] as [B, Q, F]; rows with fewer than Q repeat their last one."""
        slots = torch.arange(step.queries, device=features.device)
        index = step.starts[:, None] + torch.minimum(slots, (counts - 1).clamp_min(0)[:, None])
        return features[index]
