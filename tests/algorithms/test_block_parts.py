"""The optional parts of block drafters: causal blocks, sliding windows, convolutions, the candidate selector."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from algorithm_tools import draft_section, random_batch, tiny_draft, tiny_target
from torch import Tensor

from deepspec import registry
from deepspec.errors import RecipeError
from deepspec.testing.drafter import DecodingSuite, DraftFolderSuite, TrainingLossSuite

CAUSAL = {"causal": True, "sliding_window": 5, "full_layers": (1,)}
PARTS = {"conv_kernel_size": 3, "conv_group_size": 8}
SELECTOR = {"selector_rank": 5, "selector_top_k": 4, "markov_rank": 0, "confidence_with_markov": False}
TARGET = tiny_target("qwen3")


class TestCausalBlocksWithAWindow(DraftFolderSuite, DecodingSuite):
    algorithms, families, section = ("dflash",), ("qwen3",), CAUSAL


class TestConvolutionsAndASelectorOfDSpark(DraftFolderSuite, DecodingSuite):
    algorithms, families, section = ("dspark",), ("qwen3",), {**PARTS, **SELECTOR}


@pytest.mark.slow
class TestCausalBlocksOfEveryFamily(DraftFolderSuite, DecodingSuite):
    algorithms, section = ("dflash",), {**CAUSAL, **PARTS}


@pytest.mark.slow
class TestLossOfCausalBlocks(TrainingLossSuite):
    algorithms, section = ("dflash",), {**CAUSAL, **PARTS, "loss": [{"name": "kl"}]}


@pytest.mark.slow
class TestLossOfASelectorInDSpark(TrainingLossSuite):
    algorithms, section = ("dspark",), {**PARTS, **SELECTOR}


@pytest.mark.slow
class TestLossOfASelectorWithDPace(TrainingLossSuite):
    algorithms, families, section = ("dflash2",), ("qwen3",), {"d_pace": 0.5}


@pytest.mark.parametrize("changes", [{}, {"causal": True}, CAUSAL, {"sliding_window": 5}, PARTS, {**CAUSAL, **PARTS}])
@torch.no_grad()
def test_decoding_sees_what_training_sees(changes: dict[str, Any]) -> None:
    model = tiny_draft("dflash", TARGET, **changes).eval()
    batch, length = random_batch([20, 20]), 11
    drafter = model.algorithm.drafter(model, 2, 64)
    drafter.extend(
        batch.features[:, :length], batch.input_ids[:, 1 : length + 1], torch.tensor([length, length]), length
    )
    seen: list[Tensor] = []

    def sample(logits: Tensor, _slot: int) -> tuple[Tensor, None]:
        seen.append(logits)
        return logits.argmax(-1), None

    drafter.propose(batch.input_ids[:, length], sample)
    hidden = model.train_slots(batch.features, batch.input_ids, torch.full((2, 1), length), length + 1)
    torch.testing.assert_close(torch.stack(seen, 1), model.head.logits(hidden)[:, 0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_slot_of_a_causal_block_does_not_see_those_after_it() -> None:
    batch, anchors = random_batch([20]), torch.tensor([[9]])
    for causal in (False, True):
        model = tiny_draft("dflash", TARGET, causal=causal)
        given: Any = model.block_inputs(batch.input_ids.gather(1, anchors))
        before = _slots(model, batch, anchors, given)
        given[..., -1, :] += 1.0
        same = (before == _slots(model, batch, anchors, given)).all(-1)[0, 0]
        assert same.tolist() == [causal] * (len(same) - 1) + [False]


@torch.no_grad()
def test_a_window_ends_at_the_slots_own_position() -> None:
    batch, anchor, window = random_batch([20]), 12, 5
    model = tiny_draft("dflash", TARGET, sliding_window=window, num_layers=1)
    anchors = torch.tensor([[anchor]])
    before = model.train_slots(batch.features, batch.input_ids, anchors, anchor + 1)[0, 0]
    for row in range(anchor):
        changed = batch.features.clone()
        changed[:, row] += 1.0
        after = model.train_slots(changed, batch.input_ids, anchors, anchor + 1)[0, 0]
        sees = (before != after).any(-1).tolist()
        assert sees == [anchor + k - row < window for k in range(len(sees))]


def _slots(model: Any, batch: Any, anchors: Tensor, inputs: Tensor) -> Tensor:
    """The slots' hidden states where ``inputs`` are the embeddings of the block."""
    model.block_inputs = lambda _tokens: inputs.clone()
    return model.train_slots(batch.features, batch.input_ids, anchors, batch.input_ids.shape[1])


@torch.no_grad()
def test_a_fresh_selector_and_convolutions_change_no_proposal() -> None:
    spec, batch = TARGET.spec, random_batch([20, 20])
    plain = tiny_draft("dflash", TARGET, sample_from_anchor=False).eval()
    owner = registry.algorithm("dflash2")
    model = owner.build(owner.parse({**draft_section("dflash2")}, spec), spec).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    model.attach(TARGET.embed_weight, TARGET.head_weight)
    drafts = []
    for one in (plain, model):
        drafter = one.algorithm.drafter(one, 2, 64)
        drafter.extend(batch.features, batch.input_ids, torch.tensor([12, 9]), 20)
        drafts.append(drafter.propose(torch.tensor([5, 7]), lambda logits, _: (logits.argmax(-1), None)).tokens)
    assert torch.equal(*drafts)


@torch.no_grad()
def test_a_sampled_token_comes_from_the_candidates_alone() -> None:
    model, batch = tiny_draft("dflash2", TARGET).eval(), random_batch([20, 20])
    drafter = model.algorithm.drafter(model, 2, 64)
    drafter.extend(batch.features, batch.input_ids, torch.tensor([12, 9]), 20)

    def sample(logits: Tensor, _slot: int) -> tuple[Tensor, Tensor]:
        probs = logits.softmax(-1)
        return probs.multinomial(1)[:, 0], probs

    proposal = drafter.propose(torch.tensor([5, 7]), sample)
    assert (proposal.probs > 0).sum(-1).tolist() == [[model.config.selector_top_k] * model.config.max_draft] * 2
    assert proposal.probs.gather(-1, proposal.tokens[..., None]).gt(0).all()


REFUSED = [
    ("dflash", {"sliding_window": 3}, "sliding_window.*at least block_size"),
    ("dflash", {"sliding_window": 9, "full_layers": (2,)}, "full_layers"),
    ("dspark", {"selector_rank": 4}, "selector_rank.*markov_rank"),
    ("dflash", {"conv_kernel_size": 2, "conv_group_size": 5}, "conv_group_size.*divisor of 32"),
    ("dflash2", {"selector_top_k": 97}, "selector_top_k.*at most 96"),
    ("dflash2", {"selector_rank": 0}, "selector_rank"),
]


@pytest.mark.parametrize(("algorithm", "changes", "words"), REFUSED)
def test_parts_that_do_not_fit_are_refused(algorithm: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        registry.algorithm(algorithm).parse(draft_section(algorithm, **changes), TARGET.spec)


def kept_for_backward(**changes: Any) -> int:
    """Bytes that a step's graph keeps, without the parameters."""
    model, kept = tiny_draft("dflash", TARGET, **changes), dict[int, int]()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(random_batch([20, 20])).loss()
    return sum(kept.values())


def test_what_convolutions_read_is_computed_again_and_not_kept() -> None:
    assert kept_for_backward(conv_kernel_size=2, conv_group_size=16) < 1.15 * kept_for_backward()
