"""What the quickstart measured: one table, one JSON file, one HTML page with plots."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from deepspec.demos.quickstart.plan import LOGS, ROOT, recipe_of, results_folder
from deepspec.demos.runner import stage_seconds
from deepspec.evaluate.report import figure, html_table, page, plot_positions
from deepspec.files import read_json, write_json, write_text
from deepspec.metrics import length_text
from deepspec.recipe import load_recipe
from deepspec.registry import ALGORITHMS


def collect() -> dict[str, Any]:
    """Gather the results of all stages from their files.

    Returns:
        ``algorithms`` (name -> the evaluator's results, and the training log), ``cache`` (bytes a token, coded and
        raw), ``seconds`` (of every stage, wall clock), ``target`` (how it was trained), ``machine``.
    """
    cache = read_json(ROOT / "cache" / "manifest.json")
    tokens = sum(part["tokens"] for part in cache["parts"])
    algorithms = {}
    for name in ALGORITHMS:
        log = Path(load_recipe(recipe_of(name)).output) / "log.jsonl"
        algorithms[name] = read_json(results_folder(name) / "results.json") | {"training_log": str(log)}
    return {
        "format": "deepspec.quickstart/1",
        "algorithms": algorithms,
        "cache": {
            "tokens": tokens,
            "bytes_per_token": cache["coded_bytes"] / tokens,
            "raw_bytes_per_token": cache["raw_bytes"] / tokens,
        },
        "seconds": stage_seconds(LOGS),
        "target": read_json(ROOT / "target" / "target.json"),
        "machine": {"system": platform.platform(), "python": platform.python_version()},
    }


def drafts_table(results: dict[str, Any]) -> str:
    """A Markdown table, one row per algorithm and temperature."""
    lines = [
        "| draft | T | accepted length (95 %) | speed-up | greedy equal | train s | evaluate s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, measured in results["algorithms"].items():
        seconds = [results["seconds"].get(f"{verb} {name}", float("nan")) for verb in ("train", "evaluate")]
        for row in measured["summaries"]:
            speed = "" if row["speed_up"] is None else f"{row['speed_up']:.2f}x"
            equal = "" if row["equal_to_plain"] is None else f"{row['equal_to_plain']:.0%}"
            lines.append(
                f"| {name} | {row['temperature']:g} | {length_text(row)} | {speed} | "
                f"{equal} | {seconds[0]:.0f} | {seconds[1]:.0f} |"
            )
    return "\n".join(lines)


def stages_table(results: dict[str, Any]) -> str:
    """A Markdown table of the wall-clock seconds of the stages; some of them ran side by side."""
    lines = ["| stage | seconds |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {seconds:.1f} |" for name, seconds in results["seconds"].items()])


def summary(results: dict[str, Any]) -> str:
    """Table and cache size as the terminal shows them, the table's columns aligned."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in drafts_table(results).splitlines()]
    del rows[1]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in results["seconds"].items())
    return "\n".join([*lines, "", cache_line(results), f"seconds of the stages: {stages}"])


def cache_line(results: dict[str, Any]) -> str:
    """The cache's size in one sentence."""
    cache = results["cache"]
    coded, raw = cache["bytes_per_token"], cache["raw_bytes_per_token"]
    return f"cache: {coded:,.0f} bytes a token, {coded / raw:.0%} of raw ({raw:,.0f}), {cache['tokens']:,} tokens"


def plot_accepted(axes: Any, results: dict[str, Any]) -> None:
    """Accepted length by algorithm and temperature, with its 95 % interval."""
    names = list(results["algorithms"])
    temperatures = [row["temperature"] for row in results["algorithms"][names[0]]["summaries"]]
    for i, temperature in enumerate(temperatures):
        rows = [results["algorithms"][name]["summaries"][i] for name in names]
        heights = [row["accepted_length"] or 0.0 for row in rows]
        ends = [row["interval"] or (height, height) for height, row in zip(heights, rows, strict=True)]
        errors = [[abs(h - end[side]) for h, end in zip(heights, ends, strict=True)] for side in (0, 1)]
        places = [place + 0.35 * (i - (len(temperatures) - 1) / 2) for place in range(len(names))]
        axes.bar(places, heights, 0.3, yerr=errors, capsize=3, label=f"T={temperature:g}")
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel="accepted length (tokens a round)")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.legend(fontsize="small")


def plot_training(axes: Any, results: dict[str, Any]) -> None:
    """The training's own estimate of the accepted length, step by step."""
    import json

    for name, measured in results["algorithms"].items():
        lines = Path(measured["training_log"]).read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if row.get("kind") == "train"]
        axes.plot([row["step"] for row in rows], [row["tau"] for row in rows], label=name)
    axes.set(xlabel="optimizer step", ylabel="tau on the training batch")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)


def write_report() -> str:
    """Write ``results.json`` and ``report.html`` into build/quickstart and return the summary for the terminal."""
    results = collect()

    def positions(axes: Any) -> None:
        for name, measured in results["algorithms"].items():
            greedy = [row for row in measured["summaries"] if row["temperature"] == 0]
            plot_positions(axes, measured | {"summaries": greedy}, label=name)

    parts = [
        html_table(drafts_table(results)),
        f"<p>{cache_line(results)}; the target predicts {results['target']['held_out_top1']:.1%} of the held-out "
        "answers' tokens.</p>",
        "<h2>Accepted length</h2>",
        figure(lambda axes: plot_accepted(axes, results)),
        "<h2>Acceptance by position, T=0</h2>",
        figure(positions),
        "<h2>Training</h2>",
        figure(lambda axes: plot_training(axes, results)),
        "<h2>Stages</h2>",
        html_table(stages_table(results)),
    ]
    write_text(ROOT / "report.html", page("deepspec quickstart", parts))
    write_json(ROOT / "results.json", results)
    return summary(results)
