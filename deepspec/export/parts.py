"""What every export format works with: a draft as a config and its tensors, in the published layout of deepspec.

A format module writes such a draft into an engine's own layout and reads one back. What a layout has no field for
(its training length, the number of anchors) stands under one key ``deepspec`` of its config.json, which
engines ignore; a foreign file lacks it, and the user states what is missing as :class:`ImportHints`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspec import registry
from deepspec.drafts import FROZEN, draft_algorithm
from deepspec.errors import DraftError
from deepspec.families.base import Family, Shape
from deepspec.targets import TargetSpec
from deepspec.targets.load import family_of

EMBED, HEAD = FROZEN
EXTRAS = "deepspec"  # our own key in an engine's config.json

# fields of the published layout that no transformer config has, besides the algorithm's own
FROM_TARGET = ("target_model_name_or_path", "target_model_type", "num_target_layers", "own_embedding", "own_head")
OWN = ("architectures", "target_layer_ids", "draft_vocab_size", *FROM_TARGET)


@dataclass(frozen=True)
class Draft:
    """A draft folder's config.json and tensors by name."""

    config: dict[str, Any]
    state: dict[str, Tensor]
    file: Path | None = None  # where the config was read, for errors

    @property
    def algorithm(self) -> Any:
        """The algorithm of a draft in the published layout."""
        return draft_algorithm(self.config, self.file)

    @property
    def parsed(self) -> Any:
        """The algorithm's own config of a draft in the published layout."""
        return self.algorithm.read_config(self.config)

    @property
    def family(self) -> Family:
        """The family of the draft's layers."""
        return family_of(self.config["model_type"], self.file)

    @property
    def shape(self) -> Shape:
        """Sizes of the draft's layers."""
        return self.family.read_shape(self.config)

    @property
    def transformer(self) -> dict[str, Any]:
        """The config without the fields of drafting: what a transformer of these layers has."""
        own = {*OWN, *(one.key for one in self.algorithm.own_fields)}
        return {key: value for key, value in self.config.items() if key not in own}

    @property
    def extras(self) -> dict[str, Any]:
        """What engines have no field for, and which algorithm it is."""
        algorithm = self.algorithm
        keys = (*FROM_TARGET, *(one.key for one in algorithm.own_fields if one.training_only))
        return {"algorithm": algorithm.name, **{key: self.config[key] for key in keys if key in self.config}}


@dataclass(frozen=True)
class ImportHints:
    """What the user says of a foreign draft where its config is silent."""

    target: TargetSpec | None = None
    target_layers: tuple[int, ...] | None = None  # 0-based layers whose OUTPUT is read
    max_draft: int | None = None
    sample_from_anchor: bool | None = None


@dataclass(frozen=True)
class Format:
    """One layout that drafts are exported to and imported from."""

    name: str
    write: Callable[[Draft], Draft]
    read: Callable[[Draft, ImportHints], Draft]
    matches: Callable[[Mapping[str, Any]], bool]
    command: Callable[[Draft, str, str], str]  # (published draft, target, exported folder) -> how to serve it
    checked: str = field(default="")  # what the engine was seen to do with it


def refuse(format_name: str, problem: str, draft: Draft, remedy: str | None = None, **found: Any) -> DraftError:
    """The error that a format cannot carry a draft; ``found`` is one pair, the key at fault and its value."""
    key, value = next(iter(found.items()), (None, None))
    return DraftError(
        f"the {format_name} format cannot carry this draft: {problem}", file=draft.file, key=key, found=value,
        remedy=remedy,
    )  # fmt: skip


def missing(draft: Draft, key: str, remedy: str) -> DraftError:
    """The error that a foreign config does not say something that cannot be guessed."""
    return DraftError("does not say", file=draft.file, key=key, wanted=f"{key} stated", remedy=remedy)


def ascending(draft: Draft) -> Draft:
    """The draft with its target layers in rising order, the columns of ``fc`` moved with them.

    Engines hand features out layer by layer, whatever the order of the list.
    """
    layers = draft.parsed.target_layers
    order = sorted(range(len(layers)), key=layers.__getitem__)
    if order == list(range(len(layers))):
        return draft
    weight = draft.state["fc.weight"]  # [D, L*D]
    moved = weight.unflatten(1, (len(layers), -1))[:, order].flatten(1)
    config = draft.config | {"target_layer_ids": [layers[place] for place in order]}
    return Draft(config, draft.state | {"fc.weight": moved}, draft.file)


def whole_vocabulary(format_: str, draft: Draft) -> None:
    """Refuse a reduced vocabulary where the engine's class takes the target's head as it is.

    Raises:
        DraftError: the draft has one.
    """
    size = draft.parsed.draft_vocab_size
    if size is not None:
        remedy = "train with draft.draft_vocab_size: null"
        raise refuse(format_, "its class drafts over the whole vocabulary", draft, remedy, draft_vocab_size=size)


def with_head_rows(draft: Draft) -> dict[str, Tensor]:
    """The tensors with ``lm_head`` cut to the rows of a reduced vocabulary, which engines want in the file.

    Raises:
        DraftError: a reduced vocabulary and no head to cut.
    """
    state = dict(draft.state)
    if "d2t" not in state:
        return state
    if HEAD not in state:
        raise DraftError(
            "a reduced vocabulary needs the target's head in the file", file=draft.file, key=HEAD,
            remedy="name the target (--target), its head is read from there",
        )  # fmt: skip
    kept = state["d2t"] + torch.arange(len(state["d2t"]))
    return {**state, HEAD: state[HEAD][kept].contiguous()}


def zero_markov(draft: Draft) -> dict[str, Tensor]:
    """A Markov head of rank 1 that adds nothing, for engines that insist on one."""
    vocabulary, like = draft.shape.vocab_size, draft.state["fc.weight"]
    return {
        "markov_head.markov_w1.weight": like.new_zeros(vocabulary, 1),
        "markov_head.markov_w2.weight": like.new_zeros(draft.parsed.draft_vocab_size or vocabulary, 1),
    }


def drop_zero_markov(state: dict[str, Tensor]) -> bool:
    """Take a head of :func:`zero_markov` out of ``state``; False where there is none."""
    names = ("markov_head.markov_w1.weight", "markov_head.markov_w2.weight")
    found = [state.get(name) for name in names]
    if any(one is None or one.shape[1] != 1 or bool(one.any()) for one in found):
        return False
    for name in names:
        del state[name]
    return True


def own_names(draft: Draft, training_only: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Tensors of a foreign file under our names; buffers that every loader computes itself are left out."""
    state = {}
    for name, tensor in draft.state.items():
        ours = name.removeprefix("model.").replace("midlayer.", "layers.0.", 1)
        if ours.endswith("rotary_emb.inv_freq") or ours in training_only:
            continue
        state[ours] = tensor
    return state


def published(
    draft: Draft,
    algorithm: str,
    transformer: Mapping[str, Any],
    state: dict[str, Tensor],
    layers: tuple[int, ...] | None,
    facts: ImportHints,
    fields: Mapping[str, Any],
) -> Draft:
    """A foreign draft in the published layout.

    Args:
        draft: the foreign one, for what it says under ``deepspec`` and for errors.
        algorithm: registry name.
        transformer: its transformer config, as far as it differs from the defaults of its model type.
        state: tensors by our names.
        layers: 0-based layers whose output it reads, or None where it does not say.
        facts: what the user states.
        fields: the algorithm's fields, by the names of the published layout.

    Raises:
        DraftError: something that must be known is stated nowhere, or the draft is of a kind that we do not have.
    """
    extras = dict(draft.config.get(EXTRAS) or {})
    extras.pop("algorithm", None)
    config = _whole_transformer(draft, transformer)
    family = family_of(config["model_type"], draft.file)
    depth = extras.pop("num_target_layers", None) or draft.config.get("num_target_layers")
    if depth is None:
        if facts.target is None:
            raise missing(draft, "num_target_layers", "name the target (--target)")
        depth = facts.target.num_layers
    layers = _stated_layers(draft, layers, facts)
    if facts.target is not None:
        extras.setdefault("target_model_name_or_path", facts.target.path)
        extras.setdefault("target_model_type", facts.target.model_type)
    config |= {"num_target_layers": int(depth), "target_layer_ids": [int(i) for i in layers], **fields, **extras}
    config |= _frozen_fields(draft, config, state)
    config["architectures"] = registry.algorithm(algorithm).architectures(family)
    return Draft(config, state, draft.file)


def _stated_layers(draft: Draft, layers: tuple[int, ...] | None, facts: ImportHints) -> tuple[int, ...]:
    """The layers in the order in which the columns of ``fc`` take them: the user's word before the file's.

    Raises:
        DraftError: nobody says, or a foreign file's list does not rise: engines hand features out layer by layer
            whatever its order, while trainers may have followed it.
    """
    remedy = "state the layers whose outputs it reads, in the order in which fc takes them (--target-layers 1,9,17)"
    stated = facts.target_layers or layers
    if stated is None:
        raise missing(draft, "target_layer_ids", remedy)
    if not facts.target_layers and EXTRAS not in draft.config and list(stated) != sorted(stated):
        problem = "its layers do not rise: engines hand features out in rising order, trainers may in the list's"
        raise DraftError(problem, file=draft.file, key="target_layer_ids", found=list(stated), remedy=remedy)
    return stated


def _whole_transformer(draft: Draft, transformer: Mapping[str, Any]) -> dict[str, Any]:
    """A transformer config with the defaults of its model type filled in; full attention only."""
    from transformers import AutoConfig

    given = dict(transformer)
    kind = given.pop("model_type", None)
    if kind is None:
        raise missing(draft, "model_type", "add the model type of the draft's layers (qwen3, llama) to its config.json")
    family_of(kind, draft.file)
    if "sliding_attention" in (given.get("layer_types") or ()):
        raise DraftError("sliding-window attention is not a draft of ours", file=draft.file, key="layer_types")
    for key in ("_name_or_path", "auto_map", "torch_dtype", "quantization_config", EXTRAS, "transformers_version"):
        given.pop(key, None)
    config = AutoConfig.for_model(kind, **given).to_dict()
    return config | {
        "model_type": kind,
        "layer_types": ["full_attention"] * int(config["num_hidden_layers"]),
        "tie_word_embeddings": False,
    }


def _frozen_fields(draft: Draft, config: Mapping[str, Any], state: dict[str, Tensor]) -> dict[str, Any]:
    """Whether a foreign file brings an embedding and a head of its own; ``state`` is put in order.

    A file that we exported says that they are the target's. Rows of a reduced vocabulary become a whole head again.
    """
    reduced = state.get("d2t")
    if reduced is not None:
        kept = reduced.long() + torch.arange(len(reduced))
        state["d2t"] = reduced.long()
        state["t2d"] = torch.zeros(int(config["vocab_size"]), dtype=torch.bool).index_fill(0, kept, True)
    ours = draft.config.get(EXTRAS) is not None
    if ours and not config.get("own_head") and reduced is not None:  # the target has the rest of it
        state.pop(HEAD, None)
        if not config.get("own_embedding"):
            state.pop(EMBED, None)
    elif HEAD in state and reduced is not None:
        rows = state[HEAD]
        state[HEAD] = rows.new_zeros(int(config["vocab_size"]), rows.shape[1]).index_copy(0, kept, rows)
    if ours:
        return {}
    if draft.config.get("tie_word_embeddings") and EMBED in state and HEAD not in state:
        state[HEAD] = state[EMBED].clone()
    return {key: True for key, name in (("own_embedding", EMBED), ("own_head", HEAD)) if name in state}
