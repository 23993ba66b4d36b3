"""Whether the loss can be compiled here; without a compiler it runs as it is."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def loss_backend(wanted: bool, device: torch.device, quiet: bool = False) -> str:
    """The backend of the draft's loss: compiled on CUDA and where ``wanted`` (``train.compile``), if that works.

    A first small function is compiled to find out; where it fails, one line says so (unless ``quiet``).
    """
    if "DEEPSPEC_LOSS" in os.environ or not (wanted or device.type == "cuda"):
        return "auto"  # the environment variable chooses, or the device
    try:
        torch.compile(_probe)(torch.ones(64, device=device))
    except (RuntimeError, ImportError, OSError) as problem:  # torch's own errors are RuntimeErrors
        if not quiet:
            line = next(iter(str(problem).strip().splitlines()), type(problem).__name__)
            print(f"torch.compile does not work here ({line}); the loss runs uncompiled", flush=True)
        return "tiled"
    return "compiled"


def _probe(x: Tensor) -> Tensor:
    return (x * 2).exp().sum()
