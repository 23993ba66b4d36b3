"""z-lab's own form of DFlash, which vLLM (``dflash``) and SGLang (``DFLASH``) serve."""

from __future__ import annotations

from typing import ClassVar

from deepspec.export.engines.vllm import VLLMEngine
from deepspec.export.forms.block import DFlash
from deepspec.export.parts import DraftCheckpoint, ImportHints, Reason


class ZLabEngine(VLLMEngine):
    """Only DFlash, served by vLLM."""

    name = "zlab"
    forms: ClassVar = {"dflash-k-1": DFlash({"qwen3": "DFlashDraftModel"}, "its layers are Qwen3's")}
    no_form = "it holds only DFlash drafts"
    refused: ClassVar = {
        "dflash": Reason("its K slots give K - 1 drafts", "sample_from_anchor", True,
                         "train with draft.sample_from_anchor: false"),
    }  # fmt: skip
    checked = ""

    def read(self, draft: DraftCheckpoint, hints: ImportHints) -> DraftCheckpoint:
        """Its one form, whatever the architecture is called."""
        return self.forms["dflash-k-1"].read(draft, hints)


ZLAB = ZLabEngine()
