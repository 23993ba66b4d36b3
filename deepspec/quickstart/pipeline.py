"""The whole quickstart: run what is not whole yet, then one table, one JSON, one page with plots."""

from __future__ import annotations

import html
import os
import time
from typing import Any

from deepspec.errors import DeepSpecError
from deepspec.evaluate.report import figure, html_table, page, plot_positions
from deepspec.files import read_json, write_json, write_text
from deepspec.quickstart.runner import Runner, stage_seconds
from deepspec.quickstart.stages import ROOT, plan, results_folder
from deepspec.registry import ALGORITHMS

LOGS = ROOT / "logs"


def quickstart() -> None:
    """Run the pipeline and print its table.

    Raises:
        DeepSpecError: a stage failed, or greedy output of a draft differs from the target's own.
    """
    start = time.monotonic()
    stages = plan()
    Runner(stages, LOGS, os.cpu_count() or 1).run()
    summary = summarise()
    write_json(ROOT / "results.json", summary)
    write_text(ROOT / "report.html", report(summary))
    print(f"\n{table(summary)}\n\n{facts(summary)}")
    print(f"\n{ROOT}/results.json, {ROOT}/report.html; this call took {time.monotonic() - start:.0f} s")
    unequal = [name for name, row in summary["algorithms"].items() if row["greedy_equal"] != 1.0]
    if unequal:
        raise DeepSpecError(
            "greedy output differs from the target's own", key=", ".join(unequal), wanted="equal, always"
        )


def summarise() -> dict[str, Any]:
    """Everything the table shows, from the artefacts on disk."""
    cache = read_json(ROOT / "cache" / "manifest.json")
    algorithms = {}
    for name in ALGORITHMS:
        results = read_json(results_folder(name) / "results.json")
        rows = {f"{row['temperature']:g}": row for row in results["summaries"]}
        algorithms[name] = {
            "accepted_length": {t: row["accepted_length"] for t, row in rows.items()},
            "interval": {t: row["interval"] for t, row in rows.items()},
            "speed_up": {t: row["speed_up"] for t, row in rows.items()},
            "greedy_equal": rows["0"]["equal_to_plain"],
            "summaries": results["summaries"],
        }
    return {
        "algorithms": algorithms,
        "cache": cache_facts(cache),
        "seconds": stage_seconds(LOGS),
        "target": read_json(ROOT / "target" / "target.json"),
        "provenance": read_json(results_folder("dspark") / "results.json")["provenance"]["versions"],
    }


def cache_facts(manifest: dict[str, Any]) -> dict[str, float]:
    """Tokens, bytes per token on disk and of raw bf16."""
    tokens = manifest["tokens"]
    size = sum(path.stat().st_size for path in (ROOT / "cache").rglob("*") if path.is_file())
    return {"tokens": tokens, "bytes_per_token": size / tokens, "raw_bytes_per_token": manifest["raw_bytes"] / tokens}


def table(summary: dict[str, Any]) -> str:
    """The Markdown table, one row per algorithm."""
    seconds = summary["seconds"]
    lines = [
        "| draft | accepted length T=0 (95 %) | T=1 (95 %) | speed-up T=0 | greedy output | training | evaluation |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in summary["algorithms"].items():
        lengths, spread = row["accepted_length"], row["interval"]
        cells = [f"{lengths[t]:.2f} ({spread[t][0]:.2f}-{spread[t][1]:.2f})" for t in ("0", "1")]
        equal = "equal to the target's" if row["greedy_equal"] == 1.0 else f"EQUAL IN {row['greedy_equal']:.0%} ONLY"
        lines.append(
            f"| {name} | {cells[0]} | {cells[1]} | {row['speed_up']['0']:.2f}x | {equal} | "
            f"{seconds.get(f'train {name}', 0):.0f} s | {seconds.get(f'evaluate {name}', 0):.0f} s |"
        )
    return "\n".join(lines)


def facts(summary: dict[str, Any]) -> str:
    """The lines below the table."""
    cache, seconds = summary["cache"], summary["seconds"]
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    return (
        f"cache: {cache['tokens']:,} tokens, {cache['bytes_per_token']:,.0f} bytes per token on disk "
        f"({cache['bytes_per_token'] / cache['raw_bytes_per_token']:.2f} of {cache['raw_bytes_per_token']:,.0f} raw)\n"
        f"stages: {spent}"
    )


def report(summary: dict[str, Any]) -> str:
    """The HTML page."""

    def positions(axes: Any) -> None:
        for name, row in summary["algorithms"].items():
            plot_positions(axes, row, name)

    def stages(axes: Any) -> None:
        seconds = summary["seconds"]
        axes.barh(list(reversed(seconds)), list(reversed(seconds.values())))
        axes.set(xlabel="seconds")

    parts = [
        html_table(table(summary)),
        f"<pre>{html.escape(facts(summary))}</pre>",
        "<h2>Acceptance by position</h2>",
        figure(positions),
        "<h2>Seconds per stage</h2>",
        figure(stages),
    ]
    return page("deepspec quickstart", parts)
