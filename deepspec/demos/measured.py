"""What stages measured, read from the files that they leave, and how a figure is shown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepspec.files import read_json
from deepspec.metrics import equality_text, length_text

NOT_RUN = "not run"
Row = Mapping[str, Any]


def cache_sizes(manifests: Sequence[Path]) -> dict[str, Any]:
    """Tokens and bytes of caches together."""
    read = [read_json(path) for path in manifests]
    return {
        "tokens": sum(part["tokens"] for one in read for part in one["parts"]),
        "coded_bytes": sum(one["coded_bytes"] for one in read),
        "raw_bytes": sum(one["raw_bytes"] for one in read),
    }


def tau_by_step(run: Path) -> dict[int, float]:
    """The training's own estimate of the acceptance length, by optimizer step."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").split("\n") if line]
    return {row["step"]: round(row["tau"], 3) for row in rows if row.get("kind") == "train" and "tau" in row}


def pick(evaluation: Row | None, temperature: float, task: str | None = None) -> Row | None:
    """The summary of a task (None: the only one) at a temperature."""
    rows = evaluation["summaries"] if evaluation else []
    return next((r for r in rows if r["temperature"] == temperature and task in (None, r["task"])), None)


def length(row: Row | None) -> str:
    """Acceptance length with its interval."""
    return NOT_RUN if row is None else length_text(row)


def speed_up(row: Row) -> str:
    """``1.25x``; empty where nothing was decoded without a draft."""
    return "" if row["speed_up"] is None else f"{row['speed_up']:.2f}x"


def equality(row: Row | None) -> str:
    """Share of the prompts whose greedy output is that of decoding without a draft; empty where none is greedy."""
    if row is None:
        return NOT_RUN
    return "" if row["equal_to_plain"] is None else f"{equality_text(row)} of {row['prompts']}"
