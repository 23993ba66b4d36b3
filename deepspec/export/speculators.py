"""The speculators format (vllm-project): a config of its own around the transformer's, served by vLLM.

Layer ids are one higher than ours. What its defaults would turn round is always written: ``norm_before_residual`` of
Eagle3 (vLLM's default is true, the library's false) and ``sample_from_anchor`` of block drafters (default false).
A DFlash draft whose anchor slot drafts too is written as DSpark with a Markov head of rank 1 that is zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspec.errors import DraftError
from deepspec.export import vllm
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
    whole_vocabulary,
    with_head_rows,
    zero_markov,
)

NAME = "speculators"
CLASSES = {"eagle3": "Eagle3Speculator", "dflash": "DFlashSpeculator", "dspark": "DSparkSpeculator"}
TRAINING_ONLY = ("verifier_lm_head.weight", "verifier_norm.weight")


def write(draft: Draft) -> Draft:
    """The draft in the speculators format.

    Raises:
        DraftError: a kind of draft that the format has no model for.
    """
    kind = vllm.method(draft)
    families = ("qwen3", "llama") if kind == "eagle3" else ("qwen3",)
    if draft.family.name not in families:
        problem = f"its {kind} has layers of {' or '.join(families)}"
        raise refuse(NAME, problem, draft, model_type=draft.config["model_type"])
    parsed = draft.parsed
    config: dict[str, Any] = {
        "architectures": [CLASSES[kind]],
        "speculators_model_type": kind,
        "transformer_layer_config": draft.transformer,
        "draft_vocab_size": draft.config.get("draft_vocab_size") or draft.shape.vocab_size,
        "dtype": draft.config.get("dtype"),
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": parsed.max_draft}],
            "verifier": {
                "name_or_path": draft.config.get("target_model_name_or_path"),
                "architectures": [_verifier_class(draft)],
            },
        },
        EXTRAS: draft.extras,
    }
    layers = [layer + 1 for layer in parsed.target_layers]
    if kind == "dflash":
        whole_vocabulary(NAME, draft)
    if kind == "eagle3":
        if parsed.num_layers != 1:
            raise refuse(NAME, "its Eagle3 has exactly one layer", draft, num_hidden_layers=parsed.num_layers)
        config |= {"eagle_aux_hidden_state_layer_ids": layers, "norm_before_residual": False}
        return Draft(config, with_head_rows(draft), draft.file)
    state = with_head_rows(draft)
    config |= {
        "aux_hidden_state_layer_ids": layers,
        "block_size": parsed.block_size,
        "mask_token_id": parsed.mask_token_id,
        "sample_from_anchor": bool(parsed.sample_from_anchor),
    }
    if kind == "dspark":
        config |= _heads(draft, state)
    return Draft(config, state, draft.file)


def _verifier_class(draft: Draft) -> str:
    """The target's class by its model type: one family holds dense targets and those with experts."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known: dict[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return known.get(str(draft.config.get("target_model_type")), f"{draft.family.class_prefix}ForCausalLM")


def _heads(draft: Draft, state: dict[str, Any]) -> dict[str, Any]:
    rank, head = draft.config.get("markov_rank") or 0, draft.config.get("markov_head_type", "vanilla")
    if rank and head != "vanilla":
        raise refuse(
            NAME, "vLLM serves vanilla heads alone", draft, "train draft.markov_head: vanilla", markov_head=head
        )
    if not rank:
        state |= zero_markov(draft)
    return {
        "markov_rank": rank or 1,
        "markov_head_type": "vanilla",
        "enable_confidence_head": bool(draft.config.get("enable_confidence_head")),
        "confidence_head_with_markov": bool(rank and draft.config.get("confidence_head_with_markov")),
    }


def read(draft: Draft, facts: ImportHints) -> Draft:
    """A draft of the speculators format in ours.

    Raises:
        DraftError: another model, parts that ours has not, or a convention that the file does not state.
    """
    config = draft.config
    kind = config.get("speculators_model_type")
    if kind not in CLASSES:
        wanted = ", ".join(CLASSES)
        raise DraftError("a speculator that we do not have", file=draft.file, key="speculators_model_type", found=kind,
                         wanted=wanted)  # fmt: skip
    transformer = dict(config.get("transformer_layer_config") or {})
    transformer.setdefault("model_type", None)
    if kind == "eagle3":
        return _read_eagle3(draft, facts, transformer)
    if config.get("projector_type", "dflash") != "dflash" or config.get("shift_label"):
        raise DraftError("a variant of DFlash that we do not have", file=draft.file, key="projector_type / shift_label")
    state = own_names(draft, (*TRAINING_ONLY, "t2d"))
    if config.get("draft_vocab_size") == transformer.get("vocab_size"):
        state.pop("d2t", None)  # of every token: no reduced vocabulary
    # DSpark: published drafts were converted without a word of their convention, so silence says nothing there
    stated = config.get("sample_from_anchor", False if kind == "dflash" else None)
    heads = kind == "dspark" and not drop_zero_markov(state)
    rank = int(config.get("markov_rank") or 0) if heads else 0
    fields = {
        "block_size": int(config["block_size"]),
        "num_anchors": int(config.get("num_anchors", 512)),
        "mask_token_id": int(config["mask_token_id"]),
        "sample_from_anchor": vllm.from_anchor(draft, facts, stated),
        "markov_rank": rank,
        "enable_confidence_head": bool(kind == "dspark" and config.get("enable_confidence_head")),
    }
    if "d2t" in state:
        fields["draft_vocab_size"] = int(state["d2t"].shape[0])
    if rank or fields["enable_confidence_head"]:
        fields["markov_head_type"] = config.get("markov_head_type", "vanilla")
        fields["confidence_head_with_markov"] = bool(rank and config.get("confidence_head_with_markov"))
    algorithm = "dspark" if rank or fields["enable_confidence_head"] else "dflash"
    return published(draft, algorithm, transformer, state, _layers(config, "aux_hidden_state_layer_ids"), facts, fields)


def _read_eagle3(draft: Draft, facts: ImportHints, transformer: dict[str, Any]) -> Draft:
    config = draft.config
    odd = [key for key in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output") if config.get(key)]
    if odd:
        raise DraftError("an Eagle3 with norms that ours has not", file=draft.file, key=", ".join(odd), found=True)
    if "norm_before_residual" not in config:
        remedy = "write false or true into its config.json: the library and vLLM disagree on the default"
        raise missing(draft, "norm_before_residual", remedy)
    methods = (config.get("speculators_config") or {}).get("proposal_methods") or [{}]
    stated = ImportHints(facts.target, facts.target_layers, facts.max_draft or methods[0].get("speculative_tokens"))
    names = Draft(config, own_names(draft, TRAINING_ONLY), draft.file)
    return vllm.read_eagle3(names, stated, transformer, _layers(config, "eagle_aux_hidden_state_layer_ids"))


def _layers(config: Mapping[str, Any], key: str) -> tuple[int, ...] | None:
    ids = config.get(key)
    return None if ids is None else tuple(int(i) - 1 for i in ids)


def matches(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is in this format."""
    return "speculators_model_type" in config


FORMAT = Format(NAME, write, read, matches, vllm.command, vllm.CHECKED)
