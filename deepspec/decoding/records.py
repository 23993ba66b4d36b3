"""What goes into decoding and what comes out: settings, requests, rounds, generations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from deepspec.arguments import COUNT, POSITIVE, SEED, SHARE, TEMPERATURE, check_fields
from deepspec.errors import EvaluationError


@dataclass(frozen=True)
class DecodeSettings:
    """How to decode, the same for every prompt of a run.

    Args:
        temperature: 0 is greedy; otherwise the target's logits are divided by it.
        max_new_tokens: the output of a prompt is never longer.
        stop_token_ids: the output ends with the first of these.
        seed: with a request's sample id the key of all its random numbers, so that they do not depend on the batch.
        confidence_threshold: verify only the drafted prefix whose confidences reach it; 0 verifies all.
        confidence_temperatures: one a slot, from Sequential Temperature Scaling; divides the confidence logits.
        capture: on CUDA, capture rounds in graphs and replay them; the outputs are the same.
        tree: draft this static tree, children of every node by depth; empty: a chain. Only at temperature 0.
        release_counting: count as the released implementation does, only to compare with its results: go on until the
            rounds alone reach the limit, and verify what a block drafter proposes after a drafted stop token too.

    Raises:
        EvaluationError: a number out of its range.
    """

    temperature: float = 0.0
    max_new_tokens: int = 2048
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    confidence_threshold: float = 0.0
    confidence_temperatures: tuple[float, ...] | None = None
    release_counting: bool = False
    tree: tuple[int, ...] = ()
    capture: bool = False

    def __post_init__(self) -> None:
        ranges = {"temperature": TEMPERATURE, "max_new_tokens": COUNT, "seed": SEED, "confidence_threshold": SHARE}
        check_fields(self, ranges, EvaluationError)
        for temperature in self.confidence_temperatures or ():
            POSITIVE.check("confidence_temperatures", temperature, EvaluationError)


@dataclass(frozen=True)
class DecodeRequest:
    """A prompt to decode; ``sample_id`` keys its random numbers, ``tag`` comes back with the generation."""

    prompt_ids: tuple[int, ...]
    sample_id: int
    tag: object = None


class Round(NamedTuple):
    """One draft-verify round of one row."""

    sent: tuple[int, ...]  # drafted tokens that the policy admitted; of a tree all nodes, depth by depth
    length: int  # of them, those that count as verified: up to and with a stop token that ends them; of a tree all
    accepted: int
    committed: int  # accepted + 1 bonus token; without the 1 when the last accepted token is a stop token
    emitted: int  # of the committed tokens, those inside the output limit and before the end
    confidence: tuple[float, ...]  # logits of all drafted slots; empty without a confidence head


@dataclass
class Generation:
    """The output of one prompt. ``output_ids`` are the new tokens, the prompt not included."""

    request: DecodeRequest
    output_ids: list[int] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    finish: str = ""  # "stop" or "length"

    @property
    def acceptance_lengths(self) -> list[int]:
        """Tokens each round committed (accepted + bonus), those past the limit included."""
        return [one.committed for one in self.rounds]

    @property
    def proposals(self) -> list[list[int]]:
        """What each round sent to the target: the newest committed token and the drafts up to the first stop token."""
        rows, newest = [], 0
        for one in self.rounds:
            rows.append([self.output_ids[newest], *one.sent[: one.length]])
            newest += one.emitted
        return rows
