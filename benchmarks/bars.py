"""The form in which every benchmark writes its issue's bars: ``{"bars": {name: {"value", "limit", "holds"}}}``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepspec.files import write_json

Bars = dict[str, dict[str, Any]]


def at_most(value: float, limit: float) -> dict[str, Any]:
    """A bar that holds when the value is not above the limit."""
    return {"value": round(value, 4), "limit": limit, "holds": value <= limit}


def at_least(value: float, limit: float) -> dict[str, Any]:
    """A bar that holds when the value is not below the limit."""
    return {"value": round(value, 4), "limit": limit, "holds": value >= limit}


def write_bars(path: Path | None, bars: Bars) -> None:
    """Write the bars where ``--json`` says; nowhere without it."""
    if path is not None:
        write_json(path, {"bars": bars})
