"""``train.init: {draft: ...}``: a training that starts from a draft of any format that we can import.

Rank 0 reads the draft once, checks it against the recipe and keeps it in our layout as ``<run>/init``; so a run needs
its source no more, and all ranks start from the same bytes. What differs from the recipe is honoured and reported where
it can be (layers, order of the target's layers, reduced vocabulary, heads) and refused by name where it cannot.

V' the draft's vocabulary, L target layers read, D hidden size.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from deepspec import registry
from deepspec.algorithms.base import Algorithm, DraftModel
from deepspec.checkpoints import KEPT, steps_of
from deepspec.drafts import FROZEN, OWN, read_weights, save_draft, weights_sha256
from deepspec.errors import CheckpointError, DraftError, TargetError
from deepspec.export.consolidate import consolidate
from deepspec.export.convert import read_other
from deepspec.export.parts import DraftCheckpoint, ImportHints
from deepspec.families.base import Shape
from deepspec.files import read_json, remove
from deepspec.identity import shown
from deepspec.recipe import DraftStart, Recipe
from deepspec.targets import TargetEmbeddings, TargetSpec, load_spec, load_target_embeddings
from deepspec.targets.digests import COMPLETE

log = logging.getLogger(__name__)
IMPORT = "import it with what it does not state: deepspec import DRAFT OUT, and start from OUT"


def keep_draft(recipe: Recipe) -> None:
    """Copy the draft that a run starts from into its folder, unless the run has begun (rank 0).

    Raises:
        DraftError: it cannot be read, or differs from the recipe in what cannot be honoured.
        CheckpointError: a checkpoint that cannot be put together.
    """
    section, folder = recipe.train.init, Path(recipe.output, KEPT)
    if not isinstance(section, DraftStart) or steps_of(Path(recipe.output)):
        return
    spec = load_spec(recipe.target.path, recipe.target.revision)
    recipe = recipe.for_target(spec)
    draft, provenance = _read(section, spec, recipe.draft.max_draft)
    check_fit(draft, recipe, spec)
    own = _own_weights(draft, recipe)
    config = {key: value for key, value in draft.config.items() if key not in OWN}
    config |= {key: True for key, name in zip(OWN, FROZEN, strict=True) if name in own}
    provenance["init"]["own"] = [key for key in OWN if key in config]
    state = {name: tensor for name, tensor in draft.state.items() if name not in FROZEN}
    remove(folder)
    save_draft(folder, state | own, config, provenance)


def _read(section: DraftStart, spec: TargetSpec, max_draft: int) -> tuple[DraftCheckpoint, dict[str, Any]]:
    """The draft in our layout and its provenance, its identity under ``init``."""
    source, hints = Path(section.draft), ImportHints(target=spec, max_draft=max_draft)
    about: dict[str, Any] = {"draft": named(section.draft)}
    if (source / "manifest.json").is_file() or steps_of(source):
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder, "draft")
            about |= {"checkpoint": str(consolidate(source, made, "fp32", embeddings=False))}
            draft, provenance = read_other(made, "deepspec", hints)
    else:
        try:
            draft, provenance = read_other(section.draft, section.format, hints)
        except DraftError as error:
            if error.wanted is None or not str(error.wanted).endswith("stated"):
                raise
            key, wanted = error.key, error.wanted
            raise DraftError(error.problem, file=error.file, key=key, wanted=wanted, remedy=IMPORT) from None
    made_by, trained_for = provenance.pop("import"), provenance.get("target") or {}
    about["target"] = {key: trained_for.get(key) for key in ("path", "weights")}
    about |= {"format": made_by["format"], "weights": made_by["weights"], "algorithm": draft.algorithm.name}
    return draft, provenance | {"init": about}


def named(draft: str) -> str:
    """A draft as a record names it: a folder by its absolute path, a hub id as it is."""
    return os.path.abspath(draft) if os.path.exists(draft) else draft


# -- does it fit ------------------------------------------------------------------------------------------------------


def check_fit(draft: DraftCheckpoint, recipe: Recipe, spec: TargetSpec) -> None:
    """Check what cannot be honoured.

    Raises:
        DraftError: another algorithm, other widths, target layers or conventions, or layers that nobody chose.
    """
    owner: Algorithm = registry.algorithm(recipe.algorithm)
    theirs, ours = draft.algorithm.name, owner.name
    if theirs not in (ours, *owner.starts_from):
        _refuse(draft, "algorithm", theirs, f"{' or '.join((ours, *owner.starts_from))}", f"set algorithm: {theirs}")
    layers = owner.layers(recipe.draft, spec)
    if draft.family != layers.family:
        remedy = f"set draft.layers.family: {draft.family.name}, or name a draft for this target"
        _refuse(draft, "model_type", draft.family.name, f"layers of {layers.family.name}", remedy)
    for field in fields(Shape):
        found, wanted = getattr(draft.shape, field.name), getattr(layers.shape, field.name)
        if found != wanted and field.name != "max_positions":  # no weight depends on it
            _refuse(draft, field.name, found, f"{wanted} as in {spec.path}", "name a draft for this target")
    read, wanted_read = list(draft.parsed.target_layers), list(recipe.target.layers)
    if sorted(read) != sorted(wanted_read):
        _refuse(draft, "target_layer_ids", read, f"target.layers {wanted_read}", f"set target.layers: {read}")
    for own in draft.algorithm.own_fields:
        if not own.learned:
            continue
        found, value = getattr(draft.parsed, own.attribute), getattr(recipe.draft, own.attribute)
        if found != value:
            key = f"draft.{own.attribute}"
            _refuse(draft, own.key, found, f"{value!r} as {key}", f"set {key}: {found!r}")
    _check_layers(draft, recipe)


def _own_weights(draft: DraftCheckpoint, recipe: Recipe) -> dict[str, Tensor]:
    """Embedding and head that the draft trained for itself; a copy of the target's, as bfloat16 sees it, is none.

    A head over a reduced vocabulary has the target's rows for all other tokens.
    """
    named_own = {name for name, key in zip(FROZEN, OWN, strict=True) if draft.config.get(key) and name in draft.state}
    if not named_own:
        return {}
    target = load_target_embeddings(recipe.target.path, torch.float32, "cpu", recipe.target.revision)
    theirs = dict(zip(FROZEN, (target.embed_weight, target.head_weight), strict=True))
    own = {}
    for name in named_own:
        rows = _tokens(draft) if name == FROZEN[1] else torch.arange(draft.shape.vocab_size)
        if not torch.equal(draft.state[name][rows].bfloat16(), theirs[name][rows].bfloat16()):
            given = draft.state[name]
            own[name] = theirs[name].to(given.dtype).index_copy(0, rows, given[rows])
    return own


def _check_layers(draft: DraftCheckpoint, recipe: Recipe) -> None:
    section, depth, count = cast(DraftStart, recipe.train.init), draft.parsed.num_layers, recipe.draft.num_layers
    kept = kept_layers(section, depth)
    if max(kept) >= depth:
        key, wanted = "train.init.keep_layers", f"indices below its {depth} layers"
        raise DraftError("no such layer", file=draft.file, key=key, found=list(kept), wanted=wanted)
    if len(kept) > count:
        remedy = f"name {count} of them in train.init.keep_layers, or set draft.num_layers: {len(kept)}"
        _refuse(draft, "num_hidden_layers", len(kept), f"at most draft.num_layers {count}", remedy)


def _refuse(draft: DraftCheckpoint, key: str, found: object, wanted: str, remedy: str) -> None:
    raise DraftError(
        "the recipe's draft cannot start from this one", file=draft.file, key=key, found=found, wanted=wanted,
        remedy=remedy,
    )  # fmt: skip


def kept_layers(section: DraftStart, depth: int) -> tuple[int, ...]:
    """Which of the draft's ``depth`` layers the recipe's first ones start from."""
    return tuple(range(depth)) if section.keep_layers is None else section.keep_layers


# -- the start --------------------------------------------------------------------------------------------------------


def kept_draft(recipe: Recipe) -> DraftCheckpoint:
    """The draft that :func:`keep_draft` left in the run's folder."""
    folder = Path(recipe.output, KEPT)
    config = read_json(folder / "config.json", DraftError, "begin the run anew, in another output")
    return DraftCheckpoint(config, read_weights(folder), folder / "config.json")


def frozen_pair(recipe: Recipe, target: TargetEmbeddings) -> tuple[Tensor, Tensor]:
    """The draft's embedding and head: the target's, or those that the draft it started from trained for itself.

    Raises:
        TargetError: the target adds a bias to its logits, which no draft's head has.
    """
    if target.head_bias is not None and bool(target.head_bias.any()):
        raise TargetError(
            "no draft is trained for a target whose output head has a bias: a draft's head is a matrix alone",
            file=target.spec.path, key="lm_head.bias", remedy="it decodes and is measured without a draft",
        )  # fmt: skip
    own: dict[str, Tensor] = {}
    if isinstance(recipe.train.init, DraftStart):
        config = read_json(Path(recipe.output, KEPT, "config.json"), DraftError)
        own = kept_draft(recipe).state if any(config.get(key) for key in OWN) else {}
    like = target.embed_weight
    embed, head = (own[name].to(like.device, like.dtype) if name in own else None for name in FROZEN)
    return like if embed is None else embed, target.head_weight if head is None else head


def kept_vocabulary(draft: DraftCheckpoint, recipe: Recipe) -> Tensor | None:
    """The draft's own reduced vocabulary [V'] where the recipe's draft keeps it; None: it is chosen by the data."""
    section, size = cast(DraftStart, recipe.train.init), recipe.draft.draft_vocab_size
    if section.vocabulary == "data" or size is None or draft.parsed.draft_vocab_size != size:
        return None
    return _tokens(draft)


def _tokens(draft: DraftCheckpoint) -> Tensor:
    """The tokens that a draft proposes, [V'] ascending."""
    if "d2t" not in draft.state:
        return torch.arange(draft.shape.vocab_size)
    return draft.state["d2t"] + torch.arange(len(draft.state["d2t"]))


@torch.no_grad()
def start_from(model: DraftModel, draft: DraftCheckpoint, section: DraftStart, told: Sequence[str] = ()) -> None:
    """Overwrite the fresh weights of ``model``, whose vocabulary is set, by the draft's; report the changes."""
    own = model.state_dict()
    notes = [*told, *(f"{key}: the draft's, not trained" for key in OWN if draft.config.get(key))]
    given = {name: tensor for name, tensor in draft.state.items() if name not in ("d2t", "t2d", *FROZEN)}
    given = _with_layers(given, kept_layers(section, draft.parsed.num_layers), len(model.layers), notes)
    _order_features(given, draft, model, notes)
    _move_rows(given, own, draft, model, notes)
    _fit_heads(given, own, model.algorithm, notes)
    for name, tensor in given.items():
        own[name].copy_(tensor)
    for key in sorted({one.attribute for one in draft.algorithm.own_fields} - {"num_layers", "confidence_head"}):
        found, now = getattr(draft.parsed, key), getattr(model.config, key, None)
        if now is not None and found != now:
            notes.append(f"{key} {found!r} -> {now!r}")
    log.info("starting from %s%s", draft.file and draft.file.parent, "".join(f"\n  {note}" for note in notes))


def followed(about: Mapping[str, Any], weights: str, path: str) -> list[str]:
    """A line where the draft was trained for another target than the run's, whose ``weights`` are given by digest."""
    known = about["target"].get("weights")
    if known is None or weights == known or not (known.startswith(COMPLETE) and weights.startswith(COMPLETE)):
        return []
    return [f"target: trained for {about['target']['path']} ({shown(known)}), now for {path} ({shown(weights)})"]


def _with_layers(given: dict[str, Tensor], kept: tuple[int, ...], count: int, notes: list[str]) -> dict[str, Tensor]:
    """The tensors with the kept layers under their new numbers."""
    number = {f"layers.{old}.": f"layers.{new}." for new, old in enumerate(kept)}
    moved: dict[str, Tensor] = {}
    for name, tensor in given.items():
        prefix = name[: name.find(".", len("layers.")) + 1] if name.startswith("layers.") else ""
        if not prefix or prefix in number:
            moved[number.get(prefix, "") + name[len(prefix) :]] = tensor
    if list(kept) != list(range(count)):
        fresh = f", {count - len(kept)} new layers after them" if count > len(kept) else ""
        notes.append(f"layers: {', '.join(map(str, kept))} of the draft{fresh}")
    return moved


def _order_features(given: dict[str, Tensor], draft: DraftCheckpoint, model: DraftModel, notes: list[str]) -> None:
    """Move the columns of ``fc`` [D, L*D] to the recipe's order of the target's layers."""
    theirs, ours = list(draft.parsed.target_layers), list(model.config.target_layers)
    if theirs != ours:
        order = [theirs.index(layer) for layer in ours]
        given["fc.weight"] = given["fc.weight"].unflatten(1, (len(order), -1))[:, order].flatten(1)
        notes.append(f"target layers: the columns of {theirs} in the order {ours}")


def _move_rows(
    given: dict[str, Tensor], own: dict[str, Tensor], draft: DraftCheckpoint, model: DraftModel, notes: list[str]
) -> None:
    """Rows by token to the recipe's vocabulary; those of new tokens stay fresh."""
    theirs, ours = _tokens(draft), model.draft_vocab_tokens
    ours = torch.arange(model.shape.vocab_size) if ours is None else ours.cpu()
    if torch.equal(theirs, ours):
        return
    row_V = torch.full((model.shape.vocab_size,), -1).index_copy(0, theirs, torch.arange(len(theirs)))
    row = row_V[ours]
    known = row >= 0
    notes.append(f"vocabulary: {len(theirs)} -> {len(ours)} tokens, {int(known.sum())} of them the draft's")
    for name in model.algorithm.vocabulary_rows:
        if name in given and name in own and given[name].shape[1:] == own[name].shape[1:]:
            moved = own[name].clone()
            moved[known] = given[name][row[known]].to(moved.dtype)
            given[name] = moved


def _fit_heads(given: dict[str, Tensor], own: dict[str, Tensor], owner: Algorithm, notes: list[str]) -> None:
    """Heads that only one side has, or of other shapes: the recipe's start anew, at zero effect where they can."""
    for prefix in owner.heads:
        theirs = {name: tensor.shape for name, tensor in given.items() if fnmatchcase(name, f"{prefix}*")}
        ours = {name: tensor.shape for name, tensor in own.items() if fnmatchcase(name, f"{prefix}*")}
        if theirs == ours:
            continue
        for name in theirs:
            del given[name]
        for name in owner.neutral:
            if name in ours:
                own[name].zero_()
        fresh = "new, it starts at zero effect" if any(name.startswith(prefix) for name in owner.neutral) else "new"
        notes.append(f"{prefix.rstrip('._')}: {fresh if ours else 'left out'}")


# -- its identity -----------------------------------------------------------------------------------------------------


def identity(recipe: Recipe) -> dict[str, Any]:
    """What a checkpoint records of the draft that its run started from; {} where it started from none.

    Raises:
        CheckpointError: the run began from another draft than the recipe names.
    """
    section, folder = recipe.train.init, Path(recipe.output, KEPT)
    if not isinstance(section, DraftStart):
        return {}
    if not (folder / "provenance.json").is_file():
        problem, remedy = "the run did not begin from a draft, or its copy is gone", "choose another output"
        raise CheckpointError(problem, file=folder, key="train.init.draft", found=section.draft, remedy=remedy)
    known: dict[str, Any] = read_json(folder / "provenance.json", DraftError)["init"]
    source = Path(section.draft)
    found, wanted = section.draft, known["draft"]
    same = wanted in (found, os.path.abspath(found))  # also where it is gone: the run has its copy
    if (source / "config.json").is_file() and "checkpoint" not in known:  # the same draft may lie elsewhere
        now = weights_sha256(source)
        same = now == known["weights"]
        found, wanted = f"{found} ({shown(now)})", f"{wanted} ({shown(known['weights'])})"
    if not same:
        raise CheckpointError(
            "the run began from another draft", file=folder.parent, key="train.init.draft", found=found,
            wanted=wanted, remedy="put it back, or choose another output",
        )  # fmt: skip
    return known
