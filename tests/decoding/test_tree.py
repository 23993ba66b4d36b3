"""Static draft trees: the shape, who sees whom, the greedy walk, and lossless decoding of real Eagle3 drafts."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from algorithm_tools import FAMILIES, tiny_draft, tiny_target
from decoding_tools import FakeDrafter
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec.decoding.kv import PackedTarget
from deepspec.decoding.loop import Decoder, generate
from deepspec.decoding.records import DecodeRequest, DecodeSettings, Generation
from deepspec.decoding.scheduler import FixedLength
from deepspec.decoding.tree import count_nodes, parse_tree, path_tokens, tree_of, walk
from deepspec.decoding.verify import VerifyResult
from deepspec.errors import EvaluationError
from deepspec.evaluate.measure import PromptResult, summarise
from deepspec.nn.tree import Tree

SHAPES = st.lists(st.integers(1, 3), min_size=1, max_size=4)
# more than a batch of 8, longer than the sliding window of 8 and shorter
PROMPTS = [[1, 5, 9, 12], [7], [3, 3, 8, 20, 33, 41, 50, 6, 9, 10, 11], [2, 90, 4], list(range(20, 50)), [8, 8]]
PROMPTS += [[60 + n, 4, 70 - n] for n in range(4)]


def sharp_target(family: str = "qwen3"):
    """Greedy choices that are no near ties, and that depend on more than the newest token."""
    return tiny_target(family, initializer_range=0.5)


NORMS = {"fc_norm": True, "norm_output": True, "norm_before_residual": True}


def followed_draft(target, ttt_length: int = 4, **changes):
    """An Eagle3 draft that is accepted now and then: it carries on what the target's last hidden state says."""
    draft = tiny_draft("eagle3", target, target_layers=[-1, 1, 3], ttt_length=ttt_length, **changes)
    with torch.no_grad():
        draft.fc.weight[:, -draft.shape.hidden_size :] += torch.eye(draft.shape.hidden_size)
    return draft


def decode(target, draft, tree, batch_size=1, stops=(), limit=12, prompts=PROMPTS) -> list[Generation]:
    drafter = draft.algorithm.drafter(draft, batch_size, 16)  # shorter than the rows get: the buffers grow
    options = DecodeSettings(max_new_tokens=limit, stop_token_ids=stops, tree=tree)
    return generate(target, drafter, prompts, options, batch_size)


def outputs(generations: list[Generation]) -> list[list[int]]:
    return [one.output_ids for one in generations]


def per_round(generations: list[Generation], key: str) -> list[list[int]]:
    return [[getattr(round_, key) for round_ in one.rounds] for one in generations]


def walk_reference(tree: Tree, choice: torch.Tensor, tokens: torch.Tensor) -> VerifyResult:
    """``walk`` node by node."""
    ends = []
    for row in range(len(tokens)):
        node, moved = 0, True
        while moved:
            moved = False
            for child in range(1, len(tree)):
                if int(tree.parent[child]) == node and tokens[row, child] == choice[row, node]:
                    node, moved = child, True
                    break
        ends.append(node)
    accepted = torch.tensor(ends, device=tokens.device)
    return VerifyResult(accepted, torch.stack([choice[row, node] for row, node in enumerate(ends)]))


def test_shape_of_a_tree() -> None:
    tree = Tree((2, 1, 2))
    assert tree.parent.tolist() == [0, 0, 0, 1, 2, 3, 3, 4, 4]
    assert tree.depths.tolist() == [0, 1, 1, 2, 2, 3, 3, 3, 3]
    assert tree.paths[[0, 2, 4, 8]].tolist() == [[0, 0, 0, 0], [0, 2, 2, 2], [0, 2, 4, 4], [0, 2, 4, 8]]
    assert tree.level(3) == slice(5, 9)
    assert parse_tree(" 2,1, 2") == tree.children
    assert parse_tree("") == ()
    assert count_nodes(tree.children) == len(tree) - 1


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.lists(st.integers(0, 6), min_size=1, max_size=3), st.sampled_from([None, 1, 2, 4]), st.integers(0, 3))
def test_a_node_sees_the_context_and_its_own_path(shape, roots, window, spare) -> None:
    tree = Tree(shape)
    reach = max(roots) + len(tree) + spare
    nodes = tree.level(len(shape))
    sees = tree.visible(torch.tensor(roots), nodes, reach, window)
    for row, root in enumerate(roots):
        for query, node in enumerate(range(nodes.start, nodes.stop)):
            path = tree.paths[node][: tree.depths[node] + 1].tolist()
            chain = [*range(root), *(root + step for step in path)]  # places by position: window counts these
            wanted = chain if window is None else chain[-window:]
            assert sees[row, query].nonzero().flatten().tolist() == wanted


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 2**31))
def test_walk_equals_the_reference(shape, seed) -> None:
    tree, generator = Tree(shape), torch.Generator().manual_seed(seed)
    rows, vocab = 4, 4
    tokens = torch.zeros(rows, len(tree), dtype=torch.long)
    for parent in range(len(tree)):
        children = [child for child in range(1, len(tree)) if tree.parent[child] == parent]
        for row in range(rows):
            tokens[row, children] = torch.randperm(vocab, generator=generator)[: len(children)]
    choice = torch.randint(vocab, tokens.shape, generator=generator)
    fast, reference = walk(tree, choice, tokens), walk_reference(tree, choice, tokens)
    assert fast.accepted.tolist() == reference.accepted.tolist()
    assert fast.token.tolist() == reference.token.tolist()


def test_tokens_of_a_path_end_with_a_stop_token() -> None:
    tree = Tree((2, 1, 2))
    drafted = (10, 11, 12, 13, 14, 15, 16, 17)
    assert path_tokens(tree, 0, drafted, ()) == []
    assert path_tokens(tree, 8, drafted, ()) == [11, 13, 17]
    assert path_tokens(tree, 8, drafted, (13,)) == [11, 13]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_path_of_a_tree_step_equals_a_whole_forward(family: str) -> None:
    """Target: rows of different lengths, one absent; each node's hidden state, and those after the path is kept."""
    target, tree = tiny_target(family), Tree((2, 2, 1))
    rows = [list(range(3, 20)), [5], [9, 8, 7]]
    packed = PackedTarget(target, (0,), 3, 4)
    packed.forward(packed.cache.plan(np.array([17, 1, 3])), torch.tensor([*rows[0], *rows[1], *rows[2]]))
    packed.cache.commit(np.array([17, 1, 3]))
    tokens = torch.randint(3, 90, (3, len(tree)), generator=torch.Generator().manual_seed(1))
    step = packed.cache.plan(np.array([len(tree), 0, len(tree)]), tree=tree)
    output = packed.forward(step, tokens[[0, 2]].flatten())
    path = tree.path[torch.tensor([9, 0, 6])]  # the row between is absent
    for row, node in ((0, 9), (2, 6), (0, 3), (2, 2)):
        ids = [*rows[row], *tokens[row, tree.paths[node][: tree.depths[node] + 1]].tolist()]
        whole = target.forward(torch.tensor([ids]), (0,))
        mine = output.last_hidden[step.index[row, node]]
        torch.testing.assert_close(mine, whole.last_hidden[0, -1], atol=2e-5, rtol=2e-5)
    packed.cache.keep_path(path)
    packed.cache.commit(np.array([4, 0, 3]))
    after = packed.forward(packed.cache.plan(np.array([1, 0, 1])), torch.tensor([33, 44]))
    for place, (row, node, token) in enumerate(((0, 9, 33), (2, 6, 44))):
        ids = [*rows[row], *tokens[row, tree.paths[node][: tree.depths[node] + 1]].tolist(), token]
        whole = target.forward(torch.tensor([ids]), (0,))
        torch.testing.assert_close(after.last_hidden[place], whole.last_hidden[0, -1], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_equals_plain_decoding(family: str) -> None:
    target = sharp_target(family)
    draft = followed_draft(target)
    stop = (generate(target, None, PROMPTS[:1], DecodeSettings(max_new_tokens=8))[0].output_ids[7],)
    for batch_size, stops in ((1, stop), (8, ()), (8, stop)):
        plain = generate(target, None, PROMPTS, DecodeSettings(max_new_tokens=12, stop_token_ids=stops), 8)
        drafted = decode(target, draft, (4, 2, 2, 1), batch_size, stops)
        assert outputs(drafted) == outputs(plain)
        assert [one.finish for one in drafted] == [one.finish for one in plain]
        assert all(one.length == 44 for generation in drafted for one in generation.rounds)


class Planted(FakeDrafter):
    """Knows the whole texts; of each round it plants a few right tokens along a path, another one every time."""

    def __init__(self, texts: list[list[int]], rows: int) -> None:
        super().__init__(torch.zeros(1, 1), rows, 4, layers=(-1, 1, 3))
        self.model.device, self.max_children, self.texts = "cpu", 96, texts
        self.wrong = min(set(range(96)) - {token for text in texts for token in text})
        self.generator = torch.Generator().manual_seed(6)

    def propose_tree(self, last_token: torch.Tensor, tree: Tree) -> SimpleNamespace:
        tokens = torch.full((len(last_token), len(tree)), self.wrong)
        for row, after in enumerate(self.tokens[: len(last_token)]):
            coming = [text[len(after) + 1 :] for text in self.texts if text[1 : len(after) + 1] == after]
            path = tree.paths[int(torch.randint(len(tree), (), generator=self.generator))][1:]
            for node, token in zip(path, coming[0] if coming else [], strict=False):
                tokens[row, node] = token
        return SimpleNamespace(tokens=tokens[:, 1:], probs=None, confidence_logits=None)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 8])
def test_accepted_paths_are_kept_and_the_draft_gets_their_features(family: str, batch_size: int) -> None:
    target, options = sharp_target(family), DecodeSettings(max_new_tokens=14, tree=(3, 2, 2, 1))
    plain = outputs(generate(target, None, PROMPTS, options, 8))
    texts = [prompt + output for prompt, output in zip(PROMPTS, plain, strict=True)]
    drafter = Planted(texts, batch_size)
    drafted = generate(target, drafter, PROMPTS, options, batch_size)
    assert outputs(drafted) == plain
    assert {one.accepted for generation in drafted for one in generation.rounds} >= {1, 2, 3, 4}
    for features, tokens in drafter.contexts:
        [text] = [text for text in texts if text[1 : len(tokens) + 1] == tokens[: len(text) - 1]]
        known = min(len(tokens), len(text) - 1)
        whole = target.forward(torch.tensor([text[:-1]]), (-1, 1, 3)).features[0]
        torch.testing.assert_close(torch.stack(features[:known]), whole[:known], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "family", [name if name == "qwen3" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_a_tree_of_single_children_is_the_chain(family: str) -> None:
    target = sharp_target(family)
    draft = followed_draft(target)
    stop = (generate(target, None, PROMPTS[:1], DecodeSettings(max_new_tokens=8))[0].output_ids[7],)
    for batch_size, stops in ((1, ()), (8, stop)):
        chain, tree = (decode(target, draft, shape, batch_size, stops) for shape in ((), (1, 1, 1, 1)))
        assert outputs(tree) == outputs(chain)
        for key in ("committed", "emitted"):
            assert per_round(tree, key) == per_round(chain, key)


def test_a_wider_tree_accepts_no_less_on_the_same_context() -> None:
    target = sharp_target()
    draft = followed_draft(target)
    chain, tree = (decode(target, draft, shape, 12) for shape in ((1, 1, 1), (6, 3, 2)))
    pairs = [(a.rounds[0].accepted, b.rounds[0].accepted) for a, b in zip(chain, tree, strict=True)]
    assert all(first <= second for first, second in pairs)
    assert any(first < second for first, second in pairs)


@pytest.mark.parametrize("changes", [{}, NORMS], ids=["released", "norms"])
def test_draft_nodes_are_what_the_chain_proposes_after_each_path(changes: dict) -> None:
    """Draft: the children of a node are the likeliest tokens that a chain forced along its path would see."""
    target = sharp_target()
    draft = followed_draft(target, **changes)
    tree = Tree((3, 2, 2))
    chain, wide = (draft.algorithm.drafter(draft, 2, 8) for _ in range(2))
    features = torch.randn(2, 5, 3 * 32, generator=torch.Generator().manual_seed(2))
    given = (features, torch.tensor([[4, 5, 6, 7, 8], [9, 10, 11, 0, 0]]), torch.tensor([5, 3]), 5)
    for drafter in (chain, wide):
        drafter.extend(*given)
    tokens = wide.propose_tree(torch.tensor([8, 11]), tree).tokens
    for node in range(len(tree) - 4, len(tree)):
        path = tree.paths[node][1:]
        found = []

        def forced(logits, slot, path=path, found=found):
            found.append(logits.topk(tree.children[slot]).indices)
            return tokens[:, path[slot] - 1], None

        chain.propose(torch.tensor([8, 11]), forced, 3)
        for depth, step in enumerate(path):
            siblings = [child for child in range(1, len(tree)) if tree.parent[child] == tree.parent[step]]
            assert tokens[:, [child - 1 for child in siblings]].tolist() == found[depth].tolist()


def test_what_cannot_draft_a_tree_says_so() -> None:
    target = tiny_target("qwen3")
    drafter = followed_draft(target)
    drafter = drafter.algorithm.drafter(drafter, 1, 16)
    dflash = tiny_draft("dflash", target)
    block = dflash.algorithm.drafter(dflash, 1, 16)
    cases = [
        (DecodeSettings(1.0, tree=(2, 1)), drafter, "temperature 0"),
        (DecodeSettings(confidence_threshold=0.5, tree=(2, 1)), drafter, "confidence-threshold"),
        (DecodeSettings(tree=(2, 1)), block, "a draft that goes token by token"),
        (DecodeSettings(tree=(1,) * 5), drafter, "at most 4 depths"),
        (DecodeSettings(tree=(97,)), drafter, "at most 96"),
    ]
    for options, given_drafter, text in cases:
        with pytest.raises(EvaluationError, match=f"tree.*{text}"):
            Decoder(target, given_drafter, options)
    with pytest.raises(EvaluationError, match=r"tree.*policy"):
        Decoder(target, drafter, DecodeSettings(tree=(2, 1)), policy=FixedLength(1))
    for text in ("4,x", "0,1", "4,,1", "-1"):
        with pytest.raises(EvaluationError, match=r"tree: not a draft tree.*4,2,1,1"):
            parse_tree(text)
    with pytest.raises(EvaluationError, match="at most 1,024"):
        parse_tree("40,40")
    assert tree_of(DecodeSettings(tree=(2, 1)), None) is None


def test_summary_counts_nodes_as_verified_and_acceptance_by_depth() -> None:
    result = PromptResult("t", 0, 0.0, 7, committed=[1, 3, 3], proposed=[8] * 3, accepted=[0, 2, 3], tree_depth=3)
    summary = summarise("t", 0.0, [result])  # the last round ended with an accepted stop token
    assert summary.verify_rate == 5 / 24
    assert summary.verified_length == 8
    assert summary.conditional == [2 / 3, 1.0, 0.5]
    result = replace(result, accepted=[0, 2, 2], committed=[1, 3, 2])
    assert summarise("t", 0.0, [result]).conditional == [2 / 3, 1.0, 0.0]


def test_the_clock_counts_all_nodes() -> None:
    target = sharp_target()
    draft = followed_draft(target)
    drafter = draft.algorithm.drafter(draft, 2, 64)
    decoder = Decoder(target, drafter, DecodeSettings(max_new_tokens=8, tree=(3, 1)), 2)
    list(decoder.stream(deque(DecodeRequest(tuple(prompt), number) for number, prompt in enumerate(PROMPTS))))
    assert decoder.clock.verified == 7 * decoder.clock.row_rounds
