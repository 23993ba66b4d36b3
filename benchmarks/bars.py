"""The form in which every benchmark writes its issue's bars: ``{"bars": {name: {"value", "limit", "holds"}}}``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepspec.files import write_json
from deepspec.tables import Table

Bars = dict[str, dict[str, Any]]


def at_most(value: float, limit: float) -> dict[str, Any]:
    """A bar that holds when the value is not above the limit."""
    return {"value": round(value, 4), "limit": limit, "holds": value <= limit}


def at_least(value: float, limit: float) -> dict[str, Any]:
    """A bar that holds when the value is not below the limit."""
    return {"value": round(value, 4), "limit": limit, "holds": value >= limit}


def write_bars(path: Path | None, bars: Bars) -> None:
    """Print the bars, and write them where ``--json`` says."""
    if bars:
        rows = [[name, one["value"], one["limit"], "yes" if one["holds"] else "NO"] for name, one in bars.items()]
        print(f"\n{Table(['bar', 'found', 'limit', 'holds'], rows).text()}", flush=True)
    if path is not None:
        write_json(path, {"bars": bars})
