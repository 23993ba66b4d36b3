"""How a target is decoded: packed, padded, by replay or over the complete text; chosen by trying, with the reason.

Packed decoding is the fastest and asks the most of a model: attention of queries, keys and values under a mask that is
causal or has a window. Whatever else a model hands to its attention, or computes across tokens, shows when the path is
tried: the trial runs two rows of a few random tokens, rejects some of them, goes on, and compares with the model's own
pass over the same tokens. The first path that agrees is taken. Where the layers are those of a draft family
(:class:`~deepspec.decoding.fused.FusedDecoder`) there is nothing to try.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from deepspec.decoding.fused import FusedDecoder
from deepspec.decoding.kv import PackedTarget
from deepspec.decoding.padded import PaddedTarget, ReplayTarget
from deepspec.decoding.records import DecodeSettings
from deepspec.errors import DeepSpecError, EvaluationError, TargetError
from deepspec.targets.load import Target

RowTarget = PackedTarget | PaddedTarget | ReplayTarget  # a target that runs planned batches over rows of its own
Opener = Callable[[Target, Sequence[int], int, int], RowTarget]
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}  # kinds of layers without a state
PACKED_KINDS = {"full_attention", "sliding_attention"}  # those whose masks packed decoding makes
WINDOWS = ("sliding_window", "attention_chunk_size")  # keys of a config that narrow what a token sees
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of the states' size; of coarser types 0.1
TRIAL = ((7, 3), (3, 2), (1, 4))  # tokens of the two rows in each forward
KEPT = ((7, 3), (2, 1), (1, 4))  # of them, those that are committed


@dataclass(frozen=True)
class DecodingPath:
    """A way of decoding and why it was taken."""

    name: str
    why: str
    open: Opener

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"


def _recompute(target: Target, layers: Sequence[int], num_rows: int, capacity: int) -> ReplayTarget:
    return ReplayTarget(target, layers, num_rows, capacity, keeps_cache=False)


PATHS: dict[str, Opener] = {
    "packed": PackedTarget,
    "padded": PaddedTarget,
    "replay": ReplayTarget,
    "complete text": _recompute,
}
_CHOSEN: WeakKeyDictionary[Target, DecodingPath] = WeakKeyDictionary()


def decoding_path(target: Target) -> DecodingPath:
    """The path of ``target``, tried once.

    Raises:
        TargetError: none agrees with the model's own pass: a token's state depends on later ones, or on chance.
    """
    if target not in _CHOSEN:
        _CHOSEN[target] = _choose(target)
    return _CHOSEN[target]


def take_path(target: Target, path: DecodingPath) -> None:
    """Decode ``target`` by the path of an equal model; nothing is tried."""
    _CHOSEN[target] = path


def open_rows(target: Target, layers: Sequence[int], num_rows: int, capacity: int) -> RowTarget:
    """``target`` for ``num_rows`` rows on its path; the arguments are those of ``PackedTarget``."""
    return decoding_path(target).open(target, layers, num_rows, capacity)


def check_tree(target: Target, settings: DecodeSettings) -> None:
    """Check that a draft tree can be verified on the target's path.

    Raises:
        EvaluationError: the tokens of a row can only follow each other there.
    """
    if settings.tree and (path := decoding_path(target)).name != "packed":
        raise EvaluationError(
            "a draft tree is verified only by packed decoding", key="tree", found=f"{target.spec.path}: {path}",
            remedy="draft a chain: leave the tree out",
        )  # fmt: skip


def _choose(target: Target) -> DecodingPath:
    if FusedDecoder.of(target) is not None:
        return DecodingPath("packed", "its layers are a family's own", PackedTarget)
    reasons: list[str] = []
    for name, opener in PATHS.items():
        why = _forbidden(name, target) or _disagreement(name, opener, target)
        if why is None:
            return DecodingPath(name, "; ".join(reasons) or "its attention is the plain one", opener)
        if reasons and reasons[-1].endswith(why):
            reasons[-1] = reasons[-1].replace(": ", f", not {name}: ", 1)
        else:
            reasons.append(f"not {name}: {why}")
    raise TargetError(
        "it cannot be decoded here", file=target.spec.path, found="; ".join(reasons),
        wanted="a causal model, whose states depend on earlier tokens alone",
        remedy="serve it: deepspec regenerate --server, deepspec evaluate --server",
    )  # fmt: skip


def _forbidden(name: str, target: Target) -> str | None:
    """Why a path is not even tried: what a short trial would not show."""
    config: Any = target.decoder.config  # the object: some derive the kinds of layers from other keys
    kinds = set(getattr(config, "layer_types", None) or ())
    if name in ("packed", "padded") and (kept := sorted(kinds - ATTENTION)):
        return f"layers that are no attention ({', '.join(kept)})"
    if name == "packed" and (other := sorted(kinds - PACKED_KINDS)):
        return f"masks of its own ({', '.join(other)})"
    return None


def _disagreement(name: str, opener: Opener, target: Target) -> str | None:
    """Why the path's states are not the model's own; None: they are."""
    try:
        with torch.inference_mode():
            rows = opener(target, (), 2, 8)
            return _try(name, rows, target)
    except DeepSpecError as error:
        return f"{error.problem} ({error.key})" if error.key else str(error.problem)
    except Exception as problem:  # a model's code fails in any way on what it was not written for
        first_line = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        return f"{type(problem).__name__}: {first_line[:80]}"


def _try(name: str, rows: RowTarget, target: Target) -> str | None:
    generator = torch.Generator().manual_seed(0)
    texts: list[list[int]] = [[], []]
    for counts, kept in zip(TRIAL, KEPT, strict=True):
        new = [torch.randint(target.spec.vocab_size, (count,), generator=generator).tolist() for count in counts]
        batch = rows.cache.plan(np.array(counts))
        found = rows.forward(batch, torch.tensor([*new[0], *new[1]], device=target.device)).last_hidden
        for row, part in enumerate(found.split(list(counts))):
            own = torch.stack([_last_state(target, texts[row] + new[row][: n + 1]) for n in range(counts[row])])
            if (error := _difference(part, own)) > TOLERANCE.get(target.dtype, 0.1):
                return f"its states differ from the model's own by {error:.2g} of their size"
            texts[row] += new[row][: kept[row]]
        rows.cache.commit(np.array(kept))
        if name == "packed" and (why := _unasked(batch.attended, target)):
            return why
    return None


def _last_state(target: Target, ids: list[int]) -> Tensor:
    """The state [D] after the last of ``ids`` by the model's own pass; what would follow it is not there."""
    return target.forward(torch.tensor([ids], device=target.device), ()).last_hidden[0, -1]


def _unasked(windows: Sequence[int | None], target: Target) -> str | None:
    """Why a packed forward that agreed on short rows may not on long ones: a window that it was not told of."""
    if not windows:
        return "its attention is code of its own"
    config: Any = target.spec.config
    narrowed = [key for key in WINDOWS if config.get(key)]
    if narrowed and not config.get("layer_types") and not any(windows):
        return f"{narrowed[0]} {config[narrowed[0]]} of its config reaches no attention"
    return None


def _difference(found: Tensor, own: Tensor) -> float:
    error = float((found.float() - own.float()).norm() / own.float().norm().clamp_min(1e-20))
    return error if error == error else float("inf")
