"""What the real run, the fine-tuning and the ablations have measured, gathered from their folders into one JSON value.

The value is kept in the repository (``docs/results.json``): a run that is not on this machine keeps the entry that an
earlier gathering wrote.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspec.demos.measured import cache_sizes, tau_by_step
from deepspec.demos.runner import stage_seconds
from deepspec.demos.smollm2 import ablation, finetune
from deepspec.demos.smollm2.plan import EVALUATIONS, SCALES
from deepspec.errors import EvaluationError
from deepspec.files import read_json, write_json
from deepspec.registry import ALGORITHMS

FORMAT = "deepspec.measured/1"
MEASURES = ("task", "temperature", "prompts", "rounds", "output_tokens", "accepted_length", "interval", "conditional",
            "prefix", "verify_rate", "equal_to_plain", "equal_or_tied", "speed_up", "seconds",
            "plain_seconds")  # fmt: skip
PROVENANCE = ("seed", "max_new_tokens", "batch_size", "versions", "threads", "target_dtype", "finished",
              "target_digest", "draft_sha256")  # fmt: skip


def gather(known: Path) -> dict[str, Any]:
    """Everything measured: what the folders under build/ hold, over what ``known`` holds already.

    Raises:
        EvaluationError: neither holds anything.
    """
    runs = (SCALES["full"].root, finetune.SCALES["full"].root, ablation.ROOT)
    if not known.exists() and not any(root.exists() for root in runs):
        wanted = f"{known}, or a run in one of {', '.join(map(str, runs))}"
        raise EvaluationError("nothing was measured in this folder", wanted=wanted, remedy="run `deepspec demo real`")
    value = read_json(known) if known.exists() else {}
    merged = _merge(value, {"format": FORMAT, "real": _real(), "finetuned": _finetuned(), "ablations": _ablations()})
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
    shards = [folder / "manifest.json" for folder in scale.caches()]
    if all(path.exists() for path in shards):
        found["cache"] = {"lossless": cache_sizes(shards)}
    for kind in EVALUATIONS:
        found[kind] = _evaluations({name: scale.root / f"{name}-{kind}" for name in ALGORITHMS})
    found["training"] = _trainings({name: scale.root / name for name in ALGORITHMS})
    return found


def _finetuned() -> dict[str, Any]:
    root, starts = finetune.SCALES["full"].root, (finetune.GENERAL, *finetune.STARTS)
    results = {f"{name} {one}": finetune.results_of("full", name, one) for name in ALGORITHMS for one in starts}
    trained = {f"{name} {one}": root / f"{name}-{one}" for name in ALGORITHMS for one in finetune.STARTS}
    found = {"stages": stage_seconds(root / "logs"), "drafts": _evaluations(results)}
    return found | {"training": _trainings(trained)}


def _ablations() -> dict[str, Any]:
    root = ablation.ROOT
    names = [*ablation.VARIANTS, *(f"step-{step}" for step in ablation.CURVE)]
    caches = {level: ablation.cache_of(level) / "manifest.json" for level in ("lossless", *ablation.LEVELS)}
    found: dict[str, Any] = {
        "stages": stage_seconds(ablation.LOGS),
        "cache": {level: cache_sizes([path]) for level, path in caches.items() if path.exists()},
        "ablation": _evaluations({name: root / name / "results" for name in names}),
        "training": _trainings({name: root / name / "run" for name in ablation.VARIANTS}),
    }
    for key, path in (("sts", ablation.CALIBRATION), ("scheduler", ablation.STUDY)):
        if path.exists():
            found[key] = read_json(path)
    return found


def _evaluations(folders: Mapping[str, Path]) -> dict[str, Any]:
    """Of every finished evaluation the measures, and what they depend on."""
    found = {}
    for name, folder in folders.items():
        if (folder / "results.json").exists():
            read = read_json(folder / "results.json")
            about = read["provenance"] | read["provenance"].get("settings", {})
            command = shlex.join(["python", "-m", "deepspec.evaluate", *about["command"][1:]])  # as a user types it
            found[name] = {
                "summaries": [{key: row.get(key) for key in MEASURES} for row in read["summaries"]],
                "provenance": {key: about.get(key) for key in PROVENANCE} | {"command": command},
            }
    return found


def _trainings(runs: Mapping[str, Path]) -> dict[str, Any]:
    """Of every finished training: its seed, steps, processes, versions, and its log's tau by step."""
    found = {}
    for name, run in runs.items():
        if (run / "run.json").exists() and (run / "log.jsonl").exists():
            about, curve = read_json(run / "run.json"), tau_by_step(run)
            if about["total_steps"] in curve:
                kept = ("seed", "total_steps", "world_size", "dtype", "versions")
                found[name] = {"tau": curve, "provenance": {key: about[key] for key in kept}}
    return found
