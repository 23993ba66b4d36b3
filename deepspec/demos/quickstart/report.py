"""What the quickstart measured: one table, one JSON file, one HTML page with plots."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from deepspec.demos.measured import cache_sizes, equality, length, speed_up, tau_by_step
from deepspec.demos.quickstart.plan import ROOT, recipe_of, results_folder
from deepspec.demos.runner import stage_seconds
from deepspec.demos.stages import ALL, recipes
from deepspec.evaluate.report import plot_positions
from deepspec.files import read_json, write_json, write_text
from deepspec.pages import figure, page
from deepspec.tables import Table


def collect(root: Path) -> dict[str, Any]:
    """Gather the results of all stages from their files in ``root``.

    Returns:
        ``algorithms`` (name -> the evaluator's results, and the training log), ``cache`` (bytes a token, coded and
        raw), ``seconds`` (of every stage, wall clock), ``target`` (how it was trained), ``machine``.
    """
    sizes = cache_sizes([root / "cache" / "manifest.json"])
    algorithms = {}
    for name in recipes(recipe_of, ALL):
        measured, log = results_folder(name, root) / "results.json", root / name / "log.jsonl"
        if measured.is_file():  # of this start or an earlier one
            algorithms[name] = read_json(measured) | {"training_log": str(log)}
    return {
        "format": "deepspec.quickstart/1",
        "algorithms": algorithms,
        "cache": {
            "tokens": sizes["tokens"],
            "bytes_per_token": sizes["coded_bytes"] / sizes["tokens"],
            "raw_bytes_per_token": sizes["raw_bytes"] / sizes["tokens"],
        },
        "seconds": stage_seconds(root / "logs"),
        "target": read_json(root / "target" / "target.json"),
        "machine": {"system": platform.platform(), "python": platform.python_version()},
    }


def drafts_table(results: dict[str, Any]) -> Table:
    """A row an algorithm and temperature."""
    rows = []
    for name, measured in results["algorithms"].items():
        seconds = [f"{results['seconds'].get(f'{verb} {name}', float('nan')):.0f}" for verb in ("train", "evaluate")]
        for row in measured["summaries"]:
            rows.append([name, f"{row['temperature']:g}", length(row), speed_up(row), equality(row), *seconds])
    return Table(["draft", "T", "accepted length (95 %)", "speed-up", "greedy equal", "train s", "evaluate s"], rows)


def summary(results: dict[str, Any]) -> str:
    """Table and cache size as the terminal shows them."""
    stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in results["seconds"].items())
    return f"{drafts_table(results).text()}\n\n{cache_line(results)}\nseconds of the stages: {stages}"


def cache_line(results: dict[str, Any]) -> str:
    """The cache's size in one sentence."""
    cache = results["cache"]
    coded, raw = cache["bytes_per_token"], cache["raw_bytes_per_token"]
    return f"cache: {coded:,.0f} bytes a token, {coded / raw:.0%} of raw ({raw:,.0f}), {cache['tokens']:,} tokens"


def plot_accepted(axes: Any, results: dict[str, Any]) -> None:
    """Acceptance length by algorithm and temperature, with its 95 % interval."""
    names = list(results["algorithms"])
    temperatures = [row["temperature"] for row in results["algorithms"][names[0]]["summaries"]]
    for i, temperature in enumerate(temperatures):
        rows = [results["algorithms"][name]["summaries"][i] for name in names]
        heights = [row["accepted_length"] or 0.0 for row in rows]
        ends = [row["interval"] or (height, height) for height, row in zip(heights, rows, strict=True)]
        errors = [[abs(h - end[side]) for h, end in zip(heights, ends, strict=True)] for side in (0, 1)]
        at = [number + 0.35 * (i - (len(temperatures) - 1) / 2) for number in range(len(names))]
        axes.bar(at, heights, 0.3, yerr=errors, capsize=3, label=f"T={temperature:g}")
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel="accepted length (tokens a round)")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.legend(fontsize="small")


def plot_training(axes: Any, results: dict[str, Any]) -> None:
    """The training's own estimate of the acceptance length, step by step."""
    for name, measured in results["algorithms"].items():
        curve = tau_by_step(Path(measured["training_log"]).parent)
        axes.plot(list(curve), list(curve.values()), label=name)
    axes.set(xlabel="optimizer step", ylabel="tau on the training batch")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)


def write_report(root: Path = ROOT) -> str:
    """Write ``results.json`` and ``report.html`` into ``root`` and return the summary for the terminal."""
    results = collect(root)

    def positions(axes: Any) -> None:
        for name, measured in results["algorithms"].items():
            greedy = [row for row in measured["summaries"] if row["temperature"] == 0]
            plot_positions(axes, measured | {"summaries": greedy}, label=name)

    pages = {name: f"{results_folder(name).name}/report.html" for name in results["algorithms"]}
    answers = ", ".join(f'<a href="{path}">{name}</a>' for name, path in pages.items())
    seconds = [[name, f"{value:.1f}"] for name, value in results["seconds"].items()]
    parts = [
        drafts_table(results).html(),
        f"<p>See each draft at work: {answers}.</p>",
        f"<p>{cache_line(results)}; the target predicts {results['target']['held_out_top1']:.1%} of the held-out "
        "answers' tokens.</p>",
        "<h2>Accepted length</h2>",
        figure(lambda axes: plot_accepted(axes, results)),
        "<h2>Acceptance by position, T=0</h2>",
        figure(positions),
        "<h2>Training</h2>",
        figure(lambda axes: plot_training(axes, results)),
        "<h2>Stages</h2>",  # some ran side by side
        Table(["stage", "seconds"], seconds).html(),
    ]
    write_text(root / "report.html", page("deepspec quickstart", parts))
    write_json(root / "results.json", results)
    return summary(results)
