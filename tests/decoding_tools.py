"""Exact distributions of short outputs and the chi-square test against them, for the tests of losslessness."""

from __future__ import annotations

import torch

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
