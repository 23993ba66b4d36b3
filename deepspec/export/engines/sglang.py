"""SGLang (0.5.23 read, its draft classes run); ``docs/serving.md`` has the table of what is exported as what."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any, ClassVar

from deepspec.export.engines.base import ExportEngine
from deepspec.export.forms.base import (
    complete_vocabulary,
    no_embedding,
    no_last_layer,
    one_layer,
    same_logits,
    targets_own,
)
from deepspec.export.forms.block import DFlashForm, DSparkForm
from deepspec.export.forms.eagle3 import NORMS, Eagle3Midlayer, no_norms
from deepspec.export.forms.mtp import FROM_TARGET
from deepspec.export.parts import DraftCheckpoint, Reason

OPTIONS = {  # of a form, besides the algorithm's name and the folder; K drafts a round
    "eagle3": "--speculative-num-steps {K} --speculative-eagle-topk 1 --speculative-num-draft-tokens {K1}",
    "dspark": "--speculative-dspark-block-size {K}",
    "dflash": "",
}
BLOCK = "its block drafters have Qwen3's layers"


def targets_embedding(draft: DraftCheckpoint) -> Reason | None:
    """Its Eagle3 worker replaces the draft's embedding by the target's, whatever the file brings."""
    return (
        Reason("it takes the target's embedding", "own_embedding", True) if draft.config.get("own_embedding") else None
    )


@dataclass(frozen=True, eq=False)
class SGLangDSpark(DSparkForm):
    """The size of a head is stated."""

    def stated(self, draft: DraftCheckpoint) -> dict[str, Any]:
        return {"head_dim": draft.shape.head_dim, "sample_from_anchor": bool(draft.parsed.sample_from_anchor)}


@dataclass(frozen=True, eq=False)
class SGLangEagle3(Eagle3Midlayer):
    """A complete vocabulary is stated as null: with any number the head would have to be in the file."""

    def write(self, draft: DraftCheckpoint) -> DraftCheckpoint:
        written, size = super().write(draft), draft.parsed.draft_vocab_size
        if draft.config.get("own_head"):
            size = size or draft.shape.vocab_size
        return DraftCheckpoint(written.config | {"draft_vocab_size": size}, written.state, written.file)


EAGLE3 = SGLangEagle3(  # unknown weights are skipped there without a word
    {"llama": "LlamaForCausalLMEagle3"},
    "its Eagle3 class has Llama's layers, and would leave out the norms of the heads without a word",
    (one_layer, no_norms(*NORMS), targets_embedding),
)
DSPARK = SGLangDSpark({"qwen3": "Qwen3DSparkModel"}, BLOCK, (complete_vocabulary, targets_own, same_logits()))
DFLASH = DFlashForm({"qwen3": "DFlashDraftModel"}, BLOCK, (complete_vocabulary, targets_own), carries=())


class SGLangEngine(ExportEngine):
    """Eagle3 over Llama's layers, DSpark with any Markov head and DFlash, both in both conventions."""

    name = "sglang"
    forms: ClassVar = {"eagle3": EAGLE3, "dflash": DSPARK, "dflash-k-1": DFLASH, "dspark": DSPARK, "dspark-k-1": DSPARK}
    requires = (no_embedding, no_last_layer)
    refused: ClassVar = {"mtp": FROM_TARGET}
    checked = "SGLang 0.5.23: its draft classes on CPU (`make serve-check`); its server was not run"

    def command(self, draft: DraftCheckpoint, target: str, folder: str) -> str:
        """See :meth:`ExportEngine.command`, by the engine's documentation."""
        name, K = self.forms[draft.kind].name, draft.parsed.max_draft
        options = f"--speculative-algorithm {name.upper()} --speculative-draft-model-path {shlex.quote(folder)}"
        options = f"{options} {OPTIONS[name].format(K=K, K1=K + 1)}".rstrip()
        return f"python -m sglang.launch_server --model-path {shlex.quote(target)} {options}"


SGLANG = SGLangEngine()
