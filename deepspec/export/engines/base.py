"""What an engine is to an export: which forms it takes, why it refuses the rest, its container, how it is started."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from deepspec.drafts import SHARD_BYTES, save_draft
from deepspec.errors import DraftError
from deepspec.export.forms.base import Form, Requirement
from deepspec.export.parts import DraftCheckpoint, ImportHints, Reason


class ExportEngine(ABC):
    """One engine. Its file states the table of forms; a registry row makes it known, nothing else names it."""

    name: ClassVar[str]  # of the registry row and of --format
    forms: ClassVar[Mapping[str, Form]]  # kind of draft (DraftCheckpoint.kind) -> its form
    refused: ClassVar[Mapping[str, Reason]] = {}  # kinds with a reason of their own
    no_form: ClassVar[str] = "it has no class for such a draft"  # the reason for every other kind
    requires: ClassVar[tuple[Requirement, ...]] = ()  # of every draft, whatever its form
    cuts_head: ClassVar[bool] = True  # its file holds the head's rows of a reduced vocabulary
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

    def save(
        self, folder: Path, written: DraftCheckpoint, provenance: Mapping[str, Any], recipe_text: str | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:  # fmt: skip
        """Write what :meth:`write` gave in the engine's container: config.json and safetensors files."""
        save_draft(folder, written.state, written.config, provenance, recipe_text, shard_bytes)
