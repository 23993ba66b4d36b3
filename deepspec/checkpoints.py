"""A training checkpoint, ``<run>/checkpoints/step_N/``: its manifest, written last, and the weights in its shards."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, EnumType
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspec.errors import CheckpointError
from deepspec.files import check_digests, read_json, safe_join
from deepspec.identity import as_recorded, differences

FORMAT = 1
KEPT = "init"  # a run's folder with the draft that it started from
# What DeepSpeed's files hold beside tensors and plain values; loading one builds nothing else, so it runs no code.
TYPES = (
    "deepspeed.utils.tensor_fragment:fragment_address",
    "deepspeed.runtime.zero.config:ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler:LossScaler",
)
FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch's own: it overrules the weights_only=False of a caller


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's manifest."""

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
    init: dict[str, Any] = field(default_factory=dict)  # of the draft that the run started from; {}: from none
    score: float | None = None  # of the last validation, higher is better
    stale: int = 0  # scored validations since the one with the best score
    files: dict[str, int] = field(default_factory=dict)  # name -> bytes
    sha256: dict[str, str] = field(default_factory=dict)  # name -> digest; {}: an older checkpoint
    format: int = FORMAT


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder, its files checked for presence and size.

    Raises:
        CheckpointError: no manifest (the save never ended), a changed one, another format, a missing or cut file.
    """
    remedy = "name a folder <run>/checkpoints/step_N; without a manifest its save never ended"
    values = read_json(folder / "manifest.json", CheckpointError, remedy=remedy)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else values
        raise CheckpointError("unknown format", file=folder / "manifest.json", found=found, wanted=FORMAT)
    try:
        manifest = Manifest(**values)
    except TypeError as problem:
        raise CheckpointError(f"damaged manifest ({problem})", file=folder / "manifest.json") from None
    for name, size in manifest.files.items():
        path = safe_join(folder, name, CheckpointError, "files")
        found = path.stat().st_size if path.is_file() else "no such file"
        if found != size:
            raise CheckpointError("file missing or cut", file=path, found=found, wanted=f"{size} bytes")
    return manifest


def check_files(folder: Path, manifest: Manifest, rank: int = 0, ranks: int = 1) -> None:
    """Compare this rank's share of a checkpoint's files with their digests; older checkpoints have none.

    Raises:
        CheckpointError: a file has changed since it was saved.
    """
    share = dict(list(manifest.sha256.items())[rank::ranks])
    remedy = "put it back from a copy, or remove this checkpoint: the run resumes from the one before it"
    check_digests(folder, share, CheckpointError, remedy)


def target_differences(
    manifest: Manifest, identity: Mapping[str, Any], sides: tuple[str, str], file: object
) -> list[str]:
    """A line for each field in which the target of a training differs from the present one; see ``identity_of``.

    What ``identity`` leaves out is not compared.
    """
    found: dict[str, Any] = dict(manifest.identity) or {"target": {"weights": manifest.target_digest}}
    if "weights" not in identity["target"]:
        found["target"] = {key: value for key, value in found["target"].items() if key != "weights"}
    dtype = getattr(torch, manifest.recipe["target"]["dtype"])
    now = as_recorded(found, identity, dtype, file)
    return differences({key: value for key, value in found.items() if key in identity}, now, sides)


def steps_of(run: Path) -> dict[int, Path]:
    """Complete checkpoints of a run, by step, in rising order."""
    folders = {}
    for path in (run / "checkpoints").glob("step_*"):
        match = re.fullmatch(r"step_(\d+)", path.name)
        if match and (path / "manifest.json").is_file():
            folders[int(match[1])] = path
    return dict(sorted(folders.items()))


def check_finished(run: Path) -> Path:
    """The last checkpoint of a run that reached its end.

    Raises:
        CheckpointError: it did not; the exit code of a launcher does not tell.
    """
    remedy = "run the same training command again, it continues"
    folder = next(reversed(steps_of(run).values()), None)
    if folder is None:
        raise CheckpointError("the run has no checkpoint", file=run, remedy=remedy)
    manifest = read_manifest(folder)
    if manifest.step < manifest.total_steps:
        found, wanted = f"step {manifest.step}", f"step {manifest.total_steps}"
        raise CheckpointError("the run is not finished", file=run, found=found, wanted=wanted, remedy=remedy)
    return folder


def _member(kind: object, name: str) -> Enum:
    """The member of an enum, which Python 3.11.0 to 3.11.3 write as ``getattr(kind, name)``; nothing else is read."""
    if not isinstance(kind, EnumType) or name not in kind.__members__:
        raise pickle.UnpicklingError(f"GLOBAL getattr of {kind!r}")
    member: Enum = kind[name]
    return member


@contextlib.contextmanager
def known_types(folder: Path) -> Iterator[None]:
    """For the block every ``torch.load``, DeepSpeed's too, builds tensors, plain values and ``TYPES`` alone.

    Raises:
        CheckpointError: a file of ``folder`` holds another type; it was not built.
    """
    places = (name.split(":") for name in TYPES)
    allowed: list[Any] = [getattr(importlib.import_module(module), attribute) for module, attribute in places]
    allowed += [(_member, f"{module}.getattr") for module in ("builtins", "__builtin__")]
    before = os.environ.get(FORCED)
    os.environ[FORCED] = "1"
    try:
        with torch.serialization.safe_globals(allowed):
            yield
    except pickle.UnpicklingError as problem:
        found = re.search(r"GLOBAL (\S+)", str(problem))
        raise CheckpointError(
            "holds what no checkpoint of ours does, and it was not loaded", file=folder,
            found=found[1] if found else str(problem).strip().splitlines()[0],
            wanted="tensors, plain values and DeepSpeed's own types",
            remedy="load checkpoints of your own trainings only",
        ) from None  # fmt: skip
    finally:
        os.environ.pop(FORCED)
        if before is not None:
            os.environ[FORCED] = before


def read_weights(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    """The draft's weights by name: parameters in fp32 where the optimizer keeps masters (ZeRO 1-3), else as trained.

    Buffers (Gemma's layer scalars, a reduced vocabulary) come as the module held them.

    Raises:
        CheckpointError: the shards cannot be put together.
    """
    try:
        with known_types(folder):
            return _read_weights(folder, manifest)
    except (OSError, RuntimeError, KeyError, ValueError) as problem:
        line = (str(problem).strip() or repr(problem)).splitlines()[0]
        raise CheckpointError(f"shards cannot be put together ({line})", file=folder) from problem


def _read_weights(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    if manifest.zero_stage == 0:
        return dict(torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu")["module"])
    if manifest.zero_stage == 1 and (slices := _bf16_slices(folder, manifest)):
        state = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu")
        return _cut(slices, state["param_shapes"]) | _untrained([state], manifest)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()):
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
    return {name: tensor.clone() for name, tensor in state.items()} | read_untrained(folder, manifest)


def read_untrained(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    """The module's buffers and frozen weights of a checkpoint (ZeRO 1-3) in their own dtypes.

    DeepSpeed's tool turns buffers into fp32 and leaves frozen weights of stage 1 out; stage 3 holds them in pieces.
    """
    paths = sorted(folder.glob("*mp_rank_00_model_states.pt"), key=lambda path: _rank(path.name))
    with known_types(folder):
        states = [torch.load(path, map_location="cpu") for path in (paths if manifest.zero_stage == 3 else paths[:1])]
    return _untrained(states, manifest)


def _untrained(states: list[dict[str, Any]], manifest: Manifest) -> dict[str, Tensor]:
    """See :func:`read_untrained`; of model states that are loaded."""
    module = states[0]["module"]
    found = {name: module[name].clone() for name in states[0].get("buffer_names") or ()}
    if manifest.zero_stage == 3:
        for name, shape in (states[0].get("frozen_param_shapes") or {}).items():
            flat = torch.cat([state["frozen_param_fragments"][name].flatten() for state in states])
            found[name] = flat[: shape.numel()].view(shape).clone()
        return found
    trained = {name for group in states[0]["param_shapes"] for name in group}
    return found | {name: module[name].clone() for name in module if name not in trained}


def _rank(name: str) -> int:
    match = re.search(r"pp_rank_(\d+)_", name)
    return int(match[1]) if match else 0


def _bf16_slices(folder: Path, manifest: Manifest) -> list[list[Tensor]] | None:
    """ZeRO-1 in bf16 with fp32 accumulation: shards of DeepSpeed's BF16_Optimizer, which its own tool does not read.

    Each rank holds an equal slice of one flat fp32 buffer per parameter group; the buffer's end is padding.

    Returns:
        of each rank the slice of each group; None where the shards are of the common kind.
    """
    paths = [folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(manifest.world_size)]
    if not all(path.is_file() for path in paths):
        return None
    states = [torch.load(path, map_location="cpu")["optimizer_state_dict"] for path in paths]
    if "zero_stage" in states[0]:
        return None
    return [state["single_partition_of_fp32_groups"] for state in states]


def _cut(slices: list[list[Tensor]], shapes: list[dict[str, torch.Size]]) -> dict[str, Tensor]:
    """The weights by name from the ranks' slices."""
    weights: dict[str, Tensor] = {}
    for group, named in enumerate(shapes):
        flat, start = torch.cat([one[group].flatten() for one in slices]), 0
        for name, shape in named.items():
            weights[name] = flat[start : start + shape.numel()].view(shape).clone()
            start += shape.numel()
    return weights
