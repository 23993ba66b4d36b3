"""llama.cpp's models of a draft, ``dflash`` (DSpark too) and ``eagle3``: GGUF keys as the config, tensors by its names.

Its layer ids are one higher than ours; ``d2t`` holds the target's ids themselves. Embedding and head stay out of the
file, but for the head's rows of a reduced vocabulary: the engine takes the target's. Our own config stands whole under
one key, so that a file of ours is read back as it was.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from deepspec.errors import DraftError
from deepspec.export.forms.base import (
    Form,
    Requirement,
    complete_vocabulary,
    no_embedding,
    no_last_layer,
    one_layer,
    same_logits,
    targets_own,
    with_head_rows,
)
from deepspec.export.forms.block import MARKOV, PARTS, vanilla_head, zero_markov
from deepspec.export.forms.eagle3 import no_norms
from deepspec.export.parts import EMBED, HEAD, DraftCheckpoint, ImportHints, Reason
from deepspec.families.base import Shape

ARCHITECTURE, OURS = "general.architecture", "deepspec.config"
BEFORE_FC = {"input_norm.weight": "hidden_norm.weight"}  # of Eagle3
LAYER = {  # of a layer: our name -> the engine's
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "hidden_norm": "attn_norm_2",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "attention_conv.kernel_projection": "attn_conv_proj", "mlp_conv.kernel_projection": "ffn_conv_proj",
}  # fmt: skip
TOP = {"fc": "fc", "norm": "output_norm", "hidden_norm": "enc.output_norm", "lm_head": "output",
       "markov_head.markov_w1": "markov_w1", "markov_head.markov_w2": "markov_w2",
       "confidence_head.proj": "conf_proj", "candidate_selector.hidden_projection": "selector_hidden"}  # fmt: skip
BARE = {  # ours is no module's weight, or theirs has no such ending: the complete names
    "layers.{}.attention_conv.base_kernel": "blk.{}.attn_conv_base",
    "layers.{}.mlp_conv.base_kernel": "blk.{}.ffn_conv_base",
    "candidate_selector.predecessor_codebook": "selector_predecessor.weight",
    "candidate_selector.successor_codebook": "selector_successor.weight",
}  # fmt: skip


def plain_rope(draft: DraftCheckpoint) -> Reason | None:
    """Where a scaling of the positions, or a turn of a part of each head, has no keys of ours in the file."""
    rope = draft.shape.rope
    if rope.kind != "default":
        return Reason("scaled positions were not tried there", "rope_parameters", rope.kind)
    if rope.partial_factor != 1.0:
        return Reason("its layers turn complete heads", "partial_rotary_factor", rope.partial_factor)
    return None


def no_bias(draft: DraftCheckpoint) -> Reason | None:
    """Where projections have no bias."""
    key = next((key for key in ("attention_bias", "mlp_bias") if draft.config.get(key)), None)
    return Reason("its projections have no bias", key, True) if key else None


def markov_confidence(draft: DraftCheckpoint) -> Reason | None:
    """Where a confidence head always reads the Markov state too."""
    if not draft.config.get("enable_confidence_head") or draft.config.get("confidence_head_with_markov"):
        return None
    return Reason("its confidence head reads the Markov state", "confidence_head_with_markov", False)


def three_layers(draft: DraftCheckpoint) -> Reason | None:
    """Where the features are those of exactly three layers."""
    layers = draft.parsed.target_layers
    return None if len(layers) == 3 else Reason("exactly three target layers", "target_layer_ids", list(layers))


COMMON: tuple[Requirement, ...] = (plain_rope, no_bias, targets_own, no_embedding)


@dataclass(frozen=True, eq=False)
class GGUFForm(Form):
    """What both architectures share; ``classes`` maps a family to the architecture."""

    key: ClassVar[str] = ARCHITECTURE

    def label(self, config: Mapping[str, Any]) -> Any:
        return config.get(ARCHITECTURE)

    @abstractmethod
    def own_keys(self, draft: DraftCheckpoint) -> dict[str, Any]:
        """Keys of this architecture, without its name before them."""

    def rotated(self, draft: DraftCheckpoint) -> dict[str, int]:
        """Matrices whose rows the engine wants in another order, by our name: their number of heads."""
        return {}

    def write(self, draft: DraftCheckpoint) -> DraftCheckpoint:
        name = self.classes[draft.family.name]
        keys = layer_keys(draft.shape, draft.parsed.num_layers) | self.own_keys(draft)
        keys["target_layers"] = [layer + 1 for layer in draft.parsed.target_layers]
        named = {f"{name}.{key}": value for key, value in keys.items()}
        ours = {OURS: json.dumps(draft.config, sort_keys=True)}
        return DraftCheckpoint({ARCHITECTURE: name, **named, **ours}, dict(self._tensors(draft)), draft.file)

    def _state(self, draft: DraftCheckpoint) -> dict[str, Tensor]:
        """The draft's tensors that the file holds, by our names."""
        frozen = {EMBED} if "d2t" in draft.state else {EMBED, HEAD}
        return {name: tensor for name, tensor in with_head_rows(draft).items() if name not in {*frozen, "t2d"}}

    def _tensors(self, draft: DraftCheckpoint) -> Iterator[tuple[str, Tensor]]:
        """The file's tensors by the engine's names, as it wants them."""
        heads = self.rotated(draft)
        for name, tensor in self._state(draft).items():
            if name == "d2t":
                yield name, tensor.long() + torch.arange(len(tensor))
            else:
                yield their_name(name), interleaved(tensor, heads[name]) if name in heads else tensor

    def read(self, draft: DraftCheckpoint, hints: ImportHints) -> DraftCheckpoint:
        """See :meth:`Form.read`; only files of ours: others do not say how the draft was trained."""
        if OURS not in draft.config:
            remedy = "import the draft that it was made from"
            raise DraftError("a GGUF that is not ours", file=draft.file, key=OURS, found=None, remedy=remedy)
        config = json.loads(draft.config[OURS])
        made = DraftCheckpoint(config, {}, draft.file)
        state, heads = {}, self.rotated(made)
        for their, tensor in draft.state.items():
            name = our_name(their)
            state[name] = halves(tensor, heads[name]) if name in heads else tensor
        if "d2t" in state:
            tokens = state["d2t"].long()
            state["t2d"] = torch.zeros(made.shape.vocab_size, dtype=torch.bool).index_fill(0, tokens, True)
            state["d2t"] = tokens - torch.arange(len(tokens))
            state.pop(HEAD, None)  # some rows of the target's
        if not config.get("markov_rank"):
            for name in MARKOV:
                state.pop(name, None)
        return DraftCheckpoint(config, state, draft.file)


@dataclass(frozen=True, eq=False)
class BlockGGUF(GGUFForm):
    """DSpark and DFlash; where the anchor's slot drafts too and there is no Markov head, one that adds nothing.

    The engine starts a draft with a Markov head as DSpark, and lets the anchor's slot draft only there.
    """

    requires: tuple[Requirement, ...] = (*COMMON, no_last_layer, vanilla_head, markov_confidence, same_logits())
    zero_head: bool = False

    def own_keys(self, draft: DraftCheckpoint) -> dict[str, Any]:
        parsed = draft.parsed
        return {
            "block_size": parsed.block_size, "sample_from_anchor": bool(parsed.sample_from_anchor),
            "has_confidence_head": bool(draft.config.get("enable_confidence_head")),
        }  # fmt: skip

    def write(self, draft: DraftCheckpoint) -> DraftCheckpoint:
        written = super().write(draft)
        mask = {"tokenizer.ggml.mask_token_id": draft.parsed.mask_token_id}
        return DraftCheckpoint(written.config | mask, written.state, written.file)

    def _state(self, draft: DraftCheckpoint) -> dict[str, Tensor]:
        state = super()._state(draft)
        return state if draft.config.get("markov_rank") or not self.zero_head else state | zero_markov(draft)


def lattice(draft: DraftCheckpoint) -> Reason | None:
    """Where the scores of all pairs of candidates are handed out in place of a hidden state."""
    count, width = draft.parsed.selector_top_k, draft.shape.hidden_size
    if count * (count + 1) <= width:
        return None
    return Reason(f"{count} candidates' pairs do not fit a hidden size of {width}", "selector_top_k", count)


@dataclass(frozen=True, eq=False)
class DFlash2GGUF(BlockGGUF):
    """DFlash 2: told by its selector's tensors."""

    requires: tuple[Requirement, ...] = (*COMMON, no_last_layer, complete_vocabulary, lattice, same_logits())
    carries: tuple[str, ...] = PARTS

    def own_keys(self, draft: DraftCheckpoint) -> dict[str, Any]:
        return super().own_keys(draft) | {key: getattr(draft.parsed, key) for key in PARTS}


@dataclass(frozen=True, eq=False)
class Eagle3GGUF(GGUFForm):
    """Eagle3: one layer without norms on the heads; queries and keys rotate neighbours, not halves."""

    requires: tuple[Requirement, ...] = (*COMMON, one_layer, three_layers, no_norms("fc_norm", "norm_output"))

    def own_keys(self, draft: DraftCheckpoint) -> dict[str, Any]:
        norms = {key: True for key in ("norm_before_residual", "norm_before_fc") if getattr(draft.parsed, key)}
        return {"target_hidden_size": draft.shape.hidden_size, "vocab_size": draft.shape.vocab_size, **norms}

    def _state(self, draft: DraftCheckpoint) -> dict[str, Tensor]:
        """Its norm of the features has the name that a block drafter's ``hidden_norm`` has."""
        return {BEFORE_FC.get(name, name): tensor for name, tensor in super()._state(draft).items()}

    def read(self, draft: DraftCheckpoint, hints: ImportHints) -> DraftCheckpoint:
        made = super().read(draft, hints)
        back = {their: our for our, their in BEFORE_FC.items()}
        return replace(made, state={back.get(name, name): tensor for name, tensor in made.state.items()})

    def rotated(self, draft: DraftCheckpoint) -> dict[str, int]:
        shape = draft.shape
        counts = {"q_proj": shape.num_heads, "k_proj": shape.num_kv_heads}
        return {f"layers.0.self_attn.{name}.weight": count for name, count in counts.items()}


def layer_keys(shape: Shape, count: int) -> dict[str, Any]:
    """The keys of ``count`` layers, of a draft or of a target, without the architecture's name before them."""
    return {
        "block_count": count, "context_length": shape.max_positions,
        "embedding_length": shape.hidden_size, "feed_forward_length": shape.intermediate_size,
        "attention.head_count": shape.num_heads, "attention.head_count_kv": shape.num_kv_heads,
        "attention.key_length": shape.head_dim, "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": float(shape.norm_eps),
        "rope.freq_base": float(shape.rope.theta), "rope.dimension_count": shape.head_dim,
    }  # fmt: skip


def their_name(name: str) -> str:
    """The engine's name of a tensor of ours."""
    pattern, number = _numbered(name)
    if pattern in BARE:
        return BARE[pattern].format(number)
    stem, _, end = name.rpartition(".")
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)", stem):
        return f"blk.{match[1]}.{LAYER[match[2]]}.{end}"
    return f"{TOP[stem]}.{end}" if stem in TOP else name


def our_name(name: str) -> str:
    """Our name of a tensor of the engine's; one that is unknown stays as it is."""
    pattern, number = _numbered(name)
    if pattern in BARE.values():
        return next(our for our, their in BARE.items() if their == pattern).format(number)
    stem, _, end = name.rpartition(".")
    if match := re.fullmatch(r"blk\.(\d+)\.(.+)", stem):
        known = {their: our for our, their in LAYER.items()}
        return f"layers.{match[1]}.{known[match[2]]}.{end}" if match[2] in known else name
    known = {their: our for our, their in TOP.items()}
    return f"{known[stem]}.{end}" if stem in known else name


def _numbered(name: str) -> tuple[str, str]:
    """A name with ``{}`` in place of its layer's number, and the number."""
    parts = name.split(".", 2)
    if len(parts) < 3 or not parts[1].isdigit():
        return name, ""
    return f"{parts[0]}.{{}}.{parts[2]}", parts[1]


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads * D, in] from halves to neighbours: row i and row i + D/2 of a head stand side by side."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def halves(rows: Tensor, heads: int) -> Tensor:
    """The inverse of :func:`interleaved`."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
