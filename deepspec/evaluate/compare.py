"""Several finished runs side by side: ``python -m deepspec.evaluate compare RUN RUN ...``.

Differences are against the first run, over the prompts that both decoded, with a paired bootstrap: the same prompts are
drawn for both, so what is hard for every draft does not widen the interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepspec.errors import EvaluationError
from deepspec.evaluate.measure import MACRO, quantiles, resampled
from deepspec.evaluate.report import number, speed_up
from deepspec.evaluate.results import Key, Results, open_rows
from deepspec.metrics import length_text
from deepspec.tables import Table


@dataclass(frozen=True)
class Run:
    """A finished run and the rounds of its prompts."""

    name: str
    results: Results
    rows: Mapping[Key, dict[str, Any]]

    @staticmethod
    def load(folder: Path) -> Run:
        """Read results.json and results.jsonl.

        Raises:
            EvaluationError: no finished run there.
        """
        results, rows = Results.load(folder), dict(open_rows(folder, "results"))
        if not rows:
            raise EvaluationError("no rows", file=folder / "results.jsonl", remedy="is this a results folder?")
        return Run(str(folder), results, rows)


@dataclass(frozen=True)
class LengthDifference:
    """Acceptance length of a run minus that of the first, over ``prompts`` prompts that both decoded."""

    value: float
    interval: tuple[float, float] | None  # 95 %; None for one prompt
    prompts: int

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.value:+.2f} (one prompt)"
        return f"{self.value:+.2f} ({self.interval[0]:+.2f} to {self.interval[1]:+.2f})"


def difference(first: Run, other: Run, task: str, temperature: float, seed: int = 0) -> LengthDifference | None:
    """Paired bootstrap of the acceptance length; None where the task's prompts differ, or none had a round in both."""
    keys = sorted(key for key in first.rows if key[:2] == (task, temperature) and key in other.rows)
    keys = [key for key in keys if first.rows[key]["committed"] and other.rows[key]["committed"]]
    if not keys or not _same_prompts(first, other, task):
        return None
    lengths, draws = [], []
    for run in (other, first):
        tokens = np.array([sum(run.rows[key]["committed"]) for key in keys], dtype=float)
        rounds = np.array([len(run.rows[key]["committed"]) for key in keys], dtype=float)
        lengths.append(tokens.sum() / rounds.sum())
        draws.append(resampled(tokens, seed) / resampled(rounds, seed))
    interval = quantiles(draws[0] - draws[1]) if len(keys) > 1 else None
    return LengthDifference(float(lengths[0] - lengths[1]), interval, len(keys))


def _same_prompts(first: Run, other: Run, task: str) -> bool:
    digests = [run.results.provenance.tasks.get(task) for run in (first, other)]
    return digests[0] is not None and digests[0] == digests[1]


def _change(first: Run, other: Run, task: str, temperature: float) -> str:
    """The difference against the first run, or why there is none; nothing of the first itself and of averages."""
    if other is first or task == MACRO:
        return ""
    if not _same_prompts(first, other, task):
        return "other prompts"
    found = difference(first, other, task, temperature)
    return "no rounds" if found is None else str(found)


def comparison(runs: Sequence[Run]) -> str:
    """A Markdown table: a row a task, temperature and run."""
    names = _short_names([run.name for run in runs])
    seen = dict.fromkeys((s.task, s.temperature) for run in runs for s in run.results.summaries)
    cells = []
    for task, temperature in seen:
        for name, run in zip(names, runs, strict=True):
            for summary in run.results.summaries:
                if (summary.task, summary.temperature) != (task, temperature):
                    continue
                row = summary.to_row()
                change = _change(runs[0], run, task, temperature)
                own = [task, f"{temperature:g}", name, run.results.algorithm, length_text(row), change]
                cells.append([*own, number(summary.verify_rate, ".0%"), speed_up(row), summary.prompts])
    header = ["task", "T", "run", "algorithm", "acceptance length (95 %)", "against the first (95 %, paired)"]
    return Table([*header, "accepted/verified", "speed-up (95 %)", "prompts"], cells).markdown()


def _short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of the paths, as many as make them differ."""
    parts = [Path(path).resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-depth:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)
