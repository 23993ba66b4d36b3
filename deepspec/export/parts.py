"""What forms and engines work with: a draft as a config and its tensors, and what a user states of a foreign one.

A form writes a draft of our layout (the released one) into an engine's and reads one back. What a layout has no field
for (the training length, the number of anchors) is under one key ``deepspec`` of its config.json, which engines
ignore; a foreign file lacks it, and the user states what is missing as :class:`ImportHints`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from deepspec.algorithms.base import Algorithm
from deepspec.drafts import FROZEN, draft_algorithm
from deepspec.errors import DraftError
from deepspec.families.base import Family, Shape
from deepspec.targets import TargetSpec
from deepspec.targets.load import family_of

EMBED, HEAD = FROZEN
EXTRAS = "deepspec"  # our own key in an engine's config.json

# fields of our layout that no transformer config has, besides the algorithm's own
FROM_TARGET = ("target_model_name_or_path", "target_model_type", "num_target_layers", "own_embedding", "own_head")
COMMON = ("architectures", "target_layer_ids", "draft_vocab_size", *FROM_TARGET)


class Reason(NamedTuple):
    """Why an engine does not take a draft: the sentence, the key at fault, its value, what to do."""

    problem: str
    key: str
    found: object
    remedy: str | None = None


@dataclass(frozen=True)
class DraftCheckpoint:
    """A draft folder's config.json and tensors by name."""

    config: dict[str, Any]
    state: dict[str, Tensor]
    file: Path | None = None  # where the config was read, for errors

    @property
    def algorithm(self) -> Algorithm:
        """The algorithm of a draft in our layout."""
        return draft_algorithm(self.config, self.file)

    @property
    def parsed(self) -> Any:
        """The algorithm's own config of a draft in our layout."""
        return self.algorithm.read_config(self.config)

    @property
    def kind(self) -> str:
        """What engines' tables call it: the algorithm, with ``-k-1`` where the anchor's slot drafts nothing."""
        return self.algorithm.name + ("" if getattr(self.parsed, "sample_from_anchor", True) else "-k-1")

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
        own = {*COMMON, *(one.key for one in self.algorithm.own_fields)}
        return {key: value for key, value in self.config.items() if key not in own}

    @property
    def extras(self) -> dict[str, Any]:
        """What engines have no field for, and which algorithm it is."""
        keys = (*FROM_TARGET, *(one.key for one in self.algorithm.own_fields if one.training_only))
        return {"algorithm": self.algorithm.name, **{key: self.config[key] for key in keys if key in self.config}}


@dataclass(frozen=True)
class ImportHints:
    """What the user states of a foreign draft where its config does not."""

    target: TargetSpec | None = None
    target_layers: tuple[int, ...] | None = None  # 0-based layers whose OUTPUT is read
    max_draft: int | None = None
    sample_from_anchor: bool | None = None


def missing(draft: DraftCheckpoint, key: str, remedy: str | None = None) -> DraftError:
    """The error that a foreign config lacks a value that cannot be guessed."""
    return DraftError("does not say", file=draft.file, key=key, wanted=f"{key} stated", remedy=remedy)


def ascending(draft: DraftCheckpoint) -> DraftCheckpoint:
    """The draft with its target layers in rising order, the columns of ``fc`` moved with them.

    Engines hand features out layer by layer, whatever the order of the list.
    """
    layers = draft.parsed.target_layers
    order = sorted(range(len(layers)), key=layers.__getitem__)
    if order == list(range(len(layers))):
        return draft
    weight = draft.state["fc.weight"]  # [D, L*D]
    moved = weight.unflatten(1, (len(layers), -1))[:, order].flatten(1)
    config = draft.config | {"target_layer_ids": [layers[index] for index in order]}
    return DraftCheckpoint(config, draft.state | {"fc.weight": moved}, draft.file)
