"""The released DeepSpec layout, which is our own: flat, with the released names; its slot convention stated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from deepspec.export.engines.base import ExportEngine
from deepspec.export.parts import EXTRAS, DraftCheckpoint, ImportHints, Reason


class DeepSpecEngine(ExportEngine):
    """Takes every draft as it is: a draft of any algorithm is in this layout."""

    name = "deepspec"
    forms: ClassVar = {}
    cuts_head = False

    def reason(self, draft: DraftCheckpoint) -> Reason | None:
        """There is none."""
        return None

    def write(self, draft: DraftCheckpoint) -> DraftCheckpoint:
        """The draft with its slot convention written out; a released one is silent where the anchor's slot drafts."""
        convention = getattr(draft.parsed, "sample_from_anchor", None)
        stated = {} if convention is None else {"sample_from_anchor": bool(convention)}
        return DraftCheckpoint(draft.config | stated, draft.state, draft.file)

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json is in this layout."""
        name = (config.get("architectures") or [""])[0]
        return name.endswith(("DSparkModel", "Eagle3Model")) and EXTRAS not in config

    def read(self, draft: DraftCheckpoint, hints: ImportHints) -> DraftCheckpoint:
        """The same as :meth:`write`."""
        return self.write(draft)

    def command(self, draft: DraftCheckpoint, target: str, folder: str) -> str:
        """How to measure it."""
        return f"python -m deepspec.evaluate --target {target} --draft {folder}"


DEEPSPEC = DeepSpecEngine()
