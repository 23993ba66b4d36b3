"""Servers started for an evaluation: a target with its draft, exported in the engine's form, and the target alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspec import registry
from deepspec.drafts import weights_sha256
from deepspec.errors import EvaluationError
from deepspec.export.convert import ExportOptions, export_draft, read_draft
from deepspec.serving.base import Serving
from deepspec.targets import load_spec

log = logging.getLogger(__name__)
DTYPES = {"auto": None, "float32": "fp32", "bfloat16": "bf16"}  # of the command line -> of an export


@dataclass(frozen=True)
class ServedPair:
    """What is started.

    Args:
        engine: a row of ``registry.SERVERS``.
        target: folder or hub id.
        draft: our folder of it.
        work: folder of the export, the engine's files and the logs; kept for a later start.
        serving: how both run.
    """

    engine: str
    target: str
    draft: Path
    work: Path
    serving: Serving

    def server(self) -> Any:
        """The engine's processes, their environment made where it is missing.

        Raises:
            DeepSpecError: the engine serves nothing here, refuses the target, or could not be installed.
        """
        kind = registry.lookup("engine", registry.SERVERS, self.engine)
        if kind.loads_only:
            remedy = "start it yourself and name it with --server"
            raise EvaluationError("is not started here", key="--serve", found=self.engine, remedy=remedy)
        self.work.mkdir(parents=True, exist_ok=True)
        server = kind(self.work, kind.default_folder(), kind.find_shim(None))
        server.check_target(load_spec(self.target))
        server.prepare()
        return server

    @contextmanager
    def start(self) -> Iterator[tuple[str, str]]:
        """The URLs of the server that drafts and of the one that does not, while the block runs.

        Raises:
            DeepSpecError: the draft has no form of this engine, or a server did not start; its last error is named.
        """
        server = self.server()
        name, draft = server.formats[0], read_draft(self.draft)
        exported = self.work / f"{name}-{weights_sha256(str(self.draft))[:12]}-{self.serving.dtype}"
        if not exported.exists():
            options = ExportOptions(name, target=self.target, dtype=DTYPES[self.serving.dtype])
            export_draft(str(self.draft), str(exported), options)
        speculative = server.speculative(name, draft, exported)
        form = registry.engine(name).forms[draft.kind].name
        log.info("starting %s twice, with the draft and without; logs in %s", server.version, self.work)
        with (
            server.serving("drafting", self.target, self.serving, speculative, form) as drafting,
            server.serving("alone", self.target, self.serving) as alone,
        ):
            yield drafting, alone
