"""What a draft starts from: its reduced vocabulary, and with ``train.init: target`` layers copied from the target.

A draft that starts at random first learns the language; one that starts from the target only learns to predict ahead.
Copied are the last layers and the final norm, and the projection of the features starts by passing the last feature
on unchanged. The context keys and values of a block drafter's first layer are then exactly the target's own, where
that feature is the input of the layer copied. What has no counterpart in the target (the heads, the embedding's half
of a wide layer, convolutions, which start as the identity) starts fresh. Where the checkpoint holds a draft of the very
kind, that is the start.

D hidden size, L target layers.
"""

from __future__ import annotations

import fnmatch
import logging
from functools import partial
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deepspec import registry
from deepspec.algorithms.base import DraftModel
from deepspec.errors import RecipeError, TargetError
from deepspec.families.base import Family
from deepspec.nn.layer import ADDED
from deepspec.recipe import Recipe, TargetSection
from deepspec.sources.base import FeatureSource
from deepspec.targets.load import TargetSpec
from deepspec.targets.stored import PartedTensor, StackedTensor, StoredTensor, check_finite, open_stored

log = logging.getLogger(__name__)
Stored = StoredTensor | StackedTensor | PartedTensor
NOISE = 0.1  # of the random weights that stay in the features' projection
MISSED = 0.01  # share of the answers that a kept vocabulary may lack without a warning


def reduced_vocabulary(source: FeatureSource, vocab_size: int, size: int, kept: Tensor | None = None) -> Tensor:
    """The tokens [V'] int64, ascending, that a draft of ``size`` = V' proposes from, and what they hold in the log.

    They are those of the data, or ``kept``, an earlier draft's. Every rank counts the same data and so takes the same
    tokens. Reads token ids and masks, no hidden states.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for number in range(len(source.lengths)):
        counts += np.bincount(source.tokens(number)[source.loss_mask(number)], minlength=vocab_size)
    frequent = _most_frequent(counts, size)
    tokens = frequent if kept is None else kept
    held, possible = (counts[some.numpy()].sum() / max(counts.sum(), 1) for some in (tokens, frequent))
    log.info("vocabulary: %s of %s tokens; they are %.1f %% of the answers", f"{size:,}", f"{vocab_size:,}", 100 * held)
    if possible - held > MISSED:
        log.warning(
            "of the answers %.1f %% are tokens that the draft it starts from cannot propose; "
            "with train.init.vocabulary: data they would be %.1f %%", 100 * (1 - held), 100 * (1 - possible),
        )  # fmt: skip
    return tokens


def _most_frequent(counts: npt.NDArray[np.int64], size: int) -> Tensor:
    """The ``size`` most frequent tokens, [V'] int64 ascending; ties go to the lower id."""
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:size]))


def frozen_weights(recipe: Recipe, spec: TargetSpec) -> frozenset[str]:
    """The names of the draft's weights that ``train.freeze`` keeps as they start.

    Each pattern is over names as in the draft's file (``layers.0.mlp.*``), ``!`` in front trains what it matches, and
    the last pattern that matches a name decides.

    Raises:
        RecipeError: a pattern that matches no weight, or nothing is left to train.
    """
    patterns = recipe.train.freeze
    if not patterns:
        return frozenset()
    with torch.device("meta"):
        model = registry.algorithm(recipe.algorithm).empty(recipe.draft, spec)
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    frozen: set[str] = set()
    for pattern in patterns:
        names = fnmatch.filter(sizes, pattern.removeprefix("!"))
        if not names:
            parts = sorted({name.partition(".")[0] for name in sizes})
            raise RecipeError(
                "matches no weight of the draft", key="train.freeze", found=pattern,
                wanted=f"a pattern over names such as {', '.join(f'{part}.*' for part in parts)}",
            )  # fmt: skip
        frozen = frozen.difference(names) if pattern.startswith("!") else frozen.union(names)
    left = sum(size for name, size in sizes.items() if name not in frozen)
    if not left:
        remedy = "leave a part out of it, such as '!norm.*' at its end"
        raise RecipeError("nothing is left to train", key="train.freeze", found=list(patterns), remedy=remedy)
    log.info("%s parameters are trained, %s are frozen (train.freeze)", f"{left:,}", f"{sum(sizes.values()) - left:,}")
    return frozenset(frozen)


@torch.no_grad()
def warm_start(model: DraftModel, spec: TargetSpec, section: TargetSection) -> None:
    """Overwrite the fresh weights of ``model`` by the target's.

    Raises:
        TargetError: the target is not stored as safetensors, or its last layers have other parts or shapes.
    """
    family, added = _family_of(model, spec, section)
    stored = open_stored(section.path, model.fc.weight.dtype, section.revision)
    if stored is None:
        raise TargetError(
            "train.init: target reads the target's weights one by one", file=section.path,
            remedy="store the target as safetensors, not quantized, or set train.init: random",
        )  # fmt: skip
    copy = partial(_copy, path=section.path, family=family)
    if native := model.algorithm.native(model.config, stored.unused):
        if left := sorted(set(native) - {name for name, _ in model.named_parameters()}):
            problem, remedy = "the target's own head has parts that ours lacks", "set train.init: random"
            raise TargetError(problem, file=section.path, key=left[0], found=left, remedy=remedy)
        for name, weight in model.named_parameters():
            copy(weight, native.get(name), name)
        log.info("starting from the target's own head: %d tensors", len(native))
        return
    prefix = stored.embedding_and_head()[0].removesuffix("embed_tokens.weight")
    first = spec.num_layers - len(model.layers)
    for depth, layer in enumerate(model.layers):
        for name, weight in layer.state_dict().items():  # buffers too: Gemma4's layer scalars
            if name.partition(".")[0] in ADDED or name.removesuffix(".weight").rpartition(".")[2] in added:
                continue
            theirs = f"{prefix}layers.{first + depth}.{_counterpart(name)}"
            copy(weight, stored.tensor(theirs), theirs)
    copy(cast(Tensor, model.norm.weight), stored.tensor(f"{prefix}norm.weight"), f"{prefix}norm.weight")
    if model.hidden_norm is not None:
        # what a block drafter norms before its context keys and values, the target's layer norms on its way in
        theirs = f"{prefix}layers.{first}.input_layernorm.weight"
        copy(cast(Tensor, model.hidden_norm.weight), stored.tensor(theirs), theirs)
    size = model.fc.out_features
    model.fc.weight.mul_(NOISE)
    model.fc.weight[:, -size:] += torch.eye(size)


def _family_of(model: DraftModel, spec: TargetSpec, section: TargetSection) -> tuple[Family, tuple[str, ...]]:
    """The family of the layers that are copied, and the parts of the draft's that these lack: they start as they are.

    Raises:
        TargetError: the draft's layers differ from the target's in more than such parts.
    """
    heads, own = spec.expert_layers, spec.family if spec.has_family else None
    if model.family in (own, heads and heads.family):
        return model.family, ()
    added = None if own is None else model.family.added_to(own)
    if own is None or added is None:
        raise TargetError(
            "train.init: target copies the target's layers, and the draft has others", file=section.path,
            key="model_type", found=f"{spec.model_type}, with draft layers of {model.family.name}",
            wanted="a draft with the layers of its target's family, or with norms on the heads beside them",
            remedy="set train.init: random",
        )  # fmt: skip
    if added:
        log.info("the target's layers have no %s: in the draft these start fresh", ", ".join(added))
    return own, added


def _counterpart(name: str) -> str:
    """The target's name of a draft layer's weight; a second input norm starts as the first."""
    return "input_layernorm.weight" if name == "hidden_norm.weight" else name


def _copy(weight: Tensor, stored: Stored | None, name: str, path: str, family: Family) -> None:
    """Fill ``weight`` [out, in] by ``stored``, called ``name``; of a wider one ([embedding | hidden]) the last columns.

    Raises:
        TargetError: there is none, of another shape, or with values that are not finite.
    """
    found = None if stored is None else stored.shape
    wide = found is not None and weight.dim() == 2 and found[0] == weight.shape[0] and 2 * found[1] == weight.shape[1]
    if stored is None or not (found == tuple(weight.shape) or wide):
        raise TargetError(
            "the draft's layers cannot start from the target's", file=path, key=name, found=found,
            wanted=tuple(weight.shape), remedy="set train.init: random",
        )  # fmt: skip
    source = stored.read(weight.dtype)
    check_finite({name: source}, path)
    source = source + family.offset_of(name)
    weight[..., weight.shape[-1] - source.shape[-1] :].copy_(source)
