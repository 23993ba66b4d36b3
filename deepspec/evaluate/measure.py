"""What is measured of generations: acceptance length, acceptance by position, verify rate, times, intervals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

RESAMPLES = 1000  # of the bootstrap
MACRO = "macro"  # the name of the average over tasks
PHASES = ("prefill", "draft", "verify", "head", "other")
FILE_KEYS = {  # names here -> keys in results.jsonl, results.json and run.json, which older versions wrote too
    "baseline": "plain",
    "acceptance_length": "accepted_length",
    "equal_to_baseline": "equal_to_plain",
    "baseline_tokens": "plain_tokens",
    "baseline_seconds": "plain_seconds",
    "baseline_tokens_per_second": "plain_tokens_per_second",
    "paper_value": "published",
    "paper_differs": "published_differs",
}
_NAMES = {key: name for name, key in FILE_KEYS.items()}


def file_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the keys of the result files."""
    return {FILE_KEYS.get(name, name): value for name, value in values.items()}


def code_names(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a result file by the names in this code."""
    return {_NAMES.get(key, key): value for key, value in row.items()}


@dataclass
class PromptResult:
    """The outcome of one prompt (all its turns) at one temperature: a row of results.jsonl."""

    task: str
    index: int  # of the prompt in its file or data set
    temperature: float
    output_tokens: int
    committed: list[int]  # tokens of each round, the bonus token included
    proposed: list[int]  # drafted tokens that each round verified
    accepted: list[int]  # of them, accepted
    confidence: list[list[float]] = field(default_factory=list)  # logits of each round's slots
    tree_depth: int | None = None  # the longest path of a draft tree, all of whose nodes are verified; None: a chain
    equal_to_baseline: bool | None = None  # greedy output equal to the baseline's, token for token
    difference: dict[str, Any] | None = None  # of a greedy output that is not equal: see deepspec.evaluate.ties
    finish: str = ""  # of the last turn: "stop", "length", or "positions" where the next turn would not fit the target
    output_sha: str = ""  # of the token ids of all turns
    steps: float = 0.0  # its share of the batch's rounds
    seconds: dict[str, float] = field(default_factory=dict)  # its share of the time, a phase and "total"
    latency: dict[str, Any] = field(default_factory=dict)  # of a server: seconds to the "first" token, of "each" after
    baseline_tokens: int | None = None  # of the same prompt decoded without a draft
    baseline_seconds: float | None = None
    text: str = ""  # the answer to the last turn
    turns: list[dict[str, Any]] = field(default_factory=list)  # see deepspec.evaluate.transcript; [] of a server

    def to_row(self) -> dict[str, Any]:
        """A JSON value."""
        return file_keys(asdict(self))

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> PromptResult:
        """What :meth:`to_row` wrote, back."""
        return PromptResult(**code_names(row))


@dataclass
class TaskSummary:
    """Measures over the prompts of one task (or all) at one temperature."""

    task: str
    temperature: float
    prompts: int
    rounds: int
    output_tokens: int
    acceptance_length: float | None  # tokens committed a round; None: no prompt had a round
    interval: tuple[float, float] | None  # 95 %, bootstrap over prompts; None with fewer than two that had a round
    conditional: list[float]  # P(slot k accepted | the slots before it were), k = 1..K
    prefix: list[float]  # P(the first k slots all accepted)
    verify_rate: float | None  # accepted drafted tokens / verified drafted tokens; None: none were verified
    equal_to_baseline: float | None  # share of prompts whose greedy output equals the baseline's
    verified_length: float | None = None  # drafted tokens verified a round; None: no round
    seconds: float = 0.0  # of drafted decoding, all processes together
    baseline_tokens: int | None = None
    baseline_seconds: float | None = None
    speed_up_interval: tuple[float, float] | None = None  # 95 %, bootstrap over prompts
    steps: float = 0.0  # rounds of the batch
    phases: dict[str, float] = field(default_factory=dict)  # seconds of prefill, draft, verify, head, other
    paper_value: float | None = None  # the acceptance length that the paper reports, where it measured as here
    paper_differs: list[str] = field(default_factory=list)  # how else the paper measured
    without_rounds: int = 0  # prompts whose answer was their first token: they have no acceptance length
    cut_short: int = 0  # prompts whose later turns would not have fitted the target's positions
    too_long: int = 0  # prompts left out of the task: they do not fit the target's positions
    equal_or_tied: float | None = None  # share whose greedy output is equal, or differs within the target's rounding
    latency: dict[str, float] = field(default_factory=dict)  # of a server, means: "first_ms", "each_ms"
    beyond_rounding: list[int] = field(default_factory=list)  # prompts whose difference rounding does not explain

    @property
    def tokens_per_second(self) -> float:
        """Output tokens a second of drafted decoding, by one process."""
        return self.output_tokens / self.seconds if self.seconds else 0.0

    @property
    def baseline_tokens_per_second(self) -> float | None:
        """The same of the baseline."""
        return self.baseline_tokens / self.baseline_seconds if self.baseline_tokens and self.baseline_seconds else None

    @property
    def speed_up(self) -> float | None:
        """Wall-clock: tokens a second drafted / baseline, for the same prompts in the same run."""
        baseline = self.baseline_tokens_per_second
        return self.tokens_per_second / baseline if baseline and self.seconds else None

    @property
    def milliseconds_per_step(self) -> dict[str, float]:
        """Milliseconds of each phase but prefill a round of the batch, and their ``total``."""
        if not self.steps:
            return {}
        each = {phase: 1000 * self.phases.get(phase, 0.0) / self.steps for phase in PHASES if phase != "prefill"}
        return {**each, "total": sum(each.values())}

    def to_row(self) -> dict[str, Any]:
        """A JSON value, derived figures included."""
        derived = ("tokens_per_second", "baseline_tokens_per_second", "speed_up", "milliseconds_per_step")
        return file_keys(asdict(self) | {name: getattr(self, name) for name in derived})

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> TaskSummary:
        """What :meth:`to_row` wrote, back."""
        own = {one.name for one in fields(TaskSummary)}
        values = {name: value for name, value in code_names(row).items() if name in own}
        for name in ("interval", "speed_up_interval"):
            values[name] = None if values[name] is None else tuple(values[name])
        return TaskSummary(**values)


def summarise(task: str, temperature: float, results: Sequence[PromptResult], seed: int = 0) -> TaskSummary:
    """Summary of prompts; tokens and rounds are pooled, the interval resamples the prompts that had a round."""
    with_rounds = [result.committed for result in results if result.committed]
    tokens = np.array([sum(committed) for committed in with_rounds], dtype=float)
    rounds = np.array([len(committed) for committed in with_rounds], dtype=float)
    proposed = [count for result in results for count in result.proposed]
    accepted = [count for result in results for count in result.accepted]
    slots = [count for result in results for count in _verified_slots(result)]
    conditional, prefix = by_position(slots, accepted)
    known = [result.equal_to_baseline for result in results if result.equal_to_baseline is not None]
    summary = TaskSummary(
        task=task,
        temperature=temperature,
        prompts=len(results),
        rounds=int(rounds.sum()),
        output_tokens=sum(result.output_tokens for result in results),
        acceptance_length=float(tokens.sum() / rounds.sum()) if with_rounds else None,
        interval=bootstrap(tokens, rounds, seed),
        conditional=conditional,
        prefix=prefix,
        verify_rate=sum(accepted) / sum(proposed) if sum(proposed) else None,
        equal_to_baseline=sum(known) / len(known) if known else None,
        verified_length=sum(proposed) / len(proposed) if proposed else None,
        without_rounds=len(results) - len(with_rounds),
        cut_short=sum(result.finish == "positions" for result in results),
        equal_or_tied=_equal_or_tied(results),
        beyond_rounding=[one.index for one in results if one.difference is not None and not one.difference["tied"]],
    )
    _add_times(summary, results, seed)
    return summary


def _equal_or_tied(results: Sequence[PromptResult]) -> float | None:
    """Share of the greedy outputs; None without any, and where a difference has no explanation (older rows)."""
    known = [result for result in results if result.equal_to_baseline is not None]
    if not known or any(not one.equal_to_baseline and one.difference is None for one in known):
        return None
    return sum(one.difference is None or one.difference["tied"] for one in known) / len(known)


def _add_times(summary: TaskSummary, results: Sequence[PromptResult], seed: int) -> None:
    summary.steps = sum(result.steps for result in results)
    summary.seconds = sum(result.seconds.get("total", 0.0) for result in results)
    for name in ("first", "each"):
        if known := [one.latency[name] for one in results if one.latency.get(name) is not None]:
            summary.latency[f"{name}_ms"] = 1000 * sum(known) / len(known)
    for phase in PHASES:
        summary.phases[phase] = sum(result.seconds.get(phase, 0.0) for result in results)
    baseline = [(r.baseline_tokens, r.baseline_seconds) for r in results if r.baseline_tokens is not None]
    if len(baseline) < len(results) or not baseline or not summary.seconds:
        return
    columns = [
        [float(result.output_tokens) for result in results],
        [result.seconds.get("total", 0.0) for result in results],
        [float(tokens or 0) for tokens, _ in baseline],
        [seconds or 0.0 for _, seconds in baseline],
    ]
    summary.baseline_tokens, summary.baseline_seconds = int(sum(columns[2])), sum(columns[3])
    out, seconds, baseline_out, baseline_seconds = (resampled(np.array(column), seed) for column in columns)
    ratios = out * baseline_seconds / np.maximum(1e-12, seconds * baseline_out)
    summary.speed_up_interval = quantiles(ratios) if len(results) > 1 else None


def macro_averages(summaries: Sequence[TaskSummary]) -> Iterator[TaskSummary]:
    """One summary ``macro`` per temperature: acceptance lengths averaged over tasks, counts and seconds added up."""
    sums = ("prompts", "rounds", "output_tokens", "seconds", "steps", "without_rounds", "cut_short", "too_long")
    means = ("acceptance_length", "verify_rate", "equal_to_baseline", "equal_or_tied", "verified_length")
    baseline = ("baseline_tokens", "baseline_seconds")
    for temperature in dict.fromkeys(summary.temperature for summary in summaries):
        group = [summary for summary in summaries if summary.temperature == temperature]
        columns = {
            name: [getattr(summary, name) for summary in group] for name in (*sums, *means, *baseline, "paper_value")
        }
        values: dict[str, Any] = {name: sum(columns[name]) for name in sums}
        values |= {name: _mean(columns[name]) for name in means}
        if None not in columns["baseline_seconds"]:
            values |= {name: sum(columns[name]) for name in baseline}
        if None not in columns["paper_value"]:
            values["paper_value"] = _mean(columns["paper_value"])
        yield TaskSummary(
            task=MACRO,
            temperature=temperature,
            interval=_macro_interval(values["acceptance_length"], group),
            conditional=_positions([summary.conditional for summary in group]),
            prefix=_positions([summary.prefix for summary in group]),
            phases={phase: sum(summary.phases.get(phase, 0.0) for summary in group) for phase in PHASES},
            **values,
        )


def _macro_interval(mean: float | None, group: Sequence[TaskSummary]) -> tuple[float, float] | None:
    """Of independent tasks: the variance of the mean is the mean variance over their number. None if one has none."""
    measured = [summary.interval for summary in group if summary.acceptance_length is not None]
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
    """Slots (of a tree: depths) of each round that could have been accepted; none after an accepted stop token."""
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
    return np.asarray(values[drawn].sum(axis=1))


def quantiles(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def bootstrap(numerator: np.ndarray, denominator: np.ndarray, seed: int) -> tuple[float, float] | None:
    """95 % interval of sum(numerator) / sum(denominator), resampling prompts; None with fewer than two of them."""
    if len(numerator) < 2:
        return None
    return quantiles(resampled(numerator, seed) / resampled(denominator, seed))
