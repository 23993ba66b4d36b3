"""Rounds of static shapes that are captured once and replayed: CUDA graphs, or whatever stands in for them.

The device's work of a round is two pieces: the draft's proposal, and the target's verification with the acceptance and
the draft's extension. A piece runs over a *bucket*: rows, tokens a row and context length rounded up, so that few
shapes occur. The first round of a bucket runs the piece as it is; it is watched for what a graph cannot hold. The
second captures it, which executes nothing, and replays what was captured, as every later round does.

A graph repeats the same kernels on the same memory. Three rules make that right:

- Keys, values and rotary tables lie where they lay (``held``): when one has moved, every graph is made anew.
- What a piece reads of the host (lengths, counts) and what it leaves (proposal, outcome, the draft's state) lies
  outside the graphs' own memory, which all of them share.
- Python runs only when a piece is captured: a bound that the host keeps is set before the piece, never inside it.

A piece that reads a value on the host stays eager, and says so once.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepspec.algorithms.base import Drafter, Proposal, Sampler
from deepspec.decoding.kv import PackedBatch, PackedTarget

log = logging.getLogger(__name__)
CONTEXT_STEP = 256  # contexts are rounded up to a multiple of this, longer ones to an eighth of the next power of two
DRAFT, VERIFY = "the draft's proposal", "verification"  # the pieces
PARTS = ("tokens", "probs", "confidence_logits")  # of a proposal
Work = Callable[[], None]
RunTarget = Callable[[PackedBatch, Proposal | None, int], None]


class Graphs(Protocol):
    """How a piece is captured."""

    def run(self, work: Work) -> None:
        """Run ``work`` as it is, as a warm-up of its capture."""
        ...

    def capture(self, work: Work) -> Work:
        """What repeats the device's work of ``work`` on the same memory; nothing is executed yet.

        Raises:
            RuntimeError: it cannot be captured.
        """
        ...


class CudaGraphs:
    """CUDA graphs that share one pool of memory; warm-ups and captures have a stream of their own."""

    def __init__(self) -> None:
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def run(self, work: Work) -> None:
        """See :meth:`Graphs.run`."""
        now = torch.cuda.current_stream()
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):
            work()
        now.wait_stream(self._stream)

    def capture(self, work: Work) -> Work:
        """See :meth:`Graphs.capture`."""
        graph, now = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                work()
        finally:
            torch.cuda.set_stream(now)  # a capture that fails leaves its own stream behind
        replay: Work = graph.replay
        return replay


class HostReads(TorchDispatchMode):
    """Notes the first operation inside that a graph cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.why = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation."""
        kwargs = kwargs or {}
        if is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        self.why = self.why or _not_capturable(func, (args, kwargs, out))
        return out


def is_composite(func: Any) -> bool:
    """Whether an operation is made of others; inference mode hands it over whole, and a read would be hidden in it."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return func.namespace == "aten" and bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key))


def _not_capturable(func: Any, values: Any) -> str:
    """Why a graph cannot hold an operation with these arguments and results; "": it can."""
    tensors = [one for one in tree_leaves(values) if isinstance(one, Tensor)]
    shape_depends = torch.Tag.dynamic_output_shape in func.tags
    if func is torch.ops.aten.index.Tensor:
        shape_depends = any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in values[0][1])
    if shape_depends or torch.Tag.data_dependent_output in func.tags:
        return f"{func} reads a value on the host"
    if len({one.device.type for one in tensors if one.dim()}) > 1:
        return f"{func} copies between two devices"
    return ""


class Captured:
    """The pieces of the rounds of one decoder.

    Args:
        graphs: how they are captured.
        context_step: see ``CONTEXT_STEP``.
    """

    def __init__(self, graphs: Graphs, context_step: int = CONTEXT_STEP) -> None:
        self._graphs, self._step = graphs, context_step
        self.refused: dict[str, str] = {}  # piece -> why it stays eager
        self.replayed: Counter[tuple[str, tuple[int, ...]]] = Counter()  # rounds that a graph ran, by piece and bucket
        self._held: tuple[Tensor, ...] = ()
        self._replays: dict[tuple[str, tuple[int, ...]], Work | None] = {}  # None: warmed up
        self._proposals: dict[int, Proposal] = {}  # by slots, of B rows

    def open(self, target: Any, drafter: Drafter | None, num_rows: int) -> None:
        """Take the target's and the draft's state, of B = ``num_rows`` rows each; only a packed target is captured."""
        self._target, self._drafter, self._num_rows = target, drafter, num_rows
        self._given = torch.zeros(2, num_rows, dtype=torch.long, device=target.cache.device)  # lengths, counts
        if not isinstance(target, PackedTarget):
            self._refuse(VERIFY, f"{type(target).__name__} is not packed")

    def count(self, piece: str) -> int:
        """Rounds of a piece that a graph ran."""
        return sum(count for (name, _), count in self.replayed.items() if name == piece)

    @property
    def verifies(self) -> bool:
        """Whether verification goes through :meth:`verify`."""
        return VERIFY not in self.refused

    def propose(self, last: Tensor, live: int, sample: Sampler, slots: int) -> Proposal:
        """What the draft proposes for the first ``live`` rows after ``last`` [B]: ``slots`` tokens each."""
        drafter = self._drafter
        if drafter is None:
            raise RuntimeError("there is no draft")
        rows, context, held = self._bucket(live)
        self._run(DRAFT, (rows, context, slots), held, lambda: self._keep(drafter.propose(last[:rows], sample, slots)))
        return self._kept(slots, live)

    def verify(self, counts: np.ndarray, proposal: Proposal | None, run_target: RunTarget) -> None:
        """Verify ``counts`` [R] tokens of the first R rows; every row runs as many as the longest.

        Args:
            counts: with the newest token; 0: the row is finished.
            proposal: what :meth:`propose` gave last.
            run_target: (a planned batch, the proposal of its rows, bound of their lengths with it) -> all of the
                device's work.
        """
        rows, context, held = self._bucket(len(counts))
        cache, slots = self._target.cache, 0 if proposal is None else proposal.tokens.shape[1]
        queries = min(_power(int(counts.max())), slots + 1)
        given = self._given[:, :rows]
        numbers = np.stack((cache.lengths[:rows], np.pad(counts, (0, rows - len(counts)))))
        given.copy_(torch.from_numpy(numbers), non_blocking=True)

        def work() -> None:
            batch = cache.plan_static(given[0], given[1], queries, context)
            run_target(batch, self._kept(slots, rows) if slots else None, context)

        self._run(VERIFY, (rows, context, slots, queries), held, work)

    def _bucket(self, live: int) -> tuple[int, int, tuple[Tensor, ...]]:
        """Rows and context length of a round, rounded up, and the memory that holds contexts of that length.

        A draft may be K + 1 positions ahead of the target's committed ones: the forward in flight, or what a row that
        finished at a stop token had accepted after it. Another forward comes behind them.
        """
        rows, slots = min(_power(live), self._num_rows), 0 if self._drafter is None else self._drafter.max_draft
        length = int(self._target.cache.lengths[:rows].max()) + 2 * (slots + 1)
        step = max(self._step, _power(length) // 8)
        context = -(-length // step) * step
        held = self._target.hold(context) if self.verifies else ()
        return rows, context, held if self._drafter is None else (*held, *self._drafter.hold(context))

    def _keep(self, proposal: Proposal) -> None:
        """Copy a proposal of R rows to where verification reads it."""
        rows, slots = proposal.tokens.shape
        if slots not in self._proposals:
            self._proposals[slots] = _each(proposal, lambda one: one.new_zeros(self._num_rows, *one.shape[1:]))
        for name in PARTS:
            own, new = getattr(self._proposals[slots], name), getattr(proposal, name)
            if new is not None:
                own[:rows].copy_(new)

    def _kept(self, slots: int, rows: int) -> Proposal:
        return _each(self._proposals[slots], lambda one: one[:rows])

    def _refuse(self, piece: str, why: str) -> None:
        self.refused[piece] = why
        log.info("%s is not captured: %s", piece, why)

    def _run(self, piece: str, shape: tuple[int, ...], held: tuple[Tensor, ...], work: Work) -> None:
        """Run a piece at a bucket: as it is, or by its graph. ``work`` leaves its results in tensors that stay."""
        if piece in self.refused:
            work()
            return
        if len(held) != len(self._held) or any(a is not b for a, b in zip(held, self._held, strict=True)):
            self._replays.clear()
            self._held = held
        key = piece, shape
        if key not in self._replays:
            with HostReads() as watch:
                self._graphs.run(work)
            if watch.why:
                self._refuse(piece, watch.why)
            self._replays[key] = None
            return
        replay = self._replays[key]
        if replay is None:
            try:
                replay = self._replays[key] = self._graphs.capture(work)
            except RuntimeError as problem:  # nothing was executed
                self._refuse(piece, str(problem).splitlines()[0])
                work()
                return
        replay()
        self.replayed[key] += 1


def _power(count: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (count - 1).bit_length()


def _each(proposal: Proposal, change: Callable[[Tensor], Tensor]) -> Proposal:
    parts = (getattr(proposal, name) for name in PARTS)
    return Proposal(*(None if one is None else change(one) for one in parts))  # type: ignore[arg-type]


def cuda_rounds(device: torch.device) -> Captured | None:
    """Rounds in CUDA graphs; None where ``device`` is another."""
    return Captured(CudaGraphs()) if device.type == "cuda" else None
