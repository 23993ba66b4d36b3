"""results.json, a Markdown table and an HTML page from the rows of a run."""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from deepspec.evaluate.measures import macro, ratio, summarise
from deepspec.files import write_json, write_text

PUBLISHED = Path(__file__).with_name("published.yaml")


def summarise_run(rows: Iterable[dict[str, Any]], identity: dict[str, Any]) -> dict[str, Any]:
    """The content of results.json: measures per task and temperature, macro averages, provenance."""
    every = list(rows)
    tables = []
    for temperature in identity["settings"]["temperatures"]:
        tasks = [_task(every, name, temperature, identity) for name in identity["tasks"]]
        averages = {
            key: macro(tasks, key) for key in ("accepted_length", "verify_rate", "tokens_per_second", "speedup")
        }
        tables.append({"temperature": temperature, "tasks": tasks, "macro": averages})
    return {"format": "deepspec.results/1", "tables": tables, "provenance": identity}


def _task(rows: list[dict[str, Any]], name: str, temperature: float, identity: dict[str, Any]) -> dict[str, Any]:
    own = [row for row in rows if row["task"] == name and row["temperature"] == temperature]
    drafted = [row for row in own if row["mode"] == "draft"]
    plain = [row for row in own if row["mode"] == "plain"]
    measures = summarise(drafted, identity["slots"])
    seconds = {key: sum(row["seconds"][key] for row in drafted) for key in drafted[0]["seconds"]} if drafted else {}
    speed, plain_speed = _speed(drafted), _speed(plain)
    outputs = {(row["place"], row["turn"]): row["output_sha"] for row in plain}
    equal = [row["output_sha"] == outputs.get((row["place"], row["turn"])) for row in drafted]
    return {
        "task": name,
        **measures,
        "seconds": seconds,
        "tokens_per_second": speed,
        "plain_tokens_per_second": plain_speed,
        "speedup": ratio(speed, plain_speed),
        "equal_to_plain": sum(equal) if plain and temperature == 0 else None,
        "published": published_length(identity, name) if temperature == 1 else None,
    }


def _speed(rows: list[dict[str, Any]]) -> float:
    return ratio(sum(row["new_tokens"] for row in rows), sum(row["seconds"]["total"] for row in rows))


def published_length(identity: dict[str, Any], task: str) -> float | None:
    """The published accepted length of this target, algorithm and task, where there is one."""
    table = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
    name = Path(identity["target"]).name.removesuffix("-it")
    lengths = (table.get(name) or {}).get(identity["algorithm"]) if name != "tasks" else None
    return lengths[table["tasks"].index(task)] if lengths and task in table["tasks"] else None


COLUMNS = (
    "task",
    "samples",
    "accepted length",
    "95 %",
    "published",
    "verify rate",
    "tokens/s",
    "plain",
    "speed-up",
    "equal",
)


def table_rows(table: dict[str, Any]) -> list[list[str]]:
    """One list of cells a task, and the macro average."""
    cells = []
    for task in table["tasks"]:
        equal, published = task["equal_to_plain"], task["published"]
        cells.append([
            task["task"], str(task["samples"]), f"{task['accepted_length']:.2f}",
            f"{task['accepted_length_low']:.2f}-{task['accepted_length_high']:.2f}",
            "" if published is None else f"{published:.2f}", f"{task['verify_rate']:.3f}",
            f"{task['tokens_per_second']:.1f}", f"{task['plain_tokens_per_second']:.1f}", f"{task['speedup']:.2f}",
            "" if equal is None else f"{equal}/{task['samples']}",
        ])  # fmt: skip
    mean = table["macro"]
    cells.append([
        "macro average", "", f"{mean['accepted_length']:.2f}", "", "", f"{mean['verify_rate']:.3f}",
        f"{mean['tokens_per_second']:.1f}", "", f"{mean['speedup']:.2f}", "",
    ])  # fmt: skip
    return cells


def markdown(results: dict[str, Any]) -> str:
    """The tables of all temperatures."""
    lines = []
    for table in results["tables"]:
        lines += [
            f"Temperature {table['temperature']:g}",
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "|---" * len(COLUMNS) + "|",
        ]
        lines += ["| " + " | ".join(cells) + " |" for cells in table_rows(table)] + [""]
    return "\n".join(lines)


def write_report(folder: Path, results: dict[str, Any]) -> None:
    """results.md, report.html, and last results.json: it exists = the run is whole."""
    write_text(folder / "results.md", markdown(results))
    parts = []
    for table in results["tables"]:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>" for cells in table_rows(table)
        )
        parts.append(f"<h2>Temperature {table['temperature']:g}</h2><table><tr>{head}</tr>{body}</table>")
    page = "<!doctype html><meta charset=utf-8><title>deepspec evaluation</title>" + "".join(parts)
    write_text(folder / "report.html", page)
    write_json(folder / "results.json", results)
