"""What a cache's bytes depend on, as plain values; compared whole with the recipe before the first training step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspec import registry
from deepspec.cache.levels import codec_for
from deepspec.errors import CacheError
from deepspec.files import sha256_file
from deepspec.recipe import Recipe


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of the vocabulary and the added tokens."""
    added = {str(i): str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    text = json.dumps([sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]), added], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def template_digest(tokenizer: Any) -> str:
    """SHA-256 of the chat template."""
    return hashlib.sha256(json.dumps(tokenizer.chat_template, sort_keys=True).encode()).hexdigest()


def fingerprint_of(recipe: Recipe, target: Any, tokenizer: Any, sources: list[dict[str, Any]]) -> dict[str, Any]:
    """The fingerprint of the cache that ``recipe`` describes.

    Args:
        recipe: names target, layers, rendering and levels.
        target: a :class:`deepspec.targets.Target`; its weights are digested.
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
        "target": {
            "path": recipe.target.path,
            "revision": recipe.target.revision,
            "weights": target.weights_digest(),
            "hidden_size": target.spec.hidden_size,
        },
        "tokenizer": tokenizer_digest(tokenizer),
        "template": template_digest(tokenizer),
        "layers": list(recipe.target.layers),
        "max_length": recipe.data.max_length,
        "min_supervised": recipe.data.min_supervised,
        "thinking": recipe.data.thinking,
        "system_prompt": recipe.data.system_prompt,
        "dtype": recipe.target.dtype,
        "levels": levels,
        "sources": sources,
    }


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as ``{"target.weights": ...}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def mismatches(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """One line for each field in which a cache differs from what a recipe wants.

    A target under another path but of the same weights is the same target; a cache that keeps last_hidden serves a
    loss that does not read it; and a cache may hold more sources than the recipe names.
    """
    cache, recipe = flatten(found), flatten(wanted)
    lines = []
    for key in sorted({*cache, *recipe}):
        have, want = cache.get(key), recipe.get(key)
        if have == want or key in ("target.path", "target.revision") or (key == "levels.last_hidden" and want is None):
            continue
        if key == "sources":
            known = {source["sha256"] for source in have or []}
            missing = [source["name"] for source in want or [] if source["sha256"] not in known]
            if not missing:
                continue
            have, want = f"without {', '.join(missing)}", "all of the recipe's conversations"
        lines.append(f"{key}: cache {_short(have)}, recipe {_short(want)}")
    return lines


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, str) else value
    return text[:12] + "..." if len(text) == 64 else text


def require_fingerprint(cache: Any, recipe: Recipe, target: Any, tokenizer: Any) -> None:
    """Compare an opened cache with the recipe that wants to read it.

    That it holds the recipe's conversations is asked only of the recipe's sole training cache: others (for validation,
    or several side by side) come from other conversations.

    Raises:
        CacheError: they differ; all differing fields are listed.
    """
    conversations = recipe.data.conversations
    sources = []
    sole = list(recipe.data.cache) == [cache.path]
    if sole and conversations is not None and Path(conversations).exists():
        sources = [{"name": Path(conversations).name, "sha256": sha256_file(conversations)}]
    wanted = fingerprint_of(recipe, target, tokenizer, sources)
    lines = mismatches(cache.fingerprint, wanted)
    if lines:
        raise CacheError(
            f"the cache is not the recipe's: {'; '.join(lines)}",
            file=cache.path,
            remedy="build one with tools/build_cache.py, or mend the recipe",
        )
