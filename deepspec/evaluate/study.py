"""The scheduler study: tokens/s of each verification policy under load, on this machine.

It profiles the seconds of a round once (``profile.py``), then decodes the same prompts at every concurrency with fixed
lengths, a confidence threshold, and the scheduler that admits tokens by expected throughput. Policies take turns, many
times, so that other load on the machine hits all of them alike. Measured are the rounds up to where the queue runs
empty, prefill left out; on a CPU with one thread in seconds of the process, else in wall-clock seconds.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepspec.algorithms.base import DraftModel
from deepspec.arguments import COUNT, SHARE, TOGETHER, check_fields
from deepspec.data.chat import Renderer
from deepspec.decoding.clock import StepTiming
from deepspec.decoding.loop import Decoder
from deepspec.decoding.records import DecodeRequest, DecodeSettings
from deepspec.decoding.scheduler import FixedLength, Policy, StepCosts, Threshold, Throughput
from deepspec.drafts import load_draft
from deepspec.errors import EvaluationError
from deepspec.evaluate.calibration import load_sts
from deepspec.evaluate.measure import bootstrap
from deepspec.evaluate.profile import profile
from deepspec.evaluate.results import environment
from deepspec.evaluate.run import Models
from deepspec.evaluate.tasks import load_tasks
from deepspec.files import write_bytes, write_json, write_text
from deepspec.locks import one_writer
from deepspec.pages import saved
from deepspec.progress import Progress
from deepspec.tables import Table
from deepspec.targets import Target
from deepspec.targets.positions import fitting

log = logging.getLogger(__name__)

SCHEDULER = "expected throughput"
SURE = 0.01  # a ratio is reported where its 95 % interval is this narrow
Line = tuple[str, Any, Any]  # label, x and y of a plotted line


@dataclass(frozen=True)
class StudyOptions(Models):
    """The settings of a study.

    Raises:
        EvaluationError: a number out of its range, or a concurrency named twice.
    """

    temperature: float = 0.0
    max_new_tokens: int = 256
    concurrency: tuple[int, ...] = (1, 4, 16, 64)
    repeats: int = 10  # of every policy
    most_repeats: int = 30  # where so few differ too much to tell
    threshold: float = 0.5

    def __post_init__(self) -> None:
        TOGETHER.check_each("concurrency", self.concurrency, EvaluationError)
        counts = dict.fromkeys(("samples", "repeats", "most_repeats"), COUNT)
        check_fields(self, counts | {"threshold": SHARE}, EvaluationError)


@dataclass(frozen=True)
class Bench:
    """Everything that stays the same between the runs of a study."""

    target: Target
    draft: DraftModel
    settings: DecodeSettings
    prompts: tuple[tuple[int, ...], ...]

    @property
    def slots(self) -> int:
        """K."""
        return int(self.draft.config.max_draft)

    @property
    def clock(self) -> Callable[[], float]:
        """The process's own time on a CPU with one thread, else wall-clock time."""
        alone = self.target.device.type == "cpu" and torch.get_num_threads() == 1
        return time.process_time if alone else time.perf_counter

    def run(self, policy: Policy, concurrency: int, rounds: int | None = None, attempt: int = 0) -> list[StepTiming]:
        """Decode at ``concurrency`` and return the timings until no prompt waits, or of ``rounds`` rounds.

        Raises:
            EvaluationError: no round was timed.
        """
        count = concurrency + max(24, concurrency)  # short attempts and many: load on the machine hits all policies
        requests = deque(DecodeRequest(ids, number) for number, ids in enumerate(islice(cycle(self.prompts), count)))
        longest = max(map(len, self.prompts)) + self.settings.max_new_tokens + self.slots + 2
        drafter = self.draft.algorithm.drafter(self.draft, concurrency, longest)
        settings = replace(self.settings, seed=self.settings.seed + attempt)  # another attempt, another sample
        decoder = Decoder(self.target, drafter, settings, concurrency, policy)
        timings: list[StepTiming] = []
        decoder.clock.now, decoder.clock.timings = self.clock, timings
        for _ in decoder.stream(requests):
            if not requests or (rounds is not None and len(timings) >= rounds):
                break
        measured = [timing for timing in timings[:rounds] if timing.rows]
        if not measured:
            raise EvaluationError("nothing to measure: every answer was one token", remedy="raise --max-new-tokens")
        return measured


def compare(bench: Bench, costs: StepCosts, options: StudyOptions) -> list[dict[str, Any]]:
    """Every policy at every concurrency; a row each.

    All run ``options.repeats`` times, then those at loads whose ratio is not sure yet, ``most_repeats`` times in all.
    """
    policies: dict[str, Policy] = {f"fixed {k}": FixedLength(k) for k in range(1, bench.slots + 1)}
    policies |= {f"threshold {options.threshold:g}": Threshold(options.threshold), SCHEDULER: Throughput(costs)}
    runs: dict[tuple[int, str], list[list[StepTiming]]] = {
        (c, name): [] for c in options.concurrency for name in policies
    }
    progress = Progress("policies", None, "rounds")
    unsure = list(options.concurrency)
    for repeat in range(max(options.repeats, options.most_repeats)):
        order = [(c, name) for c, name in runs if c in unsure]
        for c, name in order if repeat % 2 == 0 else order[::-1]:
            runs[c, name].append(bench.run(policies[name], c, attempt=repeat))
            progress.add(1, len(runs[c, name][-1]))
        if repeat + 1 >= options.repeats:
            seen = judge([_row(*key, attempts) for key, attempts in runs.items() if key[0] in unsure])
            unsure = [finding["concurrency"] for finding in seen if not finding["sure"]]
        if not unsure:
            break
    progress.finish()
    return [_row(c, name, attempts) for (c, name), attempts in runs.items()]


def _row(concurrency: int, policy: str, attempts: Sequence[Sequence[StepTiming]]) -> dict[str, Any]:
    rates = [sum(one.emitted for one in timings) / sum(one.seconds for one in timings) for timings in attempts]
    timings = [one for attempt in attempts for one in attempt]
    rows = sum(one.rows for one in timings)
    return {
        "concurrency": concurrency,
        "policy": policy,
        "tokens_per_second": float(np.median(rates)),
        "attempts": rates,
        "verified_per_request": sum(one.verified for one in timings) / rows - 1,  # drafted tokens a round
        "accepted_length": sum(one.emitted for one in timings) / rows,
        "rounds_per_second": len(timings) / sum(one.seconds for one in timings),
        "mean_rows": rows / len(timings),
    }


def judge(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is known of the scheduler against the best fixed length, a row a concurrency.

    ``ratio`` of their tokens per second is the mean over attempts (pairs that ran in the same minutes), with its 95 %
    ``interval``. It is ``sure`` where the interval is at most ``SURE`` wide to either side, or that far from 1.
    """
    findings = []
    for c in dict.fromkeys(row["concurrency"] for row in rows):
        group = [row for row in rows if row["concurrency"] == c]
        fixed = [row for row in group if row["policy"].startswith("fixed")]
        best = max(fixed, key=lambda row: row["tokens_per_second"])
        own = next(row for row in group if row["policy"] == SCHEDULER)
        ratios = np.array(own["attempts"]) / np.array(best["attempts"])
        interval = bootstrap(ratios, np.ones(len(ratios)), 0)
        low, high = interval or (0.0, np.inf)
        narrow = max(high - ratios.mean(), ratios.mean() - low) <= SURE
        findings.append(
            {
                "concurrency": c,
                "best": best["policy"],
                "ratio": float(ratios.mean()),
                "interval": interval,
                "attempts": len(ratios),
                "sure": bool(narrow or low > 1 + SURE or high < 1 - SURE),
            }
        )
    return findings


def sentence(finding: dict[str, Any]) -> str:
    """A finding in words; or that the attempts differ too much for one."""
    c, best, interval = finding["concurrency"], finding["best"], finding["interval"]
    where = f"{c} {'request' if c == 1 else 'requests together'}"
    tried = f"{finding['attempts']} attempts"
    if interval is None:
        return f"{where}: one attempt says nothing about the spread."
    low, high = (f"{100 * (end - 1):+.1f} %" for end in interval)
    if not finding["sure"]:
        return f"{where}: the machine was too noisy to tell scheduler and {best} apart ({low} to {high}, {tried})."
    if interval[0] <= 1 <= interval[1]:
        return f"{where}: the scheduler is as fast as {best}, the best fixed length ({low} to {high}, {tried})."
    change = f"{100 * abs(finding['ratio'] - 1):.1f} % {'faster' if finding['ratio'] > 1 else 'slower'}"
    return f"{where}: the scheduler is {change} than {best}, the best fixed length ({low} to {high}, {tried})."


def markdown(study: dict[str, Any]) -> str:
    """Tables: tokens/s, verified drafted tokens a request and round, acceptance length; then a sentence a load."""
    rows = study["rows"]
    loads = list(dict.fromkeys(row["concurrency"] for row in rows))
    titles = {
        "tokens_per_second": ("Tokens/s", ",.0f"),
        "verified_per_request": ("Verified a request and round", ".2f"),
        "accepted_length": ("Acceptance length", ".2f"),
    }
    parts = []
    for key, (title, form) in titles.items():
        cells = []
        for policy in dict.fromkeys(row["policy"] for row in rows):
            values = {row["concurrency"]: row[key] for row in rows if row["policy"] == policy}
            cells.append([policy, *(format(values[c], form) for c in loads)])
        parts.append(f"{title}, by requests decoding together\n\n" + Table(["policy", *loads], cells).markdown())
    parts.append("\n".join(f"- {sentence(finding)}" for finding in study["findings"]))
    return "\n\n".join(parts)


def plot(study: dict[str, Any], output: Path) -> None:
    """``throughput.png``, ``verified.png``, ``trade.png`` and ``costs.png``."""
    rows = [row | {"per_request": row["tokens_per_second"] / row["mean_rows"]} for row in study["rows"]]

    def by_policy(x: str, y: str) -> list[Line]:
        policies = dict.fromkeys(row["policy"] for row in rows)
        own = {policy: [row for row in rows if row["policy"] == policy] for policy in policies}
        return [(policy, [row[x] for row in some], [row[y] for row in some]) for policy, some in own.items()]

    costs = [(f"{n} rows", tokens, 1 / np.array(spent)) for n, (tokens, spent) in study["costs"]["table"].items()]
    load, verified = "requests decoding together", "drafted tokens verified a request and round"
    plots: dict[str, tuple[list[Line], str, str]] = {
        "throughput": (by_policy("concurrency", "tokens_per_second"), load, "tokens/s"),
        "verified": (by_policy("concurrency", "verified_per_request"), load, verified),
        "trade": (by_policy("per_request", "tokens_per_second"), "tokens/s of a request", "tokens/s of all"),
        "costs": (costs, "tokens of a verify step", "steps/s"),
    }
    for name, (lines, *labels) in plots.items():

        def draw(axes: Any, lines: list[Line] = lines, labels: list[str] = labels, name: str = name) -> None:
            for label, x, y in lines:
                axes.plot(x, y, marker="o", label=label, linewidth=2.5 if label == SCHEDULER else 1.0)
            axes.set(xlabel=labels[0], ylabel=labels[1], xscale="linear" if name == "trade" else "log")
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")

        write_bytes(output / f"{name}.png", saved(draw, (6.4, 4.0), "png"))


def run_study(options: StudyOptions) -> dict[str, Any]:
    """Profile, compare, and write ``costs.json``, ``study.json``, ``study.md`` and the plots into the output folder.

    Raises:
        EvaluationError: the draft has no confidence head, there are no prompts, or another process works in the folder.
    """
    output = Path(options.output)
    with one_writer(output, "study", EvaluationError):
        bench = _bench(options)
        bench.run(FixedLength(), options.concurrency[0], rounds=8)  # the first forwards of a process are slower
        costs = profile(bench.run, bench.slots, options.concurrency)
        write_json(output / "costs.json", costs.to_row())
        rows = compare(bench, costs, options)
        study: dict[str, Any] = {
            "findings": judge(rows),
            "rows": rows,
            "costs": costs.to_row(),
            "options": asdict(options),
            "sts": bench.settings.confidence_temperatures,
            "prompts": len(bench.prompts),
            "threads": torch.get_num_threads(),
            "clock": bench.clock.__name__,
            "environment": environment(),
        }
        write_json(output / "study.json", study)
        write_text(output / "study.md", markdown(study) + "\n")
        plot(study, output)
    return study


def _bench(options: StudyOptions) -> Bench:
    target = options.load_target()
    draft = load_draft(options.draft, target)
    if not draft.config.confidence_head:
        raise EvaluationError(
            "the scheduler study needs a draft with a confidence head", file=options.draft,
            found=draft.config.algorithm, remedy="take a draft trained with confidence_head: true",
        )  # fmt: skip
    renderer = options.renderer(target)
    settings = DecodeSettings(
        options.temperature, options.max_new_tokens, renderer.stop_token_ids, options.seed,
        confidence_temperatures=load_sts(Path(options.draft)),
    )  # fmt: skip
    return Bench(target, draft, settings, _prompts(options, renderer, target))


def _prompts(options: StudyOptions, renderer: Renderer, target: Target) -> tuple[tuple[int, ...], ...]:
    """The first turns of all prompts that fit the target's positions."""
    tasks = load_tasks(options.tasks, options.samples, options.seed)
    turns = [prompt[0] for task in tasks for prompt in task.prompts.values()]
    prompts = [renderer.prompt([{"role": "user", "content": text}]) for text in turns]
    used = fitting(target.spec.config, prompts, options.max_new_tokens, "the shortest prompt")
    if len(used) < len(prompts):
        log.info("left out: %d prompts that do not fit the target's positions", len(prompts) - len(used))
    return tuple(map(tuple, used))
