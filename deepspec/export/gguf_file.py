"""A GGUF file: keys and tensors written and read by the ``gguf`` package, and a tokenizer's keys.

Matrices are stored as asked (f32, bf16, q8_0), vectors always as f32: the engine's kernels multiply nothing else by
them. A matrix whose rows do not divide into the blocks of q8_0 stays bf16.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepspec.errors import DeepSpecError, DraftError
from deepspec.files import temporary_file

TYPES = {"fp32": "F32", "bf16": "BF16", "q8_0": "Q8_0"}  # our name of a storage type -> the package's
BLOCK = 32  # values of a row that q8_0 scales together
REMEDY = "pip install 'deepspec[llamacpp]'"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of a token
# the name by which the engine knows how a tokenizer cuts its text before the merges, by the type of the target
CUTS = {"qwen2": "qwen2", "qwen3": "qwen2", "qwen3_moe": "qwen2", "llama": "llama-bpe"}


def package() -> Any:
    """The ``gguf`` package.

    Raises:
        DeepSpecError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise DeepSpecError("the gguf package is not installed", remedy=REMEDY) from None
    return gguf


def write_file(path: Path, keys: Mapping[str, Any], state: Mapping[str, Tensor], dtype: str) -> None:
    """Write a file completely or not at all.

    Args:
        path: of the file.
        keys: by full name: str, bool, int, float, or a list of one of them; ``general.architecture`` among them.
        state: tensors by the engine's names, [out, in].
        dtype: a key of ``TYPES``.
    """
    gguf = package()
    with temporary_file(path) as temporary:
        writer = gguf.GGUFWriter(str(temporary), keys["general.architecture"])
        for name, value in keys.items():
            if name != "general.architecture":  # the writer has put it first
                _add(gguf, writer, name, value)
        for name, tensor in state.items():
            kind = getattr(gguf.GGMLQuantizationType, _type_of(tensor, dtype))
            if not tensor.dtype.is_floating_point:
                writer.add_tensor(name, tensor.numpy())
                continue
            data = gguf.quants.quantize(tensor.float().contiguous().numpy(), kind)
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _add(gguf: Any, writer: Any, name: str, value: Any) -> None:
    if isinstance(value, list | tuple):
        writer.add_array(name, list(value))
    elif isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    else:
        writer.add_string(name, value)


def _type_of(tensor: Tensor, dtype: str) -> str:
    if tensor.dim() != 2:  # vectors, and the kernels of a convolution, which are added
        return TYPES["fp32"]
    if dtype == "q8_0" and tensor.shape[-1] % BLOCK:
        return TYPES["bf16"]
    return TYPES[dtype]


def read_keys(path: Path) -> dict[str, Any]:
    """The keys of a file, by full name.

    Raises:
        DraftError: not a file of the format, or one that is cut.
    """
    fields = _read(path).fields
    return {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file: bf16 as it was stored, all else that floats as f32.

    Raises:
        DraftError: not a file of the format, or one that is cut.
    """
    return {tensor.name: _tensor(package(), tensor) for tensor in _read(path).tensors}


def _read(path: Path) -> Any:
    try:
        return package().GGUFReader(str(path))
    except FileNotFoundError:
        raise DraftError("no such file", file=path) from None
    except (ValueError, IndexError, KeyError, OverflowError) as problem:
        raise DraftError(f"not a GGUF file ({problem})", file=path, remedy="fetch it again") from None


def _tensor(gguf: Any, stored: Any) -> Tensor:
    if stored.tensor_type == gguf.GGMLQuantizationType.I64:
        return torch.from_numpy(np.array(stored.data))
    values = torch.from_numpy(np.array(gguf.quants.dequantize(stored.data, stored.tensor_type)))
    return values.bfloat16() if stored.tensor_type == gguf.GGMLQuantizationType.BF16 else values


def tokenizer_keys(folder: str, model_type: str, vocabulary: int) -> dict[str, Any]:
    """A tokenizer's keys: byte-level BPE from its ``tokenizer.json``; every id of the vocabulary has a token.

    Args:
        folder: of the target.
        model_type: of the target; it decides how the engine cuts text before the merges.
        vocabulary: rows of the target's embedding, which may be more than the tokenizer has tokens.

    Raises:
        DraftError: another kind of tokenizer; its keys are those of the target's own GGUF.
    """
    from deepspec.targets import load_tokenizer

    tokenizer = load_tokenizer(folder)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    remedy = "name the target's own GGUF (--tokenizer-from): its tokenizer is taken"
    kind = backend["model"].get("type")
    if kind != "BPE" or "ByteLevel" not in json.dumps(backend.get("decoder")):
        raise DraftError("not a byte-level BPE tokenizer", file=folder, found=kind, remedy=remedy)
    tokens = [f"[PAD{number}]" for number in range(vocabulary)]
    types = [UNUSED] * vocabulary
    for text, number in backend["model"]["vocab"].items():
        tokens[number], types[number] = text, NORMAL
    for added in backend.get("added_tokens", ()):
        tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    merges = [one if isinstance(one, str) else " ".join(one) for one in backend["model"]["merges"]]
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": CUTS.get(model_type, "default"),
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types,
    }  # fmt: skip
    if merges:
        keys["tokenizer.ggml.merges"] = merges
    for name, number in (("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id)):
        if number is not None:
            keys[f"tokenizer.ggml.{name}_token_id"] = int(number)
    return keys | {"tokenizer.ggml.add_bos_token": False}


def tokenizer_keys_of(path: Path) -> dict[str, Any]:
    """The tokenizer's keys of a GGUF.

    Raises:
        DraftError: not a GGUF, or one without a tokenizer.
    """
    found = {name: value for name, value in read_keys(path).items() if name.startswith("tokenizer.")}
    if not found:
        raise DraftError("has no tokenizer", file=path, wanted="the target's GGUF")
    return found
