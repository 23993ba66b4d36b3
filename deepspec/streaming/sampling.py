"""The target's side of answers: sampled with the hidden states that the target computes while it samples them.

Prompts are answered as regeneration answers them (:mod:`deepspec.data.local`). Every token passes the target once: the
prompt together, each sampled token when the next one is drawn, and after the answer's end the tokens that the chat
template writes there, so that a rendered conversation has the states of all its tokens.

B rows of a batch, n tokens of a pass, s of a conversation, C = L*D values of the L layers, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepspec.cache.parts import next_supervised
from deepspec.cache.reader import stored_view
from deepspec.data.local import AnswerRow, LocalSampler, SamplingRequest
from deepspec.recipe import RegenerateSection
from deepspec.streaming.wire import Arrays, Sampled
from deepspec.targets import Target
from deepspec.targets.positions import known_positions


@dataclass(frozen=True)
class Answering:
    """How the prompts of a request are answered."""

    sampling: RegenerateSection
    seed: int
    stop: tuple[int, ...]  # ids that end an answer
    tail: tuple[int, ...]  # ids that follow an answer in a conversation
    most: int  # tokens of a conversation that have their states sent
    keys: tuple[str, ...]  # of the prompts: with the seed all that their random numbers depend on


class StateSampler(LocalSampler):
    """Samples answers, and keeps what the target computes of prompt, answer and tail.

    Args:
        target: that answers.
        layers: whose outputs are kept.
        answering: of the request.
    """

    def __init__(self, target: Target, layers: Sequence[int], answering: Answering) -> None:
        super().__init__(target.model, answering.stop, answering.sampling, answering.seed, len(answering.keys))
        self.target, self.layers, self.tail = target, tuple(layers), answering.tail

    def next_logits(
        self, rows: Sequence[AnswerRow], ids: Tensor, mask: Tensor, positions: Tensor, cached: dict[str, Any]
    ) -> Tensor:
        """See :meth:`LocalSampler.next_logits`; the states of the tokens that are new go to their rows."""
        past = next(iter(cached.values())) if self.keeps_cache else None
        positions = known_positions(self.target.spec.config, positions)
        output = self.target.forward(ids, self.layers, positions, mask, past_key_values=past)
        is_first = not rows[0].states
        new = ids.shape[1] if is_first else 1
        features, last = (one[:, -new:].contiguous().cpu() for one in (output.features, output.last_hidden))
        for number, row in enumerate(rows):
            if not row.complete:
                own = slice(-len(row.request.input_ids) if is_first else -1, None)
                row.states.append((features[number, own], last[number, own]))
        return self.target.logits(output.last_hidden[:, -1])

    def after_end(self, row: AnswerRow) -> Iterable[int]:
        """The tail; where the answer was cut, its last token too."""
        return (*row.answer[-1:], *self.tail) if row.reason == "length" else self.tail


def answer_states(
    sampler: StateSampler, prompts: Sequence[list[int]], answering: Answering, last_hidden: bool
) -> tuple[list[int], tuple[Sampled, ...], Arrays]:
    """Answer prompts as one batch.

    Returns:
        The tokens that have states, of one conversation after the other; the answers; the states: features [N, C] and
        where ``last_hidden`` the last hidden state of all tokens but each conversation's last.
    """
    requests = [SamplingRequest(key, prompt) for key, prompt in zip(answering.keys, prompts, strict=True)]
    found = {one.request.key: one for one in sampler.answer_batch(requests)}
    tokens: list[int] = []
    lengths, features, last = [], list[Tensor](), list[Tensor]()
    for request in requests:
        made, most = found[request.key], answering.most
        ids = [*request.input_ids, *made.token_ids, *answering.tail][:most]
        tokens += ids
        lengths.append(len(ids))
        features.append(torch.cat([piece for piece, _ in made.states])[:most])
        last.append(torch.cat([piece for _, piece in made.states])[:most])
        made.states.clear()
    kept = None
    if last_hidden:
        rows = torch.from_numpy(next_supervised(torch.ones(len(tokens)).numpy(), lengths))
        kept = stored_view(torch.cat(last)[rows])
    answers = tuple(Sampled(found[key].token_ids, found[key].finish_reason) for key in answering.keys)
    return tokens, answers, Arrays(stored_view(torch.cat(features)), kept)
