"""The speculators layout: fields of drafting around the transformer's own config; layer ids one higher than ours.

What its defaults would turn round is always written: ``norm_before_residual`` of Eagle3 (vLLM's default is true, the
library's false) and ``sample_from_anchor`` of block drafters (default false).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from deepspec.errors import DraftError
from deepspec.export.forms.base import SLIDING, Form, Requirement, refuse_windows, with_head_rows
from deepspec.export.forms.block import AS_DFLASH, PARTS, read_block, zero_markov
from deepspec.export.forms.eagle3 import one_lower, read_eagle3, stated_norms
from deepspec.export.forms.p_eagle import SERVED, learned_row_in, no_fc_norm, read_p_eagle
from deepspec.export.parts import EXTRAS, DraftCheckpoint, ImportHints, missing


@dataclass(frozen=True, eq=False)
class Speculator(Form):
    """What all of its models have."""

    key: ClassVar[str] = "speculators_model_type"

    def labels(self) -> tuple[str, ...]:
        """Its model type."""
        return (self.name,)

    def label(self, config: Mapping[str, Any]) -> Any:
        """The model type in a config.json."""
        return config.get(self.key)

    def write(self, draft: DraftCheckpoint) -> DraftCheckpoint:
        state = with_head_rows(draft)
        config: dict[str, Any] = {
            "architectures": [self.classes[draft.family.name]],
            "speculators_model_type": self.name,
            "transformer_layer_config": draft.transformer,
            "draft_vocab_size": draft.config.get("draft_vocab_size") or draft.shape.vocab_size,
            "dtype": draft.config.get("dtype"),
            "speculators_config": {
                "algorithm": self.name,
                "default_proposal_method": "greedy",
                "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": draft.parsed.max_draft}],
                "verifier": {
                    "name_or_path": draft.config.get("target_model_name_or_path"),
                    "architectures": [_verifier_class(draft)],
                },
            },
            EXTRAS: draft.extras,
        }
        layers = [layer + 1 for layer in draft.parsed.target_layers]
        return DraftCheckpoint(config | self.fields(draft, layers, state), state, draft.file)

    @abstractmethod
    def fields(self, draft: DraftCheckpoint, layers: list[int], state: dict[str, Tensor]) -> dict[str, Any]:
        """The fields of this model; may add to ``state``."""


@dataclass(frozen=True, eq=False)
class SpeculatorEagle3(Speculator):
    """Its Eagle3."""

    name: str = "eagle3"

    def fields(self, draft: DraftCheckpoint, layers: list[int], state: dict[str, Tensor]) -> dict[str, Any]:
        return {"eagle_aux_hidden_state_layer_ids": layers, **stated_norms(draft)}

    def read(self, draft: DraftCheckpoint, hints: ImportHints) -> DraftCheckpoint:
        config = draft.config
        if "norm_before_residual" not in config:
            remedy = "write false or true into its config.json: the library and vLLM disagree on the default"
            raise missing(draft, "norm_before_residual", remedy)
        layers = one_lower(config.get("eagle_aux_hidden_state_layer_ids"))
        transformer = config.get("transformer_layer_config") or {}
        return read_eagle3(trained(draft), with_max_draft(draft, hints), transformer, layers)


@dataclass(frozen=True, eq=False)
class SpeculatorPEagle(Speculator):
    """Its P-EAGLE; the embedding in the file has the learned row in place of the mask token's."""

    requires: tuple[Requirement, ...] = (no_fc_norm,)
    name: str = "peagle"
    speculative: Mapping[str, object] = field(default_factory=lambda: SERVED)
    learned_row: bool = True

    def fields(self, draft: DraftCheckpoint, layers: list[int], state: dict[str, Tensor]) -> dict[str, Any]:
        learned_row_in(draft, state)
        mask = {"mask_token_id": draft.parsed.mask_token_id}
        return {"eagle_aux_hidden_state_layer_ids": layers, **mask, **stated_norms(draft)}

    def read(self, draft: DraftCheckpoint, hints: ImportHints) -> DraftCheckpoint:
        config = draft.config
        layers, transformer = one_lower(config.get("eagle_aux_hidden_state_layer_ids")), "transformer_layer_config"
        stated = with_max_draft(draft, hints)
        return read_p_eagle(trained(draft), stated, config.get(transformer) or {}, layers, config.get("mask_token_id"))


def with_max_draft(draft: DraftCheckpoint, hints: ImportHints) -> ImportHints:
    """The hints, with the drafts a round that the config proposes where the user states none."""
    methods = (draft.config.get("speculators_config") or {}).get("proposal_methods") or [{}]
    return replace(hints, max_draft=hints.max_draft or methods[0].get("speculative_tokens"))


@dataclass(frozen=True, eq=False)
class SpeculatorBlock(Speculator):
    """Its DFlash, and its DSpark where ``heads``: the Markov and the confidence head are then written out."""

    heads: bool = False
    carries: tuple[str, ...] = ("layer_types",)
    non_causal: ClassVar[bool] = False  # what a missing ``sliding_window_non_causal`` means

    def fields(self, draft: DraftCheckpoint, layers: list[int], state: dict[str, Tensor]) -> dict[str, Any]:
        parsed, rank = draft.parsed, draft.config.get("markov_rank") or 0
        fields = {
            "aux_hidden_state_layer_ids": layers,
            "block_size": parsed.block_size,
            "mask_token_id": parsed.mask_token_id,
            "sample_from_anchor": bool(parsed.sample_from_anchor),
        }
        if not self.heads:  # vLLM lets every layer be causal where this is false, whatever its kind
            return fields | {"sliding_window_non_causal": True}
        if not rank:
            state |= zero_markov(draft)
        return fields | {
            "markov_rank": rank or 1,
            "markov_head_type": "vanilla",
            "enable_confidence_head": bool(draft.config.get("enable_confidence_head")),
            "confidence_head_with_markov": bool(rank and draft.config.get("confidence_head_with_markov")),
        }

    def read(self, draft: DraftCheckpoint, hints: ImportHints) -> DraftCheckpoint:
        config = draft.config
        if config.get("projector_type", "dflash") != "dflash" or config.get("shift_label"):
            key = "projector_type / shift_label"
            raise DraftError("a variant of DFlash that we do not have", file=draft.file, key=key)
        # drafts with heads were published by a conversion without their convention: a missing key means nothing
        stated = config.get("sample_from_anchor", None if self.heads else False)
        fields = config if self.heads else {**config, "markov_rank": 0, "enable_confidence_head": False}
        transformer, layers = config.get("transformer_layer_config") or {}, config.get("aux_hidden_state_layer_ids")
        fields = {**fields, "causal": self.causal(draft, transformer.get("layer_types") or ())}
        return read_block(trained(draft), hints, fields, transformer, one_lower(layers), stated)

    def causal(self, draft: DraftCheckpoint, kinds: Sequence[str]) -> bool:
        """Whether its blocks are causal: there the flag is of the layers with a sliding window alone.

        Raises:
            DraftError: some of its layers are, some are not.
        """
        if self.heads:
            refuse_windows(draft, kinds)
        if SLIDING not in kinds or draft.config.get("sliding_window_non_causal", self.non_causal):
            return False
        if set(kinds) != {SLIDING}:
            key, wanted = "sliding_window_non_causal", "true, or a sliding window in every layer"
            raise DraftError("causal in some layers only", file=draft.file, key=key, found=False, wanted=wanted)
        return True


@dataclass(frozen=True, eq=False)
class SpeculatorDFlash2(SpeculatorBlock):
    """Its DFlash 2."""

    speculative: Mapping[str, object] = field(default_factory=lambda: AS_DFLASH)
    carries: tuple[str, ...] = ("layer_types", *PARTS)
    non_causal: ClassVar[bool] = True

    def fields(self, draft: DraftCheckpoint, layers: list[int], state: dict[str, Tensor]) -> dict[str, Any]:
        return super().fields(draft, layers, state) | {key: getattr(draft.parsed, key) for key in PARTS}


def trained(draft: DraftCheckpoint) -> DraftCheckpoint:
    """The draft without the copies of the target's head and norm that the library's training keeps in the file."""
    copies = ("verifier_lm_head.weight", "verifier_norm.weight")
    state = {name: tensor for name, tensor in draft.state.items() if name.removeprefix("model.") not in copies}
    return DraftCheckpoint(draft.config, state, draft.file)


def _verifier_class(draft: DraftCheckpoint) -> str:
    """The target's class by its model type: one family holds dense targets and those with experts."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known: dict[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return known.get(str(draft.config.get("target_model_type")), f"{draft.family.class_prefix}ForCausalLM")
