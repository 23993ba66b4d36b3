"""What the real run and the ablations have measured, gathered from their folders into one JSON value.

The value is kept in the repository (``docs/results.json``): a run that is not on this machine keeps the entry that an
earlier gathering wrote.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspec.demos.runner import stage_seconds
from deepspec.demos.smollm2 import ablation
from deepspec.demos.smollm2.plan import EVALUATIONS, SCALES
from deepspec.files import read_json, write_json
from deepspec.registry import ALGORITHMS

FORMAT = "deepspec.measured/1"
MEASURES = ("task", "temperature", "prompts", "rounds", "output_tokens", "accepted_length", "interval", "conditional",
            "prefix", "verify_rate", "equal_to_plain", "speed_up", "seconds", "plain_seconds")  # fmt: skip


def gather(known: Path) -> dict[str, Any]:
    """Everything measured: what the folders under build/ hold, over what ``known`` holds already."""
    value = read_json(known) if known.exists() else {}
    found = {"format": FORMAT, "real": _real(), "ablations": _ablations()}
    merged = _merge(value, found)
    write_json(known, merged)
    return merged


def _merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Two levels deep: a section keeps the entries that the new one lacks."""
    merged = dict(old)
    for key, value in new.items():
        deeper = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and "provenance" not in value
        merged[key] = _merge(merged[key], value) if deeper else value
    return merged


def _real() -> dict[str, Any]:
    scale = SCALES["full"]
    found: dict[str, Any] = {"stages": stage_seconds(scale.root / "logs")}
    shards = [scale.root / f"cache-{shard}" / "manifest.json" for shard in range(scale.shards)]
    if all(path.exists() for path in shards):
        found["cache"] = {"lossless": _sizes(shards)}
    for kind in EVALUATIONS:
        found[kind] = {
            name: evaluation
            for name in ALGORITHMS
            if (evaluation := _evaluation(scale.root / f"{name}-{kind}")) is not None
        }
    found["training"] = _trainings({name: scale.root / name for name in ALGORITHMS})
    return found


def _ablations() -> dict[str, Any]:
    root = ablation.ROOT
    names = [*ablation.VARIANTS, *(f"step-{step}" for step in ablation.CURVE)]
    caches = {level: ablation.cache_of(level) / "manifest.json" for level in ("lossless", *ablation.LEVELS)}
    measured = {name: evaluation for name in names if (evaluation := _evaluation(root / name / "results")) is not None}
    found: dict[str, Any] = {
        "stages": stage_seconds(ablation.LOGS),
        "cache": {level: _sizes([path]) for level, path in caches.items() if path.exists()},
        "ablation": measured,
        "training": _trainings({name: root / name / "run" for name in ablation.VARIANTS}),
    }
    for key, path in (("sts", ablation.CALIBRATION), ("scheduler", ablation.STUDY)):
        if path.exists():
            found[key] = read_json(path)
    return found


def _sizes(manifests: list[Path]) -> dict[str, Any]:
    """Tokens and bytes of caches together."""
    read = [read_json(path) for path in manifests]
    return {
        "tokens": sum(part["tokens"] for one in read for part in one["parts"]),
        "coded_bytes": sum(one["coded_bytes"] for one in read),
        "raw_bytes": sum(one["raw_bytes"] for one in read),
    }


def _evaluation(folder: Path) -> dict[str, Any] | None:
    """The measures of a finished evaluation and what they depend on; None where it has not run."""
    if not (folder / "results.json").exists():
        return None
    read = read_json(folder / "results.json")
    about = read["provenance"]
    about = about | about.get("settings", {})
    kept = [
        "seed",
        "max_new_tokens",
        "batch_size",
        "versions",
        "threads",
        "target_dtype",
        "finished",
        "target_digest",
        "draft_sha256",
    ]
    return {
        "summaries": [{key: row.get(key) for key in MEASURES} for row in read["summaries"]],
        "provenance": {key: about.get(key) for key in kept} | {"command": _typed(about["command"])},
    }


def _typed(argv: list[str]) -> str:
    """The evaluator's command as a user types it."""
    return " ".join(["python -m deepspec.evaluate", *argv[1:]])


def _trainings(runs: Mapping[str, Path]) -> dict[str, Any]:
    """Of every finished training: its seed, steps, processes, versions, and its log's tau by step."""
    found = {}
    for name, run in runs.items():
        path = run / "run.json"
        if not path.exists() or not (run / "log.jsonl").exists():
            continue
        about = read_json(path)
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").split("\n") if line]
        curve = {row["step"]: round(row["tau"], 3) for row in rows if row.get("kind") == "train" and "tau" in row}
        if about["total_steps"] in curve:
            kept = ("seed", "total_steps", "world_size", "dtype", "versions")
            found[name] = {"tau": curve, "provenance": {key: about[key] for key in kept}}
    return found
