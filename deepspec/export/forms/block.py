"""Block drafters, DSpark and DFlash: blocks of K slots, with or without a sequential (Markov) head.

A DFlash draft whose anchor slot drafts too is written as DSpark with a Markov head of rank 1 that is zero: engines'
own DFlash lets that slot draft nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from deepspec.errors import DraftError
from deepspec.export.forms.base import (
    Form,
    Requirement,
    complete_vocabulary,
    our_layout,
    own_names,
    refuse_windows,
    with_head_rows,
)  # fmt: skip
from deepspec.export.parts import EXTRAS, DraftCheckpoint, ImportHints, Reason, missing

MARKOV = ("markov_head.markov_w1.weight", "markov_head.markov_w2.weight")
# the keys allowed in dflash_config; anything else is a part of another model (Domino, causal heads, trees)
KNOWN = ("mask_token_id", "mask_token", "target_layer_ids", "block_size", "num_target_layers", "sample_from_anchor",
         "causal")  # fmt: skip
PARTS = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")  # and those of DFlash 2
AS_DFLASH = {"method": "dflash"}  # how vLLM is told of a DFlash 2 draft, whose class it finds by the architecture
NEUTRAL = {"projector_type": ("dflash",), "attention_mode": ("gqa", "mha")}  # values that change nothing
OURS = ("block_size", "num_anchors", "mask_token_id", "sample_from_anchor", "markov_rank", "enable_confidence_head",
        "architectures", "target_layer_ids", "num_target_layers", "dspark_bonus_anchor", "dflash_config",
        "markov_head_type", "confidence_head_with_markov", "draft_vocab_size", "causal", "is_causal",
        *PARTS)  # fmt: skip


def vanilla_head(draft: DraftCheckpoint) -> Reason | None:
    """Where the engine has no other Markov head."""
    head = draft.config.get("markov_head_type", "vanilla")
    if not draft.config.get("markov_rank") or head == "vanilla":
        return None
    return Reason("only vanilla heads", "markov_head_type", head, "train draft.markov_head: vanilla")


@dataclass(frozen=True, eq=False)
class DSparkForm(Form):
    """Flat, with the released names."""

    name: str = "dspark"

    def stated(self, draft: DraftCheckpoint) -> dict[str, Any]:
        """Fields that the engine reads from the file only."""
        from_anchor = bool(draft.parsed.sample_from_anchor)
        return {"sample_from_anchor": from_anchor, "dspark_bonus_anchor": not from_anchor}

    def write(self, draft: DraftCheckpoint) -> DraftCheckpoint:
        config, state = draft.config | {EXTRAS: draft.extras}, with_head_rows(draft)
        if not config.get("markov_rank"):  # rank 0 kills an engine's process
            config |= {"markov_rank": 1, "markov_head_type": "vanilla", "confidence_head_with_markov": False}
            state |= zero_markov(draft)
        config |= {"architectures": [self.classes[draft.family.name]], **self.stated(draft)}
        for key in ("own_embedding", "own_head"):  # engines take what the file brings
            config.pop(key, None)
        return DraftCheckpoint(config, state, draft.file)

    def read(self, draft: DraftCheckpoint, hints: ImportHints) -> DraftCheckpoint:
        config = draft.config
        refuse_windows(draft, config.get("layer_types") or ())
        stated = config.get("sample_from_anchor", True)
        return read_block(draft, hints, config, config, config.get("target_layer_ids"), stated)


@dataclass(frozen=True, eq=False)
class DFlashForm(Form):
    """``DFlashDraftModel``, z-lab's own: K slots give K - 1 drafts, slot j predicts the token at its own position.

    Layer ids are ours: the layers whose output is read.
    """

    requires: tuple[Requirement, ...] = (complete_vocabulary,)
    name: str = "dflash"
    carries: tuple[str, ...] = ("causal", "layer_types")
    parts: ClassVar[tuple[str, ...]] = ()

    def write(self, draft: DraftCheckpoint) -> DraftCheckpoint:
        parsed = draft.parsed
        config = draft.transformer | {
            "architectures": [self.classes[draft.family.name]],
            "block_size": parsed.block_size,
            "num_target_layers": draft.config["num_target_layers"],
            "dflash_config": {
                "mask_token_id": parsed.mask_token_id,
                "target_layer_ids": list(parsed.target_layers),
                "sample_from_anchor": False,
            },
            EXTRAS: draft.extras,
        }
        config["dflash_config"] |= {key: getattr(parsed, key) for key in self.parts}
        if parsed.causal:  # the flat one wins in vLLM
            config["dflash_config"]["causal"] = config["is_causal"] = True
        return DraftCheckpoint(config, dict(draft.state), draft.file)

    def read(self, draft: DraftCheckpoint, hints: ImportHints) -> DraftCheckpoint:
        """See :meth:`Form.read`; the architecture states its convention."""
        config, inner = draft.config, dict(draft.config.get("dflash_config") or {})
        known = (*KNOWN, *self.parts)
        odd = [key for key, value in inner.items() if key not in known and value and value not in NEUTRAL.get(key, ())]
        odd += [key for key in ("projector_type", "use_tree") if config.get(key) not in (None, False, "dflash")]
        if odd:
            raise DraftError("a variant of DFlash that we do not have", file=draft.file, key=", ".join(odd))
        causal, flat = bool(inner.get("causal")), config.get("is_causal")
        if flat is not None and "causal" in inner and flat != causal:
            found, remedy = f"{flat}, dflash_config.causal {causal}", "make the two agree: vLLM takes the flat one"
            raise DraftError("says two things", file=draft.file, key="is_causal", found=found, remedy=remedy)
        fields = config | {"markov_rank": 0, "enable_confidence_head": False} | inner | {"causal": flat or causal}
        stated = fields.get("sample_from_anchor", False)
        return read_block(draft, hints, fields, config, fields.get("target_layer_ids"), stated)


@dataclass(frozen=True, eq=False)
class DFlash2Form(DFlashForm):
    """``DFlash2DraftModel``: the same with the sizes of the convolutions and the selector in ``dflash_config``."""

    name: str = "dflash2"
    speculative: Mapping[str, object] = field(default_factory=lambda: AS_DFLASH)
    carries: tuple[str, ...] = ("causal", "layer_types", *PARTS)
    parts: ClassVar[tuple[str, ...]] = PARTS

    def labels(self) -> tuple[str, ...]:
        """The engines' name and the trainers', which begin with the family's."""
        return (*self.classes.values(), *(f"Qwen3{name}" for name in self.classes.values()))


def zero_markov(draft: DraftCheckpoint) -> dict[str, Tensor]:
    """A Markov head of rank 1 that adds nothing, for engines that need one."""
    vocabulary, like = draft.shape.vocab_size, draft.state["fc.weight"]
    rows = (vocabulary, draft.parsed.draft_vocab_size or vocabulary)
    return {name: like.new_zeros(count, 1) for name, count in zip(MARKOV, rows, strict=True)}


def drop_zero_markov(state: dict[str, Tensor]) -> bool:
    """Take a head of :func:`zero_markov` out of ``state``; False where there is none."""
    if any(name not in state or state[name].shape[1] != 1 or bool(state[name].any()) for name in MARKOV):
        return False
    for name in MARKOV:
        del state[name]
    return True


def read_block(
    draft: DraftCheckpoint,
    hints: ImportHints,
    config: Mapping[str, Any],
    transformer: Mapping[str, Any],
    layers: Sequence[int] | None,
    stated: bool | None,
) -> DraftCheckpoint:
    """A block drafter in our layout, whatever the engine; a Markov head that is zero means DFlash.

    Args:
        draft: what was read.
        hints: what the user states.
        config: its fields of drafting.
        transformer: the transformer's config, with fields of drafting or without.
        layers: 0-based layers whose output it reads.
        stated: whether the anchor's slot drafts, by the file; None where it is not stated.

    Raises:
        DraftError: a field that is not stated.
    """
    for key in ("block_size", "mask_token_id"):
        if config.get(key) is None:
            raise missing(draft, key, "write it into its config.json")
    stated = stated if hints.sample_from_anchor is None else hints.sample_from_anchor
    if stated is None:
        remedy = (
            "state it (--sample-from-anchor yes|no): read the wrong way a draft is accepted about 1.1 tokens a round"
        )
        raise missing(draft, "sample_from_anchor", remedy)
    state = own_names(draft)
    state.pop("t2d", None)
    if config.get("draft_vocab_size") == transformer.get("vocab_size"):
        state.pop("d2t", None)  # of every token: no reduced vocabulary
    rank = int(config.get("markov_rank") or 0)
    if rank and drop_zero_markov(state):
        rank = 0
    fields = {
        "block_size": int(config["block_size"]),
        "num_anchors": int(config.get("num_anchors", 512)),  # of training alone; a draft of ours states its own
        "mask_token_id": int(config["mask_token_id"]),
        "sample_from_anchor": bool(stated),
        "markov_rank": rank,
        "enable_confidence_head": bool(config.get("enable_confidence_head")),
    }
    parts = {key: config[key] for key in ("causal", *PARTS) if config.get(key)}
    fields |= parts
    if "d2t" in state:
        fields["draft_vocab_size"] = int(state["d2t"].shape[0])
    heads = bool(rank or fields["enable_confidence_head"])
    if heads:
        fields["markov_head_type"] = config.get("markov_head_type", "vanilla")
        fields["confidence_head_with_markov"] = bool(rank and config.get("confidence_head_with_markov"))
    kept = {key: value for key, value in transformer.items() if key not in OURS}
    algorithm = "dspark" if heads else "dflash2" if parts.get("selector_rank") else "dflash"
    return our_layout(draft, algorithm, kept, state, layers, hints, fields)
