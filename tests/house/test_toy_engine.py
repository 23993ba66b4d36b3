"""A new engine is one file and one registry row: the shipped suite passes, with nothing else touched."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepspec import registry
from deepspec.testing.engine import EngineSuite

FILE = '''
"""A toy engine: takes block drafters over Qwen3's layers, a config in a config and names behind `toy.`."""

from dataclasses import dataclass
from typing import ClassVar

from deepspec.export.engines.base import ExportEngine
from deepspec.export.forms.base import Form
from deepspec.export.parts import DraftCheckpoint, Reason


@dataclass(frozen=True, eq=False)
class Nested(Form):
    name: str = "toy"

    def write(self, draft):
        config = {"architectures": [self.classes[draft.family.name]], "draft": draft.config}
        return DraftCheckpoint(config, {f"toy.{name}": tensor for name, tensor in draft.state.items()}, draft.file)

    def read(self, draft, hints):
        state = {name.removeprefix("toy."): tensor for name, tensor in draft.state.items()}
        return DraftCheckpoint(draft.config["draft"], state, draft.file)


NESTED = Nested({"qwen3": "ToyDraft"}, "its layers are Qwen3's")


class ToyEngine(ExportEngine):
    name = "toy"
    forms: ClassVar = {"dflash": NESTED, "dspark": NESTED, "dspark-k-1": NESTED}
    refused: ClassVar = {"dflash-k-1": Reason("its slots all draft", "sample_from_anchor", False)}
    cuts_head = False

    def command(self, draft, target, folder):
        return f"toy --target {target} --draft {folder} --tokens {draft.parsed.max_draft}"


TOY = ToyEngine()
'''


class TestToyEngine(EngineSuite):
    """The toy passes as it is."""

    engine = "toy"

    @pytest.fixture(autouse=True)
    def _row(self, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        folder: Path = tmp_path_factory.mktemp("toy")
        (folder / "toy_engine.py").write_text(FILE)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setitem(registry.ENGINES, "toy", "toy_engine:TOY")
        yield
        sys.modules.pop("toy_engine", None)
