"""The speculators library (vllm-project), whose folders vLLM serves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from deepspec.export.engines.vllm import VLLMEngine
from deepspec.export.forms.base import complete_vocabulary, same_logits
from deepspec.export.forms.block import vanilla_head
from deepspec.export.forms.mtp import SpeculatorMTP
from deepspec.export.forms.speculators import SpeculatorBlock, SpeculatorDFlash2, SpeculatorEagle3, SpeculatorPEagle

EAGLE3 = SpeculatorEagle3(
    dict.fromkeys(("qwen3", "llama"), "Eagle3Speculator"), "its eagle3 has layers of qwen3 or llama"
)
P_EAGLE = SpeculatorPEagle(
    dict.fromkeys(("qwen3", "llama"), "PEagleDraftModel"), "its peagle has layers of qwen3 or llama"
)
DFLASH = SpeculatorBlock(
    {"qwen3": "DFlashSpeculator"}, "its dflash has layers of qwen3", (complete_vocabulary,), name="dflash"
)
DFLASH2 = SpeculatorDFlash2(
    {"qwen3": "DFlash2DraftModel"},
    "its dflash2 has layers of qwen3",
    (complete_vocabulary, same_logits()),
    name="dflash2",
)
DSPARK = SpeculatorBlock(
    {"qwen3": "DSparkSpeculator"},
    "its dspark has layers of qwen3",
    (vanilla_head, same_logits()),
    name="dspark",
    carries=(),
    heads=True,
)
MTP = SpeculatorMTP({"qwen3": "MTPDraftModel", "qwen3_5": "MTPDraftModel"}, "its mtp has layers of qwen3 or qwen3_5")


class SpeculatorsEngine(VLLMEngine):
    """One model a kind of draft; what vLLM serves of the format."""

    name = "speculators"
    forms: ClassVar = {
        "eagle3": EAGLE3, "p_eagle": P_EAGLE, "mtp": MTP,
        "dflash": DSPARK, "dflash-k-1": DFLASH, "dspark": DSPARK, "dspark-k-1": DSPARK,
        "dflash2-k-1": DFLASH2,
    }  # fmt: skip

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Every model of the library, those that we do not have too."""
        return EAGLE3.key in config


SPECULATORS = SpeculatorsEngine()
