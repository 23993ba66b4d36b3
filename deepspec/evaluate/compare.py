"""Several finished runs side by side: ``python -m deepspec.evaluate compare RUN RUN ...``.

Differences are against the first run, over the prompts that both decoded, with a paired bootstrap: the same prompts are
drawn for both, so what is hard for every draft does not widen the interval.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepspec.errors import EvaluationError
from deepspec.evaluate.log import Key, read_rows, row_key
from deepspec.evaluate.measure import MACRO, quantiles, resampled
from deepspec.evaluate.report import speed_up, table
from deepspec.evaluate.results import Results


@dataclass(frozen=True)
class Run:
    """A finished run and the rounds of its prompts."""

    name: str
    results: Results
    rows: dict[Key, dict[str, Any]]

    @staticmethod
    def load(folder: Path) -> Run:
        """Read results.json and results.jsonl.

        Raises:
            EvaluationError: no finished run there.
        """
        results = Results.load(folder)
        return Run(str(folder), results, {row_key(row): row for row in read_rows(folder / "results.jsonl")})


@dataclass(frozen=True)
class Difference:
    """Accepted length of a run minus that of the first, over ``prompts`` prompts that both decoded."""

    value: float
    interval: tuple[float, float]  # 95 %
    prompts: int


def difference(first: Run, other: Run, task: str, temperature: float, seed: int = 0) -> Difference | None:
    """Paired bootstrap of the accepted length; None where the task's prompts differ, or none are shared."""
    digests = [run.results.provenance.tasks.get(task) for run in (first, other)]
    if digests[0] is None or digests[0] != digests[1]:
        return None
    keys = sorted(key for key in first.rows if key[:2] == (task, temperature) and key in other.rows)
    if not keys:
        return None
    lengths, draws = [], []
    for run in (other, first):
        tokens = np.array([sum(run.rows[key]["committed"]) for key in keys], dtype=float)
        rounds = np.array([len(run.rows[key]["committed"]) for key in keys], dtype=float)
        lengths.append(tokens.sum() / max(1.0, rounds.sum()))
        draws.append(resampled(tokens, seed) / np.maximum(1.0, resampled(rounds, seed)))
    return Difference(float(lengths[0] - lengths[1]), quantiles(draws[0] - draws[1]), len(keys))


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
                low, high = summary.interval
                found = None if run is runs[0] else difference(runs[0], run, task, temperature)
                change = (
                    ""
                    if found is None
                    else f"{found.value:+.2f} ({found.interval[0]:+.2f} to {found.interval[1]:+.2f})"
                )
                if run is not runs[0] and found is None and task != MACRO:
                    change = "other prompts"
                cells.append(
                    [
                        task,
                        f"{temperature:g}",
                        name,
                        run.results.algorithm,
                        f"{summary.accepted_length:.2f} ({low:.2f}-{high:.2f})",
                        change,
                        f"{summary.verify_rate:.0%}",
                        speed_up(summary.to_row()),
                        str(summary.prompts),
                    ]
                )
    header = ["task", "T", "run", "algorithm", "accepted length (95 %)", "against the first (95 %, paired)"]
    return table([*header, "accepted/verified", "speed-up (95 %)", "prompts"], cells)


def _short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [Path(path).resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-depth:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def main(arguments: Sequence[str]) -> int:
    """Read the folders, print the table."""
    parser = argparse.ArgumentParser(prog="python -m deepspec.evaluate compare", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="results folders; differences are against the first")
    given = parser.parse_args(arguments)
    if len(given.runs) < 2:
        raise EvaluationError("nothing to compare", found=str(given.runs[0]), wanted="two results folders or more")
    print(comparison([Run.load(folder) for folder in given.runs]))
    return 0
