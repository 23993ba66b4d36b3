"""The scheduler study: what each verification policy is worth under load, on the machine at hand.

``python -m deepspec.evaluate --target T --draft D --study scheduler`` profiles seconds of a round (``profile.py``),
then decodes the same prompts at every concurrency with every policy: fixed lengths, a confidence
threshold, and the scheduler that admits tokens by expected throughput. Policies take turns and every turn is repeated,
so that what else the machine does hits all of them alike.

Measured are the rounds up to where the queue runs empty, prefill left out. On a CPU with one thread the seconds are the
process's own, since other processes would otherwise be measured too; else they are wall-clock.
"""

from __future__ import annotations

import argparse
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
from deepspec.decoding.records import DecodeSettings, Request
from deepspec.decoding.scheduler import FixedLength, Policy, StepCosts, Threshold, Throughput
from deepspec.drafts import load_draft
from deepspec.errors import EvaluationError
from deepspec.evaluate.calibration import load_sts
from deepspec.evaluate.measure import bootstrap
from deepspec.evaluate.profile import profile
from deepspec.evaluate.report import table
from deepspec.evaluate.results import environment
from deepspec.evaluate.tasks import load_tasks
from deepspec.files import temporary_file, write_json, write_text
from deepspec.locks import one_writer
from deepspec.progress import Progress
from deepspec.targets import Target, load_target, load_tokenizer
from deepspec.targets.positions import fitting

SCHEDULER = "expected throughput"
SURE = 0.01  # what is said of a ratio is true to so much, with 95 %


@dataclass(frozen=True)
class StudyOptions:
    """What the command line says.

    Raises:
        EvaluationError: a number out of its range, or a concurrency named twice.
    """

    target: str
    draft: str
    output: str
    tasks: tuple[str, ...] = ()
    samples: int | None = None
    seed: int = 980406
    temperature: float = 0.0
    max_new_tokens: int = 256
    concurrency: tuple[int, ...] = (1, 4, 16, 64)
    repeats: int = 10  # of every policy
    most_repeats: int = 30  # where so few differ too much for a sentence
    threshold: float = 0.5
    thinking: bool = False
    system_prompt: str | None = None
    dtype: str = "auto"
    device: str = "cpu"
    revision: str | None = None  # of a target of the hub

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
        """The process's own time where that is what the machine would take alone, else the wall's."""
        alone = self.target.device.type == "cpu" and torch.get_num_threads() == 1
        return time.process_time if alone else time.perf_counter

    def run(self, policy: Policy, concurrency: int, turns: int | None = None, attempt: int = 0) -> list[StepTiming]:
        """Decode at ``concurrency`` and return the turns until no prompt waits any more, or ``turns`` of them.

        Raises:
            EvaluationError: no turn had a round.
        """
        count = concurrency + max(24, concurrency)  # short attempts and many: what disturbs one hits its rivals too
        requests = deque(Request(ids, number) for number, ids in enumerate(islice(cycle(self.prompts), count)))
        longest = max(map(len, self.prompts)) + self.settings.max_new_tokens + self.slots + 2
        drafter = self.draft.algorithm.drafter(self.draft, concurrency, longest)
        settings = replace(self.settings, seed=self.settings.seed + attempt)  # another attempt, another sample
        decoder = Decoder(self.target, drafter, settings, concurrency, policy)
        decoder.clock.now, decoder.clock.turns = self.clock, []
        for _ in decoder.stream(requests):
            if not requests or (turns is not None and len(decoder.clock.turns) >= turns):
                break
        measured = [turn for turn in decoder.clock.turns[:turns] if turn.rows]
        if not measured:
            raise EvaluationError("nothing to measure: every answer was one token", remedy="raise --max-new-tokens")
        return measured


def compare(bench: Bench, costs: StepCosts, options: StudyOptions) -> list[dict[str, Any]]:
    """Every policy at every concurrency; a row each.

    All run ``options.repeats`` times, then those at loads whose ratio is not sure yet, ``most_repeats`` times in all.
    """
    makers: dict[str, Callable[[], Policy]] = {
        f"fixed {k}": lambda k=k: FixedLength(k)  # type: ignore[misc]
        for k in range(1, bench.slots + 1)
    }
    makers |= {
        f"threshold {options.threshold:g}": lambda: Threshold(options.threshold),
        SCHEDULER: lambda: Throughput(costs),
    }
    runs: dict[tuple[int, str], list[list[StepTiming]]] = {
        (c, name): [] for c in options.concurrency for name in makers
    }
    progress = Progress("policies", None, "turns")
    unsure = list(options.concurrency)
    for repeat in range(max(options.repeats, options.most_repeats)):
        order = [(c, name) for c, name in runs if c in unsure]
        for c, name in order if repeat % 2 == 0 else order[::-1]:
            runs[c, name].append(bench.run(makers[name](), c, attempt=repeat))
            progress.add(1, len(runs[c, name][-1]))
        if repeat + 1 >= options.repeats:
            seen = judge([_row(*key, attempts) for key, attempts in runs.items() if key[0] in unsure])
            unsure = [finding["concurrency"] for finding in seen if not finding["sure"]]
        if not unsure:
            break
    progress.finish()
    return [_row(c, name, attempts) for (c, name), attempts in runs.items()]


def _row(concurrency: int, policy: str, attempts: Sequence[Sequence[StepTiming]]) -> dict[str, Any]:
    rates = [sum(turn.emitted for turn in turns) / sum(turn.seconds for turn in turns) for turns in attempts]
    turns = [turn for attempt in attempts for turn in attempt]
    rows = sum(turn.rows for turn in turns)
    return {
        "concurrency": concurrency,
        "policy": policy,
        "tokens_per_second": float(np.median(rates)),
        "attempts": rates,
        "verified_per_request": sum(turn.verified for turn in turns) / rows - 1,  # drafted tokens a round
        "accepted_length": sum(turn.emitted for turn in turns) / rows,
        "rounds_per_second": len(turns) / sum(turn.seconds for turn in turns),
        "mean_rows": rows / len(turns),
    }


def judge(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is known of the scheduler against the best fixed length, a row a concurrency.

    ``ratio`` of their tokens per second is the mean over attempts, pairs that ran in the same minutes, with its 95 %
    ``interval``. It is ``sure`` where the interval reaches no further than ``SURE`` to either side, or lies further
    than that from 1.
    """
    findings = []
    for c in dict.fromkeys(row["concurrency"] for row in rows):
        group = [row for row in rows if row["concurrency"] == c]
        best = max(
            (row for row in group if row["policy"].startswith("fixed")), key=lambda row: row["tokens_per_second"]
        )
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
    """A finding in words; where the attempts differ too much for one, that."""
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
    """Tables: tokens/s, verified drafted tokens a request and round, accepted length; then a sentence a load."""
    rows = study["rows"]
    loads = list(dict.fromkeys(row["concurrency"] for row in rows))
    parts = []
    titles = {
        "tokens_per_second": ("Tokens/s", ",.0f"),
        "verified_per_request": ("Verified a request and round", ".2f"),
    }
    titles["accepted_length"] = ("Accepted length", ".2f")
    for key, (title, form) in titles.items():
        cells = []
        for policy in dict.fromkeys(row["policy"] for row in rows):
            values = {row["concurrency"]: row[key] for row in rows if row["policy"] == policy}
            cells.append([policy, *(format(values[c], form) for c in loads)])
        parts.append(f"{title}, by requests decoding together\n\n" + table(["policy", *map(str, loads)], cells))
    parts.append("\n".join(f"- {sentence(finding)}" for finding in study["findings"]))
    return "\n\n".join(parts)


def plot(study: dict[str, Any], output: Path) -> None:
    """``throughput.png``, ``verified.png``, ``trade.png`` and ``costs.png``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = study["rows"]

    def draw(name: str, x: str, y: str, labels: tuple[str, str]) -> None:
        picture, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
        for policy in dict.fromkeys(row["policy"] for row in rows):
            own = [row for row in rows if row["policy"] == policy]
            wide = 2.5 if policy == SCHEDULER else 1.0
            axes.plot([row[x] for row in own], [row[y] for row in own], marker="o", label=policy, linewidth=wide)
        axes.set(xlabel=labels[0], ylabel=labels[1], xscale="log" if x == "concurrency" else "linear")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        _save(picture, output / name)
        pyplot.close(picture)

    load = "requests decoding together"
    draw("throughput.png", "concurrency", "tokens_per_second", (load, "tokens/s"))
    draw("verified.png", "concurrency", "verified_per_request", (load, "drafted tokens verified a request and round"))
    for row in rows:
        row["tokens_per_second_a_request"] = row["tokens_per_second"] / row["mean_rows"]
    draw("trade.png", "tokens_per_second_a_request", "tokens_per_second", ("tokens/s of a request", "tokens/s of all"))
    picture, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    for count, (tokens, seconds) in study["costs"]["table"].items():
        axes.plot(tokens, 1 / np.array(seconds), marker="o", label=f"{count} rows")
    axes.set(xlabel="tokens of a verify step", ylabel="steps/s", xscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    _save(picture, output / "costs.png")
    pyplot.close(picture)


def _save(picture: Any, path: Path) -> None:
    with temporary_file(path) as temporary:
        picture.savefig(temporary, format="png", dpi=110)


def run_study(options: StudyOptions) -> dict[str, Any]:
    """Profile, compare, and write ``costs.json``, ``study.json``, ``study.md`` and the plots into the output folder.

    Raises:
        EvaluationError: the draft has no confidence head, there are no prompts, or another process works in the folder.
    """
    with one_writer(options.output, "study", EvaluationError):
        return _run_study(options)


def _run_study(options: StudyOptions) -> dict[str, Any]:
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    target = load_target(options.target, dtype, options.device, options.revision)
    draft = _draft(options, target)
    tokenizer = load_tokenizer(options.target, options.revision)
    renderer = Renderer(tokenizer, target.spec, options.system_prompt, options.thinking)
    prompts = _prompts(options, renderer, target)
    sts = load_sts(Path(options.draft))
    settings = DecodeSettings(
        options.temperature, options.max_new_tokens, renderer.stop_token_ids, options.seed, confidence_temperatures=sts
    )
    bench = Bench(target, draft, settings, prompts)
    bench.run(FixedLength(), options.concurrency[0], turns=8)  # the first forwards of a process are not like the others
    costs = profile(bench, options.concurrency)
    output = Path(options.output)
    costs.save(output / "costs.json")
    rows = compare(bench, costs, options)
    study: dict[str, Any] = {
        "findings": judge(rows),
        "rows": rows,
        "costs": {
            "table": {n: [list(map(float, part)) for part in pair] for n, pair in costs.table.items()},
            "saved": {n: list(map(float, part)) for n, part in costs.saved.items()},
            "even": dict(costs.even),
        },
        "options": asdict(options),
        "sts": sts,
        "prompts": len(prompts),
        "threads": torch.get_num_threads(),
        "clock": bench.clock.__name__,
        "environment": environment(),
    }
    write_json(output / "study.json", study)
    write_text(output / "study.md", markdown(study) + "\n")
    plot(study, output)
    return study


def _prompts(options: StudyOptions, renderer: Renderer, target: Target) -> tuple[tuple[int, ...], ...]:
    """The first turns of all prompts that fit the target's positions."""
    tasks = load_tasks(options.tasks, options.samples, options.seed)
    turns = [prompt[0] for task in tasks for prompt in task.prompts.values()]
    prompts = [renderer.prompt([{"role": "user", "content": text}]) for text in turns]
    kept = fitting(target.spec.config, prompts, options.max_new_tokens, "the shortest prompt")
    if len(kept) < len(prompts):
        print(f"left out: {len(prompts) - len(kept)} prompts that do not fit the target's positions", flush=True)
    return tuple(map(tuple, kept))


def _draft(options: StudyOptions, target: Target) -> DraftModel:
    draft = load_draft(options.draft, target)
    if getattr(draft, "confidence_head", None) is None:
        raise EvaluationError(
            "the scheduler study needs a draft with a confidence head", file=options.draft,
            found=draft.config.algorithm, remedy="take a DSpark draft trained with confidence_head: true",
        )  # fmt: skip
    return draft


def main(given: argparse.Namespace, device: str) -> int:
    """Run the study that the command line of ``deepspec.evaluate`` asks for.

    Raises:
        EvaluationError: several temperatures.
    """
    if len(given.temperature) > 1:
        raise EvaluationError(
            "the study decodes at one temperature", key="--temperature", found=given.temperature, remedy="name one"
        )
    output = given.output or str(Path(given.draft) / "study")
    study = run_study(
        StudyOptions(
            target=given.target,
            revision=given.revision,
            draft=given.draft,
            output=output,
            tasks=tuple(name for name in given.tasks.split(",") if name),
            samples=given.samples,
            seed=given.seed,
            temperature=given.temperature[0],
            max_new_tokens=given.max_new_tokens,
            concurrency=tuple(given.concurrency),
            threshold=given.confidence_threshold or StudyOptions.threshold,
            thinking=given.thinking,
            system_prompt=given.system_prompt,
            dtype=given.dtype,
            device=device,
        )
    )
    print(markdown(study))
    print(f"\n{output}/study.json, study.md, costs.json and plots")
    return 0
