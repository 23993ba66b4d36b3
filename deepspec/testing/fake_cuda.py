"""CUDA tensors without CUDA: any machine finds what would make a GPU wait for the host, or mixes devices.

Inside :func:`fake_cuda` tensors with ``device="cuda"`` have shapes, dtypes and a device, and no values (PyTorch's
``FakeTensorMode``). What reads a value (``.item()``, ``.tolist()``, ``bool(tensor)``, ``nonzero``, a boolean index)
fails; copies between host and device are recorded in :class:`Traffic`; an operation that takes a CPU tensor beside one
on the device fails, an index among them, which CUDA itself would copy silently, and wait for.

A PyTorch that was built without CUDA cannot run autograd over CUDA tensors. To its C++ side the fakes are tensors of
``lazy``, a device that needs no driver; to Python they are on ``cuda:0``.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from deepspec.errors import DeepSpecError

CUDA, STAND_IN = torch.device("cuda", 0), torch.device("lazy", 0)
_MACHINERY = (str(Path(torch.__file__).parent), contextlib.__file__)
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class DeviceError(DeepSpecError):
    """An operation that a GPU could not run without waiting, or not at all."""


class Traffic(TorchDispatchMode):
    """What passed between host and device; the place in the package of each."""

    supports_higher_order_operators = True  # flex attention is one

    def __init__(self, fakes: FakeTensorMode) -> None:
        super().__init__()
        self._fakes = fakes
        self.reads: list[str] = []  # device to host: the host waits for all that was queued
        self.waits: list[str] = []  # host to device without non_blocking: so too

    def clear(self) -> None:
        """Forget what passed so far."""
        self.reads.clear()
        self.waits.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Check the operation's devices, record it if it is a copy, and run it."""
        kwargs = kwargs or {}
        if (
            getattr(func, "overloadpacket", None) is torch.ops.aten.to
        ):  # as inference mode calls it; made of the copies below
            with self:
                return func.decompose(*args, **kwargs)
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if func in _COPIES:
            self._copied(func, args, kwargs)
            args = tree_map_only(Tensor, self._fake, args)  # a copy of a real tensor alone would be made in earnest
        elif len({one.device.type for one in tensors if one.dim()}) > 1:  # numbers may come from the host
            found = ", ".join(f"{tuple(one.shape)} on {one.device.type}" for one in tensors)
            raise DeviceError("tensors of two devices", key=str(func), found=found, wanted="one", remedy=_place())
        if tensors and not any(isinstance(one, FakeTensor) for one in tensors):  # the host's own work, done in earnest
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        try:
            return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            problem = "the host reads what the device has yet to compute"
            raise DeviceError(problem, key=str(func), remedy=_place()) from error

    def _fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self._fakes.from_tensor(tensor)

    def _copied(self, func: Any, args: Any, kwargs: Any) -> None:
        source, target = args[0].device, torch.device(kwargs.get("device") or args[0].device)
        asynchronous = kwargs.get("non_blocking", False)
        if func is _COPIES[1]:
            source, target = args[1].device, args[0].device
            asynchronous = asynchronous or (len(args) > 2 and args[2]) or not args[1].dim()
        if source.type == "cpu" != target.type:
            if not asynchronous:
                self.waits.append(_place())
        elif target.type == "cpu" != source.type:
            self.reads.append(_place())


def _place() -> str:
    """File and line of what runs now, PyTorch left out."""
    frames = [one for one in traceback.extract_stack() if not one.filename.startswith((__file__, *_MACHINERY))]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "outside"


class _Event:
    """In place of ``torch.cuda.Event``."""

    def __init__(self, **_: object) -> None:
        pass

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, _other: object) -> float:
        return 0.0


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Tensors made inside are fakes, those of CUDA by their stand-in; what was copied to the host reads as zeros."""
    normalised = FakeTensor._normalize_fake_device

    def stand_in(device: torch.device) -> torch.device:
        return STAND_IN if device.type == "cuda" else normalised(device)

    def device(self: FakeTensor) -> torch.device:
        if self.fake_mode.in_kernel_invocation:
            return torch.device("meta")
        return CUDA if self.fake_device.type == STAND_IN.type else self.fake_device

    def numpy(self: FakeTensor) -> np.ndarray:
        return np.zeros(tuple(self.shape), str(self.dtype).removeprefix("torch."))

    on_cuda = property(lambda self: self.device.type == "cuda")
    with ExitStack() as stack:
        patch = mock.patch.object
        stack.enter_context(patch(FakeTensor, "_normalize_fake_device", staticmethod(stand_in)))
        stack.enter_context(patch(FakeTensor, "device", property(device)))
        stack.enter_context(patch(FakeTensor, "is_cuda", on_cuda, create=True))
        stack.enter_context(patch(FakeTensor, "numpy", numpy, create=True))
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


@contextmanager
def fake_cuda() -> Iterator[Traffic]:
    """Everything inside runs on fake tensors, eagerly; tensors from outside are taken as they are."""
    eager = torch.compiler.set_stance("force_eager")
    with mock.patch.object(torch.cuda, "Event", _Event), eager, fake_tensors() as fakes, Traffic(fakes) as traffic:
        yield traffic


class FakeGraphs:
    """In place of CUDA graphs inside :func:`fake_cuda`: pieces run as they are, without a copy from or to the host."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic

    def run(self, work: Callable[[], None]) -> None:
        """Run ``work``.

        Raises:
            DeviceError: it reads from the device, or copies to it.
        """
        before = len(self._traffic.reads), len(self._traffic.waits)
        work()
        places = [*self._traffic.reads[before[0] :], *self._traffic.waits[before[1] :]]
        if places:
            raise DeviceError("a captured piece copies between host and device", remedy=", ".join(places))

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """What runs ``work`` again."""
        return lambda: self.run(work)


def faked(tensor: Tensor) -> Tensor:
    """A fake CUDA tensor of the same shape and dtype."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)


def to_fake(module: nn.Module) -> None:
    """Replace every parameter and buffer of ``module`` by a fake one on CUDA."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(faked(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = faked(buffer)
