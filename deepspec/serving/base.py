"""What the engines that run here share: where their jobs lie, and how a draft is named to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from deepspec import registry
from deepspec.export.parts import DraftCheckpoint


@dataclass(frozen=True)
class EngineProcesses:
    """An engine as processes.

    Args:
        work: folder of jobs and logs.
        folder: its environment, made where missing.
        shim: folder of what makes it run on a CPU, or None.
        timeout: seconds of one run.
        environment: added to that of every run.
    """

    loads_only: ClassVar[bool] = False  # its server does not run here, only its code that loads drafts

    work: Path
    folder: Path
    shim: Path | None = None
    timeout: float = 1800.0
    environment: Mapping[str, str] = field(default_factory=dict)

    def speculative(self, format_name: str, draft: DraftCheckpoint, folder: Path) -> dict[str, Any]:
        """How it runs a draft that was exported to ``folder``."""
        return dict(registry.engine(format_name).speculative(draft, str(folder.resolve())))
