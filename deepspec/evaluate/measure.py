"""What is measured of generations: accepted length, acceptance by position, verify rate, times, intervals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

RESAMPLES = 1000  # of the bootstrap
MACRO = "macro"  # the name of the average over tasks
PHASES = ("prefill", "draft", "verify", "head", "other")


@dataclass
class PromptResult:
    """The outcome of one prompt (all its turns) at one temperature: a row of results.jsonl."""

    task: str
    index: int  # the prompt's place in its file or data set
    temperature: float
    output_tokens: int
    committed: list[int]  # tokens of each round, the bonus token included
    proposed: list[int]  # drafted tokens that each round verified
    accepted: list[int]  # of them, accepted
    confidence: list[list[float]] = field(default_factory=list)  # logits of each round's slots
    tree_depth: int | None = None  # the longest path of a draft tree, all of whose nodes are verified; None: a chain
    equal_to_plain: bool | None = None  # greedy output equal to plain decoding, token for token
    finish: str = ""  # of the last turn: "stop", "length", or "positions" where the next turn would not fit the target
    output_sha: str = ""  # of the token ids of all turns
    steps: float = 0.0  # its share of the batch's rounds
    seconds: dict[str, float] = field(default_factory=dict)  # its share of the time, a phase and "total"
    plain_tokens: int | None = None  # of plain decoding of the same prompt
    plain_seconds: float | None = None
    text: str = ""  # the answer to the last turn

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
    accepted_length: float | None  # tokens committed a round; None: no prompt had a round
    interval: tuple[float, float] | None  # 95 %, bootstrap over prompts; None with fewer than two that had a round
    conditional: list[float]  # P(slot k accepted | the slots before it were), k = 1..K
    prefix: list[float]  # P(the first k slots all accepted)
    verify_rate: float | None  # accepted drafted tokens / verified drafted tokens; None: none were verified
    equal_to_plain: float | None  # share of prompts whose greedy output equals plain decoding
    verified_length: float | None = None  # drafted tokens verified a round; None: no round
    seconds: float = 0.0  # of drafted decoding, all processes together
    plain_tokens: int | None = None
    plain_seconds: float | None = None
    speed_up_interval: tuple[float, float] | None = None  # 95 %, bootstrap over prompts
    steps: float = 0.0  # rounds of the batch
    phases: dict[str, float] = field(default_factory=dict)  # seconds of prefill, draft, verify, head, other
    published: float | None = None  # the published accepted length, where it was measured as this one
    published_differs: list[str] = field(default_factory=list)  # why one that there is does not stand here
    without_rounds: int = 0  # prompts whose answer was their first token: they have no accepted length
    cut_short: int = 0  # prompts whose later turns would not have fitted the target's positions
    too_long: int = 0  # prompts left out of the task: they do not fit the target's positions

    @property
    def tokens_per_second(self) -> float:
        """Output tokens a second of drafted decoding, by one process."""
        return self.output_tokens / self.seconds if self.seconds else 0.0

    @property
    def plain_tokens_per_second(self) -> float | None:
        """The same of plain decoding."""
        return self.plain_tokens / self.plain_seconds if self.plain_tokens and self.plain_seconds else None

    @property
    def speed_up(self) -> float | None:
        """Wall-clock: tokens a second drafted / plain, for the same prompts in the same run."""
        plain = self.plain_tokens_per_second
        return self.tokens_per_second / plain if plain and self.seconds else None

    @property
    def milliseconds_per_step(self) -> dict[str, float]:
        """Milliseconds of each phase but prefill a round of the batch, and their ``total``."""
        if not self.steps:
            return {}
        each = {phase: 1000 * self.phases.get(phase, 0.0) / self.steps for phase in PHASES if phase != "prefill"}
        return {**each, "total": sum(each.values())}

    def to_row(self) -> dict[str, Any]:
        """A JSON value, derived figures included."""
        return asdict(self) | {
            "tokens_per_second": self.tokens_per_second,
            "plain_tokens_per_second": self.plain_tokens_per_second,
            "speed_up": self.speed_up,
            "milliseconds_per_step": self.milliseconds_per_step,
        }


def summarise(task: str, temperature: float, results: Sequence[PromptResult], seed: int = 0) -> Summary:
    """Summary of prompts; tokens and rounds are pooled, the interval resamples the prompts that had a round."""
    with_rounds = [result.committed for result in results if result.committed]
    tokens = np.array([sum(committed) for committed in with_rounds], dtype=float)
    rounds = np.array([len(committed) for committed in with_rounds], dtype=float)
    proposed = [count for result in results for count in result.proposed]
    accepted = [count for result in results for count in result.accepted]
    slots = [count for result in results for count in _verified_slots(result)]
    conditional, prefix = by_position(slots, accepted)
    known = [result.equal_to_plain for result in results if result.equal_to_plain is not None]
    summary = Summary(
        task=task,
        temperature=temperature,
        prompts=len(results),
        rounds=int(rounds.sum()),
        output_tokens=sum(result.output_tokens for result in results),
        accepted_length=float(tokens.sum() / rounds.sum()) if with_rounds else None,
        interval=bootstrap(tokens, rounds, seed),
        conditional=conditional,
        prefix=prefix,
        verify_rate=sum(accepted) / sum(proposed) if sum(proposed) else None,
        equal_to_plain=sum(known) / len(known) if known else None,
        verified_length=sum(proposed) / len(proposed) if proposed else None,
        without_rounds=len(results) - len(with_rounds),
        cut_short=sum(result.finish == "positions" for result in results),
    )
    _add_times(summary, results, seed)
    return summary


def _add_times(summary: Summary, results: Sequence[PromptResult], seed: int) -> None:
    summary.steps = sum(result.steps for result in results)
    summary.seconds = sum(result.seconds.get("total", 0.0) for result in results)
    for phase in PHASES:
        summary.phases[phase] = sum(result.seconds.get(phase, 0.0) for result in results)
    plain = [(r.plain_tokens, r.plain_seconds) for r in results if r.plain_tokens is not None]
    if len(plain) < len(results) or not plain or not summary.seconds:
        return
    columns = [
        [float(result.output_tokens) for result in results],
        [result.seconds.get("total", 0.0) for result in results],
        [float(tokens or 0) for tokens, _ in plain],
        [seconds or 0.0 for _, seconds in plain],
    ]
    summary.plain_tokens, summary.plain_seconds = int(sum(columns[2])), sum(columns[3])
    out, seconds, plain_out, plain_seconds = (resampled(np.array(column), seed) for column in columns)
    ratios = out * plain_seconds / np.maximum(1e-12, seconds * plain_out)
    summary.speed_up_interval = quantiles(ratios) if len(results) > 1 else None


def macro_averages(summaries: Sequence[Summary]) -> Iterator[Summary]:
    """One summary ``macro`` per temperature: accepted lengths averaged over tasks, counts and seconds added up."""
    for temperature in dict.fromkeys(summary.temperature for summary in summaries):
        group = [summary for summary in summaries if summary.temperature == temperature]
        mean = _mean([summary.accepted_length for summary in group])
        plain = [s for s in group if s.plain_seconds is not None and s.plain_tokens is not None]
        yield Summary(
            task=MACRO,
            temperature=temperature,
            prompts=sum(summary.prompts for summary in group),
            rounds=sum(summary.rounds for summary in group),
            output_tokens=sum(summary.output_tokens for summary in group),
            accepted_length=mean,
            interval=_macro_interval(mean, group),
            conditional=_positions([summary.conditional for summary in group]),
            prefix=_positions([summary.prefix for summary in group]),
            verify_rate=_mean([summary.verify_rate for summary in group]),
            equal_to_plain=_mean([summary.equal_to_plain for summary in group]),
            verified_length=_mean([summary.verified_length for summary in group]),
            seconds=sum(summary.seconds for summary in group),
            plain_tokens=sum(s.plain_tokens or 0 for s in plain) if len(plain) == len(group) else None,
            plain_seconds=sum(s.plain_seconds or 0.0 for s in plain) if len(plain) == len(group) else None,
            steps=sum(summary.steps for summary in group),
            phases={phase: sum(summary.phases.get(phase, 0.0) for summary in group) for phase in PHASES},
            published=_mean([s.published for s in group]) if all(s.published is not None for s in group) else None,
            without_rounds=sum(summary.without_rounds for summary in group),
            cut_short=sum(summary.cut_short for summary in group),
            too_long=sum(summary.too_long for summary in group),
        )


def _macro_interval(mean: float | None, group: Sequence[Summary]) -> tuple[float, float] | None:
    """Of independent tasks: the variance of the mean is the mean variance over their number. None if one has none."""
    measured = [summary.interval for summary in group if summary.accepted_length is not None]
    known = [interval for interval in measured if interval is not None]
    if mean is None or len(known) < len(measured):
        return None
    half = sum(((high - low) / 2) ** 2 for low, high in known) ** 0.5 / len(known)
    return (mean - half, mean + half)


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean of those that there are; None without any."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _positions(lists: Sequence[Sequence[float]]) -> list[float]:
    """Position by position the mean over the tasks that have it."""
    longest = max(map(len, lists), default=0)
    known = ([one[k] for one in lists if len(one) > k] for k in range(longest))
    return [sum(values) / len(values) for values in known]


def _verified_slots(result: PromptResult) -> Sequence[int]:
    """Slots (of a tree: depths) of each round that could have been accepted; none behind an accepted stop token."""
    if result.tree_depth is None:
        return result.proposed
    rounds = zip(result.committed, result.accepted, strict=True)
    return [accepted if committed == accepted else result.tree_depth for committed, accepted in rounds]


def by_position(proposed: Sequence[int], accepted: Sequence[int]) -> tuple[list[float], list[float]]:
    """(conditional, prefix) acceptance of every slot (of a tree: depth) over rounds that verified it."""
    conditional, prefix = [], []
    pairs = list(zip(proposed, accepted, strict=True))
    for slot in range(1, max(proposed, default=0) + 1):
        verified = [taken for sent, taken in pairs if sent >= slot]
        reached = [taken for taken in verified if taken >= slot - 1]
        conditional.append(sum(taken >= slot for taken in reached) / max(1, len(reached)))
        prefix.append(sum(taken >= slot for taken in verified) / max(1, len(verified)))
    return conditional, prefix


def resampled(values: np.ndarray, seed: int) -> np.ndarray:
    """Sums [RESAMPLES] of as many values, drawn with replacement from [N]; the same draws for the same seed and N."""
    drawn = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    sums: np.ndarray = values[drawn].sum(axis=1)
    return sums


def quantiles(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def bootstrap(numerator: np.ndarray, denominator: np.ndarray, seed: int) -> tuple[float, float] | None:
    """95 % interval of sum(numerator) / sum(denominator), resampling prompts; None with fewer than two of them."""
    if len(numerator) < 2:
        return None
    return quantiles(resampled(numerator, seed) / resampled(denominator, seed))
