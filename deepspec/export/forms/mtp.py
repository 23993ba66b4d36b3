"""MTP heads under other people's names: the speculators library's, and those of a target's own checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from deepspec.families.base import Family

SPECULATORS = {  # names of the library -> ours; every other one is of the layer
    "input_proj": "fc",
    "token_layernorm": "pre_fc_norm_embedding",
    "hidden_layernorm": "pre_fc_norm_hidden",
    "final_layernorm": "norm",
}
PREFIX = "mtp_layers.0."


def from_speculators(state: Mapping[str, Tensor], family: Family | None) -> dict[str, Tensor]:
    """Tensors of the library's file by our names."""
    found = {}
    for name, tensor in state.items():
        part, _, rest = name.removeprefix(PREFIX).partition(".")
        found[f"{SPECULATORS[part]}.{rest}" if part in SPECULATORS else f"layers.0.{part}.{rest}"] = tensor
    return found
