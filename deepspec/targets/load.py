"""Load a target: only its config, only embedding and head, or the Hugging Face model, frozen."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn

from deepspec import registry
from deepspec.distributed import world_from_environment
from deepspec.errors import DeepSpecError, RecipeError, TargetError
from deepspec.families.base import (
    DRAFT_EXPERTS,
    FIXED_ROPES,
    Family,
    Shape,
    length_dependent_rope,
    read_experts,
    rope_kinds,
)
from deepspec.families.plain import DraftLayers, LayerSection, plain_config
from deepspec.files import read_json
from deepspec.progress import waiting
from deepspec.targets.adaptor import (
    CACHE_NAMES,
    auto_class,
    cache_keyword,
    check_logits,
    find_parts,
    flat_config,
    logit_scale_of,
    softcap_of,
    takes,
)
from deepspec.targets.capture import EMBEDDING, FeatureCapture, TargetOutput
from deepspec.targets.stored import check_finite, check_fit, open_stored, silent, weight_files

log = logging.getLogger(__name__)

if not torch.cuda.is_available():  # transformers imports deepspeed where it is installed; that would guess, and warn
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


@dataclass(frozen=True)
class TargetSpec:
    """What a draft needs of its target, without loading a weight."""

    path: str
    family: Family
    config: Mapping[str, Any] = field(repr=False, hash=False)  # the text config, flat
    model_type: str  # of the complete model (gemma4), where the text config has its own
    revision: str | None = None
    stop_token_ids: tuple[int, ...] = ()  # where its generation ends by its own configs, ascending

    @property
    def has_family(self) -> bool:
        """Whether the target's own layers are of its family; a target of no family has drafts of the default one."""
        return self.model_type in self.family.model_types

    @property
    def shape(self) -> Shape:
        """Sizes of the target's (full-attention) layers; of a target of no family those of its drafts' layers."""
        return self.draft_layers().shape

    def draft_layers(self, section: LayerSection | None = None) -> DraftLayers:
        """Family and sizes of the layers of a draft for this target, with what ``draft.layers`` changes.

        Raises:
            DeepSpecError: an unknown family.
        """
        section = section or LayerSection()
        family = self.family if section.family is None else registry.family(section.family)
        own = self.has_family and family.name == self.family.name
        if own and not section.sizes:
            return DraftLayers(family, self.config)
        config, sizes = self.config, section.sizes
        if "rope_parameters" in sizes:
            default = {"rope_type": "default", "rope_theta": plain_config(config)["rope_parameters"]["rope_theta"]}
            sizes["rope_parameters"] = default | sizes["rope_parameters"]
        if self.has_family:  # sizes of its full-attention layers, whatever its config calls them
            shape = self.family.read_shape(config)
            config = {**config, "num_key_value_heads": shape.num_kv_heads, "head_dim": shape.head_dim}
        if own:  # what is not stated stays the target's own: biases, keys as values, its rotary embedding
            return DraftLayers(family, family.resized(config, sizes) if family.resized else {**config, **sizes})
        plain = plain_config(config) | sizes
        if self.logit_scale != 1.0:
            plain["logit_scale"] = self.logit_scale
        return DraftLayers(family, family.from_plain(plain) if family.from_plain else plain)

    @property
    def expert_layers(self) -> DraftLayers | None:
        """The layers of the target's own next-token heads, with its experts; None where it has none that are known."""
        families = [registry.family(name) for name in registry.FAMILIES]
        usual = self.family if self.has_family else None  # a draft's config.json has its family's own model type
        family = next((one for one in families if self.model_type in one.expert_types), usual)
        config = {**self.config, DRAFT_EXPERTS: True}
        if family is None or not family.expert_types or read_experts(config) is None:
            return None
        width = plain_config(config)["intermediate_size"]  # of dense layers: some of these targets state none
        return DraftLayers(family, config | {"intermediate_size": width})

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self.config["hidden_size"])

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return int(self.config["num_hidden_layers"])

    @property
    def vocab_size(self) -> int:
        """V, the rows of the embedding."""
        return int(self.config["vocab_size"])

    @property
    def softcap(self) -> float | None:
        """c of the final logits c * tanh(x / c), or None."""
        return softcap_of(self.config)

    @property
    def logit_scale(self) -> float:
        """The factor between the head's product and the logits."""
        return logit_scale_of(self.config)

    def check_token(self, token: int, key: str) -> None:
        """Check that ``token``, which a recipe's ``key`` names, is one of the vocabulary.

        Raises:
            RecipeError: it is not.
        """
        if token >= self.vocab_size:
            wanted = f"below {self.vocab_size}, the vocabulary of {self.path}"
            raise RecipeError("no such token", key=key, found=token, wanted=wanted)

    def check_layers(self, layers: Sequence[int], file: str | Path | None = None, key: str = "target.layers") -> None:
        """Check that every layer id exists.

        Raises:
            TargetError: an id outside -1 .. num_layers, or none, or one twice.
        """
        wrong = [layer for layer in layers if not EMBEDDING <= layer <= self.num_layers]
        if wrong or not layers or len(set(layers)) != len(layers):
            raise TargetError(
                "target layers do not exist" if wrong else "target layers must be one or more distinct ids",
                file=file,
                key=key,
                found=wrong or list(layers),
                wanted=f"ids from -1 (embedding) to {self.num_layers - 1}, or {self.num_layers} (after the final norm)",
                remedy=f"{self.path} has {self.num_layers} layers",
            )


def family_of(model_type: str, file: str | Path | None = None, strict: bool = True) -> Family:
    """The family whose table lists ``model_type``; where none does, with ``strict`` false, the default family.

    Raises:
        TargetError: no family does.
    """
    families = [registry.family(name) for name in registry.FAMILIES]
    for one in families:
        if model_type in one.model_types:
            return one
    if not strict:
        return cast(Family, registry.family(registry.DEFAULT_FAMILY))
    known = ", ".join(kind for one in families for kind in one.model_types)
    raise TargetError(
        "no family for this model type",
        file=file,
        key="model_type",
        found=model_type,
        wanted=f"one of {known}",
        remedy="add a file to deepspec/families and a row to deepspec/registry.py",
    )


def spec_from_config(config: Any, path: str, revision: str | None = None) -> TargetSpec:
    """A :class:`TargetSpec` from a transformers config object.

    Raises:
        TargetError: a size that the config does not state, or a RoPE that depends on the batch.
    """
    flat = flat_config(config, path)
    check_rope(flat, path, TargetError)
    stops = read_stops(config.to_dict(), flat)
    family = family_of(config.model_type, path, strict=False)
    return TargetSpec(path, family, flat, config.model_type, revision, stops)


def read_stops(*configs: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids of every ``eos_token_id`` of some configs, each one id, a list of ids or nothing; ascending."""
    found: set[int] = set()
    for config in configs:
        ids = config.get("eos_token_id")
        found |= set(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
    return tuple(sorted(found))


def check_rope(config: Mapping[str, Any], file: str | Path, error: type[DeepSpecError]) -> None:
    """Refuse a RoPE whose frequencies depend on the longest sequence of a forward: batches and caches share forwards.

    An unknown kind is refused too.

    Raises:
        DeepSpecError: of the type ``error``.
    """
    if kind := length_dependent_rope(config):
        raise error(
            "its rotary frequencies change with the longest sequence of a batch: hidden states would depend on what "
            "shares the forward", file=file, key="rope_type", found=kind,
            wanted=f"one with fixed frequencies: {', '.join(FIXED_ROPES)}",
            remedy="set a fixed one in config.json; within the original length 'dynamic' is 'default'",
        )  # fmt: skip
    if unknown := [kind for kind in rope_kinds(config) if kind not in FIXED_ROPES]:
        wanted = f"one of {', '.join(FIXED_ROPES)}"
        raise error(
            "unknown kind of RoPE", file=file, key="rope_type", found=unknown[0], wanted=wanted,
            remedy="correct it in config.json",
        )  # fmt: skip


def load_spec(path: str | Path, revision: str | None = None) -> TargetSpec:
    """Read a target's config (a folder or a hub id); no weights.

    Raises:
        TargetError: no config there, a size that it does not state, or a RoPE that depends on the batch.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(path), revision=revision)
        own, generation = (_stored_json(path, name, revision) for name in ("config.json", "generation_config.json"))
    except DeepSpecError:
        raise
    except Exception as problem:  # transformers checks some fields of a config only by failing on them
        raise _unreadable(path, problem) from None
    spec = spec_from_config(config, str(path), revision)
    stops = read_stops(own, own.get("text_config") or {}, generation)  # as stated: a class's default is no statement
    return replace(spec, stop_token_ids=stops or spec.stop_token_ids)


def _stored_json(path: str | Path, name: str, revision: str | None) -> dict[str, Any]:
    """A JSON file of a target as it is stored; empty where the target has none."""
    from transformers.utils import cached_file

    file = cached_file(
        str(path), name, revision=revision, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    values = read_json(file, TargetError) if file else {}
    if not isinstance(values, dict):
        raise TargetError("not a config", file=file, found=values, wanted="a JSON object", remedy="fetch it again")
    return values


def load_tokenizer(path: str | Path, revision: str | None = None) -> Any:
    """The target's tokenizer.

    Raises:
        TargetError: no tokenizer there, or one that cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), revision=revision)
    except Exception as problem:  # the tokenizers package has no class of its own for a file that is not one
        raise _unreadable(path, problem) from None


def load_target(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", revision: str | None = None
) -> Target:
    """Load a target's real model, frozen and in eval mode.

    Args:
        path: a folder or a hub id.
        dtype: of the weights; None keeps the checkpoint's.
        device: where it runs.
        revision: of the hub id.

    Raises:
        TargetError: nothing to load there, no class that loads it, tensors that are not those of its config, or
            weights that are not finite.
    """
    from transformers import AutoConfig

    spec = load_spec(path, revision)
    owner = auto_class(AutoConfig.from_pretrained(str(path), revision=revision), str(path))
    files = weight_files(path, revision)  # a broken index is named
    try:
        with waiting(f"loading the target {path}", sum(map(os.path.getsize, files))) as job, silent(job):
            loaded: Any = owner.from_pretrained(
                str(path), dtype=dtype or "auto", revision=revision, output_loading_info=True,
                ignore_mismatched_sizes=True,  # check_fit refuses them, by name
            )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as problem:
        raise _unreadable(path, problem) from None
    model, info = loaded
    check_fit(path, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    model = model.to(device)
    check_finite(dict(model.named_parameters()), path)
    target = Target(model, spec)
    _warn_untied(spec, target.embed_weight.data_ptr() == target.head_weight.data_ptr())
    check_logits(target)
    return target


def load_target_embeddings(
    path: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu", revision: str | None = None
) -> TargetEmbeddings:
    """Load embedding and head of a target in ``dtype``: all that training from a cache reads of it.

    The complete :class:`Target` comes instead where it is quantized or its files are not safetensors.

    Raises:
        TargetError: nothing to load there, no class that loads it, tensors that are not those of its config, or
            weights that are not finite.
    """
    spec = load_spec(path, revision)
    stored = open_stored(path, dtype, revision)
    if stored is None:
        return load_target(path, dtype, device, revision)
    tied = stored.tied()
    embed, head = stored.embedding_and_head()
    with waiting(f"loading embedding and head of {path}"):
        embed_weight = stored.read(embed if stored.holds(embed) else head).to(device, copy=True)
        head_weight = embed_weight if tied else stored.read(head).to(device, copy=True)
    bias_name = head.removesuffix("weight") + "bias"
    bias = stored.read(bias_name).to(device, copy=True) if stored.holds(bias_name) else None
    check_finite({embed: embed_weight, head: head_weight} | ({} if bias is None else {bias_name: bias}), path)
    _warn_untied(spec, tied)
    return TargetEmbeddings(spec, embed_weight, head_weight, bias)


def _warn_untied(spec: TargetSpec, tied: bool) -> None:
    """Warn where the config ties the head and the files hold another: transformers keeps it, engines may not."""
    if spec.config.get("tie_word_embeddings") and not tied and world_from_environment().is_main:
        log.warning(
            "%s: tie_word_embeddings is true, but the files hold another lm_head; it is the head here, as in "
            "transformers; set it to false in config.json, or a serving engine may take the embedding instead",
            spec.path,
        )  # fmt: skip


def _unreadable(path: str | Path, problem: Exception) -> DeepSpecError:
    if isinstance(problem, StrictDataclassError) and problem.__cause__ is not None:  # a config that contradicts itself
        problem = Exception(problem.__cause__)
    first_line = (str(problem).strip() or type(problem).__name__).splitlines()[0]
    return TargetError(
        f"cannot load the target ({first_line})",
        file=path,
        wanted="a Hugging Face model folder or a hub id",
        remedy="check the path, or download the model first",
    )


class TargetEmbeddings:
    """A target's embedding and head, without what runs the model."""

    def __init__(
        self, spec: TargetSpec, embed_weight: Tensor, head_weight: Tensor, head_bias: Tensor | None = None
    ) -> None:
        self.spec, self.embed_weight, self.head_weight = spec, embed_weight, head_weight  # [V, D] each
        self.head_bias = head_bias  # [V], or None

    @property
    def device(self) -> torch.device:
        """Where the weights and the target's hidden states are."""
        return self.embed_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and hidden states."""
        return self.embed_weight.dtype

    def weights_digest(self) -> str:
        """Of every byte of the target's files; see :mod:`deepspec.targets.digests`."""
        from deepspec.targets.digests import weights_digest

        return weights_digest(self.spec.path, self.spec.revision)


class Target(TargetEmbeddings):
    """A frozen target model and the few methods that deepspec needs."""

    def __init__(self, model: nn.Module, spec: TargetSpec) -> None:
        parts = find_parts(model)
        super().__init__(spec, parts.embed_weight, parts.head_weight, parts.head_bias)
        self.model = model.eval().requires_grad_(False)
        self.decoder, self.layers = parts.decoder, parts.layers

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        layers: Sequence[int],
        position_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        past_key_values: Any = None,
    ) -> TargetOutput:
        """One pass over the decoder, without logits.

        Args:
            input_ids: [B, S] int64.
            layers: the layer outputs to keep, 0-based, -1 the embedding, num_layers the final norm.
            position_ids: [B, S]; None counts from the cache's length.
            attention_mask: [B, S] padding mask, or [B, 1, S, KV] bool (True = visible), or for families with sliding
                windows a dict from layer type to such a mask.
            past_key_values: a transformers cache, updated in place; None for a pass without a cache.

        Returns:
            features [B, S, L*D] and the normed last hidden state [B, S, D].
        """
        given: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": past_key_values is not None}
        if position_ids is not None and takes(self.decoder, "position_ids"):
            given["position_ids"] = position_ids
        if past_key_values is not None:
            given[cache_keyword(self.decoder) or CACHE_NAMES[0]] = past_key_values
        with FeatureCapture(self.layers[: self.spec.num_layers], layers) as capture:
            output = self.decoder(input_ids=input_ids, **given)
        return TargetOutput(capture.features(output.last_hidden_state), output.last_hidden_state)

    @torch.no_grad()
    def logits(self, last_hidden: Tensor) -> Tensor:
        """softcap(logit_scale * (lm_head(last_hidden) + bias)): [.., D] -> [.., V], in the model's dtype."""
        logits = last_hidden @ self.head_weight.T
        if self.head_bias is not None:
            logits = logits + self.head_bias
        scale, cap = self.spec.logit_scale, self.spec.softcap
        logits = logits if scale == 1.0 else logits * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)
