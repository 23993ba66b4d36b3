"""What an engine is to an export: which forms it takes, why it refuses the rest, its container, how it is started."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from deepspec.drafts import SHARD_BYTES, read_weights, save_draft, weights_sha256
from deepspec.errors import DraftError
from deepspec.export.forms.base import Form, Requirement
from deepspec.export.parts import HEAD, DraftCheckpoint, ImportHints, Reason
from deepspec.files import read_json


class ExportEngine(ABC):
    """One engine. Its file states the table of forms; a registry row makes it known, nothing else names it."""

    name: ClassVar[str]  # of the registry row and of --format
    forms: ClassVar[Mapping[str, Form]]  # kind of draft (DraftCheckpoint.kind) -> its form
    refused: ClassVar[Mapping[str, Reason]] = {}  # kinds with a reason of their own
    no_form: ClassVar[str] = "it has no class for such a draft"  # the reason for every other kind
    requires: ClassVar[tuple[Requirement, ...]] = ()  # of every draft, whatever its form
    cuts_head: ClassVar[bool] = True  # its file holds the head's rows of a reduced vocabulary
    holds_frozen: ClassVar[bool] = True  # its file can hold the target's embedding and head
    head: ClassVar[str] = HEAD  # its name of the head
    absolute_ids: ClassVar[bool] = False  # d2t holds the target's ids, not what to add to the draft's
    types: ClassVar[tuple[str, ...]] = ("fp32", "bf16")  # in which it can hold the weights
    checked: ClassVar[str] = ""  # what the engine was seen to do with such folders, for the model card

    def reason(self, draft: DraftCheckpoint) -> Reason | None:
        """Why it does not take a draft of our layout, or None; no tensor is looked at."""
        for check in self.requires:
            if reason := check(draft):
                return reason
        form = self.forms.get(draft.kind)
        if form is None:
            return self.refused.get(draft.kind) or Reason(self.no_form, "algorithm", draft.algorithm.name)
        return form.reason(draft)

    def write(self, draft: DraftCheckpoint) -> DraftCheckpoint:
        """A draft of our layout, its target layers in rising order, in this engine's.

        Raises:
            DraftError: the engine does not take it.
        """
        if reason := self.reason(draft):
            raise self.refusal(draft, reason)
        return self.forms[draft.kind].write(draft)

    def refusal(self, draft: DraftCheckpoint, reason: Reason, others: str | None = None) -> DraftError:
        """The error of a :meth:`reason`; ``others`` names the engines that take the draft."""
        remedy = ", or ".join(part for part in (reason.remedy, others) if part) or None
        problem = f"the {self.name} format cannot carry this draft: {reason.problem}"
        return DraftError(problem, file=draft.file, key=reason.key, found=reason.found, remedy=remedy)

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json is in one of its forms."""
        return any(form.label(config) in form.labels() for form in self.forms.values())

    def read(self, draft: DraftCheckpoint, hints: ImportHints) -> DraftCheckpoint:
        """A draft of this engine's in our layout.

        Raises:
            DraftError: another form, parts that our drafts do not have, or a statement that is missing.
        """
        forms = dict.fromkeys(self.forms.values())
        for form in forms:
            if form.label(draft.config) in form.labels():
                return form.read(draft, hints)
        form = next(iter(forms))
        wanted = ", ".join(dict.fromkeys(label for one in forms for label in one.labels()))
        problem, found = f"not a draft in the {self.name} format", form.label(draft.config)
        raise DraftError(problem, file=draft.file, key=form.key, found=found, wanted=wanted)

    @abstractmethod
    def command(self, draft: DraftCheckpoint, target: str, folder: str) -> str:
        """How a draft of our layout is served from the exported ``folder`` beside ``target``."""

    def config(self, folder: Path) -> dict[str, Any] | None:
        """The config of a folder in the engine's container; None where the folder holds no such container."""
        file = folder / "config.json"
        return dict(read_json(file, DraftError)) if file.is_file() else None

    def state(self, folder: Path) -> dict[str, Tensor]:
        """The tensors of a folder that has a :meth:`config`."""
        return read_weights(folder)

    def sha256(self, folder: Path) -> str:
        """Of the weights in the engine's container."""
        return weights_sha256(folder)

    def save(
        self, folder: Path, written: DraftCheckpoint, provenance: Mapping[str, Any], recipe_text: str | None = None,
        shard_bytes: int = SHARD_BYTES, dtype: str | None = None, target: str | None = None,
    ) -> None:  # fmt: skip
        """Write what :meth:`write` gave in the engine's container: config.json and safetensors files.

        Args:
            folder: created where missing.
            written: config and tensors.
            provenance: where they came from.
            recipe_text: the resolved recipe.
            shard_bytes: no file of weights is larger.
            dtype: one of :attr:`types`, where the container has types of its own; None: the tensors'.
            target: the target that the user named, or its GGUF: its tokenizer is taken by a container that needs it.
        """
        save_draft(folder, written.state, written.config, provenance, recipe_text, shard_bytes)
