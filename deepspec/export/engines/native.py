"""A target's own checkpoint: the head that engines serve from there, to be put over it.

The folder has the head's tensors under the checkpoint's names and the checkpoint's index, which names that file for
them; copied beside the checkpoint's files, both make it the same target with the new head. Experts are stored one by
one or stacked, as the checkpoint stores those of its own head, or of its layers where it has no head.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from deepspec.algorithms.mtp import PREFIX, SINGLE, apart, stacked
from deepspec.drafts import INDEX, SHARD_BYTES, read_tensors, seal_draft
from deepspec.errors import DraftError
from deepspec.export.engines.base import ExportEngine
from deepspec.export.forms.mtp import NativeMTP
from deepspec.export.parts import EXTRAS, DraftCheckpoint
from deepspec.files import read_json, sha256_file, temporary_file, write_json
from deepspec.targets.stored import weight_files

FILE, CONFIG = "mtp.safetensors", "mtp.json"
MTP = NativeMTP({"qwen3_5": "Qwen3_5MTP"}, "its checkpoints have no such head")


class NativeEngine(ExportEngine):
    """MTP heads of targets that bring one with them: Qwen3-Next and Qwen3.5."""

    name = "native_mtp"
    forms: ClassVar = {"mtp": MTP}
    no_form = "a checkpoint holds only heads of the target's own kind"
    cuts_head = False
    holds_frozen = False

    def command(self, draft: DraftCheckpoint, target: str, folder: str) -> str:
        """How the head is put over a copy of the target, and served by vLLM (not run here)."""
        copied = shlex.join(["cp", f"{folder}/{FILE}", f"{folder}/{INDEX}", target])
        config = json.dumps({"method": MTP.name, "num_speculative_tokens": draft.parsed.max_draft})
        return f"{copied} && {shlex.join(['vllm', 'serve', target, '--speculative-config', config])}"

    def config(self, folder: Path) -> dict[str, Any] | None:
        return dict(read_json(folder / CONFIG, DraftError)) if (folder / CONFIG).is_file() else None

    def state(self, folder: Path) -> dict[str, Tensor]:
        return stacked(read_tensors(folder / FILE), lambda rows: torch.stack([torch.cat(row) for row in rows]))

    def sha256(self, folder: Path) -> str:
        return sha256_file(folder / FILE)

    def save(
        self, folder: Path, written: DraftCheckpoint, provenance: Mapping[str, Any], recipe_text: str | None = None,
        shard_bytes: int = SHARD_BYTES, dtype: str | None = None, target: str | None = None,
    ) -> None:  # fmt: skip
        """One file of tensors, and the index of the target's files with it.

        Raises:
            DraftError: the target's files are not here.
        """
        path = target or written.config[EXTRAS].get("target_model_name_or_path")
        index = _stored(path, written.file)
        theirs = [name for name in index if name.startswith(PREFIX)] or index
        state = apart(written.state) if any(SINGLE.fullmatch(name) for name in theirs) else written.state
        index |= dict.fromkeys(state, FILE)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        with temporary_file(folder / FILE) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        write_json(folder / CONFIG, dict(written.config))
        write_json(folder / INDEX, {"metadata": {}, "weight_map": dict(sorted(index.items()))})
        seal_draft(folder, [FILE, CONFIG, INDEX], provenance, recipe_text)


def _stored(path: str | None, file: Path | None) -> dict[str, str]:
    """The target's tensors by name, each with the name of its file."""
    files = weight_files(path) if path else []
    if not files or not all(name.endswith(".safetensors") for name in files):
        problem, remedy = "the index of the target's files is needed", "name a target of safetensors files (--target)"
        raise DraftError(problem, file=file, key="target_model_name_or_path", found=path, remedy=remedy)
    found: dict[str, str] = {}
    for name in files:
        with safe_open(name, "pt") as opened:
            found |= dict.fromkeys(opened.keys(), Path(name).name)
    return found


NATIVE = NativeEngine()
