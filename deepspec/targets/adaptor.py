"""What deepspec needs of a model of transformers, found in the model itself: no model type is named here but one.

Found are: the class that loads it, the decoder with its list of layers, embedding and head, and what comes between the
head's product and the logits (bias, scale, softcap). What cannot be found is one :class:`TargetError` that says which.
:func:`check_logits` compares the finds with the model's own output once, when it is loaded.

D hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from deepspec.errors import TargetError

# what every config must state, and what it may state under another name; transformers maps the names
NEEDED = ("hidden_size", "num_hidden_layers", "vocab_size")
OPTIONAL = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "max_position_embeddings")
CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # of a decoder's forward: 5.24 on, before, recurrent ones
MULTIPLIES = ("logit_scale", "lm_head_multiplier")  # keys of a config: factors of the logits
MULTIPLIES_TOO = ("hyperclovax",)  # whose `logits_scaling` multiplies; that of all others divides
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of the logits' size; of coarser types 0.05
PROBE_TOKENS = 5


THINKING = ("enable_thinking", "thinking")  # what chat templates call the switch
NORMS = ("norm", "final_layernorm", "ln_f", "norm_f", "final_layer_norm", "embedding_norm", "norm_out")


@dataclass(frozen=True)
class Parts:
    """The parts of a causal language model."""

    decoder: nn.Module  # runs token ids to the last hidden state
    layers: nn.ModuleList
    embed_weight: Tensor  # [V, D]
    head_weight: Tensor  # [V, D]
    head_bias: Tensor | None  # [V]


def flat_config(config: Any, path: str) -> dict[str, Any]:
    """The text part of a config as a mapping, with the sizes under their usual names.

    Raises:
        TargetError: a size that it does not state.
    """
    text = config.get_text_config()
    flat: dict[str, Any] = text.to_dict()
    for name in (*NEEDED, *OPTIONAL):
        if flat.get(name) is None and isinstance(value := getattr(text, name, None), int):
            flat[name] = value
    if missing := [name for name in NEEDED if flat.get(name) is None]:
        raise TargetError(
            "its config does not state how large the model is", file=path, key=missing[0],
            found=config.model_type, wanted=f"a number for each of {', '.join(NEEDED)}",
        )  # fmt: skip
    return flat


def auto_class(config: Any, path: str) -> Any:
    """The class of transformers that loads a config's model: a causal LM, or one of image and text.

    Raises:
        TargetError: its model has no output head over a vocabulary.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for found in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in found._model_mapping:
            return found
    raise TargetError(
        "no class of transformers generates text with this model", file=path, key="model_type",
        found=config.model_type, wanted="a causal language model, or an image-text model",
        remedy="name the model's text checkpoint, or install the release of transformers that has it",
    )  # fmt: skip


def find_parts(model: Any) -> Parts:
    """The parts of ``model``.

    Raises:
        TargetError: one of them cannot be found; it is named.
    """
    embed, head = _module(model, "get_input_embeddings"), _module(model, "get_output_embeddings")
    count = int(model.config.get_text_config().num_hidden_layers)
    for module in model.modules():  # from the outside in: the first that holds the layers and the embedding
        lists = [one for one in module.children() if isinstance(one, nn.ModuleList) and len(one) >= count]
        if lists and any(one is embed for one in module.modules()):
            return Parts(module, lists[0], embed.weight.detach(), head.weight.detach(), _bias(head))
    wanted = f"a module that holds the embedding and a list of {count} layers"
    raise TargetError("no decoder found in the model", found=type(model).__name__, wanted=wanted)


def find_norm(model: Any) -> nn.Module:
    """The norm after the last layer.

    Raises:
        TargetError: it cannot be found.
    """
    children = dict(find_parts(model).decoder.named_children())
    for name in NORMS:
        if name in children:
            return children[name]
    wanted = f"a module of the decoder called {', '.join(NORMS)}"
    raise TargetError("no final norm found in the model", found=type(model).__name__, wanted=wanted)


def _module(model: Any, getter: str) -> Any:
    found = getattr(model, getter)()
    if getattr(found, "weight", None) is None:
        what = "embedding" if "input" in getter else "output head"
        raise TargetError(f"no {what} found in the model", found=type(model).__name__, wanted="one matrix [V, D]")
    return found


def _bias(head: Any) -> Tensor | None:
    bias: Tensor | None = getattr(head, "bias", None)
    return None if bias is None else bias.detach()


def softcap_of(config: Mapping[str, Any]) -> float | None:
    """c of the final logits c * tanh(x / c), by a flat config; None: there is none."""
    cap = config.get("final_logit_softcapping")
    return None if cap is None else float(cap)


def logit_scale_of(config: Mapping[str, Any]) -> float:
    """The factor between the head's product and the logits, by a flat config."""
    scale = 1.0
    for key in MULTIPLIES:
        value = config.get(key)
        scale *= float(value) if isinstance(value, int | float) else 1.0
    if divisor := config.get("logits_scaling"):
        scale *= float(divisor) if config.get("model_type") in MULTIPLIES_TOO else 1 / float(divisor)
    return scale


def thinking_keyword(template: str | None) -> str | None:
    """The variable of a chat template that turns thinking on or off; None: it asks for none that is known."""
    code = " ".join(re.findall(r"\{[{%](.+?)[%}]\}", template or "", flags=re.S))
    names = set(re.findall(r"(?<![.\w])\w+", re.sub(r"'[^']*'|\"[^\"]*\"", "", code)))
    return next((name for name in THINKING if name in names), None)


@torch.no_grad()
def check_logits(target: Any) -> None:
    """Compare a loaded target's logits with the model's own: what was found of it is all that there is.

    Raises:
        TargetError: they differ.
    """
    ids = (torch.arange(PROBE_TOKENS, device=target.device) * 7 + 3)[None] % target.spec.vocab_size
    own = target.model(input_ids=ids, use_cache=False).logits.float()
    found = target.logits(target.forward(ids, ()).last_hidden).float()
    worst = float((own - found).abs().max()) if own.shape == found.shape else float("inf")
    if worst > TOLERANCE.get(target.dtype, 0.05) * max(float(own.abs().max()), 1e-6):
        raise TargetError(
            "its logits are more than bias, scale and softcap of its head", file=target.spec.path,
            key="model_type", found=target.spec.model_type,
            wanted=f"softcap(logit_scale * (hidden @ head + bias)), here off by {worst:.3g}",
            remedy="state what is missing in deepspec/targets/adaptor.py",
        )  # fmt: skip


def cache_keyword(model: nn.Module) -> str | None:
    """What ``forward`` of a decoder calls its cache; None: it has none that deepspec knows."""
    return next((name for name in CACHE_NAMES if name in _parameters(type(model).forward)), None)


def takes(model: nn.Module, name: str) -> bool:
    """Whether ``forward`` of a decoder has a parameter ``name``."""
    return name in _parameters(type(model).forward)


@cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:  # needed in every forward of the target
    return tuple(inspect.signature(forward).parameters)
