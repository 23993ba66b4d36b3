"""A drafter from a table; exact distributions of short outputs and the chi-square test against them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from deepspec.targets.load import Target


def exact_joint(target: Target, prompt: list[int], length: int, temperature: float) -> dict[tuple[int, ...], float]:
    """Probability of every output of ``length`` tokens, by enumeration."""
    vocab = target.spec.vocab_size
    joint = {(): 1.0}
    for _ in range(length):
        prefixes = list(joint)
        ids = torch.tensor([[*prompt, *prefix] for prefix in prefixes])
        logits = target.logits(target.forward(ids, ()).last_hidden[:, -1]).double() / temperature
        probs = torch.softmax(logits, -1)
        joint = {
            (*prefix, token): joint[prefix] * float(probs[row, token])
            for row, prefix in enumerate(prefixes)
            for token in range(vocab)
        }
    return joint


def chi_square(observed: dict[tuple[int, ...], int], joint: dict[tuple[int, ...], float]) -> float:
    """p-value of the counts under the joint distribution; cells expecting under 5 are pooled."""
    total = sum(observed.values())
    statistic, cells, rest_seen, rest_expected = 0.0, 0, 0, 0.0
    for outcome, probability in joint.items():
        expected, seen = total * probability, observed.get(outcome, 0)
        if expected < 5:
            rest_seen, rest_expected = rest_seen + seen, rest_expected + expected
        else:
            statistic, cells = statistic + (seen - expected) ** 2 / expected, cells + 1
    if rest_expected > 1:
        statistic, cells = statistic + (rest_seen - rest_expected) ** 2 / rest_expected, cells + 1
    return float(
        torch.special.gammaincc(torch.tensor((cells - 1) / 2.0).double(), torch.tensor(statistic / 2).double())
    )


@dataclass
class FakeProposal:
    tokens: Tensor
    probs: Tensor | None
    confidence_logits: Tensor | None


class FakeDrafter:
    """Drafts token after token from a table q(next | previous); its confidences depend on the previous token.

    It keeps what it was given, so that a test can compare it with the target's own features.
    """

    max_children = 0

    def __init__(
        self, table: Tensor, rows: int, max_draft: int, confidence: Tensor | None = None, layers=(0, 2)
    ) -> None:
        self.table, self.max_draft, self.confidence = table, max_draft, confidence
        self.model = SimpleNamespace(config=SimpleNamespace(target_layers=layers))
        self.features: list[list[Tensor]] = [[] for _ in range(rows)]
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.contexts: list[tuple[list[Tensor], list[int]]] = []  # of every prompt, in the order of entering

    def reset_rows(self, rows: Tensor) -> None:
        for row in rows.tolist():
            self.features[row], self.tokens[row] = [], []
            self.contexts.append((self.features[row], self.tokens[row]))

    def move_rows(self, source: Tensor, target: Tensor) -> None:
        for old, new in zip(source.tolist(), target.tolist(), strict=True):
            self.features[new], self.tokens[new] = self.features[old], self.tokens[old]

    def extend(self, features: Tensor, tokens: Tensor, counts: Tensor, reach: int, rows: Tensor | None = None) -> None:
        for place, count in enumerate(counts.tolist()):
            row = place if rows is None else int(rows[place])
            self.features[row] += features[place, :count]
            self.tokens[row] += tokens[place, :count].tolist()
            assert len(self.tokens[row]) - count + features.shape[1] <= reach

    def propose(self, last_token: Tensor, sample, max_draft: int | None = None) -> FakeProposal:
        tokens, probs, confidence, previous = [], [], [], last_token
        for slot in range(self.max_draft if max_draft is None else max_draft):
            if self.confidence is not None:
                confidence.append(self.confidence[slot, previous])
            previous, distribution = sample(self.table[previous], slot)
            tokens.append(previous)
            probs.append(distribution)
        return FakeProposal(
            torch.stack(tokens, 1),
            None if probs[0] is None else torch.stack(probs, 1),
            torch.stack(confidence, 1) if confidence else None,
        )
