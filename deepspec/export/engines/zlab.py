"""z-lab's own form of DFlash, which vLLM (``dflash``) and SGLang (``DFLASH``) serve."""

from __future__ import annotations

from typing import ClassVar

from deepspec.export.engines.vllm import FROM_ANCHOR, VLLMEngine
from deepspec.export.forms.block import PARTS, DFlash2Form, DFlashForm
from deepspec.export.parts import DraftCheckpoint, ImportHints


class ZLabEngine(VLLMEngine):
    """Only DFlash and DFlash 2, served by vLLM."""

    name = "zlab"
    forms: ClassVar = {
        "dflash-k-1": DFlashForm({"qwen3": "DFlashDraftModel"}, "its layers are Qwen3's"),
        "dflash2-k-1": DFlash2Form({"qwen3": "DFlash2DraftModel"}, "its layers are Qwen3's"),
    }
    no_form = "it holds only DFlash drafts"
    refused: ClassVar = dict.fromkeys(("dflash", "dflash2"), FROM_ANCHOR)
    checked = ""

    def read(self, draft: DraftCheckpoint, hints: ImportHints) -> DraftCheckpoint:
        """By the parts that it states, whatever the architecture is called."""
        second = any(key in (draft.config.get("dflash_config") or {}) for key in PARTS)
        return self.forms["dflash2-k-1" if second else "dflash-k-1"].read(draft, hints)


ZLAB = ZLabEngine()
