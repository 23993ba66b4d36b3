"""The model card of an exported draft: what it is, how it is served, how it was trained, what was measured."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from deepspec.export.engines.base import ExportEngine
from deepspec.export.parts import DraftCheckpoint
from deepspec.metrics import equality_text, length_text
from deepspec.tables import Table


def model_card(
    draft: DraftCheckpoint,
    engine: ExportEngine,
    provenance: Mapping[str, Any],
    recipe_text: str | None,
    results: Mapping[str, Any] | None,
    folder: str,
) -> str:
    """README.md of an exported draft, with the front matter that the hub reads.

    Args:
        draft: the draft in our layout.
        engine: what it is exported to.
        provenance: where it came from.
        recipe_text: its recipe as YAML, if known.
        results: results.json of an evaluation, if there is one.
        folder: how the exported folder is called.
    """
    parsed, target = draft.parsed, str(draft.config.get("target_model_name_or_path") or "TARGET")
    front: dict[str, Any] = {
        "tags": ["speculative-decoding", "deepspec", parsed.algorithm],
        "library_name": engine.name,
    }
    if "/" in target and not target.startswith((".", "/")) and target.count("/") == 1:
        front["base_model"] = target
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {folder}: a {parsed.algorithm} draft for {target}",
        f"It drafts {parsed.max_draft} tokens a round for speculative decoding; the target verifies every one, so what "
        "is generated is the target's own. It is of no use by itself.",
        f"## Serve it\n\n```\n{engine.command(draft, target, folder)}\n```",
        engine.checked and f"Checked with: {engine.checked}.",
        "## What it is\n\n" + Table(("field", "value"), _rows(draft)).markdown(),
        _training(provenance, recipe_text),
        "## Measured\n\n" + (_measured(results) if results else "Not measured before this export."),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _rows(draft: DraftCheckpoint) -> list[tuple[str, object]]:
    rows = draft.algorithm.card_rows(draft.parsed, draft.shape)
    parameters = sum(tensor.numel() for name, tensor in draft.state.items() if "weight" in name or "bias" in name)
    return [*rows, ("parameters in the source folder", f"{parameters:,}"), ("dtype", draft.config.get("dtype"))]


def _training(provenance: Mapping[str, Any], recipe_text: str | None) -> str:
    parts = ["## Training"]
    if "step" in provenance:
        parts.append(f"Step {provenance['step']:,} of {provenance['total_steps']:,}, seed {provenance['seed']}.")
    if init := provenance.get("init"):
        taken = f", checkpoint {init['checkpoint']}" if "checkpoint" in init else ""
        parts.append(f"It started from the draft {init['draft']}{taken} (weights {init['weights']}).")
    sources = [
        (source["name"], f"{source['rows']:,}", source["sha256"])
        for cache in (provenance.get("data") or {}).get("caches", ())
        for source in cache.get("sources", ())
    ]
    if sources:
        parts.append("Data:\n\n" + Table(("file", "conversations", "SHA-256"), sources).markdown())
    if recipe_text:
        parts.append(f"The resolved recipe:\n\n```yaml\n{recipe_text.rstrip()}\n```")
    if len(parts) == 1:
        parts.append("The source folder states nothing about it.")
    return "\n\n".join(parts)


def _measured(results: Mapping[str, Any]) -> str:
    rows = []
    for row in results["summaries"]:
        equal = equality_text(row)
        rate = "" if row["verify_rate"] is None else f"{row['verify_rate']:.0%}"
        rows.append((row["task"], f"{row['temperature']:g}", length_text(row), rate, equal, row["prompts"]))
    equal_text = "greedy text equal to the target's"
    head = ("task", "T", "acceptance length (95 %)", "accepted/verified", equal_text, "prompts")
    table = Table(head, rows).markdown()
    command = (results.get("provenance") or {}).get("command")
    return table + (f"\n\nBy `{shlex.join(command)}`." if command else "")
