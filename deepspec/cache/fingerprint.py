"""What a cache's bytes depend on, as JSON values; compared with the recipe before the first training step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deepspec import registry
from deepspec.cache.levels import codec_for
from deepspec.errors import CacheError
from deepspec.files import sha256_file
from deepspec.identity import as_recorded, differences, identity_of
from deepspec.recipe import Recipe
from deepspec.targets import TargetSpec

SIDES = ("cache", "recipe")
APPEND = "add them with deepspec cache append"


def fingerprint_of(recipe: Recipe, spec: TargetSpec, tokenizer: Any, sources: list[dict[str, Any]]) -> dict[str, Any]:
    """The fingerprint of the cache that ``recipe`` describes.

    Args:
        recipe: names target, layers, rendering and levels.
        spec: of the target; see :func:`deepspec.identity.identity_of`.
        tokenizer: the target's.
        sources: one ``{"name", "rows", "sha256"}`` for each conversation file.

    Raises:
        CacheError: an unknown level.
    """
    keeps_last = registry.algorithm(recipe.algorithm).needs_last_hidden(recipe.draft)
    levels = {
        "features": recipe.cache.features_level or recipe.cache.level,
        "last_hidden": (recipe.cache.last_hidden_level or recipe.cache.level) if keeps_last else None,
    }
    for array, level in levels.items():
        if level is not None:
            codec_for(array, level)
    return {
        **identity_of(spec, tokenizer),
        "layers": list(recipe.target.layers),
        "max_length": recipe.data.max_length,
        "min_supervised": recipe.data.min_supervised,
        "thinking": recipe.data.thinking,
        "system_prompt": recipe.data.system_prompt,
        "dtype": recipe.target.dtype,
        "levels": levels,
        "sources": sources,
    }


def mismatches(found: Mapping[str, Any], wanted: Mapping[str, Any], file: object = "the cache") -> list[str]:
    """One line for each field in which a cache, or an online run's data, differs from the recipe.

    A cache that keeps last_hidden serves a loss that does not read it; and a cache may hold more sources than the
    recipe names.
    """
    now = as_recorded(found, wanted, getattr(torch, wanted["dtype"]), file)
    sources = {source["sha256"] for source in found["sources"]}
    missing = [source["name"] for source in now.pop("sources") if source["sha256"] not in sources]
    known = {key: value for key, value in found.items() if key != "sources"}
    if now["levels"]["last_hidden"] is None:
        known["levels"] = {**known["levels"], "last_hidden": None}
    lines = differences(known, now, SIDES)
    if missing:
        lines.append(f"sources: cache without {', '.join(missing)}, recipe names them in data.conversations")
    return lines


def remedy_for(lines: list[str], otherwise: str) -> str:
    """What to do about ``lines`` of :func:`mismatches`: only conversations can be added."""
    return f"{APPEND}, or {otherwise}" if all(line.startswith("sources: ") for line in lines) else otherwise


def require_fingerprint(cache: Any, recipe: Recipe, fingerprint: Mapping[str, Any]) -> None:
    """Compare an opened cache with the recipe that reads it.

    That it holds the recipe's conversations is asked only of the recipe's sole training cache: others (for validation,
    or several side by side) come from other conversations.

    Raises:
        CacheError: they differ; all differing fields are listed.
    """
    sole = list(recipe.data.cache) == [cache.path]
    files = [Path(name) for name in recipe.data.files if sole and Path(name).exists()]
    sources = [{"name": file.name, "sha256": sha256_file(file)} for file in files]
    lines = mismatches(cache.fingerprint, {**fingerprint, "sources": sources}, cache.path)
    if lines:
        raise CacheError(
            f"the cache is not the recipe's: {'; '.join(lines)}",
            file=cache.path,
            remedy=remedy_for(lines, "build one with deepspec cache build, or fix the recipe or the target"),
        )
