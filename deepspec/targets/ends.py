"""A target's embedding and head without its layers: all that training from a cache reads of it.

The whole model stays on disk. Only its digest looks at every tensor, one at a time, at the samples of its values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from deepspec.errors import TargetError
from deepspec.files import read_json
from deepspec.targets.load import Target, TargetSpec, load_spec, load_target, tensors_digest


class TargetEnds:
    """Embedding and head of a target on disk; the same attributes as :class:`Target` without what runs the model."""

    def __init__(self, spec: TargetSpec, embed_weight: Tensor, head_weight: Tensor, digest: str) -> None:
        self.spec, self.embed_weight, self.head_weight = spec, embed_weight, head_weight  # [V, D] each
        self._digest = digest

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.embed_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.embed_weight.dtype

    def weights_digest(self) -> str:
        """The digest of the whole target, equal to :meth:`Target.weights_digest` of it loaded."""
        return self._digest


def load_target_ends(
    path: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu", revision: str | None = None
) -> TargetEnds | Target:
    """Load embedding and head of a target in ``dtype``.

    The whole target comes instead where its files are not safetensors with the model's own names and shapes (a
    quantized one, or one that transformers converts while it loads): only then does the digest need the loaded model.

    Raises:
        TargetError: nothing to load there, or an unknown family.
    """
    spec = load_spec(path, revision)
    model = _skeleton(path, dtype, revision)
    stored = None if model is None else _find_stored(model, stored_tensors(path, revision))
    if model is None or stored is None:
        return load_target(path, dtype, device, revision)
    states = model.state_dict()
    digest = tensors_digest((name, stored[name].read(states[name].dtype)) for name in sorted(states))
    embed, head = (
        next(name for name, weight in model.named_parameters(remove_duplicate=False) if weight is module.weight)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    )
    embed_weight = stored[embed].read(dtype).to(device, copy=True)
    tied = stored[embed] == stored[head]
    return TargetEnds(
        spec, embed_weight, embed_weight if tied else stored[head].read(dtype).to(device, copy=True), digest
    )


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    file: str
    name: str

    def read(self, dtype: torch.dtype) -> Tensor:
        """The tensor; the file is mapped anew for each, so that no more than one of them stays in memory."""
        with safe_open(self.file, "pt") as opened:
            tensor: Tensor = opened.get_tensor(self.name)
        return tensor.to(dtype)

    def shape(self) -> list[int]:
        """Its shape, from the file's header."""
        with safe_open(self.file, "pt") as opened:
            return list(opened.get_slice(self.name).get_shape())


def _skeleton(path: str | Path, dtype: torch.dtype, revision: str | None) -> nn.Module | None:
    """The model without memory behind its weights; None where its weights are quantized."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(path), revision=revision)
    if getattr(config, "quantization_config", None) is not None:
        return None
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # type: ignore[operator]
    return model


def stored_tensors(path: str | Path, revision: str | None) -> dict[str, StoredTensor]:
    """All stored tensors by name; none where the target has no readable safetensors files."""
    from transformers.utils import cached_file

    options = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    names = ["model.safetensors"]
    found: dict[str, StoredTensor] = {}
    try:
        if index := cached_file(str(path), "model.safetensors.index.json", **options):
            names = sorted(set(read_json(index, TargetError)["weight_map"].values()))
        for name in names:
            if file := cached_file(str(path), name, **options):
                with safe_open(file, "pt") as opened:
                    found |= {key: StoredTensor(str(file), key) for key in opened.keys()}  # noqa: SIM118 - no dict
    except (OSError, SafetensorError):
        return {}
    return found


def _find_stored(model: nn.Module, files: Mapping[str, StoredTensor]) -> dict[str, StoredTensor] | None:
    """The stored tensor of each name of the model's state; None where one is missing or of another shape."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owners = {id(parameter): files[name] for name, parameter in parameters.items() if name in files}
    found = {}
    for name, state in model.state_dict().items():
        stored = files.get(name) or owners.get(id(parameters.get(name)))  # a tied one is stored under one name only
        if stored is None or stored.shape() != list(state.shape):
            return None
        found[name] = stored
    return found
