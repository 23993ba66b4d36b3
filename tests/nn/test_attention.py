"""The attention backends against the reference with a mask, over random shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepspec.errors import DeepSpecError
from deepspec.nn.attention import attend, visibility_mask, visible_blocks
from deepspec.nn.cpu import two_part

SHAPES = {
    "B": st.integers(1, 3), "N": st.integers(0, 40), "K": st.integers(1, 8), "M": st.integers(0, 5),
    "S": st.integers(1, 50), "G": st.sampled_from([1, 2]), "rep": st.sampled_from([1, 3]), "seed": st.integers(0, 999),
    "kind": st.sampled_from(["all", "causal", "window", "both"]),
}  # fmt: skip


def inputs(
    B: int, N: int, K: int, M: int, S: int, G: int, rep: int, seed: int, dtype: torch.dtype, kind: str = "all"
) -> tuple[list[Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, N, K, G * rep, 8), (B, S, G, 8), (B, S, G, 8), (B, N, M, G, 8), (B, N, M, G, 8)]
    tensors = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]
    sees: dict[str, Any] = {"limit_BN": torch.randint(0, S + 1, (B, N), generator=generator)}
    sees["causal"] = kind in ("causal", "both")
    if kind in ("window", "both"):
        sees["start_BNK"] = torch.randint(-3, S + 1, (B, N, K), generator=generator)
    return tensors, sees


def run(tensors: list[Tensor], sees: dict[str, Any], backend: str) -> list[Tensor]:
    query, ck, cv, ok, ov = tensors
    out = attend(query, (ck, cv), (ok, ov), scale=0.4, backend=backend, **sees)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), tensors)]


@given(**SHAPES)
@settings(max_examples=40, deadline=None)
def test_two_part_equals_the_masked_reference(**shape: int) -> None:
    tensors, sees = inputs(**shape, dtype=torch.float32)
    for fast, plain in zip(run(tensors, sees, "two_part"), run(tensors, sees, "sdpa"), strict=True):
        torch.testing.assert_close(fast, plain, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(**SHAPES, tile=st.integers(1, 20))
@settings(max_examples=25, deadline=None)
def test_tiles_of_the_context_change_nothing(dtype: torch.dtype, tile: int, **shape: int) -> None:
    tensors, sees = inputs(**shape, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(two_part, "_TILE_KEYS", tile)
        tiled = run(tensors, sees, "two_part")
    exact = [tensor.detach().float().requires_grad_() for tensor in tensors]
    close = {"atol": 2e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.15, "rtol": 0.05}
    for fast, plain in zip(tiled, run(exact, sees, "sdpa"), strict=True):
        torch.testing.assert_close(fast.float(), plain, **close)


@given(**{**SHAPES, "N": st.integers(1, 90), "S": st.integers(1, 700)})
@settings(max_examples=30, deadline=None)
def test_visible_blocks_hold_all_that_the_mask_shows_and_full_ones_nothing_hidden(**shape: int) -> None:
    B, N, K, M, S = (shape[name] for name in "BNKMS")
    generator = torch.Generator().manual_seed(shape["seed"])
    limit = torch.randint(0, S + 1, (B, N), generator=generator).sort().values
    start = (limit[..., None] - torch.randint(1, 300, (B, N, K))) if shape["kind"] in ("window", "both") else None
    mask = visibility_mask(limit, K, M, S, shape["kind"] in ("causal", "both"), start)
    some, full = visible_blocks(limit, (K, M, S), start)
    rows, columns = some.shape[-2:]
    padded = F.pad(mask, (0, columns * 128 - mask.shape[2], 0, rows * 128 - mask.shape[1]))
    blocks = padded.view(B, rows, 128, columns, 128)
    anything, everything = blocks.any(dim=(2, 4)), blocks.all(dim=4).all(dim=2)
    assert not (anything & ~(some | full)[:, 0]).any()
    assert not (full[:, 0] & ~everything).any()
    assert not (some & full).any()


@given(**SHAPES)
@settings(max_examples=15, deadline=None)
def test_two_part_in_bf16_stays_near_fp32(**shape: int) -> None:
    tensors, sees = inputs(**shape, dtype=torch.bfloat16)
    exact = [tensor.detach().float().requires_grad_() for tensor in tensors]
    for fast, plain in zip(run(tensors, sees, "two_part"), run(exact, sees, "sdpa"), strict=True):
        torch.testing.assert_close(fast.float(), plain, atol=0.15, rtol=0.05)


@given(**{**SHAPES, "N": st.integers(1, 12)})
@settings(max_examples=8, deadline=None)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_mask_equals_the_reference(**shape: int) -> None:
    tensors, sees = inputs(**shape, dtype=torch.float32)
    seen = visibility_mask(sees["limit_BN"], shape["K"], shape["M"], shape["S"], sees["causal"], sees.get("start_BNK"))
    with torch.no_grad():
        query, ck, cv, ok, ov = (tensor.detach() for tensor in tensors)
        flex = attend(query, (ck, cv), (ok, ov), scale=0.4, backend="flex", **sees)
        plain = attend(query, (ck, cv), (ok, ov), scale=0.4, backend="sdpa", **sees)
    rows = seen.any(dim=-1).view(query.shape[:3])  # flex leaves rows that see nothing undefined
    torch.testing.assert_close(flex[rows], plain[rows], atol=2e-5, rtol=1e-4)


@given(**{**SHAPES, "N": st.integers(1, 20)}, packed=st.booleans())
@settings(max_examples=25, deadline=None)
def test_flex_sees_exactly_the_pairs_of_the_reference(packed: bool, **shape: int) -> None:
    """The mask that flex_attention is given, pair by pair; ``packed``: every group has a limit of its own."""
    tensors, sees = inputs(**shape, dtype=torch.float32)
    B, N, K, M, S = (shape[name] for name in "BNKMS")
    if not packed:
        sees["limit_BN"].fill_(S)
    given_masks = []

    def record(query: Tensor, *_: Tensor, block_mask: Any, **__: Any) -> Tensor:
        given_masks.append(block_mask)
        return query

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.attention.flex_attention.flex_attention", record)
        query, ck, cv, ok, ov = tensors
        attend(query, (ck, cv), (ok, ov), scale=1.0, backend="flex", **sees)
    rows, columns = torch.arange(N * K)[:, None], torch.arange(S + N * M)
    found = given_masks[0].mask_mod(torch.arange(B)[:, None, None], torch.tensor(0), rows, columns)
    start = sees.get("start_BNK")
    assert torch.equal(found, visibility_mask(sees["limit_BN"], K, M, S, sees["causal"], start))


def test_visibility_is_the_definition() -> None:
    mask = visibility_mask(torch.tensor([[0, 2, 3]]), num_queries=2, num_own=2, context_length=3)[0]
    for row in range(6):
        group = row // 2
        for column in range(9):
            wanted = column < [0, 2, 3][group] if column < 3 else (column - 3) // 2 == group
            assert bool(mask[row, column]) is wanted


def test_causal_own_keys_and_a_start_hide_what_they_say() -> None:
    start = torch.tensor([[[1, 2, 3]]])
    mask = visibility_mask(torch.tensor([[3]]), 3, 3, 4, causal=True, start_BNK=start)[0]
    assert mask.tolist() == [
        [False, True, True, False, True, False, False],
        [False, False, True, False, True, True, False],
        [False, False, False, False, True, True, True],
    ]


def test_groups_that_see_nothing_give_zeros() -> None:
    tensors, _ = inputs(1, 3, 2, 0, 4, 1, 1, 0, torch.float32)
    for backend in ("two_part", "sdpa"):
        assert run(tensors, {"limit_BN": torch.zeros(1, 3, dtype=torch.int64)}, backend)[0].abs().max() == 0


def test_unknown_backend_names_the_nearest() -> None:
    tensors, sees = inputs(1, 1, 1, 1, 1, 1, 1, 0, torch.float32)
    with pytest.raises(DeepSpecError, match="did you mean 'flex'"):
        run(tensors, sees, "flexx")
