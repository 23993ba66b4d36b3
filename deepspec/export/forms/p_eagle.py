"""P-EAGLE: Eagle3's layout with further layers, and what is read where token and features are unknown.

Engines read the unknown token's embedding from its row of the embedding: the file holds one, with the learned row in
the mask token's place. Read back, the row is the draft's again, and the rest is the target's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from deepspec.errors import DraftError
from deepspec.export.forms.base import Requirement, our_layout, own_names
from deepspec.export.forms.eagle3 import LEFT_OUT, PARALLEL, Eagle3Form, one_lower, read_norms, stated_norms
from deepspec.export.parts import EMBED, EXTRAS, DraftCheckpoint, ImportHints, Reason, missing

ROW, HIDDEN, THEIRS = "mask.embedding", "mask.hidden", "mask_hidden"  # ours, ours, engines' name of the second
SERVED = {"method": "eagle3", "parallel_drafting": True}


def no_fc_norm(draft: DraftCheckpoint) -> Reason | None:
    """Where the engine builds no norms of the single layers for a parallel draft."""
    if not draft.parsed.fc_norm:
        return None
    return Reason("its P-EAGLE has no norms of the single layers", "fc_norm", True, "train with draft.fc_norm: false")


@dataclass(frozen=True, eq=False)
class PEagleForm(Eagle3Form):
    """Eagle3's class, told by ``pard_token`` that it drafts in parallel."""

    requires: tuple[Requirement, ...] = (no_fc_norm,)
    name: str = "peagle"
    speculative: Mapping[str, object] = field(default_factory=lambda: SERVED)
    learned_row: bool = True

    def labels(self) -> tuple[str, ...]:
        """See :meth:`Eagle3.label`."""
        return tuple(f"{name} {PARALLEL}" for name in super().labels())

    def write(self, draft: DraftCheckpoint) -> DraftCheckpoint:
        token, layers = draft.parsed.mask_token_id, [layer + 1 for layer in draft.parsed.target_layers]
        fields = {"eagle_aux_hidden_state_layer_ids": layers, PARALLEL: token, "mask_token_id": token}
        written = self._flat(draft, fields, stated_norms(draft))
        learned_row_in(draft, written.state)
        return written

    def read(self, draft: DraftCheckpoint, hints: ImportHints) -> DraftCheckpoint:
        config = draft.config
        layers = one_lower(config.get("eagle_aux_hidden_state_layer_ids"))
        return read_p_eagle(draft, hints, config, layers, config[PARALLEL])


def learned_row_in(draft: DraftCheckpoint, state: dict[str, Tensor]) -> None:
    """Put the learned row into the embedding of ``state``, at the mask token, and the learned state under its name.

    Raises:
        DraftError: there is no embedding.
    """
    if EMBED not in state:
        problem, remedy = "its file needs the target's embedding, with a row of its own", "name the target (--target)"
        raise DraftError(problem, file=draft.file, key=EMBED, remedy=remedy)
    state[EMBED] = state[EMBED].clone()
    state[EMBED][draft.parsed.mask_token_id] = state.pop(ROW)
    state[THEIRS] = state.pop(HIDDEN)


def read_p_eagle(
    draft: DraftCheckpoint, hints: ImportHints, transformer: Mapping[str, Any], layers: Sequence[int] | None,
    token: int | None,
) -> DraftCheckpoint:  # fmt: skip
    """A P-EAGLE in our layout, whatever the engine.

    Args:
        draft: what was read.
        hints: what the user states.
        transformer: the transformer's config, with fields of drafting or without.
        layers: 0-based layers whose output it reads.
        token: the mask token.
    """
    extras = draft.config.get(EXTRAS)
    length = hints.max_draft or (extras or {}).get("num_depths")
    for key, value in (("mask_token_id", token), ("num_hidden_layers", transformer.get("num_hidden_layers"))):
        if value is None:
            raise missing(draft, key)
    if length is None:
        raise missing(draft, "num_depths", "state how many tokens it drafts a round (--max-draft 8)")
    state = own_names(draft)
    if EMBED not in state:
        raise missing(draft, EMBED, "its mask token's row was learned: fetch the weights with the embedding")
    state[ROW] = state[EMBED][token].clone()
    if THEIRS in state:
        state[HIDDEN] = state.pop(THEIRS)
    if extras is not None and not extras.get("own_embedding"):  # the target has the rest of it
        del state[EMBED]
    # what belongs to training alone is the published recipe's; a draft of ours states its own
    fields = {"mask_token_id": int(token or 0), "num_depths": int(length), "keep_ratio": 0.7, "keep_floor": 0.2}
    norms = read_norms(draft.config)
    norms.pop("norm_output")  # it has no meaning here: nothing is fed back
    fields |= norms
    if "d2t" in state:
        fields["draft_vocab_size"] = int(state["d2t"].shape[0])
    else:
        state.pop("t2d", None)
    kept = {key: value for key, value in transformer.items() if key not in (*LEFT_OUT, PARALLEL, "mask_token_id")}
    made = our_layout(draft, "p_eagle", kept, state, layers, hints, fields)
    return DraftCheckpoint(made.config | {"num_depths": int(length)}, made.state, made.file)
