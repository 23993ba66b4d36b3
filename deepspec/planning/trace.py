"""What one micro-batch of a draft costs, counted by running its objective on tensors without values.

The model's own forward and backward run once; every operator is counted as it is dispatched: floating-point operations
of products (FLOP), bytes read and written by everything else, operators, and the bytes held at the fullest moment. So
any drafter of the registry is counted, by the code that trains it. Integers (positions, limits, token ids) keep their
values beside: what Python reads of them decides the cut into chunks.

Two kinds of device. "cpu" runs what a CPU runs. "accelerator" runs the loss as one tile of the vocabulary, uncompiled,
and counts attention by its formula, as flex_attention does it: no scores are held, pairs that a block mask hides are
not computed.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from deepspec import registry
from deepspec.batch import Batch, Supervision
from deepspec.errors import RecipeError
from deepspec.nn import attention, selector
from deepspec.nn.cpu import tiles
from deepspec.targets import TargetSpec

_LOSS = ("nn/losses.py", "nn/loss_chunk.py", "nn/chains.py", "nn/cpu/tiles.py", "nn/cpu/top.py")
_MOVES_NOTHING = {"detach", "empty", "empty_like", "empty_strided", "new_empty", "lift_fresh", "_unsafe_view", "device"}
_PICKS = {"index", "index_select", "gather", "embedding", "index_put_", "index_add_", "scatter_add_", "index_copy"}
_PLANNED = "planned"  # the name of the counted attention among the backends


@dataclass
class MicroBatchCost:
    """What was counted of one micro-batch."""

    flops: Counter[str] = field(default_factory=Counter)  # of products, by dtype
    moved: float = 0.0  # bytes read and written by everything else
    operators: int = 0
    peak: Counter[str] = field(default_factory=Counter)  # bytes held at the fullest moment, by part
    last: int = 0  # bytes of the batch's hidden states on the device

    @property
    def held(self) -> int:
        """Bytes at the fullest moment, beside weights and inputs."""
        return sum(self.peak.values())


def example(tokens: int, samples: int, supervised: float) -> Supervision:
    """Masks of ``samples`` conversations of ``tokens`` tokens, the last share ``supervised`` of each an answer."""
    mask = torch.zeros(samples, tokens, dtype=torch.bool)
    mask[:, tokens - round(supervised * tokens) :] = True
    return Supervision(mask, torch.full((samples,), tokens), tuple(range(samples)), 0, 0)


def trace(
    algorithm_name: str, config: Any, target: TargetSpec, supervision: Supervision, dtype: torch.dtype, device: str,
    checkpointing: bool = False,
) -> MicroBatchCost:  # fmt: skip
    """Count one micro-batch.

    Args:
        algorithm_name: a row of the registry.
        config: its config.
        target: sizes of the target; no weights.
        supervision: masks of the micro-batch.
        dtype: of weights and activations.
        device: "cpu" or "accelerator".
        checkpointing: the recipe's `train.activation_checkpointing`.
    """
    algorithm = registry.algorithm(algorithm_name)
    plan = algorithm.plan(config, supervision)
    counting = _Counting()
    with counted_attention(counting), chunks_of(device), torch.device("meta"):
        with default_dtype(dtype):
            model = algorithm.empty(config, target)
        head, width = (target.vocab_size, target.hidden_size), len(config.target_layers) * target.hidden_size
        tables = [torch.empty(head, dtype=dtype) for _ in range(2)]
        model.attach(*tables)
        model.activation_checkpointing, model.loss = checkpointing, "tiled"
        model.attention = "two_part" if device == "cpu" else _PLANNED
        shape = supervision.loss_mask.shape
        last = torch.empty(*shape, target.hidden_size, dtype=dtype) if algorithm.needs_last_hidden(config) else None
        batch = Batch(
            supervision, counting.with_values(torch.zeros(shape, dtype=torch.int64, device="cpu")),
            torch.empty(*shape, width, dtype=dtype), last, counting.with_values(plan),
        )  # fmt: skip
        for parameter in model.parameters():  # the engine takes each gradient as it comes
            parameter.register_post_accumulate_grad_hook(lambda one: setattr(one, "grad", None))
        counting.leave_out([*model.parameters(), *model.buffers(), *tables, *_tensors([batch.features, last])])
        with counting:
            model(batch).loss().backward()
    counting.cost.last = batch.features.nbytes + (0 if last is None else last.nbytes)
    return counting.cost


@contextlib.contextmanager
def chunks_of(device: str) -> Iterator[None]:
    """Meanwhile the loss is cut into the chunks of ``device``, not into those of the device without values."""
    sizes = (tiles.CHUNK_BYTES, selector.CHUNK_BYTES)
    for one in sizes:
        one["meta"] = one["cpu"] if device == "cpu" else tiles.ACCELERATOR_BYTES
    try:
        yield
    finally:
        for one in sizes:
            del one["meta"]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Meanwhile new tensors are of ``dtype``: what has no values cannot be cast in place."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


class _Counting(TorchDispatchMode):
    """Counts every operator; those of integers run beside with values."""

    def __init__(self) -> None:
        super().__init__()
        self.cost = MicroBatchCost()
        self._values: dict[int, Tensor] = {}  # by the id of a tensor without values, while that lives
        self._live: Counter[str] = Counter()
        self._storages: set[int] = set()

    def leave_out(self, tensors: list[Tensor]) -> None:
        """Do not count these, nor views of them: a plan has parts of its own for weights and features."""
        self._storages.update(one.untyped_storage()._cdata for one in tensors)

    def with_values(self, given: Any) -> Any:
        """A tensor, or a loss plan, as the device has it; its integers keep their values."""
        if isinstance(given, Tensor):
            moved = given.to("meta")
            self._keep(moved, given)
            return moved
        if is_dataclass(given) and not isinstance(given, type):
            return replace(given, **{one.name: self.with_values(getattr(given, one.name)) for one in fields(given)})
        return given

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, given = func.overloadpacket.__name__, _tensors((args, kwargs))
        if name in ("_local_scalar_dense", "item"):
            value = self._value(given[0])
            if value is None:
                raise RecipeError("the objective reads a value from the device: its cost cannot be counted")
            return value.item()
        beside = self._beside(func, given, args, kwargs)
        if not all(one.is_meta for one in given):
            args, kwargs = tree_map_only(Tensor, lambda one: one.to("meta"), (args, kwargs))
        found = func(*args, **kwargs)
        for one, value in zip(_tensors(found), _tensors(beside), strict=False):
            self._keep(one, value)
        self._count(func, name, args, kwargs, found)
        return found

    def _value(self, tensor: Tensor) -> Tensor | None:
        return self._values.get(id(tensor)) if tensor.is_meta else tensor

    def _keep(self, tensor: Tensor, value: Tensor) -> None:
        if not value.is_floating_point():
            self._values[id(tensor)] = value
            weakref.finalize(tensor, self._values.pop, id(tensor), None)

    def visible(self, limit: Tensor, start: Tensor | None, queries: int) -> int:
        """Pairs of a query and a context position that it sees: limits [B, N], starts [B, N, K] or none."""
        limit_value, start_value = self._value(limit), None if start is None else self._value(start)
        if limit_value is None or (start is not None and start_value is None):
            raise RecipeError("what attention sees depends on hidden states: its cost cannot be counted")
        if start_value is None:
            return int(limit_value.sum()) * queries
        return int((limit_value[..., None] - start_value.clamp_min(0)).clamp_min(0).sum())

    def _beside(self, func: Any, given: list[Tensor], args: Any, kwargs: dict[str, Any]) -> Any:
        """What the operator gives with values, where all that it reads are integers that have them; else None."""
        if any(one.is_floating_point() for one in given) or (not given and func.overloadpacket.__name__ != "arange"):
            return None
        known = [self._value(one) for one in given]
        if any(value is None for value in known):
            return None
        pairs = {id(one): value for one, value in zip(given, known, strict=True)}
        args, kwargs = tree_map_only(Tensor, lambda one: pairs[id(one)], (args, kwargs))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        with contextlib.suppress(RuntimeError, NotImplementedError):
            return func(*args, **kwargs)
        return None

    def _count(self, func: Any, name: str, args: Any, kwargs: Any, found: Any) -> None:
        given, made = _tensors((args, kwargs)), _tensors(found)
        for one in made:
            self._hold(one)
        if name in _MOVES_NOTHING or getattr(func, "is_view", False) or not made:
            return
        cost = self.cost
        cost.operators += 1
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            cost.flops[_dtype(given[0])] += formula(*args, **kwargs, out_val=found)
        elif name == "_linear_pointwise":
            cost.flops[_dtype(given[0])] += 2 * given[0].numel() * len(given[1])
        elif name in _PICKS:
            cost.moved += 2 * min(sum(one.nbytes for one in made), *(one.nbytes for one in given[:1] + given[2:3]))
        else:
            cost.moved += sum(one.nbytes for one in given) + sum(one.nbytes for one in made)

    def _hold(self, tensor: Tensor) -> None:
        """Count a tensor's storage while it lives."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        part, size = _part(), storage.nbytes()
        self._storages.add(key)
        self._live[part] += size
        weakref.finalize(storage, self._release, key, part, size)
        if sum(self._live.values()) > self.cost.held:
            self.cost.peak = Counter(self._live)

    def _release(self, key: int, part: str, size: int) -> None:
        self._storages.discard(key)
        self._live[part] -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _part() -> str:
    """Whose memory a new tensor is: the loss's, or an activation."""
    frame: Any = sys._getframe(2)
    for _ in range(12):
        if frame is None:
            break
        if frame.f_code.co_filename.endswith(_LOSS):
            return "loss buffers"
        frame = frame.f_back
    return "activations"


@contextlib.contextmanager
def counted_attention(counting: _Counting) -> Iterator[None]:
    """Meanwhile :func:`deepspec.nn.attention.attend` has a backend that only counts."""

    def attend(
        query: Tensor, ck: Tensor, cv: Tensor, ok: Tensor, ov: Tensor, limit: Tensor, scale: float,
        causal: bool, start: Tensor | None,
    ) -> Tensor:  # fmt: skip
        K, M, H, E = query.shape[2], ok.shape[2], *query.shape[3:]
        seen = counting.visible(limit, start, K)
        pairs = seen + query.shape[0] * query.shape[1] * K * (M + 1) // (2 if causal else 1)
        found: Tensor = _Attention.apply(query, ck, cv, ok, ov, counting.cost, 4 * H * E * pairs)
        return found

    backends: dict[str, Callable[..., Tensor]] = attention.BACKENDS
    backends[_PLANNED] = attend
    try:
        yield
    finally:
        del backends[_PLANNED]


class _Attention(torch.autograd.Function):
    """Attention that holds what flex_attention holds: inputs, output, the rows' log of sums."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, ck: Tensor, cv: Tensor, ok: Tensor, ov: Tensor, cost: MicroBatchCost, flops: int
    ) -> Any:
        joined = [torch.cat((context, own.flatten(1, 2)), dim=1) for context, own in ((ck, ok), (cv, ov))]
        out, sums = torch.empty_like(query), torch.empty(query.shape[:-1], device=query.device)
        ctx.save_for_backward(query, ck, cv, ok, ov, *joined, out, sums)
        ctx.cost, ctx.flops = cost, flops
        cost.flops[_dtype(query)] += flops
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.cost.flops[_dtype(grad)] += 2.5 * ctx.flops  # scores again, and four gradients
        return *(torch.empty_like(one) for one in ctx.saved_tensors[:5]), None, None
