"""``train.init: target``: a draft whose layers start as copies of the target's last ones, for short trainings.

A fresh draft first has to learn the language; one that starts from the target has only to learn to guess ahead. Copied
are the last layers and the final norm, and the projection of the features starts as "the last feature as it is". The
context keys and values of a block drafter's first layer are then exactly the target's own, where that feature is the
input of the layer copied. What the target has no counterpart of (the heads, Eagle3's embedding half) starts at random.

D hidden size, L target layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from deepspec.algorithms.base import DraftModel
from deepspec.errors import TargetError
from deepspec.recipe import TargetSection
from deepspec.targets.load import TargetSpec
from deepspec.targets.stored import StoredTensor, open_stored

NOISE = 0.1  # of the random weights that stay in the features' projection


@torch.no_grad()
def warm_start(model: DraftModel, spec: TargetSpec, section: TargetSection) -> None:
    """Overwrite the fresh weights of ``model`` by the target's.

    Raises:
        TargetError: the target is not stored as safetensors, or its last layers have other shapes than the draft's.
    """
    stored = open_stored(section.path, model.fc.weight.dtype, section.revision)
    if stored is None:
        raise TargetError(
            "train.init: target reads the target's weights one by one", file=section.path,
            remedy="store the target as safetensors, not quantized, or set train.init: random",
        )  # fmt: skip
    files, prefix = stored.found, stored.embedding_and_head()[0].removesuffix("embed_tokens.weight")
    first = spec.num_layers - len(model.layers)
    for depth, layer in enumerate(model.layers):
        for name, weight in layer.state_dict().items():  # buffers too: Gemma4's layer scalars
            _copy(weight, files, f"{prefix}layers.{first + depth}.{_counterpart(name)}", section.path)
    _copy(cast(Tensor, model.norm.weight), files, f"{prefix}norm.weight", section.path)
    if (norm := getattr(model, "hidden_norm", None)) is not None:
        # what a block drafter norms before its context keys and values, the target's layer norms on its way in
        _copy(norm.weight, files, f"{prefix}layers.{first}.input_layernorm.weight", section.path)
    size = model.fc.out_features
    model.fc.weight.mul_(NOISE)
    model.fc.weight[:, -size:] += torch.eye(size)


def _counterpart(name: str) -> str:
    """The target's name of a draft layer's weight; Eagle3 norms its hidden state as the target's layer does."""
    return "input_layernorm.weight" if name == "hidden_norm.weight" else name


def _copy(weight: Tensor, files: Mapping[str, StoredTensor], name: str, path: str) -> None:
    """Fill ``weight`` [out, in]; of a wider one (Eagle3's [embedding | hidden]) the last columns."""
    stored = files.get(name)
    found = None if stored is None else stored.shape
    wide = found is not None and weight.dim() == 2 and found[0] == weight.shape[0] and 2 * found[1] == weight.shape[1]
    if stored is None or not (found == tuple(weight.shape) or wide):
        raise TargetError(
            "the draft's layers cannot start from the target's", file=path, key=name, found=found,
            wanted=tuple(weight.shape), remedy="set train.init: random",
        )  # fmt: skip
    source = stored.read(weight.dtype)
    weight[..., weight.shape[-1] - source.shape[-1] :].copy_(source)
