"""What runs on an H100 is compiled for it where there is no GPU: the kernels that Inductor makes of the losses.

Needs Triton, which PyTorch without CUDA does not bring: pip install triton.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ahead_of_time import compiled_kernels
from torch import Tensor

from deepspec.nn.loss_chunk import chunk_terms
from deepspec.nn.loss_table import LOSSES, LossWeights

R, P, V = 192, 64, 1000
CASES = {
    "cross-entropy": (LossWeights(ce=1.0), False),
    "DSpark": (LossWeights(ce=0.1, l1=0.9), True),
    "every loss": (LossWeights(**{name: 0.3 for name, row in LOSSES.items() if row.value is not None}), True),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_of_a_loss_are_compiled_for_sm_90(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="PyTorch without CUDA does not bring Triton")
    weights, compares = CASES[case]

    def make() -> list[Tensor]:
        index = [torch.empty(R, dtype=torch.int64, device="cuda") for _ in range(2)]
        return [
            torch.empty(R, V, device="cuda"),
            torch.empty(P, V, device="cuda"),
            *index,
            torch.empty(R, device="cuda"),
        ]

    def terms(logits: Tensor, target: Tensor, local: Tensor, label: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        found, gradient = chunk_terms(logits, target if compares else None, local, label, weight, None, weights, True)
        return (*found.values, found.hit_r, *([] if gradient is None else [gradient]))

    kernels = compiled_kernels(terms, make, tmp_path, monkeypatch)
    assert kernels
    assert all(kernels.values()), f"not compiled: {[name for name, files in kernels.items() if not files]}"
    for files in kernels.values():
        assert ".target sm_90" in files[0].with_suffix(".ptx").read_text()
