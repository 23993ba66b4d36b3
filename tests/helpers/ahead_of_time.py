"""Inductor's Triton kernels of a function, compiled for an H100 on a machine that has neither a GPU nor CUDA.

Inductor asks the device for its properties, and Triton its driver for the architecture: both are told an H100's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from deepspec.testing.fake_cuda import fake_tensors

HOPPER = {
    "major": 9, "minor": 0, "multi_processor_count": 132, "regs_per_multiprocessor": 65536, "warp_size": 32,
    "max_threads_per_multi_processor": 2048, "total_memory": 80 << 30, "shared_memory_per_block_optin": 232_448,
}  # fmt: skip


class _Driver:
    """Triton's driver as far as a compiler asks it."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


@contextmanager
def hopper() -> Iterator[FakeTensorMode]:
    """Inside, the CUDA device of fake tensors is an H100 to Inductor and Triton."""
    import triton
    from torch._inductor.runtime import hints, triton_helpers

    keys = ("multi_processor_count", "major", "regs_per_multiprocessor", "max_threads_per_multi_processor", "warp_size")
    known = hints.DeviceProperties(type="cuda", index=0, cc=90, **{key: HOPPER[key] for key in keys})
    before = triton.runtime.driver._active
    with ExitStack() as stack:
        for name, value in (
            ("get_device_properties", SimpleNamespace(name="H100", **HOPPER)), ("get_device_capability", (9, 0)),
            ("is_available", True), ("current_device", 0), ("device_count", 1),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, value=value: value))
        create = staticmethod(lambda _: known)
        stack.enter_context(mock.patch.object(hints.DeviceProperties, "create", create))
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu", return_value=None))
        triton.runtime.driver.set_active(_Driver())
        stack.callback(setattr, triton.runtime.driver, "_active", before)
        yield stack.enter_context(fake_tensors())


def compiled_kernels(
    function: Callable[..., Any], make: Callable[[], Sequence[Tensor]], cache: Path, monkeypatch: Any
) -> dict[str, list[Path]]:
    """The CUDA binaries of every Triton kernel that Inductor makes of ``function`` of the fake tensors of ``make``."""
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    for key in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setitem(os.environ, key, str(cache))
    PyCodeCache.cache_clear()  # a kernel that this process has compiled before would not be compiled again
    found: dict[str, list[Path]] = {}
    with hopper() as fakes:
        inputs = list(make())
        graph_module = make_fx(function, decomposition_table=select_decomp_table())(*inputs)
        graph = GraphLowering(graph_module, example_inputs=inputs)
        with V.set_graph_handler(graph), V.set_fake_mode(fakes), V.set_debug_handler(DebugContext()):
            graph.run(*inputs)
            code: Any = graph.codegen()[0]
        kernels = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", getattr(code, "value", code), re.DOTALL)
        for name, source in kernels:
            before = {*cache.rglob("*.cubin")}
            getattr(PyCodeCache.load(source), name).precompile(warm_cache_only=True)
            found[name] = sorted({*cache.rglob("*.cubin")} - before)
    return found
