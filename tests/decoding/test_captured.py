"""Captured rounds against eager ones: equal for every drafter, and what a graph would get wrong is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from algorithm_tools import ALGORITHMS, tiny_draft, tiny_target
from model_types import config_of
from torch import Tensor

from deepspec.algorithms.base import Drafter, Proposal
from deepspec.decoding.captured import DRAFT, VERIFY, Captured, HostReads
from deepspec.decoding.loop import generate
from deepspec.decoding.paths import decoding_path
from deepspec.decoding.records import DecodeSettings
from deepspec.targets.adaptor import auto_class
from deepspec.targets.load import Target, spec_from_config
from deepspec.testing.case import Uneven
from deepspec.testing.fake_cuda import CUDA, DeviceError, FakeGraphs, fake_cuda
from deepspec.testing.recorder import RecordedGraphs

STEP = 16  # contexts are rounded up to it: those of PROMPTS pass several buckets
Outcome = list[tuple[list[int], list[tuple[int, ...]]]]


def prompts_of(count: int) -> list[list[int]]:
    """Short and long ones: rows end in different rounds, later prompts are longer than the buffers at first."""
    generator = np.random.Generator(np.random.Philox(key=2))
    return [generator.integers(3, 90, int(size)).tolist() for size in generator.choice([1, 4, 9, 21, 45], count)]


def decode(
    target: Target, drafter: Drafter | None, batch_size: int, settings: DecodeSettings, captured: Captured | None = None
) -> Outcome:
    """Outputs and what every round sent to the target."""
    prompts = prompts_of(batch_size + 2)
    done = generate(target, drafter, prompts, settings, batch_size, None, captured)
    return [(one.output_ids, [step.sent for step in one.rounds]) for one in done]


def settings_at(temperature: float, **more: Any) -> DecodeSettings:
    return DecodeSettings(temperature, 14, seed=5, stop_token_ids=(2, 17), **more)


def recorded() -> Captured:
    return Captured(RecordedGraphs(), STEP)


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target("qwen3")


@pytest.mark.parametrize(
    ("batch_size", "temperature"),
    [
        (1, 0.0),
        (3, 1.0),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in [(1, 1.0), (3, 0.0), (16, 0.0), (16, 1.0)]),
    ],
)
@pytest.mark.parametrize("algorithm", [None, *ALGORITHMS])
def test_captured_rounds_are_the_eager_ones(
    target: Target, algorithm: str | None, batch_size: int, temperature: float
) -> None:
    """Tokens, and every draft that was sent: a wrong draft alone would only be accepted less often."""
    draft = None if algorithm is None else tiny_draft(algorithm, target).eval()
    found, captured = [], recorded()
    for rounds in (None, captured):
        drafter = None if draft is None else draft.algorithm.drafter(draft, batch_size, 16)
        found.append(decode(target, drafter, batch_size, settings_at(temperature), rounds))
    assert found[0] == found[1]
    assert not captured.refused
    assert captured.count(VERIFY) > 2
    assert (captured.count(DRAFT) > 2) == (draft is not None)
    assert len({shape[1] for _, shape in captured.replayed}) > 1  # contexts passed a bucket's edge


def test_a_threshold_and_a_policy_cut_what_captured_rounds_accept(target: Target) -> None:
    draft = tiny_draft("dspark", target).eval()
    for policy, threshold in ((None, 0.4), (Uneven(), 0.0)):
        found = []
        for captured in (None, recorded()):
            drafter, settings = draft.algorithm.drafter(draft, 3, 16), settings_at(1.0, confidence_threshold=threshold)
            done = generate(target, drafter, prompts_of(7), settings, 3, policy, captured)
            found.append([(one.output_ids, [step.sent for step in one.rounds]) for one in done])
        assert found[0] == found[1]
        assert len({len(sent) for _, rounds in found[0] for sent in rounds}) > 1


class Planted:
    """A drafter as it is, with one fault in what it proposes or in the memory that it names."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter, self.calls, self.seen = drafter, 0, torch.zeros(1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.drafter, name)

    def propose(self, last_token: Tensor, sample: Any, max_draft: int | None = None) -> Proposal:
        return self.changed(self.drafter.propose(last_token, sample, max_draft))

    def changed(self, proposal: Proposal) -> Proposal:
        return proposal

    def with_tokens(self, proposal: Proposal, tokens: Tensor) -> Proposal:
        return Proposal(tokens, proposal.probs, proposal.confidence_logits)


class CountsInPython(Planted):
    def changed(self, proposal: Proposal) -> Proposal:
        self.calls += 1
        return self.with_tokens(proposal, (proposal.tokens + self.calls) % 90)


class KeepsAResult(Planted):
    """It mixes the last round's proposal into this one's; the proposal lies in the graph's own memory."""

    def changed(self, proposal: Proposal) -> Proposal:
        now = proposal.tokens + self.seen[:1].long().flatten()[:1] % 2
        self.seen = proposal.tokens
        return self.with_tokens(proposal, now % 90)


class Moving(Planted):
    """Prompts that enter find their rows in new buffers."""

    def reset_rows(self, rows: Tensor) -> None:
        self.drafter.reset_rows(rows)
        self.move()

    def move(self) -> None:
        for cache in self.drafter._cache:
            cache.keys, cache.values = cache.keys.clone(), cache.values.clone()


class HidesItsMemory(Moving):
    """Every round moves it, and nobody is told."""

    def hold(self, max_context_len: int) -> tuple[Tensor, ...]:
        self.drafter.hold(max_context_len)
        self.move()
        return ()


def test_graphs_are_made_anew_where_the_memory_has_moved(target: Target) -> None:
    draft, found, captured = tiny_draft("eagle3", target).eval(), [], recorded()
    for rounds in (None, captured):
        moving: Any = Moving(draft.algorithm.drafter(draft, 3, 99))
        found.append(decode(target, moving, 3, settings_at(0.0), rounds))
    assert found[0] == found[1]
    assert captured.count(DRAFT) > 5


@pytest.mark.parametrize("fault", [CountsInPython, KeepsAResult, HidesItsMemory])
def test_what_a_graph_would_get_wrong_shows_with_the_recorder(target: Target, fault: type[Planted]) -> None:
    draft = tiny_draft("eagle3", target).eval()

    def outcome(captured: Captured | None) -> Outcome:
        planted: Any = fault(draft.algorithm.drafter(draft, 3, 99))
        return decode(target, planted, 3, settings_at(0.0), captured)

    wanted = outcome(None)
    assert outcome(None) == wanted
    try:
        found = outcome(recorded())
    except IndexError:  # garbage as an index
        return
    assert found != wanted


READS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "boolean index": lambda x: x[x > 0],
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_piece_that_reads_on_the_host_stays_eager_and_says_so(
    target: Target, read: Callable[[Tensor], object], caplog: pytest.LogCaptureFixture
) -> None:
    class Reading(Planted):
        def changed(self, proposal: Proposal) -> Proposal:
            read(proposal.tokens)
            return proposal

    draft, captured = tiny_draft("eagle3", target).eval(), recorded()
    found = []
    with caplog.at_level("INFO", "deepspec.decoding.captured"):
        for rounds in (None, captured):
            planted: Any = Reading(draft.algorithm.drafter(draft, 3, 16))
            found.append(decode(target, planted, 3, settings_at(1.0), rounds))
    assert found[0] == found[1]
    assert list(captured.refused) == [DRAFT]
    assert "reads a value on the host" in captured.refused[DRAFT]
    assert [record.message.split(":")[0] for record in caplog.records] == [f"{DRAFT} is not captured"]
    assert captured.count(VERIFY) > 5
    assert not captured.count(DRAFT)


def test_an_operation_that_no_graph_holds_is_noted_and_runs() -> None:
    x, one = torch.arange(4.0), torch.ones(1)
    for work in (lambda: x[torch.tensor([1, 0])], lambda: x.index_put_((torch.tensor([1]),), one), lambda: x + 1):
        with HostReads() as watch:
            work()
        assert not watch.why
    with HostReads() as watch:
        assert float(x.sum()) == 6.0
    assert watch.why


def test_a_capture_that_fails_leaves_the_round_eager(target: Target) -> None:
    """As CUDA refuses what only it knows; nothing of the round was executed."""

    class Refusing(RecordedGraphs):
        def capture(self, work: Callable[[], None]) -> Callable[[], None]:
            super().capture(work)
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    draft, captured = tiny_draft("dflash", target).eval(), Captured(Refusing(), STEP)
    found = [
        decode(target, draft.algorithm.drafter(draft, 3, 16), 3, settings_at(1.0), one) for one in (None, captured)
    ]
    assert found[0] == found[1]
    assert captured.refused == dict.fromkeys((DRAFT, VERIFY), "operation not permitted when stream is capturing")


@pytest.mark.parametrize(
    ("model_type", "path", "verifies"),
    [("mistral", "packed", True), ("gpt_oss", "padded", False), ("lfm2", "replay", False)],
)
def test_targets_on_other_paths_verify_eagerly(model_type: str, path: str, verifies: bool) -> None:
    config = config_of(model_type)
    torch.manual_seed(0)
    target = Target(auto_class(config, model_type).from_config(config).float(), spec_from_config(config, "tiny"))
    assert decoding_path(target).name == path
    draft, captured = tiny_draft("eagle3", target).eval(), recorded()
    found = [
        decode(target, draft.algorithm.drafter(draft, 3, 16), 3, settings_at(1.0), one) for one in (None, captured)
    ]
    assert found[0] == found[1]
    assert (VERIFY in captured.refused) == (not verifies)
    assert captured.count(DRAFT) > 5


def test_a_tree_stays_eager(target: Target) -> None:
    draft, captured = tiny_draft("eagle3", target).eval(), recorded()
    settings = settings_at(0.0, tree=(2, 1))
    found = [decode(target, draft.algorithm.drafter(draft, 3, 16), 3, settings, one) for one in (None, captured)]
    assert found[0] == found[1]
    assert not captured.replayed


def test_a_copy_to_the_host_inside_a_piece_fails_on_fake_tensors() -> None:
    with fake_cuda() as traffic:
        graphs, x = FakeGraphs(traffic), torch.ones(3, device=CUDA)
        fine: Any = lambda: x + 1  # noqa: E731
        plants: tuple[Any, ...] = (lambda: x.cpu(), lambda: torch.ones(3).to(x.device), lambda: x.sum().item())
        graphs.run(fine)
        for planted in plants:
            with pytest.raises(DeviceError):
                graphs.run(planted)


@pytest.mark.parametrize("work", ["copy", "count", "garbage"])
def test_the_recorder_keeps_to_the_rules_of_a_graph(work: str) -> None:
    x, out, made = torch.tensor([1.0, 2.0]), torch.zeros(2), []

    def piece() -> None:
        made.append(x * 2)
        out.copy_(made[-1] + 1)
        x.add_(1)

    replay = RecordedGraphs().capture(piece)
    if work == "copy":
        assert x.tolist() == [1.0, 2.0]
        assert out.tolist() == [0.0, 0.0]
    elif work == "count":
        for wanted in ([3.0, 5.0], [5.0, 7.0]):
            replay()
            assert out.tolist() == wanted
        assert len(made) == 1
    else:
        replay()
        assert made[0].isnan().all()
