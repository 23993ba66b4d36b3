"""llama.cpp (run as xllamacpp 2026.10 on CPU): a draft as one GGUF file; ``docs/serving.md`` has the table."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from deepspec.drafts import SHARD_BYTES, seal_draft
from deepspec.errors import DraftError
from deepspec.export.engines.base import ExportEngine
from deepspec.export.engines.vllm import FROM_ANCHOR
from deepspec.export.forms.gguf import BlockGGUF, DFlash2GGUF, Eagle3GGUF
from deepspec.export.gguf_file import read_keys, read_tensors, tokenizer_keys, tokenizer_keys_of, write_file
from deepspec.export.parts import DraftCheckpoint
from deepspec.files import sha256_file

FILE = "draft.gguf"
HEADS = "its block drafters norm every head"
DSPARK = BlockGGUF({"qwen3": "dflash"}, HEADS, name="draft-dspark", zero_head=True)
DFLASH = BlockGGUF({"qwen3": "dflash"}, HEADS, name="draft-dflash")
DFLASH2 = DFlash2GGUF({"qwen3": "dflash"}, HEADS, name="draft-dflash")
EAGLE3 = Eagle3GGUF({"llama": "eagle3"}, "its Eagle3 has Llama layers", name="draft-eagle3")


class GGUFEngine(ExportEngine):
    """Block drafters with norms on the heads, Eagle3 of one Llama layer over three of the target's."""

    name = "gguf"
    forms: ClassVar = {
        "eagle3": EAGLE3, "dflash": DSPARK, "dflash-k-1": DFLASH, "dspark": DSPARK, "dspark-k-1": DSPARK,
        "dflash2-k-1": DFLASH2,
    }  # fmt: skip
    refused: ClassVar = {"dflash2": FROM_ANCHOR}
    holds_frozen = False
    absolute_ids = True
    head = "output.weight"
    types = ("fp32", "bf16", "q8_0")
    checked = "llama.cpp on CPU (xllamacpp 2026.10): the test suite and `make serve-check`"

    def command(self, draft: DraftCheckpoint, target: str, folder: str) -> str:
        """``--spec-draft-n-max`` is stated because its default is 3."""
        flags = ["--spec-type", self.forms[draft.kind].name, "--spec-draft-n-max", str(draft.parsed.max_draft)]
        return shlex.join(["llama-server", "-m", f"{target}.gguf", "-md", f"{folder}/{FILE}", *flags])

    def speculative(self, draft: DraftCheckpoint, folder: str) -> dict[str, object]:
        """What its server is told of a draft of our layout that was exported to ``folder``."""
        return {"draft": f"{folder}/{FILE}", "type": self.forms[draft.kind].name, "n_max": draft.parsed.max_draft}

    def config(self, folder: Path) -> dict[str, Any] | None:
        return read_keys(folder / FILE) if (folder / FILE).is_file() else None

    def state(self, folder: Path) -> dict[str, Tensor]:
        return read_tensors(folder / FILE)

    def sha256(self, folder: Path) -> str:
        return sha256_file(folder / FILE)

    def save(
        self, folder: Path, written: DraftCheckpoint, provenance: Mapping[str, Any], recipe_text: str | None = None,
        shard_bytes: int = SHARD_BYTES, dtype: str | None = None, target: str | None = None,
    ) -> None:  # fmt: skip
        """One file, with the target's tokenizer: from its own GGUF where ``target`` names one.

        Raises:
            DraftError: the tokenizer cannot be had.
        """
        ours = json.loads(written.config["deepspec.config"])
        folder.mkdir(parents=True, exist_ok=True)
        keys = written.config | {"deepspec.provenance": json.dumps(dict(provenance), sort_keys=True)}
        write_file(folder / FILE, keys | _tokenizer(ours, target), written.state, dtype or _stored(written))
        seal_draft(folder, [FILE], provenance, recipe_text)


def _stored(written: DraftCheckpoint) -> str:
    """The type of the draft's own matrices."""
    return "bf16" if written.state["fc.weight"].element_size() == 2 else "fp32"


def _tokenizer(config: Mapping[str, Any], target: str | None) -> dict[str, Any]:
    path = target or config.get("target_model_name_or_path")
    if path is None:
        raise DraftError("does not say which target it was trained for", remedy="name it (--target)")
    found = tokenizer_keys_of(Path(path)) if str(path).endswith(".gguf") else tokenizer_keys(
        path, config.get("target_model_type") or config["model_type"], config["vocab_size"])  # fmt: skip
    return {name: value for name, value in found.items() if name != "tokenizer.ggml.mask_token_id"}


GGUF = GGUFEngine()
