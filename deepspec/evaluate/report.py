"""Results as a Markdown table and as one HTML page with its plots inside."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepspec.files import write_text

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{border-bottom:1px solid #ddd;padding:.3rem .7rem;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%}pre{background:#f6f6f6;padding:.7rem;overflow:auto}"""


def markdown(results: Mapping[str, Any]) -> str:
    """The table of a run, one row per task and temperature."""
    lines = [
        "| task | T | accepted length (95 %) | accepted/verified | tokens/s | speed-up | greedy equal | prompts |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["summaries"]:
        low, high = row["interval"]
        speed = "" if row["speed_up"] is None else f"{row['speed_up']:.2f}x"
        equal = "" if row["equal_to_plain"] is None else f"{row['equal_to_plain']:.0%}"
        lines.append(
            f"| {row['task']} | {row['temperature']:g} | {row['accepted_length']:.2f} ({low:.2f}-{high:.2f}) | "
            f"{row['verify_rate']:.0%} | {row['tokens_per_second']:,.0f} | {speed} | {equal} | {row['prompts']} |"
        )
    return "\n".join(lines)


def figure(draw: Any, size: tuple[float, float] = (6.4, 3.4)) -> str:
    """An <img> with the plot that ``draw(axes)`` draws, embedded as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    picture, axes = pyplot.subplots(figsize=size, layout="constrained")
    draw(axes)
    data = io.BytesIO()
    picture.savefig(data, format="png", dpi=110)
    pyplot.close(picture)
    return f'<img alt="plot" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def plot_positions(axes: Any, results: Mapping[str, Any], label: str = "") -> None:
    """Conditional acceptance by position, a line per task and temperature."""
    for row in results["summaries"]:
        if row["conditional"]:
            name = f"{label or row['task']}, T={row['temperature']:g}"
            axes.plot(range(1, len(row["conditional"]) + 1), row["conditional"], marker="o", label=name)
    axes.set(xlabel="position in the draft", ylabel="accepted, given the ones before", ylim=(0, 1))
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)


def plot_phases(axes: Any, results: Mapping[str, Any]) -> None:
    """Share of the time spent in each phase."""
    rows = [row for row in results["summaries"] if row["phases"]]
    names = [f"{row['task']}, T={row['temperature']:g}" for row in rows]
    left = [0.0] * len(rows)
    for phase in ("prefill", "draft", "verify", "head", "other"):
        shares = [row["phases"].get(phase, 0.0) / max(1e-9, row["phases"].get("total", 0.0)) for row in rows]
        axes.barh(names, shares, left=left, label=phase)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.set(xlabel="share of the time")
    axes.legend(fontsize="small", ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def page(title: str, parts: Sequence[str]) -> str:
    """A whole HTML page from its parts."""
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    return f"{head}<style>{STYLE}</style><h1>{html.escape(title)}</h1>{''.join(parts)}</html>\n"


def html_table(text: str) -> str:
    """A Markdown table as HTML."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows[2:])
    return f"<table><tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in rows[0])}</tr>{body}</table>"


def write_report(results: Mapping[str, Any], output: Path) -> None:
    """Write ``report.html`` and ``results.md`` into ``output``."""
    table = markdown(results)
    write_text(output / "results.md", table + "\n")
    provenance = "\n".join(f"{key}: {value}" for key, value in results["provenance"].items())
    parts = [
        html_table(table),
        "<h2>Acceptance by position</h2>",
        figure(lambda axes: plot_positions(axes, results)),
        "<h2>Where the time goes</h2>",
        figure(lambda axes: plot_phases(axes, results)),
        f"<h2>Provenance</h2><pre>{html.escape(provenance)}</pre>",
    ]
    write_text(output / "report.html", page(f"{results['algorithm']} on {results['provenance']['target']}", parts))
