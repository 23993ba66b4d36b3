"""What is measured of generations: accepted length, acceptance by position, verify rate, confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

RESAMPLES = 1000  # of the bootstrap


@dataclass
class PromptResult:
    """The outcome of one prompt (all its turns) at one temperature: a row of results.jsonl."""

    task: str
    index: int
    temperature: float
    output_tokens: int
    committed: list[int]  # tokens of each round, the bonus token included
    proposed: list[int]  # drafted tokens that each round verified
    accepted: list[int]  # of them, accepted
    confidence: list[list[float]] = field(default_factory=list)  # logits of each round's slots
    equal_to_plain: bool | None = None  # greedy output equal to plain decoding, token for token
    text: str = ""

    def to_row(self) -> dict[str, Any]:
        """A JSON value."""
        return asdict(self)


@dataclass
class Summary:
    """Measures over the prompts of one task (or all) at one temperature."""

    task: str
    temperature: float
    prompts: int
    rounds: int
    output_tokens: int
    accepted_length: float  # tokens committed a round
    interval: tuple[float, float]  # 95 %, bootstrap over prompts
    conditional: list[float]  # P(slot k accepted | the slots before it were), k = 1..K
    prefix: list[float]  # P(the first k slots all accepted)
    verify_rate: float  # accepted drafted tokens / verified drafted tokens
    equal_to_plain: float | None  # share of prompts whose greedy output equals plain decoding
    seconds: float = 0.0
    plain_seconds: float | None = None
    phases: dict[str, float] = field(default_factory=dict)  # seconds of prefill, draft, verify, head, other

    @property
    def tokens_per_second(self) -> float:
        """Output tokens a second of drafted decoding."""
        return self.output_tokens / self.seconds if self.seconds else 0.0

    @property
    def speed_up(self) -> float | None:
        """Wall-clock: plain seconds / drafted seconds for the same prompts in the same run."""
        return self.plain_seconds / self.seconds if self.plain_seconds and self.seconds else None

    def to_row(self) -> dict[str, Any]:
        """A JSON value, derived figures included."""
        return asdict(self) | {"tokens_per_second": self.tokens_per_second, "speed_up": self.speed_up}


def summarise(task: str, temperature: float, results: Sequence[PromptResult], seed: int = 0) -> Summary:
    """Summary of prompts; tokens and rounds are pooled, the interval resamples prompts."""
    tokens = np.array([sum(result.committed) for result in results], dtype=float)
    rounds = np.array([len(result.committed) for result in results], dtype=float)
    proposed = [count for result in results for count in result.proposed]
    accepted = [count for result in results for count in result.accepted]
    conditional, prefix = by_position(proposed, accepted)
    known = [result.equal_to_plain for result in results if result.equal_to_plain is not None]
    return Summary(
        task=task,
        temperature=temperature,
        prompts=len(results),
        rounds=int(rounds.sum()),
        output_tokens=sum(result.output_tokens for result in results),
        accepted_length=float(tokens.sum() / max(1.0, rounds.sum())),
        interval=bootstrap(tokens, rounds, seed),
        conditional=conditional,
        prefix=prefix,
        verify_rate=sum(accepted) / max(1, sum(proposed)),
        equal_to_plain=sum(known) / len(known) if known else None,
    )


def by_position(proposed: Sequence[int], accepted: Sequence[int]) -> tuple[list[float], list[float]]:
    """(conditional, prefix) acceptance of every slot over rounds; a slot counts where it was verified."""
    conditional, prefix = [], []
    pairs = list(zip(proposed, accepted, strict=True))
    for slot in range(1, max(proposed, default=0) + 1):
        verified = [taken for sent, taken in pairs if sent >= slot]
        reached = [taken for taken in verified if taken >= slot - 1]
        conditional.append(sum(taken >= slot for taken in reached) / max(1, len(reached)))
        prefix.append(sum(taken >= slot for taken in verified) / max(1, len(verified)))
    return conditional, prefix


def bootstrap(numerator: np.ndarray, denominator: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % interval of sum(numerator) / sum(denominator), resampling the prompts."""
    if len(numerator) == 0:
        return (0.0, 0.0)
    drawn = np.random.default_rng(seed).integers(0, len(numerator), (RESAMPLES, len(numerator)))
    ratios = numerator[drawn].sum(axis=1) / np.maximum(1.0, denominator[drawn].sum(axis=1))
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)
