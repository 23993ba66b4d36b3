"""What the engines that run here share: where they and their jobs lie, and how a draft is named to them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from deepspec import registry
from deepspec.export.parts import DraftCheckpoint


@dataclass(frozen=True)
class Serving:
    """How a server runs.

    Args:
        requests: answered at a time.
        dtype: "float32", "bfloat16", or "auto": the target's own.
        positions: of a request's context; None: as many as the target has.
    """

    requests: int
    dtype: str = "auto"
    positions: int | None = None


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

    name: ClassVar[str]  # of its environment: .venv-NAME, or what DEEPSPEC_NAME says
    formats: ClassVar[tuple[str, ...]]  # that it serves
    hands_out_states: ClassVar[bool] = False  # hidden states of the target, for training
    loads_only: ClassVar[bool] = False  # its server does not run here, only its code that loads drafts

    work: Path
    folder: Path
    shim: Path | None = None
    timeout: float = 1800.0
    environment: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def default_folder(cls) -> Path:
        """Where its environment is, unless the user names another."""
        return Path(os.environ.get(f"DEEPSPEC_{cls.name.upper()}", f".venv-{cls.name}"))

    @classmethod
    def find_shim(cls, named: str | None) -> Path | None:
        """The CPU shim to use; None where it needs none."""
        return None

    @property
    def python(self) -> str:
        """The interpreter of its environment."""
        return str(self.folder / "bin" / "python")

    def serving(
        self, name: str, target: str, how: Serving, speculative: Mapping[str, Any] | None = None, form: str = ""
    ) -> AbstractContextManager[str]:
        """The URL of a server while a block runs.

        Args:
            name: of its log.
            target: folder or hub id.
            how: it runs.
            speculative: what :meth:`speculative` gives; None: it drafts nothing.
            form: of the draft, as the engine calls it.

        Raises:
            DeepSpecError: it did not start; ``found`` is the last error in its log.
        """
        raise NotImplementedError

    def lacks_shim(self, form: str) -> bool:
        """Whether drafts of a form need the shim, and there is none."""
        return False

    def speculative(self, format_name: str, draft: DraftCheckpoint, folder: Path) -> dict[str, Any]:
        """How it runs a draft that was exported to ``folder``."""
        return dict(registry.engine(format_name).speculative(draft, str(folder.resolve())))
