"""``DFlashDraftModel``: the form of z-lab's DFlash drafts, which vLLM (``dflash``) and SGLang (``DFLASH``) serve.

K slots give K - 1 drafts: the anchor's slot drafts nothing, slot j predicts the token at its own place. Layer ids are
those of our own convention, the layers whose output is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspec.errors import DraftError
from deepspec.export.parts import EXTRAS, Draft, Format, ImportHints, own_names, published, refuse, whole_vocabulary

ARCHITECTURE = "DFlashDraftModel"
# what may stand in dflash_config; anything else is a part of another model (Domino, DFlash-2, causal heads, trees)
KNOWN = ("mask_token_id", "mask_token", "target_layer_ids", "block_size", "num_target_layers", "sample_from_anchor")
PLAIN = {"projector_type": ("dflash",), "attention_mode": ("gqa", "mha")}  # values that change nothing


def write(draft: Draft) -> Draft:
    """A DFlash draft whose anchor slot drafts nothing.

    Raises:
        DraftError: another kind of draft.
    """
    name = draft.algorithm.name
    if name != "dflash":
        raise refuse("zlab", "it holds DFlash drafts alone", draft, algorithm=name)
    if draft.parsed.sample_from_anchor:
        remedy = "train with draft.sample_from_anchor: false"
        raise refuse("zlab", "its K slots give K - 1 drafts", draft, remedy, sample_from_anchor=True)
    if draft.family.name != "qwen3":
        raise refuse("zlab", "its layers are Qwen3's", draft, model_type=draft.config["model_type"])
    whole_vocabulary("zlab", draft)
    parsed = draft.parsed
    config = draft.transformer | {
        "architectures": [ARCHITECTURE],
        "block_size": parsed.block_size,
        "num_target_layers": draft.config["num_target_layers"],
        "dflash_config": {
            "mask_token_id": parsed.mask_token_id,
            "target_layer_ids": list(parsed.target_layers),
            "sample_from_anchor": False,
        },
        EXTRAS: draft.extras,
    }
    return Draft(config, dict(draft.state), draft.file)


def read(draft: Draft, facts: ImportHints) -> Draft:
    """A DFlash draft of z-lab's form in ours; the architecture states its convention.

    Raises:
        DraftError: a variant with parts that ours has not, or a statement that is missing.
    """
    config = draft.config
    inner = dict(config.get("dflash_config") or {})
    odd = [key for key, value in inner.items() if key not in KNOWN and value and value not in PLAIN.get(key, ())]
    odd += [
        key for key in ("is_causal", "projector_type", "use_tree") if config.get(key) not in (None, False, "dflash")
    ]
    if odd:
        raise DraftError("a variant of DFlash that we do not have", file=draft.file, key=", ".join(odd))
    names = ("block_size", "mask_token_id", "target_layer_ids")
    stated: dict[str, Any] = {key: inner.get(key, config.get(key)) for key in names}
    for key in ("block_size", "mask_token_id"):
        if stated[key] is None:
            raise DraftError("does not say", file=draft.file, key=key, wanted=f"{key} in config.json or dflash_config")
    convention = inner.get("sample_from_anchor", config.get("sample_from_anchor", False))
    if facts.sample_from_anchor is not None:
        convention = facts.sample_from_anchor
    fields = {
        "block_size": int(stated["block_size"]),
        "num_anchors": 512,  # of training alone; a draft of ours states its own
        "mask_token_id": int(stated["mask_token_id"]),
        "sample_from_anchor": bool(convention),
        "markov_rank": 0,
        "enable_confidence_head": False,
    }
    left_out = (*stated, "architectures", "dflash_config", "num_target_layers", "draft_vocab_size")
    transformer = {key: value for key, value in config.items() if key not in left_out}
    layers = stated["target_layer_ids"]
    return published(
        draft, "dflash", transformer, own_names(draft, ("t2d",)), None if layers is None else tuple(layers), facts,
        fields,
    )  # fmt: skip


def matches(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is in this form."""
    return (config.get("architectures") or [""])[0] == ARCHITECTURE and "speculators_model_type" not in config


def command(draft: Draft, target: str, folder: str) -> str:
    """How to serve it."""
    from deepspec.export.vllm import command as vllm_command

    return vllm_command(draft, target, folder)


FORMAT = Format("zlab", write, read, matches, command)
