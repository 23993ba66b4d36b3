"""What forms and engines work with: a draft as a config and its tensors, and what a user states of a foreign one.

A form writes a draft of our layout (the released one) into an engine's and reads one back. What a layout has no field
for (the training length, the number of anchors) stands under one key ``deepspec`` of its config.json, which engines
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

# fields of our layout that no transformer config has
OWN = (
    "architectures", "target_layer_ids", "target_model_name_or_path", "target_model_type", "num_target_layers",
    "draft_num_hidden_layers", "ttt_length", "step_loss_decay", "draft_vocab_size",
    "block_size", "num_anchors", "mask_token_id", "sample_from_anchor",
    "markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov",
    "own_embedding", "own_head",
)  # fmt: skip
# of them, those that no engine's layout has a field for
UNKNOWN_TO_ENGINES = (
    "target_model_name_or_path", "target_model_type", "num_target_layers", "ttt_length", "step_loss_decay",
    "num_anchors", "own_embedding", "own_head",
)  # fmt: skip


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
        return {key: value for key, value in self.config.items() if key not in OWN}

    @property
    def extras(self) -> dict[str, Any]:
        """What engines have no field for, and which algorithm it is."""
        known = {key: self.config[key] for key in UNKNOWN_TO_ENGINES if key in self.config}
        return {"algorithm": self.algorithm.name, **known}


@dataclass(frozen=True)
class ImportHints:
    """What the user says of a foreign draft where its config is silent."""

    target: TargetSpec | None = None
    target_layers: tuple[int, ...] | None = None  # 0-based layers whose OUTPUT is read
    max_draft: int | None = None
    sample_from_anchor: bool | None = None


def missing(draft: DraftCheckpoint, key: str, remedy: str | None = None) -> DraftError:
    """The error that a foreign config does not say something that cannot be guessed."""
    return DraftError("does not say", file=draft.file, key=key, wanted=f"{key} stated", remedy=remedy)


# -- until an algorithm states them itself ----------------------------------------------------------------------------


def architecture(algorithm: str, family: Family) -> str:
    """The class in config.json of an algorithm's drafts over layers of ``family``."""
    return f"{family.class_prefix}{'Eagle3' if algorithm == 'eagle3' else 'DSpark'}Model"


def card_rows(draft: DraftCheckpoint) -> list[tuple[str, object]]:
    """What a model card says of the algorithm's own fields: (field, value)."""
    parsed, config = draft.parsed, draft.config
    if parsed.algorithm == "eagle3":
        size = parsed.draft_vocab_size
        return [("vocabulary", f"{size} of {draft.shape.vocab_size} tokens")] if size else []
    meaning = "the anchor's slot drafts too" if parsed.sample_from_anchor else "the anchor's slot drafts nothing"
    head = f"{config['markov_head_type']}, rank {config['markov_rank']}" if config.get("markov_rank") else "none"
    return [
        ("block size", parsed.block_size),
        ("sample_from_anchor", f"{str(parsed.sample_from_anchor).lower()}: {meaning}"),
        ("mask token", parsed.mask_token_id),
        ("sequential head", head),
        ("confidence head", "yes" if config.get("enable_confidence_head") else "none"),
    ]
