"""ZeRO shards of a training checkpoint -> one draft folder, whatever the stage and the number of processes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspec import registry
from deepspec.checkpoints import (
    KEPT,
    Manifest,
    check_files,
    read_manifest,
    read_weights,
    steps_of,
    target_differences,
)
from deepspec.drafts import FROZEN, OWN, save_draft
from deepspec.drafts import read_weights as read_draft_weights
from deepspec.errors import CheckpointError, DraftError, TargetError
from deepspec.identity import target_fields
from deepspec.locks import one_writer
from deepspec.progress import about, bytes_in, bytes_read, waiting
from deepspec.recipe import Recipe, recipe_at
from deepspec.targets import TargetSpec, load_spec, load_target_embeddings
from deepspec.targets.stored import check_finite

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def checkpoint_folder(path: Path) -> Path:
    """``path`` itself where it is a checkpoint, or the newest complete checkpoint of the run ``path``.

    Raises:
        CheckpointError: neither.
    """
    if (path / "manifest.json").is_file():
        return path
    complete = steps_of(path)
    if not complete:
        remedy = "name a folder <run>/checkpoints/step_N with a manifest.json, or a run that has one"
        raise CheckpointError("not a checkpoint", file=path, remedy=remedy)
    return list(complete.values())[-1]


def consolidate(
    checkpoint: str | Path,
    output: str | Path,
    dtype: str | None = None,
    embeddings: bool = True,
    target: str | None = None,
) -> Path:
    """Write the draft of a checkpoint as a draft folder.

    Args:
        checkpoint: a checkpoint folder, or a run (its newest checkpoint is taken).
        output: the draft folder to create.
        dtype: ``bf16`` or ``fp32``; None takes the run's precision.
        embeddings: whether the folder carries the target's embedding and head, so that no target is needed to load it.
        target: where the target is now; None: where the recipe has it.

    Returns:
        The checkpoint folder that was taken.

    Raises:
        CheckpointError: no complete checkpoint, changed or broken shards, weights that are not finite, or a target
            with other weights than in training.
        DraftError: ``output`` already holds a draft, or another process works there.
    """
    with one_writer(output, "consolidation", DraftError):
        return _consolidate(checkpoint_folder(Path(checkpoint)), Path(output), dtype, embeddings, target)


def _consolidate(folder: Path, output: Path, dtype: str | None, embeddings: bool, moved: str | None) -> Path:
    manifest = read_manifest(folder)
    recipe = recipe_at(folder, manifest.recipe)
    spec = _spec(recipe, moved)
    recipe = recipe.for_target(spec)
    digest = recipe.digest()  # of the recipe that was trained, wherever its target is now
    if moved is not None:
        recipe = replace(recipe, target=replace(recipe.target, path=spec.path, revision=None))
    kind = DTYPES[dtype] if dtype else getattr(torch, manifest.dtype)
    about(target=spec.path)
    _check_target(spec, manifest, folder, embeddings)
    with waiting(f"checking {folder}", folder, bytes_read):
        check_files(folder, manifest)
    with waiting(f"putting the shards of {folder} together", folder, bytes_read):
        weights = read_weights(folder, manifest)
    state = {name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    if embeddings:  # as exact as the target's files have them, not as training rounded them
        target = load_target_embeddings(spec.path, kind, "cpu", spec.revision)
        state |= dict(zip(FROZEN, (target.embed_weight, target.head_weight), strict=True))
    own = _own_weights(manifest, folder)
    state |= {name: tensor.to(kind) for name, tensor in own.items()}
    check_finite(state, folder, CheckpointError)
    provenance: dict[str, Any] = {
        "checkpoint": str(folder),
        "step": manifest.step,
        "total_steps": manifest.total_steps,
        "seed": recipe.seed,
        "recipe_digest": digest,
        "target": {"path": spec.path, "revision": spec.revision, "weights": manifest.target_digest}
        | {key: value for key, value in manifest.identity.get("target", {}).items() if key in ("config", "reader")},
        "data": manifest.fingerprint,
        "training": {"world_size": manifest.world_size, "zero_stage": manifest.zero_stage, "dtype": manifest.dtype},
        "dtype": str(kind).removeprefix("torch."),
        "versions": manifest.versions,
    }
    if manifest.init:
        provenance["init"] = manifest.init
    config = registry.algorithm(recipe.algorithm).config_json(recipe.draft, spec, provenance["dtype"])
    config |= {key: True for key, name in zip(OWN, FROZEN, strict=True) if name in own}
    with waiting(f"writing {output}", sum(tensor.nbytes for tensor in state.values()), partial(bytes_in, output)):
        save_draft(output, state, config, provenance, recipe.to_yaml(output))
    return folder


def _spec(recipe: Recipe, moved: str | None) -> TargetSpec:
    """The recipe's target, or the folder to which it was ``moved``.

    Raises:
        TargetError: it is not there.
    """
    if moved is not None:
        return load_spec(moved)
    try:
        return load_spec(recipe.target.path, recipe.target.revision)
    except TargetError as error:
        remedy = "say where the target is now: --target FOLDER"
        raise TargetError(error.problem, file=error.file, key=error.key, wanted=error.wanted, remedy=remedy) from None


def _own_weights(manifest: Manifest, folder: Path) -> dict[str, Tensor]:
    """Embedding and head of a fine-tuned draft that has its own; the run keeps them beside its checkpoints."""
    own = {name for key, name in zip(OWN, FROZEN, strict=True) if key in manifest.init.get("own", ())}
    kept = read_draft_weights(folder.parents[1] / KEPT) if own else {}
    return {name: kept[name] for name in own}


def _check_target(spec: TargetSpec, manifest: Manifest, folder: Path, embeddings: bool) -> None:
    """The target is still that of the training: the draft's config, embedding and head are made from it.

    Raises:
        CheckpointError: it is not.
    """
    now = {"target": target_fields(spec, weights=embeddings)}
    if lines := target_differences(manifest, now, ("training", "now"), folder):
        remedy = "put the target back, or say where it is (--target)"
        if all(line.startswith("target.weights") for line in lines):
            remedy += ", or leave its embeddings out (--without-embeddings)"
        problem = f"the target's files are not those of the training: {'; '.join(lines)}"
        raise CheckpointError(problem, file=folder, key=spec.path, remedy=remedy)
