"""The target of a plan by its config alone: parameters from the model itself without weights, FLOP of a token."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from deepspec.targets import TargetSpec, load_spec
from deepspec.targets.load import spec_from_config

KNOWN = Path(__file__).with_name("targets.json")


@dataclass(frozen=True)
class TargetCost:
    """What a forward of the target costs."""

    parameters: int
    active: int  # of them, those that multiply with a token: its experts, no embedding
    layers: int
    width: int  # of all query heads of a layer

    def flops(self, tokens: float) -> float:
        """FLOP of one conversation of ``tokens`` tokens: 2 x active x tokens, and causal attention over all layers.

        Attention: scores and mix, 2 x 2 x width x tokens^2 / 2 a layer.
        """
        return 2.0 * self.active * tokens + 2.0 * self.layers * self.width * tokens**2


def read_spec(path: str, revision: str | None = None) -> tuple[TargetSpec, str]:
    """(spec, where its sizes are from): a folder's config.json, the sizes that the package knows, or the hub's.

    Raises:
        TargetError: no config there.
    """
    from transformers import AutoConfig

    known = json.loads(KNOWN.read_text(encoding="utf-8"))
    if not Path(path).exists() and path in known["targets"]:
        config = AutoConfig.for_model(**known["targets"][path])
        return spec_from_config(config, path, revision), known["source"]
    return load_spec(path, revision), str(path)


def known_targets() -> dict[str, dict[str, Any]]:
    """The targets whose sizes the package knows, by hub id."""
    found: dict[str, dict[str, Any]] = json.loads(KNOWN.read_text(encoding="utf-8"))["targets"]
    return found


@cache
def _count(text: str) -> TargetCost:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**json.loads(text))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    share = (getattr(config, "num_experts_per_tok", None) or experts) / experts
    total = active = 0.0
    embedding = model.get_input_embeddings().weight
    for name, one in model.named_parameters():
        total += one.numel()
        if one is not embedding and one is not model.get_output_embeddings().weight:
            active += one.numel() * (share if ".experts." in name else 1.0)
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return TargetCost(int(total), int(active), config.num_hidden_layers, width)


def target_cost(spec: TargetSpec) -> TargetCost:
    """Parameters and FLOP of a target, counted from its modules on the meta device."""
    values = {key: value for key, value in spec.config.items() if _plain(value)} | {"model_type": spec.model_type}
    return _count(json.dumps(values, sort_keys=True))


def _plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
