"""What a form is, and the parts that several share: tensors under an engine's names, a foreign draft in our layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from deepspec import registry
from deepspec.errors import DraftError
from deepspec.export.parts import EMBED, EXTRAS, HEAD, DraftCheckpoint, ImportHints, Reason, missing
from deepspec.targets.load import family_of

SLIDING = "sliding_attention"
Requirement = Callable[[DraftCheckpoint], Reason | None]  # None: the draft meets it


@dataclass(frozen=True, eq=False)
class Form(ABC):
    """How one kind of draft is laid out; an engine has one in its table for each kind that it takes.

    Args:
        classes: the engine's class by the family of the draft's layers.
        other_family: why drafts of other families are refused.
        requires: what else a draft must meet.
        name: what the engine calls this way of drafting.
        speculative: what else the engine is told of such a draft when it is started.
        learned_row: whether the file holds an embedding with a row of the draft's own.
    """

    classes: Mapping[str, str]
    other_family: str
    requires: tuple[Requirement, ...] = ()
    name: str = ""
    speculative: Mapping[str, object] = field(default_factory=dict)
    learned_row: bool = False
    carries: tuple[str, ...] = ()  # fields of optional parts of a draft (``OwnField.optional``) that it has room for
    key: ClassVar[str] = "architectures"  # the field of config.json by which a draft of this form is known
    continues: ClassVar[bool] = False  # it continues the target's last state; else it reads outputs of layers

    def reason(self, draft: DraftCheckpoint) -> Reason | None:
        """Why this form cannot hold a draft of our layout, or None."""
        if draft.family.name not in self.classes:
            return Reason(self.other_family, "model_type", draft.config["model_type"])
        for own in draft.algorithm.own_fields:
            if own.optional and own.key in draft.config and own.key not in self.carries:
                return Reason("its class has no such part", own.key, draft.config[own.key])
        if SLIDING in draft.config["layer_types"] and "layer_types" not in self.carries:
            return Reason("its layers see the complete context", "layer_types", SLIDING)
        normed = draft.config.get("num_target_layers")
        if not self.continues and normed in draft.parsed.target_layers:
            remedy = f"train with layers below {normed}"
            return Reason("the state after the final norm is not handed out", "target_layer_ids", normed, remedy)
        return next((reason for check in self.requires if (reason := check(draft))), None)

    def labels(self) -> tuple[str, ...]:
        """The values of :attr:`key` that mean this form."""
        return tuple(self.classes.values())

    def label(self, config: Mapping[str, Any]) -> Any:
        """The value of :attr:`key` in a config.json."""
        return (config.get("architectures") or [""])[0]

    @abstractmethod
    def write(self, draft: DraftCheckpoint) -> DraftCheckpoint:
        """A draft of our layout, without a :meth:`reason` against it, in this form."""

    @abstractmethod
    def read(self, draft: DraftCheckpoint, hints: ImportHints) -> DraftCheckpoint:
        """A draft of this form in our layout.

        Raises:
            DraftError: parts that our drafts do not have, or a statement that is missing.
        """


def one_layer(draft: DraftCheckpoint) -> Reason | None:
    """Where the engine's class has a single layer."""
    count = draft.parsed.num_layers
    return None if count == 1 else Reason("its class has exactly one layer", "num_hidden_layers", count)


def complete_vocabulary(draft: DraftCheckpoint) -> Reason | None:
    """Where the engine's class takes the target's head as it is."""
    size = draft.parsed.draft_vocab_size
    remedy = "train with draft.draft_vocab_size: null"
    return size and Reason("its class drafts over the full vocabulary", "draft_vocab_size", size, remedy)


def targets_own(draft: DraftCheckpoint) -> Reason | None:
    """Where embedding and head are always the target's."""
    key = next((key for key in ("own_embedding", "own_head") if draft.config.get(key)), None)
    return Reason("it takes the target's embedding and head", key, True) if key else None


def same_logits(carried: Mapping[str, str] | None = None) -> Requirement:
    """Where a head that adds to the logits would add to others: the class leaves out their softcap or their scale.

    Args:
        carried: by the family of the draft's layers which of the two the class has.
    """

    def check(draft: DraftCheckpoint) -> Reason | None:
        shape, carries = draft.shape, (carried or {}).get(draft.family.name)
        if not (draft.config.get("markov_rank") or draft.config.get("selector_rank")):
            return None  # the order of the tokens is the same with and without them
        if shape.softcap is not None and carries != "final_logit_softcapping":
            return Reason("its class has no softcap of the logits", "final_logit_softcapping", shape.softcap)
        if shape.logit_scale != 1.0 and carries != "logit_scale":
            return Reason("its class has no factor of the logits", "logit_scale", shape.logit_scale)
        return None

    return check


def no_last_layer(draft: DraftCheckpoint) -> Reason | None:
    """Where the state after the last layer is not handed out: the engine fails at the first request."""
    last = draft.config["num_target_layers"] - 1
    if last not in draft.parsed.target_layers:
        return None
    return Reason("the target's last layer is not handed out", "target_layer_ids", last, "train with other layers")


def no_embedding(draft: DraftCheckpoint) -> Reason | None:
    """Where the features are outputs of layers alone."""
    if -1 not in draft.parsed.target_layers:
        return None
    return Reason("the embedding is not handed out", "target_layer_ids", -1, "train with other layers")


# -- writing ----------------------------------------------------------------------------------------------------------


def with_head_rows(draft: DraftCheckpoint) -> dict[str, Tensor]:
    """The tensors with ``lm_head`` cut to the rows of a reduced vocabulary, which engines need in the file.

    Raises:
        DraftError: a reduced vocabulary and no head to cut.
    """
    state = dict(draft.state)
    if "d2t" not in state:
        return state
    if HEAD not in state:
        remedy = "name the target (--target), its head is read from there"
        problem = "a reduced vocabulary needs the target's head in the file"
        raise DraftError(problem, file=draft.file, key=HEAD, remedy=remedy)
    return {**state, HEAD: state[HEAD][_vocabulary(state["d2t"])].contiguous()}


def _vocabulary(d2t: Tensor) -> Tensor:
    """The target's ids of a reduced vocabulary from its offsets."""
    return d2t.long() + torch.arange(len(d2t))


# -- reading ----------------------------------------------------------------------------------------------------------


def own_names(draft: DraftCheckpoint) -> dict[str, Tensor]:
    """Tensors of a foreign file under our names; buffers that every loader computes itself are left out."""
    names = {name: name.removeprefix("model.").replace("midlayer.", "layers.0.", 1) for name in draft.state}
    return {ours: draft.state[name] for name, ours in names.items() if not ours.endswith("rotary_emb.inv_freq")}


def our_layout(
    draft: DraftCheckpoint,
    algorithm: str,
    transformer: Mapping[str, Any],
    state: dict[str, Tensor],
    layers: Sequence[int] | None,
    hints: ImportHints,
    fields: Mapping[str, Any],
) -> DraftCheckpoint:
    """A foreign draft in our layout.

    Args:
        draft: the foreign one, for its values under ``deepspec`` and for errors.
        algorithm: registry name.
        transformer: its transformer config, as far as it differs from the defaults of its model type.
        state: tensors by our names.
        layers: 0-based layers whose output it reads, or None where it is not stated.
        hints: what the user states.
        fields: the algorithm's fields, by the names of our layout.

    Raises:
        DraftError: something that must be known is stated nowhere, or the draft is of a kind that we do not have.
    """
    extras = dict(draft.config.get(EXTRAS) or {})
    extras.pop("algorithm", None)
    config = _complete_transformer(draft, algorithm, transformer)
    depth = extras.pop("num_target_layers", None) or draft.config.get("num_target_layers")
    if depth is None:
        if hints.target is None:
            raise missing(draft, "num_target_layers", "name the target (--target)")
        depth = hints.target.num_layers
    ids = _stated_layers(draft, layers, hints)
    if hints.target is not None:
        extras.setdefault("target_model_name_or_path", hints.target.path)
        extras.setdefault("target_model_type", hints.target.model_type)
    config |= {"num_target_layers": int(depth), "target_layer_ids": [int(i) for i in ids], **fields, **extras}
    config |= _frozen_fields(draft, config, state)
    config["architectures"] = registry.algorithm(algorithm).architectures(family_of(config["model_type"], draft.file))
    return DraftCheckpoint(config, state, draft.file)


def _stated_layers(draft: DraftCheckpoint, layers: Sequence[int] | None, hints: ImportHints) -> Sequence[int]:
    """The layers in the order in which the columns of ``fc`` take them: the user's before the file's.

    Raises:
        DraftError: not stated, or a foreign file's list does not rise: engines hand features out layer by layer
            whatever its order, while trainers may have followed it.
    """
    remedy = "state the layers whose outputs it reads, in the order in which fc takes them (--target-layers 1,9,17)"
    stated = hints.target_layers or layers
    if stated is None:
        raise missing(draft, "target_layer_ids", remedy)
    if not hints.target_layers and EXTRAS not in draft.config and list(stated) != sorted(stated):
        problem = "its layers do not rise: engines hand features out in rising order, trainers may in the list's"
        raise DraftError(problem, file=draft.file, key="target_layer_ids", found=list(stated), remedy=remedy)
    return stated


def refuse_windows(draft: DraftCheckpoint, kinds: Sequence[str]) -> None:
    """Raise a :class:`DraftError` for layers with a sliding window, where that is not a draft of ours."""
    if SLIDING in kinds:
        raise DraftError("sliding-window attention is not a draft of ours", file=draft.file, key="layer_types")


def _complete_transformer(draft: DraftCheckpoint, algorithm: str, transformer: Mapping[str, Any]) -> dict[str, Any]:
    """A transformer config with the defaults of its model type filled in; sliding windows where we have them."""
    from transformers import AutoConfig

    given = dict(transformer)
    kind = given.pop("model_type", None)
    if kind is None:
        raise missing(draft, "model_type", "add the model type of the draft's layers (qwen3, llama) to its config.json")
    family_of(kind, draft.file)
    kinds = list(given.get("layer_types") or ())
    if SLIDING not in kinds:
        kinds = ["full_attention"] * len(kinds)
    elif not hasattr(registry.algorithm(algorithm).config_class, "sliding_window"):
        refuse_windows(draft, kinds)
    for key in ("_name_or_path", "auto_map", "torch_dtype", "quantization_config", EXTRAS, "transformers_version"):
        given.pop(key, None)
    config = AutoConfig.for_model(kind, **given).to_dict()
    return config | {
        "model_type": kind,
        "layer_types": kinds or ["full_attention"] * int(config["num_hidden_layers"]),
        "tie_word_embeddings": False,
    }


def _frozen_fields(draft: DraftCheckpoint, config: Mapping[str, Any], state: dict[str, Tensor]) -> dict[str, Any]:
    """Whether a foreign file brings an embedding and a head of its own; ``state`` is put in order.

    A file that we exported marks them as the target's. Rows of a reduced vocabulary become a complete head again.
    """
    reduced = state.get("d2t")
    ours = draft.config.get(EXTRAS) is not None
    if reduced is not None:
        vocabulary, size = _vocabulary(reduced), int(config["vocab_size"])
        state["d2t"] = reduced.long()
        state["t2d"] = torch.zeros(size, dtype=torch.bool).index_fill(0, vocabulary, True)
        if ours and not config.get("own_head"):  # the target has the rest of it
            state.pop(HEAD, None)
            if not config.get("own_embedding"):
                state.pop(EMBED, None)
        elif HEAD in state:
            rows = state[HEAD]
            state[HEAD] = rows.new_zeros(size, rows.shape[1]).index_copy(0, vocabulary, rows)
    if ours:
        return {}
    if draft.config.get("tie_word_embeddings") and EMBED in state and HEAD not in state:
        state[HEAD] = state[EMBED].clone()
    return {key: True for key, name in (("own_embedding", EMBED), ("own_head", HEAD)) if name in state}
