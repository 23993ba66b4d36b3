"""The decoding loop over tiny targets of every family and a fake draft: lossless, ragged, independent of the batch."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from decoding_tools import FakeDrafter, FakeProposal, chi_square, exact_joint
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.gemma4 import Gemma4TextConfig
from transformers.models.llama import LlamaConfig
from transformers.models.qwen3 import Qwen3Config

from deepspec.decoding.kv import PackedTarget
from deepspec.decoding.loop import Decoder, generate
from deepspec.decoding.records import DecodeRequest, DecodeSettings
from deepspec.decoding.scheduler import StepCosts, Threshold, Throughput
from deepspec.errors import DataError
from deepspec.targets.load import Target, spec_from_config
from deepspec.targets.positions import positions_of

FAMILIES = ("qwen3", "llama", "gemma4")


def tiny_target(family: str = "qwen3", vocab: int = 61, seed: int = 0, dtype: torch.dtype = torch.float32) -> Target:
    """A random target of a few layers, sharp enough that greedy choices are no ties."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
    }
    if family == "gemma4":
        config = Gemma4TextConfig(
            **sizes, num_hidden_layers=6, vocab_size_per_layer_input=vocab, global_head_dim=16, sliding_window=8,
            hidden_size_per_layer_input=8,
        )  # fmt: skip
    else:
        config = {"qwen3": Qwen3Config, "llama": LlamaConfig}[family](
            **sizes, num_hidden_layers=3, tie_word_embeddings=False
        )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # attention weak enough that the newest token says much about the next
                parameter.mul_(0.2 if "o_proj" in name else 6.0)
    return Target(model, spec_from_config(model.config, "tiny"))


class OracleDrafter(FakeDrafter):
    """Knows the whole texts and drafts from them, with every third token or so wrong."""

    def __init__(self, texts: list[list[int]], vocab: int, rows: int, max_draft: int) -> None:
        super().__init__(torch.zeros(vocab, vocab), rows, max_draft)
        self.texts, self.vocab = texts, vocab

    def propose(self, last_token: Tensor, sample, max_draft: int | None = None) -> FakeProposal:
        drafts = torch.zeros(len(last_token), self.max_draft, dtype=torch.long)
        for row, after in enumerate(self.tokens[: len(last_token)]):
            known = [text for text in self.texts if text[1 : len(after) + 1] == after]  # none: the row is finished
            for slot, token in enumerate(known[0][len(after) + 1 :][: self.max_draft] if known else []):
                drafts[row, slot] = token if (token + slot) % 3 else (token + 1) % self.vocab
        return FakeProposal(drafts, None, None)


def bigram_table(target: Target, noise: float = 1.0, seed: int = 1) -> Tensor:
    """The target's logits after one token, with noise: a draft that is often right and often wrong. [V, V]"""
    vocab = target.spec.vocab_size
    output = target.forward(torch.arange(vocab)[:, None], ())
    logits = target.logits(output.last_hidden[:, 0]).float()
    return logits + noise * torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed))


def prompts_of(target: Target, lengths: tuple[int, ...], seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(target.spec.vocab_size, (n,), generator=generator).tolist() for n in lengths]


def greedy_by_hand(target: Target, prompt: list[int], count: int) -> list[int]:
    """Plain greedy decoding by whole forwards: no cache, no packing."""
    ids = list(prompt)
    for _ in range(count):
        output = target.forward(torch.tensor([ids]), ())
        ids.append(int(target.logits(output.last_hidden[0, -1]).argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_ragged_steps_equal_whole_forwards(family: str) -> None:
    """Rows of different lengths fed in uneven pieces, with rollbacks, against one forward a row."""
    target = tiny_target(family)
    rows = prompts_of(target, (5, 17, 1, 30))
    packed = PackedTarget(target, (0, 1), 4, 8)
    generator = np.random.Generator(np.random.Philox(key=5))
    fed, seen = np.zeros(4, dtype=np.int64), [[] for _ in rows]
    while any(fed[row] < len(ids) for row, ids in enumerate(rows)):
        counts = np.array([min(int(generator.integers(0, 7)), len(ids) - fed[row]) for row, ids in enumerate(rows)])
        if not counts.any():
            continue
        step = packed.cache.plan(counts)
        flat = [token for row in range(4) for token in rows[row][fed[row] : fed[row] + counts[row]]]
        output = packed.forward(step, torch.tensor(flat))
        kept = np.minimum(counts, generator.integers(1, 7, 4))  # the rest is rolled back and fed again
        packed.cache.commit(kept)
        for row in range(4):
            start = int(step.index[row, 0])
            seen[row].extend(zip(output.features[start : start + kept[row]], output.last_hidden[start:], strict=False))
        fed += kept
    for row, ids in enumerate(rows):
        whole = target.forward(torch.tensor([ids]), (0, 1))
        torch.testing.assert_close(torch.stack([f for f, _ in seen[row]]), whole.features[0], atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(torch.stack([h for _, h in seen[row]]), whole.last_hidden[0], atol=2e-5, rtol=2e-5)
    assert target.decoder.config._attn_implementation != "deepspec_ragged"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_greedy_output_equals_plain_decoding(family: str, batch_size: int) -> None:
    target = tiny_target(family)
    prompts = prompts_of(target, (4, 1, 9, 20, 2, 13, 7, 5, 3))
    settings = DecodeSettings(max_new_tokens=13)
    expected = [greedy_by_hand(target, prompt, 13) for prompt in prompts]
    texts = [prompt + output for prompt, output in zip(prompts, expected, strict=True)]
    drafted = generate(target, OracleDrafter(texts, 61, batch_size, 4), prompts, settings, batch_size)
    plain = generate(target, None, prompts, settings, batch_size)
    assert [one.output_ids for one in plain] == expected
    assert [one.output_ids for one in drafted] == expected
    for one in drafted:
        assert sum(round_.emitted for round_ in one.rounds) == 12
        assert one.finish == "length"
    accepted = [length for one in drafted for length in one.acceptance_lengths]
    assert 1.3 < sum(accepted) / len(accepted) < 4.5  # the draft was right sometimes and wrong sometimes


def test_drafter_receives_the_targets_features_and_the_tokens_after_them() -> None:
    target = tiny_target()
    prompts = prompts_of(target, (600, 5, 530))  # longer than one prefill chunk
    drafter = FakeDrafter(bigram_table(target), 3, 4)
    done = generate(target, drafter, prompts, DecodeSettings(max_new_tokens=9), 3)
    for row, one in enumerate(done):
        ids = [*prompts[row], *one.output_ids]
        whole = target.forward(torch.tensor([ids[:-1]]), (0, 2)).features[0]
        features, tokens = drafter.contexts[row]
        given = torch.stack(features)
        known = min(len(given), len(whole))
        assert known >= len(prompts[row]) + 8
        torch.testing.assert_close(given[:known], whole[:known], atol=1e-4, rtol=1e-4)
        assert tokens[:known] == ids[1 : known + 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_result_of_a_prompt_does_not_depend_on_the_batch(temperature: float) -> None:
    target = tiny_target()
    prompts = prompts_of(target, (4, 11, 2, 7, 9, 1))
    settings = DecodeSettings(temperature, max_new_tokens=12, seed=7, stop_token_ids=(3,))
    results = []
    for batch_size in (1, 2, 6):
        drafter = FakeDrafter(bigram_table(target), batch_size, 3)
        results.append([(g.output_ids, g.rounds) for g in generate(target, drafter, prompts, settings, batch_size)])
    assert results[0] == results[1] == results[2]
    other = generate(target, None, prompts, DecodeSettings(temperature, 12, (3,), seed=8), 2)
    if temperature:
        assert [g.output_ids for g in other] != [ids for ids, _ in results[0]]


def test_stop_token_ends_the_output_and_limit_is_exact() -> None:
    target = tiny_target()
    [prompt] = prompts_of(target, (6,))
    free = greedy_by_hand(target, prompt, 20)
    for cut in range(20):
        stop = free[cut]
        expected = free[: free.index(stop) + 1]
        drafter = FakeDrafter(bigram_table(target, 0.3), 1, 5)
        [one] = generate(target, drafter, [prompt], DecodeSettings(max_new_tokens=20, stop_token_ids=(stop,)))
        assert one.output_ids == expected
        assert one.finish == ("stop" if len(expected) < 20 or expected[-1] == stop else "length")
    for limit in range(1, 12):
        drafter = FakeDrafter(bigram_table(target, 0.3), 1, 5)
        [one] = generate(target, drafter, [prompt], DecodeSettings(max_new_tokens=limit))
        assert one.output_ids == free[:limit]
        assert sum(round_.emitted for round_ in one.rounds) == limit - 1 <= sum(one.acceptance_lengths)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("stepwise", [False, True])
def test_the_published_counting_cuts_a_block_only_at_an_accepted_stop_token(stepwise: bool, batch_size: int) -> None:
    """A draft that goes token by token stops at the stop token that it drafts; one of blocks has all verified."""
    target = tiny_target()
    prompts = prompts_of(target, (4, 9, 2, 6))
    free = [greedy_by_hand(target, prompt, 16) for prompt in prompts]
    texts = [prompt + output for prompt, output in zip(prompts, free, strict=True)]
    wrong = Counter((token + 1) % 61 for output in free for token in output)  # what the oracle drafts where it errs
    stops = (free[0][-2], free[2][9], wrong.most_common(1)[0][0])
    results = {}
    for published in (False, True):
        drafter = OracleDrafter(texts, 61, batch_size, 4)
        if stepwise:
            drafter.max_children = 61  # what a drafter has that can also propose trees
        settings = DecodeSettings(max_new_tokens=16, stop_token_ids=stops, release_counting=published)
        results[published] = generate(target, drafter, prompts, settings, batch_size)
    wanted = [output[: cut_at(output, stops)] for output in free]
    for done in results.values():
        assert [one.output_ids for one in done] == wanted
    behind = 0
    for published, done in results.items():
        for one in (round_ for generation in done for round_ in generation.rounds):
            drafted = cut_at(one.sent, stops)
            ended = one.accepted > 0 and one.sent[one.accepted - 1] in stops
            whole = published and not stepwise and not ended
            assert one.length == (len(one.sent) if whole else one.accepted if ended else drafted)
            behind += whole and drafted < len(one.sent)
    assert (behind > 0) == (not stepwise)  # there were stop tokens drafted and not accepted


def cut_at(tokens: Sequence[int], stops: Sequence[int]) -> int:
    """How many tokens there are up to and with the first stop token."""
    return next((place for place, token in enumerate(tokens, 1) if token in stops), len(tokens))


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({}, 512),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 512),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 2048),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}}, 1024),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}}, 512),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}}, 1024),
    ],
    ids=str,
)
def test_positions_are_those_that_the_config_states_scaled(rope: dict, positions: int) -> None:
    assert positions_of({"max_position_embeddings": 512, **rope}) == positions
    assert positions_of(rope) is None


def test_a_prompt_beyond_the_targets_positions_is_refused() -> None:
    target = tiny_target()
    [prompt] = prompts_of(target, (1000,))
    assert len(generate(target, None, [prompt], DecodeSettings(max_new_tokens=24))[0].output_ids) == 24
    with pytest.raises(DataError, match=r"sample 1: longer.*1000 tokens.*at most 999: 1024 positions less 25 new"):
        generate(target, None, [[1], prompt], DecodeSettings(max_new_tokens=25))


def test_next_turns_can_be_appended_while_decoding() -> None:
    target = tiny_target()
    first = prompts_of(target, (4, 6, 3))
    requests = deque(DecodeRequest(tuple(prompt), number, ("turn", 0)) for number, prompt in enumerate(first))
    decoder = Decoder(target, FakeDrafter(bigram_table(target), 2, 3), DecodeSettings(max_new_tokens=5), 2)
    seen = []
    for one in decoder.stream(requests):
        seen.append(one)
        if one.request.tag == ("turn", 0):
            following = (*one.request.prompt_ids, *one.output_ids, 1, 2)
            requests.append(DecodeRequest(following, 10 + one.request.sample_id, ("turn", 1)))
    assert len(seen) == 6
    for one in seen:
        assert one.output_ids == greedy_by_hand(target, list(one.request.prompt_ids), 5)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(DataError, match="empty prompt"):
        generate(tiny_target(), None, [[]], DecodeSettings())


def test_one_reading_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host reads device values once a round: `.cpu()` is counted, `.item()` and `.tolist()` do not occur."""
    target = tiny_target()
    prompts = prompts_of(target, (4, 6))

    class Counting(FakeDrafter):
        def extend(self, *given: object) -> None:
            pass

        def reset_rows(self, rows: Tensor) -> None:
            pass

        def move_rows(self, source: Tensor, target: Tensor) -> None:
            pass

    reads = {"cpu": 0, "other": 0}
    cpu = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self, *a: reads.update(cpu=reads["cpu"] + 1) or cpu(self, *a))
    for name in ("item", "tolist", "__int__", "__bool__", "__float__", "__index__", "nonzero"):
        original = getattr(Tensor, name)

        def spy(self: Tensor, *args: object, _original=original, **kwargs: object) -> object:
            reads["other"] += 1
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, spy)
    decoder = Decoder(target, Counting(bigram_table(target), 2, 3), DecodeSettings(1.0, max_new_tokens=20), 2)
    reads.update(cpu=0, other=0)
    list(decoder.stream(deque(DecodeRequest(tuple(p), i) for i, p in enumerate(prompts))))
    assert reads["cpu"] == decoder.clock.rounds + 1
    assert reads["other"] == 0


# -- sampling: the joint distribution of short outputs ---------------------------------------------------------------


class Lookahead(Throughput):
    """What the scheduler must not do: the best total over all admissions, later tokens' confidences included."""

    def admit(self, confidence, drafted, rows):
        survival = confidence.cumprod(axis=1)
        lengths = np.zeros(rows, dtype=np.int64)
        for row in range(rows):
            gains = np.concatenate(([1.0], 1 + survival[row].cumsum()))
            lengths[row] = int((gains / self.costs.seconds(1, 1 + np.arange(drafted + 1))).argmax())
        return lengths


def sampled_counts(policy, temperature: float, samples: int, batch_size: int = 250, drafts: int = 3):
    """Counts of three-token outputs over a vocabulary of five, drafted with confidences that depend on the tokens."""
    target = tiny_target(vocab=5, seed=4)
    table = bigram_table(target, 1.5)
    # A weak first token, then sure ones, but never after token 0 or 1: a policy that looked ahead would show.
    confidence = torch.full((drafts, 5), 4.5)
    confidence[0], confidence[1:, :2] = -0.8, -6.0
    drafter = FakeDrafter(table, batch_size, drafts, confidence)
    settings = DecodeSettings(temperature, max_new_tokens=3, seed=11)
    prompt = (1, 3, 2)
    decoder = Decoder(target, drafter, settings, batch_size, policy)
    counts: dict[tuple[int, ...], int] = {}
    for one in decoder.stream(deque(DecodeRequest(prompt, number) for number in range(samples))):
        counts[tuple(one.output_ids)] = counts.get(tuple(one.output_ids), 0) + 1
    return counts, exact_joint(target, list(prompt), 3, temperature), decoder.clock


COSTS = StepCosts({1: (np.array([1.0, 2.0, 4.0]), np.array([1.0, 1.4, 1.5]))})
BATCH_COSTS = StepCosts({250: (np.array([250.0, 1000.0]), np.array([1.0, 1.4]))})
POLICIES = {"all": None, "threshold": Threshold(0.2), "scheduler": Throughput(BATCH_COSTS)}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("temperature", [1.0, pytest.param(0.7, marks=pytest.mark.slow)])
def test_joint_distribution_is_the_targets(name: str, temperature: float) -> None:
    counts, joint, clock = sampled_counts(POLICIES[name], temperature, 6_000)
    assert chi_square(counts, joint) > 1e-3
    sent = clock.verified / clock.row_rounds
    assert sent == 4 if name == "all" else 1.5 < sent < 3.9  # the policies did cut


def test_chi_square_detects_a_policy_that_looks_ahead() -> None:
    """The control: the same test fails where admission depends on what was drafted later."""
    counts, joint, _ = sampled_counts(Lookahead(COSTS), 1.0, 6_000)
    assert chi_square(counts, joint) < 1e-6


def test_chi_square_detects_another_temperature() -> None:
    counts, _, _ = sampled_counts(None, 1.0, 4_000)
    target = tiny_target(vocab=5, seed=4)
    assert chi_square(counts, exact_joint(target, [1, 3, 2], 3, 0.7)) < 1e-6


def test_joint_enumeration_sums_to_one() -> None:
    joint = exact_joint(tiny_target(vocab=5, seed=4), [1, 3, 2], 3, 1.0)
    assert len(joint) == len(list(itertools.product(range(5), repeat=3)))
    assert abs(sum(joint.values()) - 1) < 1e-9
