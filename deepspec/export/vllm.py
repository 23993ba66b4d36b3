"""vLLM (read from and run with 0.32.0 on CPU): one form per kind of draft.

| draft | form |
|---|---|
| Eagle3 | ``Eagle3Qwen3ForCausalLM`` or ``Eagle3LlamaForCausalLM``; layer ids one higher than ours; one layer |
| DSpark | ``Qwen3DSparkModel`` or ``Gemma4DSparkModel``, flat as published; a vanilla head |
| DFlash, K slots -> K drafts | the same with a Markov head of rank 1 that is zero (``dflash`` reads slots otherwise) |
| DFlash, K slots -> K - 1 drafts | ``DFlashDraftModel`` |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from deepspec.errors import DraftError
from deepspec.export import zlab
from deepspec.export.parts import (
    EXTRAS,
    Draft,
    Format,
    ImportHints,
    drop_zero_markov,
    missing,
    own_names,
    published,
    refuse,
    with_head_rows,
    zero_markov,
)

EAGLE3 = {"qwen3": "Eagle3Qwen3ForCausalLM", "llama": "Eagle3LlamaForCausalLM"}
DSPARK = {"qwen3": "Qwen3DSparkModel", "gemma4": "Gemma4DSparkModel"}
NAME = "vllm"


def write(draft: Draft) -> Draft:
    """The draft in vLLM's form.

    Raises:
        DraftError: a kind of draft that vLLM has no class for.
    """
    if draft.algorithm.name == "eagle3":
        return _write_eagle3(draft)
    if draft.algorithm.name == "dflash" and not draft.parsed.sample_from_anchor:
        if draft.family.name != "qwen3":
            raise refuse(NAME, "its DFlash class has Qwen3 layers alone", draft, model_type=draft.config["model_type"])
        return zlab.write(draft)
    return write_dspark(draft)


def _write_eagle3(draft: Draft) -> Draft:
    if draft.family.name not in EAGLE3:
        raise refuse(NAME, "there is no Eagle3 class of this family", draft, model_type=draft.config["model_type"])
    if draft.parsed.num_layers != 1:
        raise refuse(NAME, "its Eagle3 has exactly one layer", draft, num_hidden_layers=draft.parsed.num_layers)
    config = draft.transformer | {
        "architectures": [EAGLE3[draft.family.name]],
        "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in draft.parsed.target_layers],
        "num_aux_hidden_states": len(draft.parsed.target_layers),
        "draft_vocab_size": draft.parsed.draft_vocab_size or draft.shape.vocab_size,
        "norm_before_residual": False,
        EXTRAS: draft.extras,
    }
    return Draft(config, with_head_rows(draft), draft.file)


def write_dspark(draft: Draft) -> Draft:
    """The flat form, for DSpark and for DFlash drafts whose anchor slot drafts too."""
    if draft.family.name not in DSPARK:
        raise refuse(NAME, "its block drafters norm every head", draft, model_type=draft.config["model_type"])
    if draft.family.name == "gemma4" and not draft.shape.k_eq_v:
        raise refuse(NAME, "its Gemma4 drafts take keys as values", draft, attention_k_eq_v=False)
    config, state = draft.config | {EXTRAS: draft.extras}, with_head_rows(draft)
    rank = config.get("markov_rank") or 0
    if rank and config.get("markov_head_type", "vanilla") != "vanilla":
        remedy = "train draft.markov_head: vanilla"
        raise refuse(NAME, "vanilla heads alone", draft, remedy, markov_head_type=config["markov_head_type"])
    if not rank:  # rank 0 kills the engine's process
        config |= {"markov_rank": 1, "markov_head_type": "vanilla", "confidence_head_with_markov": False}
        state |= zero_markov(draft)
    from_anchor = bool(draft.parsed.sample_from_anchor)
    config |= {
        "architectures": [DSPARK[draft.family.name]],
        "sample_from_anchor": from_anchor,
        "dspark_bonus_anchor": not from_anchor,
    }
    for key in ("own_embedding", "own_head"):  # vLLM takes what the file brings
        config.pop(key, None)
    return Draft(config, state, draft.file)


def read(draft: Draft, facts: ImportHints) -> Draft:
    """A draft of vLLM's form in ours.

    Raises:
        DraftError: another form, or a statement that is missing.
    """
    name = (draft.config.get("architectures") or [""])[0]
    if name == zlab.ARCHITECTURE:
        return zlab.read(draft, facts)
    if name in DSPARK.values():
        return read_dspark(draft, facts)
    if name not in EAGLE3.values():
        wanted = ", ".join([*EAGLE3.values(), *DSPARK.values(), zlab.ARCHITECTURE])
        raise DraftError("not a draft of vLLM's", file=draft.file, key="architectures", found=name, wanted=wanted)
    if draft.config.get("norm_before_residual") or draft.config.get("norm_before_fc") or draft.config.get("fc_norm"):
        raise DraftError(
            "an Eagle3 with norms that ours has not", file=draft.file, key="norm_before_residual / fc_norm"
        )
    ids = draft.config.get("eagle_aux_hidden_state_layer_ids")
    layers = None if ids is None else tuple(int(i) - 1 for i in ids)
    return read_eagle3(draft, facts, draft.config, layers)


def read_eagle3(draft: Draft, facts: ImportHints, config: Mapping[str, Any], layers: tuple[int, ...] | None) -> Draft:
    """An Eagle3 with its fields flat beside the transformer's, whatever the engine.

    Args:
        draft: what was read.
        facts: what the user states.
        config: transformer config.
        layers: 0-based layers whose output it reads.
    """
    state = own_names(draft)
    extras = draft.config.get(EXTRAS) or {}
    length = facts.max_draft or extras.get("ttt_length")
    if length is None:
        raise missing(draft, "ttt_length", "state how many tokens it drafts a round (--max-draft 7)")
    left_out = ("architectures", "eagle_aux_hidden_state_layer_ids", "eagle_config", "num_aux_hidden_states",
                "draft_vocab_size", "norm_before_residual", "norm_before_fc", "fc_norm", "target_hidden_size",
                "num_target_layers")  # fmt: skip
    transformer = {key: value for key, value in config.items() if key not in left_out}
    fields: dict[str, Any] = {
        "draft_num_hidden_layers": int(config["num_hidden_layers"]),
        "ttt_length": int(length),
        "step_loss_decay": 1.0,  # of training alone; a draft of ours states its own
    }
    if "d2t" in state:
        fields["draft_vocab_size"] = int(state["d2t"].shape[0])
    else:  # a mark of every token is no reduced vocabulary
        state.pop("t2d", None)
    made = published(draft, "eagle3", transformer, state, layers, facts, fields)
    return made if facts.max_draft is None else Draft(made.config | {"ttt_length": length}, made.state, made.file)


def read_dspark(draft: Draft, facts: ImportHints) -> Draft:
    """A flat DSpark config; a Markov head of rank 1 that is zero means DFlash."""
    config = draft.config
    state = own_names(draft, ("t2d",))
    if drop_zero_markov(state):
        config = config | {"markov_rank": 0}
    fields = {
        "block_size": int(config["block_size"]),
        "num_anchors": int(config.get("num_anchors", 512)),
        "mask_token_id": int(config["mask_token_id"]),
        "sample_from_anchor": from_anchor(draft, facts, config.get("sample_from_anchor", True)),
        "markov_rank": int(config.get("markov_rank") or 0),
        "enable_confidence_head": bool(config.get("enable_confidence_head", False)),
    }
    if "d2t" in state:
        fields["draft_vocab_size"] = int(state["d2t"].shape[0])
    if fields["markov_rank"] or fields["enable_confidence_head"]:
        fields["markov_head_type"] = config.get("markov_head_type", "vanilla")
        fields["confidence_head_with_markov"] = bool(config.get("confidence_head_with_markov", False))
    ours = (*fields, "architectures", "target_layer_ids", "num_target_layers", "dspark_bonus_anchor",
            "markov_head_type", "confidence_head_with_markov", "draft_vocab_size")  # fmt: skip
    transformer = {key: value for key, value in config.items() if key not in ours}
    algorithm = "dspark" if fields["markov_rank"] or fields["enable_confidence_head"] else "dflash"
    return published(draft, algorithm, transformer, state, tuple(config["target_layer_ids"]), facts, fields)


def from_anchor(draft: Draft, facts: ImportHints, stated: bool | None) -> bool:
    """Whether the anchor's slot drafts: the user's word before the file's.

    Raises:
        DraftError: neither says.
    """
    value = stated if facts.sample_from_anchor is None else facts.sample_from_anchor
    if value is None:
        remedy = (
            "state it (--sample-from-anchor yes|no): read the wrong way a draft is accepted about 1.1 tokens a round"
        )
        raise missing(draft, "sample_from_anchor", remedy)
    return bool(value)


def matches(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is in one of vLLM's forms (a published DSpark without our key is our own layout)."""
    name = (config.get("architectures") or [""])[0]
    return name in EAGLE3.values() or (name in DSPARK.values() and EXTRAS in config)


def method(draft: Draft) -> str:
    """vLLM's name for the way a published draft is served."""
    if draft.algorithm.name == "dflash" and draft.parsed.sample_from_anchor:
        return "dspark"
    return str(draft.algorithm.name)


def command(draft: Draft, target: str, folder: str) -> str:
    """How to serve it."""
    options = {"model": folder, "method": method(draft), "num_speculative_tokens": draft.parsed.max_draft}
    return f"vllm serve {target} --speculative-config '{json.dumps(options)}'"


CHECKED = "vLLM 0.32.0 on CPU: `make serve-check`"
FORMAT = Format(NAME, write, read, matches, command, CHECKED)
