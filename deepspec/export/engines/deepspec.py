"""The released DeepSpec layout, which is our own: flat, with the released names; its slot convention stated."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any, ClassVar

from deepspec import registry
from deepspec.algorithms.own_fields import REQUIRED
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
        """The draft with what its silence means written out, such as the slot convention of a released one."""
        silent = [
            own
            for own in draft.algorithm.own_fields
            if own.default is not REQUIRED and not own.optional and own.key not in draft.config
        ]
        stated = {own.key: own.default for own in silent}
        return DraftCheckpoint(draft.config | stated, draft.state, draft.file)

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json is in this layout."""
        known = any(registry.algorithm(name).matches(config) for name in registry.ALGORITHMS)
        return known and EXTRAS not in config

    def read(self, draft: DraftCheckpoint, hints: ImportHints) -> DraftCheckpoint:
        """The same as :meth:`write`."""
        return self.write(draft)

    def command(self, draft: DraftCheckpoint, target: str, folder: str) -> str:
        """How to measure it."""
        return shlex.join(["python", "-m", "deepspec.evaluate", "--target", target, "--draft", folder])


DEEPSPEC = DeepSpecEngine()
