"""Eagle3: its fields flat beside the transformer's, one layer, the rows of the head that it drafts over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepspec.errors import DraftError
from deepspec.export.forms.base import Form, Requirement, one_layer, our_layout, own_names, with_head_rows
from deepspec.export.parts import EXTRAS, DraftCheckpoint, ImportHints, Reason, missing

NORMS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")  # of EAGLE-3.1
PARALLEL = "pard_token"
LEFT_OUT = ("architectures", "eagle_aux_hidden_state_layer_ids", "eagle_config", "num_aux_hidden_states",
            "draft_vocab_size", "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output",
            "target_hidden_size", "num_target_layers")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Eagle3Form(Form):
    """``layers.0.*``; ``eagle_aux_hidden_state_layer_ids`` are one higher than ours."""

    requires: tuple[Requirement, ...] = (one_layer,)
    name: str = "eagle3"

    def label(self, config: Mapping[str, Any]) -> Any:
        """Its parallel sibling has the same class, and a token in place of those that are not yet known."""
        name = super().label(config)
        return f"{name} {PARALLEL}" if config.get(PARALLEL) is not None else name

    def write(self, draft: DraftCheckpoint) -> DraftCheckpoint:
        layers = [layer + 1 for layer in draft.parsed.target_layers]
        fields = {"eagle_aux_hidden_state_layer_ids": layers}
        return self._flat(draft, fields, stated_norms(draft))

    def _flat(self, draft: DraftCheckpoint, layers: dict[str, Any], norms: dict[str, Any]) -> DraftCheckpoint:
        config = draft.transformer | {
            "architectures": [self.classes[draft.family.name]],
            **layers,
            "num_aux_hidden_states": len(draft.parsed.target_layers),
            "draft_vocab_size": draft.parsed.draft_vocab_size or draft.shape.vocab_size,
            **norms,
            EXTRAS: draft.extras,
        }
        return DraftCheckpoint(config, with_head_rows(draft), draft.file)

    def read(self, draft: DraftCheckpoint, hints: ImportHints) -> DraftCheckpoint:
        layers = one_lower(draft.config.get("eagle_aux_hidden_state_layer_ids"))
        return read_eagle3(draft, hints, draft.config, layers)


@dataclass(frozen=True, eq=False)
class Eagle3Midlayer(Eagle3Form):
    """``midlayer.*``; ``eagle_config`` names the layers whose OUTPUT is read, as ours does."""

    def write(self, draft: DraftCheckpoint) -> DraftCheckpoint:
        layers = list(draft.parsed.target_layers)
        inner = {"eagle_aux_hidden_state_layer_ids": layers, "use_aux_hidden_state": True}
        flat = self._flat(draft, {"head_dim": draft.shape.head_dim, "eagle_config": inner}, {})
        state = {name.replace("layers.0.", "midlayer.", 1): tensor for name, tensor in flat.state.items()}
        return DraftCheckpoint(flat.config, state, draft.file)

    def read(self, draft: DraftCheckpoint, hints: ImportHints) -> DraftCheckpoint:
        if int(draft.config.get("num_hidden_layers", 1)) != 1:
            raise DraftError("further layers of an Eagle3 are not ours", file=draft.file, key="num_hidden_layers")
        refuse_norms(draft)
        ids = (draft.config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
        return read_eagle3(draft, hints, draft.config, ids)


def one_lower(ids: Sequence[int] | None) -> list[int] | None:
    """Our layers from ids that are one higher."""
    return None if ids is None else [int(i) - 1 for i in ids]


def no_norms(*keys: str) -> Requirement:
    """Where the engine does not read these of EAGLE-3.1's options, and would leave them out without a word."""

    def reason(draft: DraftCheckpoint) -> Reason | None:
        key = next((key for key in keys if getattr(draft.parsed, key)), None)
        return Reason("its Eagle3 does not read it", key, True, f"train with draft.{key}: false") if key else None

    return reason


def stated_norms(draft: DraftCheckpoint) -> dict[str, bool]:
    """EAGLE-3.1's options at the top level; the one whose default differs between engines is always written."""
    on = {key: True for key in NORMS if getattr(draft.parsed, key, False)}
    return {"norm_before_residual": False} | on


def read_norms(config: Mapping[str, Any]) -> dict[str, bool]:
    """The options of a config.json, by our names, which are the engines'; one may be in ``eagle_config``."""
    inner = config.get("eagle_config") or {}
    return {key: bool(config.get(key, inner.get(key) if key == "norm_before_fc" else False)) for key in NORMS}


def refuse_norms(draft: DraftCheckpoint) -> None:
    """Refuse norms in a form whose engine reads none; ``norm_output`` also where it is false.

    One trainer of this form means by it the norm before the head, which ours always has; elsewhere it is what is fed
    back.

    Raises:
        DraftError: the config states one.
    """
    if odd := [key for key in NORMS if draft.config.get(key) or (key == "norm_output" and key in draft.config)]:
        remedy = "import the form it was trained in (speculators), or remove the key where it changes nothing"
        problem, found = "an option of EAGLE-3.1 that means nothing, or different things, in this form", True
        raise DraftError(problem, file=draft.file, key=", ".join(odd), found=found, remedy=remedy)


def read_eagle3(
    draft: DraftCheckpoint, hints: ImportHints, transformer: Mapping[str, Any], layers: Sequence[int] | None
) -> DraftCheckpoint:
    """An Eagle3 in our layout, whatever the engine.

    Args:
        draft: what was read.
        hints: what the user states.
        transformer: the transformer's config, with fields of drafting or without.
        layers: 0-based layers whose output it reads.
    """
    if "num_hidden_layers" not in transformer:
        raise missing(draft, "num_hidden_layers")
    state = own_names(draft)
    length = hints.max_draft or (draft.config.get(EXTRAS) or {}).get("ttt_length")
    if length is None:
        raise missing(draft, "ttt_length", "state how many tokens it drafts a round (--max-draft 7)")
    fields: dict[str, Any] = {
        "draft_num_hidden_layers": int(transformer["num_hidden_layers"]),
        "ttt_length": int(length),
        "step_loss_decay": 1.0,  # of training alone; a draft of ours states its own
        **read_norms(draft.config),
    }
    if "d2t" in state:
        fields["draft_vocab_size"] = int(state["d2t"].shape[0])
    else:  # a mark of every token is no reduced vocabulary
        state.pop("t2d", None)
    kept = {key: value for key, value in transformer.items() if key not in LEFT_OUT}
    made = our_layout(draft, "eagle3", kept, state, layers, hints, fields)
    return DraftCheckpoint(made.config | {"ttt_length": int(length)}, made.state, made.file)
