"""MTP heads under other people's names: those of a target's own checkpoint, and the speculators library's.

Norms of a family whose norms multiply by 1 + weight are stored so there; ours are stored as they multiply.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from deepspec.algorithms.mtp import PREFIX
from deepspec.drafts import FROZEN
from deepspec.errors import DraftError
from deepspec.export.forms.base import Form, Requirement, complete_vocabulary, one_layer, our_layout, targets_own
from deepspec.export.forms.speculators import Speculator, trained
from deepspec.export.parts import EXTRAS, DraftCheckpoint, ImportHints, Reason, missing
from deepspec.families.base import DRAFT_EXPERTS, Family
from deepspec.targets.load import family_of

LIBRARY = "mtp_layers.0."
FROM_TARGET = Reason(  # of engines that have such heads, in no folder of their own
    "it serves such heads from the target's own checkpoint", "algorithm", "mtp"
)
PARTS = {  # the library's names -> ours; every other one is of the layer
    "input_proj": "fc",
    "token_layernorm": "pre_fc_norm_embedding",
    "hidden_layernorm": "pre_fc_norm_hidden",
    "final_layernorm": "norm",
}


def _reads(draft: DraftCheckpoint, layer: int, state: str) -> Reason | None:
    """A :class:`Reason` unless the head continues the target's state ``layer``."""
    found = list(draft.parsed.target_layers)
    problem, remedy = (
        f"its heads continue the state {state} the target's final norm",
        f"train with target.layers: [{layer}]",
    )
    return None if found == [layer] else Reason(problem, "target_layer_ids", found, remedy)


def reads_normed(draft: DraftCheckpoint) -> Reason | None:
    """Engines hand a native head the state after the final norm."""
    return _reads(draft, draft.config["num_target_layers"], "after")


def reads_prenorm(draft: DraftCheckpoint) -> Reason | None:
    """The library trains on the state before the final norm, and its files do not say so."""
    return _reads(draft, draft.config["num_target_layers"] - 1, "before")


def as_stored(state: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Our tensors as the family's checkpoints store them."""
    return {name: tensor - offset if (offset := family.offset_of(name)) else tensor for name, tensor in state.items()}


def as_ours(state: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """The reverse of :func:`as_stored`."""
    return {name: tensor + offset if (offset := family.offset_of(name)) else tensor for name, tensor in state.items()}


def from_library(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the library's file by our names; unknown ones keep theirs."""
    found = {}
    for name, tensor in state.items():
        part, _, rest = name.removeprefix(LIBRARY).partition(".")
        ours = f"{PARTS[part]}.{rest}" if part in PARTS else f"layers.0.{part}.{rest}"
        found[ours if name.startswith(LIBRARY) else name] = tensor
    return found


def _to_library(name: str) -> str:
    part, _, rest = name.partition(".")
    theirs = {ours: theirs for theirs, ours in PARTS.items()}
    return f"{LIBRARY}{theirs[part]}.{rest}" if part in theirs else LIBRARY + name.removeprefix("layers.0.")


def _family(config: Mapping[str, Any], draft: DraftCheckpoint) -> Family:
    if "model_type" not in config:
        raise missing(draft, "model_type")
    return family_of(config["model_type"], draft.file)


def _read(
    draft: DraftCheckpoint, hints: ImportHints, transformer: Mapping[str, Any], state: dict[str, Tensor],
    after_norm: bool, steps: int | None,
) -> DraftCheckpoint:  # fmt: skip
    """A head in our layout; ``state`` has our names, its norms as they multiply."""
    extras = draft.config.get(EXTRAS) or {}
    steps = hints.max_draft or extras.get("mtp_steps") or steps
    if steps is None:
        raise missing(draft, "mtp_steps", "state how many tokens it drafts a round (--max-draft 3)")
    depth = extras.get("num_target_layers") or (hints.target.num_layers if hints.target else None)
    if depth is None:
        raise missing(draft, "num_target_layers", "name the target (--target)")
    fields = {"mtp_steps": int(steps), "step_weight_decay": 1.0, "step_keys": "committed"}  # ours state their own
    if any(".mlp.experts." in name for name in state):
        fields[DRAFT_EXPERTS] = True
    kept = {key: value for key, value in transformer.items() if key not in ("architectures", EXTRAS)}
    made = our_layout(draft, "mtp", kept, state, [int(depth) - (not after_norm)], hints, fields)
    return DraftCheckpoint(made.config | {"mtp_steps": int(steps)}, made.state, made.file)


@dataclass(frozen=True, eq=False)
class NativeMTP(Form):
    """``mtp.*`` as the target's own checkpoint has them; embedding and head are the target's."""

    requires: tuple[Requirement, ...] = (one_layer, complete_vocabulary, targets_own, reads_normed)
    name: str = "mtp"
    carries: tuple[str, ...] = (DRAFT_EXPERTS,)
    continues: ClassVar[bool] = True

    def write(self, draft: DraftCheckpoint) -> DraftCheckpoint:
        own = {name: tensor for name, tensor in draft.state.items() if name not in FROZEN}
        state = {PREFIX + name: tensor for name, tensor in as_stored(own, draft.family).items()}
        config = draft.transformer | {"architectures": [self.classes[draft.family.name]], EXTRAS: draft.extras}
        return DraftCheckpoint(config, state, draft.file)

    def read(self, draft: DraftCheckpoint, hints: ImportHints) -> DraftCheckpoint:
        family = _family(draft.config, draft)
        state = {name.removeprefix(PREFIX): tensor for name, tensor in draft.state.items()}
        return _read(draft, hints, draft.config, as_ours(state, family), True, None)


@dataclass(frozen=True, eq=False)
class SpeculatorMTP(Speculator):
    """The library's MTP model: its names, the target's state before the final norm."""

    requires: tuple[Requirement, ...] = (one_layer, complete_vocabulary, targets_own, reads_prenorm)
    name: str = "mtp"
    continues: ClassVar[bool] = True

    def write(self, draft: DraftCheckpoint) -> DraftCheckpoint:
        made = super().write(draft)
        own = {name: tensor for name, tensor in made.state.items() if name not in FROZEN}
        state = {_to_library(name): tensor for name, tensor in as_stored(own, draft.family).items()}
        frozen = {name: made.state[name] for name in FROZEN if name in made.state}
        config = {key: value for key, value in made.config.items() if key != "draft_vocab_size"}
        return DraftCheckpoint(config, state | frozen, made.file)

    def fields(self, draft: DraftCheckpoint, layers: list[int], state: dict[str, Tensor]) -> dict[str, Any]:
        return {"num_nextn_predict_layers": 1, "tie_word_embeddings": False}

    def read(self, draft: DraftCheckpoint, hints: ImportHints) -> DraftCheckpoint:
        config = draft.config
        transformer = config.get("transformer_layer_config") or {}
        if config.get("num_nextn_predict_layers", 1) != 1:
            problem, found = "heads of several layers are not ours", config["num_nextn_predict_layers"]
            raise DraftError(problem, file=draft.file, key="num_nextn_predict_layers", found=found, wanted=1)
        family = _family(transformer, draft)
        frozen = {name: tensor for name, tensor in draft.state.items() if name in FROZEN}
        given = {name: tensor for name, tensor in trained(draft).state.items() if name not in FROZEN}
        state = as_ours(from_library(given), family) | frozen
        methods = (config.get("speculators_config") or {}).get("proposal_methods") or [{}]
        one = {**transformer, "num_hidden_layers": 1, "layer_types": ["full_attention"]}
        return _read(draft, hints, one, state, False, methods[0].get("speculative_tokens"))
