"""On a GPU: its kernels, steps and decoding against their plain twins. The dry run tries the same on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from gpu_twins import CHECKS, Twin


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS)
def test_a_gpu_computes_what_the_plain_twin_does(check: Callable[[torch.device], Iterator[Twin]]) -> None:
    for twin in check(torch.device("cuda")):
        assert twin.compare() <= twin.limit, twin.name
