"""What a training checkpoint says of itself: ``<run>/checkpoints/step_N/manifest.json``, written last."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deepspec.errors import CheckpointError
from deepspec.files import read_json
from deepspec.identity import as_recorded, differences

FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int  # optimizer steps done
    total_steps: int
    recipe: dict[str, Any]  # resolved
    fingerprint: dict[str, Any]  # of the data
    target_digest: str  # of the frozen target's weights: every byte, or a sample of them in older checkpoints
    world_size: int
    zero_stage: int
    dtype: str
    versions: dict[str, str]
    identity: dict[str, Any] = field(default_factory=dict)  # `target` of an `identity_of`; {}: an older checkpoint
    score: float | None = None  # of the last validation, higher is better
    files: dict[str, int] = field(default_factory=dict)  # name -> bytes
    format: int = FORMAT


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder, its files checked for presence and size.

    Raises:
        CheckpointError: no manifest (the save never ended), another format, a missing or cut file.
    """
    remedy = "name a folder <run>/checkpoints/step_N; without a manifest its save never ended"
    values = read_json(folder / "manifest.json", CheckpointError, remedy=remedy)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else values
        raise CheckpointError("unknown format", file=folder / "manifest.json", found=found, wanted=FORMAT)
    manifest = Manifest(**values)
    for name, size in manifest.files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else "no such file"
        if found != size:
            raise CheckpointError("file missing or cut", file=path, found=found, wanted=f"{size} bytes")
    return manifest


def target_differences(
    manifest: Manifest, identity: Mapping[str, Any], sides: tuple[str, str], file: object
) -> list[str]:
    """A line for each field in which the target of a training differs from what stands now; see ``identity_of``.

    What ``identity`` leaves out is not compared.
    """
    found: dict[str, Any] = dict(manifest.identity) or {"target": {"weights": manifest.target_digest}}
    if "weights" not in identity["target"]:
        found["target"] = {key: value for key, value in found["target"].items() if key != "weights"}
    dtype = getattr(torch, manifest.recipe["target"]["dtype"])
    now = as_recorded(found, identity, dtype, file)
    return differences({key: value for key, value in found.items() if key in identity}, now, sides)


def steps_of(run: Path) -> dict[int, Path]:
    """Whole checkpoints of a run, by step, in rising order."""
    folders = {}
    for path in (run / "checkpoints").glob("step_*"):
        match = re.fullmatch(r"step_(\d+)", path.name)
        if match and (path / "manifest.json").is_file():
            folders[int(match[1])] = path
    return dict(sorted(folders.items()))
