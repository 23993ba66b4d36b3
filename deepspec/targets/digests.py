"""Digests of a target's weights, read from its files.

:func:`weights_digest` sees every byte and is remembered per file (``$XDG_CACHE_HOME/deepspec/digests.json``).
:func:`sampled_digest` is what records of before held: 1,024 values of each tensor, which miss a fine-tuned embedding.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepspec.errors import TargetError
from deepspec.files import sha256_file, write_json
from deepspec.progress import Progress, waiting
from deepspec.targets.stored import NAMES, open_stored, weight_files

COMPLETE = "bytes:"  # in front of a digest of every byte; older records hold a bare sampled one
SMALL = 4 << 20  # bytes: a smaller file is read again sooner than looked up
SETTLED = 1_000_000_000  # ns: a file that changed less long ago could change again under the same time stamp


def weights_digest(path: str | Path, revision: str | None = None) -> str:
    """A digest of every byte of every stored tensor, with their names, shapes and types.

    How tensors are spread over files does not matter. Nothing is fetched.

    Raises:
        TargetError: no weights there, or a broken file.
    """
    files = weight_files(path, revision)
    if not files:
        raise TargetError("no weights to compare", file=path, wanted=f"one of {', '.join(NAMES)}, complete")
    return COMPLETE + _hex(_remembered([Path(os.path.realpath(file)) for file in files]))


def digest_like(known: str, path: str | Path, dtype: torch.dtype, revision: str | None = None) -> str:
    """The digest of a target in the form of ``known``: complete, or sampled as older records have it."""
    return weights_digest(path, revision) if known.startswith(COMPLETE) else sampled_digest(path, dtype, revision)


# -- every byte --------------------------------------------------------------------------------------------------------


def _hex(number: int) -> str:
    return f"{number % 2**256:064x}"  # tensors' digests are added up: their order and their files do not matter


def _tensor_number(job: Progress, name: str, tensor: Tensor) -> int:
    digest = hashlib.sha256(f"{name}\n{tensor.dtype}\n{list(tensor.shape)}\n".encode())
    digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    job.add(0, tensor.nbytes)
    return int(digest.hexdigest(), 16)


def _file_number(file: Path, job: Progress) -> int:
    """The sum of a file's tensors; of a pickle that cannot be mapped, the file's own digest."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            if file.suffix == ".bin":
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                return sum(pool.map(lambda item: _tensor_number(job, *item), state.items()))
            with safe_open(file, "pt") as opened:
                names = list(opened.keys())
            return sum(pool.map(partial(_stored_number, job, file), names))
        except SafetensorError as problem:
            raise TargetError(f"not a safetensors file ({problem})", file=file, remedy="fetch it again") from None
        except (RuntimeError, AttributeError, TypeError):
            return int(sha256_file(file), 16)


def _stored_number(job: Progress, file: Path, name: str) -> int:
    with safe_open(file, "pt") as opened:  # mapped again for each tensor, so that none stays in memory
        return _tensor_number(job, name, opened.get_tensor(name))


# -- the memory --------------------------------------------------------------------------------------------------------


def memory_file() -> Path:
    """Where digests of large files are remembered."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "deepspec" / "digests.json"


def _remembered(files: Iterable[Path]) -> int:
    """The sum over ``files``; unchanged files are not read again."""
    known, new, total = _recall(), dict[str, Any](), 0
    for file in files:
        state = _state(file)
        entry = known.get(str(file))
        if isinstance(entry, dict) and entry.get("state") == state and isinstance(entry.get("digest"), str):
            total += int(entry["digest"], 16)
            continue
        with waiting(f"reading {file} for its digest", file) as job:
            number = _file_number(file, job)
        total += number
        settled = time.time_ns() - max(state[1:3]) > SETTLED
        if state[0] >= SMALL and settled and _state(file) == state:
            new[str(file)] = {"state": state, "digest": _hex(number)}
    if new:
        _remember(new)
    return total


def _state(file: Path) -> list[int]:
    """Size, times of the last change of content and of anything, inode: a changed file differs in one."""
    about = file.stat()
    return [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]


def _recall() -> dict[str, Any]:
    try:
        known = json.loads(memory_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(new: dict[str, Any]) -> None:
    """Add to what is remembered, and forget files that are gone; a folder that cannot be written is no error."""
    known = {name: entry for name, entry in (_recall() | new).items() if os.path.exists(name)}
    try:
        write_json(memory_file(), known)
    except OSError:
        return


# -- the digest of older records ---------------------------------------------------------------------------------------


def sampled_digest(path: str | Path, dtype: torch.dtype, revision: str | None = None) -> str:
    """The digest that records of before this version hold: of 1,024 values of each tensor as loaded in ``dtype``."""
    from deepspec.targets.load import load_target

    stored = open_stored(path, dtype, revision)
    tensors: Iterable[tuple[str, Tensor]]
    if stored is None:
        tensors = sorted(load_target(path, dtype, "cpu", revision).model.state_dict().items())
    else:
        ties = stored.model.all_tied_weights_keys
        tied_to = {**ties, **{other: name for name, other in ties.items()}}
        names = sorted(stored.model.state_dict())
        tensors = ((name, stored.read(name if stored.holds(name) else tied_to[name])) for name in names)
    digest = hashlib.sha256()
    for name, tensor in tensors:
        flat = tensor.detach().reshape(-1)
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(flat[:: max(1, flat.numel() // 1024)].float().cpu().numpy().tobytes())
    return digest.hexdigest()
