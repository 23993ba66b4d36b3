"""What every engine's folder held on 2026-11-28, before the forms and engines were cut apart: exports stay equal to it.

``snapshot.json`` holds, of every kind of draft in every format: the fields of config.json that differ from ours, those
that are gone, and a digest of the tensors. ``PYTHONPATH=.:tests/helpers python tests/export/test_snapshot.py NAME...``
adds the cases that are named (``"vllm dspark qwen3"``).
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from export_tools import made
from safetensors.torch import load_file, save_file

from deepspec.drafts import read_weights
from deepspec.export.convert import ExportOptions, export_draft

LATER = ("fc_norm", "norm_before_fc", "norm_before_residual", "norm_output")  # fields that ours has had since
FILE = Path(__file__).with_name("snapshot.json")
SNAPSHOT: dict[str, Any] = json.loads(FILE.read_text()) if FILE.is_file() else {}


def fixed_weights(path: Path) -> None:
    """Give every weight values that no random generator and no processor decides."""
    state = load_file(path)
    for number, (name, tensor) in enumerate(sorted(state.items())):
        if tensor.is_floating_point():
            values = (torch.arange(tensor.numel()) * 7 + number * 13) % 251 - 125
            state[name] = (values / 64).view(tensor.shape).to(tensor.dtype)
    save_file(state, path)
    (path.parent / "provenance.json").unlink()


def tensors_digest(folder: Path) -> str:
    """A short digest of all tensors of a folder, by name, dtype, shape and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(read_weights(folder).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def changes(ours: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """How one config differs from another; the transformer's own config inside one is compared in the same way."""
    fields = {
        key: changes(ours, value) if key == "transformer_layer_config" else value
        for key, value in written.items()
        if key not in ours or ours[key] != value
    }
    return {"fields": fields, "gone": sorted(set(ours) - set(written))}


def exported(case: str, folder: Path) -> dict[str, Any]:
    """The snapshot of ``"<format> <kind> <family>"``."""
    name, kind, family = case.split()
    _, _, ours = made(folder, kind, family)
    fixed_weights(ours / "model.safetensors")
    export_draft(ours, folder / "out", ExportOptions(name))
    config, written = (json.loads((one / "config.json").read_text()) for one in (ours, folder / "out"))
    if name != "deepspec":  # which holds what ours does
        config = {key: value for key, value in config.items() if key not in LATER}
    return {"tensors": tensors_digest(folder / "out"), **changes(config, written)}


@pytest.mark.parametrize("case", SNAPSHOT)
def test_an_export_holds_what_it_has_always_held(case: str, tmp_path: Path) -> None:
    assert exported(case, tmp_path) == SNAPSHOT[case]


if __name__ == "__main__":
    for case in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            SNAPSHOT[case] = exported(case, Path(folder))
    lines = [f"{json.dumps(case)}: {json.dumps(value)}" for case, value in sorted(SNAPSHOT.items())]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
