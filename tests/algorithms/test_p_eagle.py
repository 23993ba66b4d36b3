"""P-EAGLE against its definition: which chains are drawn, and one pass over a dense mask of all elements."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from algorithm_tools import random_batch, rows_of, tiny_draft, tiny_target
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec.algorithms.eagle import wide_input
from deepspec.algorithms.p_eagle import ChainPlan, draw_chains

TARGET = tiny_target("qwen3")


@given(seed=st.integers(0, 999), length=st.integers(1, 40), depths=st.integers(2, 9), ratio=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_chains_are_nested_end_where_supervision_ends_and_are_as_many_as_is_said(
    seed: int, length: int, depths: int, ratio: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    supervised = torch.rand(length, generator=generator) < 0.7
    config = replace(tiny_draft("p_eagle", TARGET).config, num_depths=depths, keep_ratio=ratio)
    reached = draw_chains(supervised, config, generator)
    for anchor, depth in enumerate(reached.tolist()):
        assert all(supervised[anchor + 1 : anchor + 1 + depth])
        assert anchor + depth < length
    most = [int(int(supervised.sum()) * max(ratio**depth, config.keep_floor)) for depth in range(1, depths)]
    assert all(int((reached >= depth).sum()) <= size for depth, size in enumerate(most, 1))
    if ratio == 1:  # then every chain is as long as it can be
        runs = [min([i for i in range(depths) if a + 1 + i >= length or not supervised[a + 1 + i]] + [depths - 1])
                for a in range(length)]  # fmt: skip
        assert reached.tolist() == runs


def test_draws_depend_on_seed_epoch_and_sample_alone() -> None:
    model, batch = tiny_draft("p_eagle", TARGET), random_batch([40, 33, 40], share=1.0)

    def chains(supervision) -> set[tuple[int, int]]:
        plan = model.algorithm.plan(model.config, supervision)
        place = plan.grid_R // plan.num_depths
        rows = zip((place // plan.max_context_len).tolist(), (place % plan.max_context_len).tolist(), strict=True)
        depth = (plan.grid_R % plan.num_depths).tolist()
        return {(supervision.sample_ids[row] * 100 + anchor, d) for (row, anchor), d in zip(rows, depth, strict=True)}

    every = chains(batch.supervision)
    assert chains(rows_of(batch, [2, 0]).supervision) == {one for one in every if one[0] // 100 != 11}
    assert chains(replace(batch.supervision, epoch=2)) != every


@torch.no_grad()
def dense_hidden(model, batch, row: int, elements: list[tuple[int, int]], length: int) -> torch.Tensor:
    """Every element (anchor, depth) of a row after all layers, by one mask over all of them."""
    anchors, depths = torch.tensor(elements).T
    embedding, state = model.mask_inputs()
    tokens = torch.nn.functional.pad(batch.input_ids[row, 1:length], (0, 1))
    deep = (depths > 0)[:, None]
    embedded = torch.where(deep, embedding, model.frozen.embed(tokens)[anchors])
    hidden = torch.where(deep, state, model.start(batch.features[row, :length])[anchors])
    sees = (depths == 0) & (anchors <= anchors[:, None])
    sees = sees | ((anchors == anchors[:, None]) & (depths <= depths[:, None]))
    table = model.rotary(anchors + depths)
    for depth, layer in enumerate(model.layers):
        pair = (layer.input_layernorm(hidden), hidden) if depth else wide_input(layer, embedded, hidden)
        queries = layer.self_attn.queries(pair[0], table)
        keys, values = layer.self_attn.keys_values(pair[0], table)
        heads = [part.transpose(0, 1)[None] for part in (queries, keys, values)]
        mixed = torch.nn.functional.scaled_dot_product_attention(
            *heads, attn_mask=sees, scale=layer.self_attn.scale, enable_gqa=True
        )
        hidden = layer.finish(pair[1], mixed[0].transpose(0, 1))
    return hidden


@pytest.mark.parametrize("norms", [{}, {"fc_norm": True, "norm_before_residual": True}, {"norm_before_fc": True}])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 6e-2)])
def test_spans_of_chains_are_one_pass_over_a_dense_mask(norms: dict, dtype: torch.dtype, tolerance: float) -> None:
    model = tiny_draft("p_eagle", TARGET, num_depths=8, **norms).to(dtype)
    batch = random_batch([30, 17], share=0.9, dtype=dtype)
    plan: ChainPlan = model.algorithm.plan(model.config, batch.supervision)
    with torch.no_grad():
        found = model.train_hidden(batch.features, batch.input_ids, plan)[plan.element_R]
    K, T = plan.num_depths, plan.max_context_len
    assert int((plan.grid_R % K).max()) >= 5  # the last span too
    for row, length in enumerate(batch.supervision.lengths.tolist()):
        own = plan.grid_R // K // T == row
        wanted = list(zip((plan.grid_R[own] // K % T).tolist(), (plan.grid_R[own] % K).tolist(), strict=True))
        every = [(anchor, 0) for anchor in range(length)] + [one for one in wanted if one[1]]
        dense = dense_hidden(model, batch, row, every, length)
        expected = dense[[every.index(one) for one in wanted]].float()
        gap = (found[own].float() - expected).abs().max() / expected.abs().max()
        assert float(gap) < tolerance
