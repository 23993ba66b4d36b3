"""Memory for decoded samples, used again: a new page costs more time than decoding into one already mapped."""

from __future__ import annotations

import math
import os
import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KEPT_BYTES = 1 << 30  # of free blocks at most
_SMALL = 1 << 20  # below this the C library does as well
_GRAIN = 1 << 20


class _Lease:
    """A block while a tensor uses it. numpy and torch hold on to this object; with the last tensor it goes back."""

    def __init__(self, pool: BlockPool, block: NDArray[np.uint8]) -> None:
        self.pool, self.block, self.pid = pool, block, os.getpid()
        self.__array_interface__: dict[str, Any] = block.__array_interface__

    def __del__(self) -> None:
        if self.pid == os.getpid():
            self.pool.give_back(self.block)


class BlockPool:
    """Free blocks by size. Threads may share it."""

    def __init__(self, kept: int = KEPT_BYTES) -> None:
        self.kept, self.free_bytes = kept, 0
        self._free: list[NDArray[np.uint8]] = []
        self._lock = threading.RLock()  # re-entrant: garbage collection may give a block back while one is taken

    def take(self, size: int) -> NDArray[np.uint8]:
        """``size`` bytes, uninitialised; a free block is used when no more than half of it would lie idle."""
        with self._lock:
            fitting = [i for i, block in enumerate(self._free) if size <= len(block) <= 2 * size]
            if fitting:
                best = min(fitting, key=lambda i: len(self._free[i]))
                block = self._free.pop(best)
                self.free_bytes -= len(block)
                return np.asarray(_Lease(self, block))[:size]
        return np.asarray(_Lease(self, np.empty(-(-size // _GRAIN) * _GRAIN, np.uint8)))[:size]

    def give_back(self, block: NDArray[np.uint8]) -> None:
        """Keep a block for later, or free the oldest ones beyond the limit."""
        with self._lock:
            self._free.append(block)
            self.free_bytes += len(block)
            while self.free_bytes > self.kept:
                self.free_bytes -= len(self._free.pop(0))


_pool = BlockPool()


def _after_fork() -> None:
    """A child process starts with its own pool: another thread may have held the parent's lock."""
    global _pool
    _pool = BlockPool()


os.register_at_fork(after_in_child=_after_fork)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor: from the pool, or in a DataLoader's worker process in shared memory (which saves the
    copy to the consumer)."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if torch.utils.data.get_worker_info() is not None:
        storage = torch.UntypedStorage._new_shared(size)
        return torch.empty(0, dtype=dtype).set_(storage, 0, (count,)).view(shape)  # type: ignore[call-overload]
    if size < _SMALL:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(_pool.take(size)).view(dtype).view(shape)
