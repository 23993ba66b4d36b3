"""SGLang (its code was read, it was not run here); ``docs/serving.md`` has the table of what is exported as what."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any, ClassVar

from deepspec.export.engines.base import ExportEngine
from deepspec.export.forms.base import complete_vocabulary
from deepspec.export.forms.block import DFlash, DSpark
from deepspec.export.forms.eagle3 import Eagle3Midlayer
from deepspec.export.parts import DraftCheckpoint, Reason

OPTIONS = {  # of a form, besides the algorithm's name and the folder; K drafts a round
    "eagle3": "--speculative-num-steps {K} --speculative-eagle-topk 1 --speculative-num-draft-tokens {K1}",
    "dspark": "--speculative-dspark-block-size {K}",
    "dflash": "",
}
BLOCK = "its block drafters have Qwen3's layers"


def no_embedding(draft: DraftCheckpoint) -> Reason | None:
    """It captures only the outputs of layers."""
    if -1 not in draft.parsed.target_layers:
        return None
    return Reason("it does not return the embedding's output", "target_layer_ids", [-1])


def confidence_with_markov(draft: DraftCheckpoint) -> Reason | None:
    """Its confidence head reads the Markov features."""
    config = draft.config
    if not config.get("enable_confidence_head") or config.get("confidence_head_with_markov"):
        return None
    remedy = "train with draft.confidence_with_markov: true, or draft.confidence_head: false"
    if not config.get("markov_rank"):
        remedy = "train with draft.confidence_head: false, or with a draft.markov_rank"
    return Reason("its confidence head reads the Markov features", "confidence_head_with_markov", False, remedy)


def shares_frozen(draft: DraftCheckpoint) -> Reason | None:
    """Its block drafters take the target's embedding and head."""
    owned = [key for key in ("own_embedding", "own_head") if draft.config.get(key)]
    return Reason("its block drafters share the target's embedding and head", owned[0], True) if owned else None


@dataclass(frozen=True, eq=False)
class SGLangDSpark(DSpark):
    """The size of a head is stated; the anchor's slot always drafts."""

    def stated(self, draft: DraftCheckpoint) -> dict[str, Any]:
        return {"head_dim": draft.shape.head_dim, "sample_from_anchor": True}


EAGLE3 = Eagle3Midlayer(  # unknown weights are skipped there without a word
    {"llama": "LlamaForCausalLMEagle3"},
    "its Eagle3 class has Llama's layers, and would leave out the norms of the heads without a word",
)
DSPARK = SGLangDSpark(
    {"qwen3": "Qwen3DSparkModel"}, BLOCK, (confidence_with_markov, complete_vocabulary, shares_frozen)
)
DFLASH = DFlash({"qwen3": "DFlashDraftModel"}, BLOCK)


class SGLangEngine(ExportEngine):
    """Eagle3 over Llama's layers, DSpark with any Markov head, DFlash in both conventions."""

    name = "sglang"
    forms: ClassVar = {"eagle3": EAGLE3, "dflash": DSPARK, "dflash-k-1": DFLASH, "dspark": DSPARK}
    refused: ClassVar = {
        "dspark-k-1": Reason("its DSpark drafts from the anchor's slot too", "sample_from_anchor", False,
                             "train with draft.sample_from_anchor: true"),
    }  # fmt: skip
    requires = (no_embedding,)
    checked = "SGLang: its code was read, it was not run"

    def command(self, draft: DraftCheckpoint, target: str, folder: str) -> str:
        """See :meth:`ExportEngine.command`, by the engine's documentation."""
        name, K = self.forms[draft.kind].name, draft.parsed.max_draft
        options = f"--speculative-algorithm {name.upper()} --speculative-draft-model-path {shlex.quote(folder)}"
        options = f"{options} {OPTIONS[name].format(K=K, K1=K + 1)}".rstrip()
        return f"python -m sglang.launch_server --model-path {shlex.quote(target)} {options}"


SGLANG = SGLangEngine()
