"""SGLang (its code was read, it was not run here): one form per kind of draft.

| draft | form |
|---|---|
| Eagle3 | ``LlamaForCausalLMEagle3``, ``midlayer.*``; layers of Llama (unknown weights are skipped in silence) |
| DSpark | ``Qwen3DSparkModel``, flat as published; any kind of Markov head |
| DFlash, K slots -> K drafts | the same with a Markov head of rank 1 that is zero |
| DFlash, K slots -> K - 1 drafts | ``DFlashDraftModel`` |

Its ``eagle_config`` names the layers whose OUTPUT is read, as ours: the engine itself adds the one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspec.errors import DraftError
from deepspec.export import vllm, zlab
from deepspec.export.parts import (
    EXTRAS,
    Draft,
    Format,
    ImportHints,
    refuse,
    whole_vocabulary,
    with_head_rows,
    zero_markov,
)

EAGLE3 = "LlamaForCausalLMEagle3"
DSPARK = "Qwen3DSparkModel"
NAME = "sglang"


def write(draft: Draft) -> Draft:
    """The draft in SGLang's form.

    Raises:
        DraftError: a kind of draft that SGLang has no class for.
    """
    if -1 in draft.parsed.target_layers:
        raise refuse(NAME, "it does not hand out the embedding's output", draft, target_layer_ids=[-1])
    if draft.algorithm.name == "eagle3":
        return _write_eagle3(draft)
    if draft.family.name != "qwen3":
        raise refuse(NAME, "its block drafters have Qwen3's layers", draft, model_type=draft.config["model_type"])
    if draft.algorithm.name == "dflash" and not draft.parsed.sample_from_anchor:
        return zlab.write(draft)
    return _write_dspark(draft)


def _write_eagle3(draft: Draft) -> Draft:
    if draft.family.name != "llama":
        problem = "its Eagle3 class has Llama's layers, and would leave out the norms of the heads without a word"
        raise refuse(NAME, problem, draft, model_type=draft.config["model_type"])
    if draft.parsed.num_layers != 1:
        raise refuse(
            NAME, "further layers of its Eagle3 are not ours", draft, num_hidden_layers=draft.parsed.num_layers
        )
    layers = list(draft.parsed.target_layers)
    config = draft.transformer | {
        "architectures": [EAGLE3],
        "head_dim": draft.shape.head_dim,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": layers, "use_aux_hidden_state": True},
        "num_aux_hidden_states": len(layers),
        "draft_vocab_size": draft.parsed.draft_vocab_size or draft.shape.vocab_size,
        EXTRAS: draft.extras,
    }
    state = {name.replace("layers.0.", "midlayer.", 1): tensor for name, tensor in with_head_rows(draft).items()}
    return Draft(config, state, draft.file)


def _write_dspark(draft: Draft) -> Draft:
    config, state = draft.config | {EXTRAS: draft.extras}, dict(draft.state)
    if not draft.parsed.sample_from_anchor:
        remedy = "train with draft.sample_from_anchor: true"
        raise refuse(NAME, "its DSpark drafts from the anchor's slot too", draft, remedy, sample_from_anchor=False)
    if config.get("enable_confidence_head") and not config.get("confidence_head_with_markov"):
        remedy = "train with draft.confidence_with_markov: true, or draft.confidence_head: false"
        if not config.get("markov_rank"):
            remedy = "train with draft.confidence_head: false, or with a draft.markov_rank"
        raise refuse(NAME, "its confidence head reads the Markov features", draft, remedy)
    whole_vocabulary(NAME, draft)
    if not config.get("markov_rank"):
        config |= {"markov_rank": 1, "markov_head_type": "vanilla", "confidence_head_with_markov": False}
        state |= zero_markov(draft)
    config |= {"architectures": [DSPARK], "head_dim": draft.shape.head_dim, "sample_from_anchor": True}
    for key in ("own_embedding", "own_head"):
        if config.pop(key, None):
            problem = "its block drafters share the target's embedding and head"
            raise refuse(NAME, problem, draft, None, **{key: True})
    return Draft(config, state, draft.file)


def read(draft: Draft, facts: ImportHints) -> Draft:
    """A draft of SGLang's form in ours.

    Raises:
        DraftError: another form, or a statement that is missing.
    """
    name = (draft.config.get("architectures") or [""])[0]
    if name == zlab.ARCHITECTURE:
        return zlab.read(draft, facts)
    if name == DSPARK:
        return vllm.read_dspark(draft, facts)
    if name != EAGLE3:
        wanted = f"{EAGLE3}, {DSPARK} or {zlab.ARCHITECTURE}"
        raise DraftError("not a draft of SGLang's", file=draft.file, key="architectures", found=name, wanted=wanted)
    if int(draft.config.get("num_hidden_layers", 1)) != 1:
        raise DraftError("further layers of an Eagle3 are not ours", file=draft.file, key="num_hidden_layers")
    ids = (draft.config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    layers = None if ids is None else tuple(int(i) for i in ids)
    return vllm.read_eagle3(draft, facts, draft.config, layers)


def matches(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is in a form of SGLang's alone (its others are vLLM's too)."""
    return (config.get("architectures") or [""])[0] == EAGLE3


def command(draft: Draft, target: str, folder: str) -> str:
    """How to serve it, by the engine's documentation."""
    method, K = vllm.method(draft), draft.parsed.max_draft
    options = f"--speculative-algorithm {method.upper()} --speculative-draft-model-path {folder}"
    if method == "eagle3":
        options += f" --speculative-num-steps {K} --speculative-eagle-topk 1 --speculative-num-draft-tokens {K + 1}"
    elif method == "dspark":
        options += f" --speculative-dspark-block-size {K}"
    return f"python -m sglang.launch_server --model-path {target} {options}"


FORMAT = Format(NAME, write, read, matches, command, "SGLang: its code was read, it was not run")
