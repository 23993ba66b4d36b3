"""CUDA graphs without CUDA: a recorder of operations that keeps to a graph's rules on any device.

What :class:`RecordedGraphs` captures is repeated operation by operation on the very tensors that were seen, as a graph
repeats kernels on addresses. So whatever a graph would get wrong is wrong here:

- a capture executes nothing: what it changed of the memory outside is put back;
- Python does not run again: a branch, a bound or a number of the host is what it was at the capture;
- memory that was allocated inside holds garbage between two replays: who keeps a result of it reads garbage;
- a tensor that was replaced since is not the one that is read;
- an operation whose result the host must know fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepspec.decoding.captured import is_composite

Call = tuple[Any, Any, Any, list[tuple[Tensor, bool]]]  # operation, its arguments, results and which are new memory


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(values: Any) -> list[Tensor]:
    return [one for one in tree_leaves(values) if isinstance(one, Tensor)]


class _Recorder(TorchDispatchMode):
    """Runs operations and keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.own: dict[int, Tensor] = {}  # memory that was allocated inside, by address
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # memory outside that was written to, and what it held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and keep one operation."""
        kwargs = kwargs or {}
        if is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        if torch.Tag.data_dependent_output in func.tags:
            raise RuntimeError("operation not permitted when stream is capturing")
        given = _tensors((args, kwargs))
        if func._schema.is_mutable:
            for tensor in given:  # those that are only read as well: to keep them costs a copy
                self._keep(tensor)
        known = {_address(tensor) for tensor in given}
        out = func(*args, **kwargs)
        results = [(one, _address(one) not in known) for one in _tensors(out)]
        self.own |= {_address(one): one for one, new in results if new and one.numel()}
        self.calls.append((func, args, kwargs, results))
        return out

    def _keep(self, tensor: Tensor) -> None:
        address = _address(tensor)
        if address not in self.own and address not in self.before:
            flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
            self.before[address] = flat, flat.clone()


class RecordedGraphs:
    """What ``deepspec.decoding.captured.Captured`` takes for CUDA graphs."""

    def run(self, work: Callable[[], None]) -> None:
        """Run ``work`` as it is."""
        work()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """The operations of ``work``; calling it repeats them.

        Raises:
            RuntimeError: the host would read a value.
        """
        recorder = _Recorder()
        try:
            with recorder:
                work()
        finally:
            for now, then in recorder.before.values():
                now.copy_(then)
        _spoil(recorder)

        def replay() -> None:
            for func, args, kwargs, results in recorder.calls:
                again = _tensors(func(*args, **kwargs))
                for (seen, new), found in zip(results, again, strict=True):
                    if new:
                        seen.copy_(found)
            _spoil(recorder)

        return replay


def _spoil(recorder: _Recorder) -> None:
    for tensor in recorder.own.values():
        flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
        flat.fill_(float("nan") if flat.is_floating_point() else 1 if flat.dtype == torch.bool else 1 << 20)
