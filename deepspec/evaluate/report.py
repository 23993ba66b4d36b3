"""Results as Markdown tables, and as one HTML page with its plots inside."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepspec.evaluate.measure import MACRO, PHASES
from deepspec.evaluate.results import open_rows
from deepspec.evaluate.transcript import script, section
from deepspec.files import write_text
from deepspec.metrics import length_text
from deepspec.pages import figure, page
from deepspec.tables import Table

Rows = Sequence[Mapping[str, Any]]
COLUMNS = {  # of the tables -> what they hold
    "task": "a file of prompts; macro is the mean over the tasks",
    "T": "temperature of sampling; 0 is greedy",
    "acceptance length (95 %)": "tokens that a round of drafting and verifying adds, the bonus token included; the "
    "interval resamples the prompts",
    "paper": "the acceptance length that the paper reports, measured in the same way",
    "accepted/verified": "share of the verified drafted tokens that the target accepted",
    "tokens/s": "output tokens a second with the draft",
    "baseline tokens/s": "output tokens a second of the target alone, for the same prompts in the same run",
    "speed-up (95 %)": "tokens/s over baseline tokens/s; the interval resamples the prompts",
    "greedy equal": "share of the prompts whose greedy output is the baseline's, token for token",
    "equal or tied within rounding": "the same, where the first difference lies within the target's rounding too",
    "prompts": "how many were decoded",
    "draft ms": "milliseconds that drafting takes in a round of the batch",
    "verify ms": "milliseconds of the target's layers in a round of the batch",
    "head ms": "milliseconds of the target's output layer in a round of the batch",
    "other ms": "milliseconds of all else in a round of the batch",
    "round ms": "milliseconds of a round of the batch",
    "verified tokens": "drafted tokens that the target verified, a round",
    "prefill s": "seconds that the prompts took before their first token",
}
SLOT = "position {} of the draft: share accepted where all before were / share of the rounds accepted so far"


def summary_table(rows: Rows) -> Table:
    """Acceptance length, verify rate and speed, a row a task and temperature."""
    with_paper = any(row.get("published") is not None for row in rows)
    header = ["task", "T", "acceptance length (95 %)", *(["paper"] if with_paper else []), "accepted/verified"]
    header += [
        "tokens/s",
        "baseline tokens/s",
        "speed-up (95 %)",
        "greedy equal",
        "equal or tied within rounding",
        "prompts",
    ]
    cells = []
    for row in rows:
        own = [*_names(row), length_text(row), *([number(row.get("published"))] if with_paper else [])]
        own += [number(row["verify_rate"], ".0%"), number(row["tokens_per_second"], ",.0f")]
        own += [number(row["plain_tokens_per_second"], ",.0f"), speed_up(row)]
        own += [number(row.get(key), ".0%") for key in ("equal_to_plain", "equal_or_tied")]
        cells.append([*own, row["prompts"]])
    return Table(header, cells)


def speed_up(row: Mapping[str, Any]) -> str:
    """``1.40x (1.31-1.49)``; empty without a baseline."""
    if row["speed_up"] is None:
        return ""
    interval = row["speed_up_interval"]
    return f"{row['speed_up']:.2f}x" + (f" ({interval[0]:.2f}-{interval[1]:.2f})" if interval else "")


def position_table(rows: Rows) -> Table:
    """At each position ``conditional / prefix`` acceptance."""
    slots = max((len(row["conditional"]) for row in rows), default=0)
    cells = []
    for row in rows:
        both = [f"{one:.3f} / {so_far:.3f}" for one, so_far in zip(row["conditional"], row["prefix"], strict=True)]
        cells.append([*_names(row), *both, *[""] * (slots - len(both))])
    return Table(["task", "T", *map(str, range(1, slots + 1))], cells)


def time_table(rows: Rows) -> Table:
    """Milliseconds a round of the batch by phase, and what a round verified."""
    phases = [phase for phase in PHASES if phase != "prefill"]
    header = ["task", "T", *(f"{phase} ms" for phase in phases), "round ms", "verified tokens", "prefill s"]
    cells = []
    for row in rows:
        spent = row["milliseconds_per_step"]
        times = [number(spent.get(phase), ".3f") for phase in (*phases, "total")]
        verified, prefill = number(row["verified_length"]), f"{row['phases'].get('prefill', 0.0):.2f}"
        cells.append([*_names(row), *times, verified, prefill])
    return Table(header, cells)


def _names(row: Mapping[str, Any]) -> list[str]:
    return [row["task"], f"{row['temperature']:g}"]


def number(value: float | None, form: str = ".2f") -> str:
    """A number in a cell; empty for None."""
    return "" if value is None else format(value, form)


def sections(results: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """(title, table) of everything that a run measured."""
    rows = results["summaries"]
    return [
        ("Acceptance length and speed", summary_table(rows)),
        ("Acceptance by position: given the ones before / all so far", position_table(rows)),
        ("Where a round's time goes", time_table(rows)),
    ]


def meanings(table: Table) -> dict[str, str]:
    """What each column of a table holds."""
    return {str(name): COLUMNS.get(str(name)) or SLOT.format(name) for name in table.header}


def remarks(rows: Rows) -> list[str]:
    """What the tables leave out, a sentence each: prompts without a round or too long, figures of the paper."""
    tasks: dict[str, list[str]] = {}  # by sentence
    for row in rows:
        if row["task"] == MACRO:
            continue
        of_all = f"of {row['prompts']} prompts"
        texts = []
        if count := row.get("without_rounds"):
            texts.append(f"{count} {of_all} ended at their first token: they have no round and no acceptance length")
        if count := row.get("cut_short"):
            texts.append(f"{count} {of_all} ended before a turn that did not fit the target's positions")
        if count := row.get("too_long"):
            texts.append(f"{count} prompts are left out: with the new tokens they do not fit the target's positions")
        if row.get("beyond_rounding"):
            which = ", ".join(map(str, row["beyond_rounding"]))
            texts.append(
                f"prompts {which} differ from the baseline by more than the target's rounding: a fault, report it"
            )
        if differs := row.get("published_differs"):
            texts.append(f"the paper reports a figure, which is not comparable: {'; '.join(differs)}")
        for text in texts:
            tasks.setdefault(text, []).append(f"{row['task']} at T={row['temperature']:g}")
    return [f"{', '.join(names)}: {text}." for text, names in tasks.items()]


def markdown(results: Mapping[str, Any]) -> str:
    """The tables of a run, each under its title, and what they leave out."""
    tables = [f"{title}\n\n{table.markdown()}" for title, table in sections(results)]
    return "\n\n".join([*tables, *remarks(results["summaries"])])


def plot_positions(axes: Any, results: Mapping[str, Any], label: str = "") -> None:
    """Conditional acceptance by position, a line per task and temperature; a colour a task, dashes for the second."""
    rows = [row for row in results["summaries"] if row["conditional"]]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    temperatures = list(dict.fromkeys(row["temperature"] for row in rows))
    for row in rows:
        style: dict[str, Any] = {"linestyle": ("-", "--", ":")[temperatures.index(row["temperature"]) % 3]}
        if not label:  # alone in the plot
            style["color"] = "black" if row["task"] == MACRO else f"C{tasks.index(row['task'])}"
        name = f"{label or row['task']}, T={row['temperature']:g}"
        axes.plot(range(1, len(row["conditional"]) + 1), row["conditional"], marker=".", label=name, **style)
    axes.set(xlabel="position in the draft", ylabel="accepted, given the ones before", ylim=(0, 1))
    if len(rows) > 4:
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    elif rows:
        axes.legend(fontsize="small")
    axes.grid(alpha=0.3)


def plot_lengths(axes: Any, rows: Rows) -> None:
    """Acceptance length with its interval, and that of the paper where it is known."""
    values = [row["accepted_length"] or 0.0 for row in rows]  # no bar where there is none
    errors = [[abs(v - row["interval"][side]) if row["interval"] else 0.0 for v, row in zip(values, rows, strict=True)]
              for side in (0, 1)]  # fmt: skip
    axes.barh(range(len(rows)), values, xerr=errors, color="C0", alpha=0.8, capsize=2, label="measured, 95 %")
    known = [(row["published"], index) for index, row in enumerate(rows) if row.get("published")]
    if known:
        axes.plot(*zip(*known, strict=True), "kD", markersize=4, label="paper")
        axes.legend(fontsize="small")
    _name_rows(axes, rows)
    axes.set(xlabel="acceptance length (tokens a round)")


def plot_phases(axes: Any, rows: Rows) -> None:
    """Share of the time spent in each phase."""
    left = [0.0] * len(rows)
    for phase in PHASES:
        shares = [row["phases"].get(phase, 0.0) / max(1e-9, sum(row["phases"].values())) for row in rows]
        axes.barh(range(len(rows)), shares, left=left, label=phase)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    _name_rows(axes, rows)
    axes.set(xlabel="share of the time", xlim=(0, 1))
    axes.legend(fontsize="small", ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _name_rows(axes: Any, rows: Rows) -> None:
    axes.set_yticks(range(len(rows)), [f"{row['task']}, T={row['temperature']:g}" for row in rows], fontsize="small")
    axes.invert_yaxis()


def write_report(results: Mapping[str, Any], output: Path) -> list[Mapping[str, Any]]:
    """Write ``report.html`` and ``results.md`` into ``output``; the rows of its prompts, which it reads."""
    rows = results["summaries"]
    write_text(output / "results.md", markdown(results) + "\n")
    height = 1.2 + 0.26 * len(rows)
    plots = [
        figure(lambda axes: plot_lengths(axes, rows), (6.4, height), "acceptance lengths"),
        figure(lambda axes: plot_positions(axes, results), (8.0, max(3.4, 0.22 * len(rows))), "acceptance by position"),
        figure(lambda axes: plot_phases(axes, rows), (6.4, height + 0.3), "shares of the time"),
    ]
    parts = []
    for (title, table), plot in zip(sections(results), plots, strict=True):
        parts.append(f"<h2>{html.escape(title)}</h2>{table.html(meanings(table))}{plot}")
    parts += [f"<p>{html.escape(remark)}</p>" for remark in remarks(rows)]
    provenance = "\n".join(f"{key}: {value}" for key, value in results["provenance"].items())
    parts.append(f"<details><summary>Provenance</summary><pre>{html.escape(provenance)}</pre></details>")
    prompts: list[Mapping[str, Any]] = list(open_rows(output, "results").values())
    answers = section(prompts)
    parts[1:1] = answers
    title = f"{results['algorithm']} on {Path(results['provenance']['target']).name}"
    write_text(output / "report.html", page(title, parts, *([script()] if answers else [])))
    return prompts
