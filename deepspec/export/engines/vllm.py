"""vLLM (read from and run with 0.32.0 on CPU); ``docs/serving.md`` has the table of what is exported as what."""

from __future__ import annotations

import json
import shlex
from typing import ClassVar

from deepspec.export.engines.base import ExportEngine
from deepspec.export.forms.base import complete_vocabulary, same_logits
from deepspec.export.forms.block import DFlash2Form, DFlashForm, DSparkForm, vanilla_head
from deepspec.export.forms.eagle3 import Eagle3Form
from deepspec.export.forms.mtp import FROM_TARGET
from deepspec.export.forms.p_eagle import PEagleForm
from deepspec.export.parts import DraftCheckpoint, Reason


def keys_as_values(draft: DraftCheckpoint) -> Reason | None:
    """Its Gemma4 block drafters have keys as values in all layers."""
    if draft.family.name != "gemma4" or draft.shape.k_eq_v:
        return None
    return Reason("its Gemma4 drafts take keys as values", "attention_k_eq_v", False)


EAGLE3 = Eagle3Form(
    {"qwen3": "Eagle3Qwen3ForCausalLM", "llama": "Eagle3LlamaForCausalLM"}, "there is no Eagle3 class of this family"
)
P_EAGLE = PEagleForm(EAGLE3.classes, EAGLE3.other_family)
DSPARK = DSparkForm(
    {"qwen3": "Qwen3DSparkModel", "gemma4": "Gemma4DSparkModel"},
    "its block drafters norm every head",
    (keys_as_values, vanilla_head, same_logits({"qwen3": "logit_scale", "gemma4": "final_logit_softcapping"})),
)
DFLASH = DFlashForm({"qwen3": "DFlashDraftModel"}, "its DFlash class has only Qwen3 layers")
DFLASH2 = DFlash2Form(  # vLLM 0.28 and later
    {"qwen3": "DFlash2DraftModel"}, "its DFlash 2 class has only Qwen3 layers", (complete_vocabulary, same_logits())
)
FROM_ANCHOR = Reason(
    "its K slots give K - 1 drafts", "sample_from_anchor", True, "train with draft.sample_from_anchor: false"
)


class VLLMEngine(ExportEngine):
    """Eagle3 of one layer, P-EAGLE, DSpark with a vanilla head, DFlash in both conventions, DFlash 2 in one."""

    name = "vllm"
    forms: ClassVar = {
        "eagle3": EAGLE3, "p_eagle": P_EAGLE,
        "dflash": DSPARK, "dflash-k-1": DFLASH, "dspark": DSPARK, "dspark-k-1": DSPARK,
        "dflash2-k-1": DFLASH2,
    }  # fmt: skip
    refused: ClassVar = {"dflash2": FROM_ANCHOR, "mtp": FROM_TARGET}
    checked = "vLLM 0.32.0 on CPU: `make serve-check`"

    def command(self, draft: DraftCheckpoint, target: str, folder: str) -> str:
        config = json.dumps(self.speculative(draft, folder))
        return shlex.join(["vllm", "serve", target, "--speculative-config", config])

    def speculative(self, draft: DraftCheckpoint, folder: str) -> dict[str, object]:
        """Its ``speculative_config`` of a draft of our layout that was exported to ``folder``."""
        form = self.forms[draft.kind]
        told = {"model": folder, "method": form.name, "num_speculative_tokens": draft.parsed.max_draft}
        return {**told, **form.speculative}


VLLM = VLLMEngine()
