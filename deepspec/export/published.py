"""The published DeepSpec layout, which is our own: flat, with the released names; its slot convention stated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspec.export.parts import Draft, Format, ImportHints


def write(draft: Draft) -> Draft:
    """The draft as it is, with its slot convention written out."""
    stated = {} if draft.algorithm.name == "eagle3" else {"sample_from_anchor": _from_anchor(draft.config)}
    return Draft(draft.config | stated, draft.state, draft.file)


def read(draft: Draft, facts: ImportHints) -> Draft:
    """A released draft; where it is silent the architecture's convention holds: the anchor's slot drafts too."""
    return write(draft)


def matches(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is in this layout."""
    name = (config.get("architectures") or [""])[0]
    return name.endswith(("DSparkModel", "Eagle3Model")) and "deepspec" not in config and not _is_speculators(config)


def command(draft: Draft, target: str, folder: str) -> str:
    """How to measure it."""
    return f"python -m deepspec.evaluate --target {target} --draft {folder}"


def _from_anchor(config: Mapping[str, Any]) -> bool:
    return bool(config.get("sample_from_anchor", True))


def _is_speculators(config: Mapping[str, Any]) -> bool:
    return "speculators_model_type" in config


FORMAT = Format("deepspec", write, read, matches, command)
