"""Conformance of an algorithm, as a pytest class. Subclass it and name the algorithm's row in the registry::

    from deepspec.testing.drafter import DrafterSuite

    class TestMine(DrafterSuite):
        algorithms = ("mine",)

Every test then runs for every family of layers, on a tiny random target. ``families`` narrows them, ``section`` changes
keys of the algorithm's ``tiny_section``, ``target_config`` fields of the target's config; ``zero_stages`` are those
that a training runs with. The suite is the sum of five, which can be subclassed alone.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from deepspec import registry
from deepspec.batch import Batch
from deepspec.decoding.captured import DRAFT, VERIFY, Captured
from deepspec.decoding.loop import Decoder, generate
from deepspec.decoding.paths import decoding_path, take_path
from deepspec.decoding.records import DecodeRequest, DecodeSettings
from deepspec.drafts import FROZEN, build_draft, draft_algorithm, load_draft, read_weights
from deepspec.errors import CacheError, DraftError, RecipeError
from deepspec.targets import Target, load_target
from deepspec.testing import tiny
from deepspec.testing.case import (
    PROMPTS,
    Case,
    Uneven,
    engine_answers,
    equal_gradients,
    equal_rows,
    extend,
    loss_and_gradients,
    propose,
    started,
    terms_of,
    write_run,
)
from deepspec.testing.fake_cuda import CUDA, FakeGraphs, fake_cuda, faked, to_fake
from deepspec.testing.recorder import RecordedGraphs
from deepspec.training.report import Meter

REDUCED = 20  # tokens of a reduced vocabulary


class _Cases:
    """The parametrization that both suites share."""

    algorithms: ClassVar[tuple[str, ...]] = ()
    families: ClassVar[tuple[str, ...] | None] = None  # None: every family of the registry
    section: ClassVar[Mapping[str, Any]] = {}
    target_config: ClassVar[Mapping[str, Any]] = {}
    zero_stages: ClassVar[tuple[int, ...]] = (1,)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Every algorithm with every family."""
        families = registry.FAMILIES if self.families is None else self.families
        if "family" in metafunc.fixturenames:
            pairs = list(itertools.product(self.algorithms, families))
            metafunc.parametrize(("algorithm", "family"), pairs, scope="class")
        if "zero_stage" in metafunc.fixturenames:
            metafunc.parametrize("zero_stage", self.zero_stages)

    @pytest.fixture(scope="class")
    def case(self, algorithm: str, family: str) -> Case:
        """The algorithm under test with one family."""
        target = tiny.tiny_target(family, **self.target_config)
        section = tiny.tiny_section(algorithm, **self.section)
        return Case(registry.algorithm(algorithm), target, section, self.target_config)


class DraftFolderSuite(_Cases):
    """Identity: what the algorithm states, and what is in a draft folder."""

    def test_a_section_is_read_strictly(self, case: Case) -> None:
        """An unknown key is an error, and a config has its algorithm's name."""
        assert case.config.algorithm == case.owner.name
        assert case.config.max_draft >= 1
        with pytest.raises(RecipeError, match=r"draft\.no_such_key"):
            case.owner.parse({**case.section, "no_such_key": 1}, case.target.spec)

    def test_config_json_belongs_to_this_algorithm_alone_and_gives_the_config_back(self, case: Case) -> None:
        """Also without what the recipe alone holds: the loss weights."""
        written = case.config_json(case.draft())
        assert draft_algorithm(written) is case.owner
        assert {own.key for own in case.owner.own_fields if not own.optional} <= set(written)
        read = case.owner.read_config(written)
        for key in ("algorithm", "target_layers", "num_layers", "draft_vocab_size", "max_draft", "confidence_head"):
            assert getattr(read, key) == getattr(case.config, key), key
        again = case.owner.config_json(read, case.target.spec)
        assert json.loads(json.dumps(again)) == written

    def test_a_field_that_is_missing_from_config_json_is_named(self, case: Case, tmp_path: Path) -> None:
        """Unless silence has a meaning."""
        written = case.config_json(case.draft())
        for key in ("target_layer_ids", "num_hidden_layers", "rms_norm_eps", "max_position_embeddings"):
            less = {name: value for name, value in written.items() if name != key}
            with pytest.raises((DraftError, KeyError), match=key):
                build_draft(less, tmp_path / "config.json")

    def test_a_saved_draft_is_loaded_to_the_bit(self, case: Case, tmp_path: Path) -> None:
        """Beside its target, and alone with the target's embedding and head in the folder."""
        model, batch = case.draft(), case.batch([40, 25])
        loaded = load_draft(case.save(tmp_path / "draft", model), case.target)
        assert loaded.algorithm is case.owner
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        alone = load_draft(case.save(tmp_path / "alone", model, standalone=True))
        model.config = loaded.config  # config.json carries no loss weights
        with torch.no_grad():
            wanted = terms_of(model.eval(), batch).weighted_sum()
            for other in (loaded, alone):
                assert torch.equal(terms_of(other, batch).weighted_sum(), wanted)

    def test_a_checkpoint_of_it_can_be_consolidated(self, case: Case) -> None:
        """Parameters and buffers are all there is; the target's embedding and head are neither."""
        model = case.draft()
        names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
        assert sorted(names) == sorted(model.state_dict())
        assert not set(names) & set(FROZEN)
        assert all(parameter.requires_grad for parameter in model.parameters())
        storages = [tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()]
        assert len(set(storages)) == len(storages), "two tensors share memory"

    def test_the_model_card_has_a_row_for_every_fact(self, case: Case) -> None:
        """Each with its own label, each on one line."""
        rows = case.owner.card_rows(case.config, case.target.spec.shape)
        labels = [label for label, _ in rows]
        assert len(set(labels)) == len(labels)
        assert all("\n" not in f"{label}{value}" and "|" not in f"{label}{value}" for label, value in rows)
        assert any(str(value) == str(case.config.max_draft) for _, value in rows)

    def test_every_engine_takes_the_draft_or_says_why_not(self, case: Case, tmp_path: Path) -> None:
        """A refusal is one line; what an engine takes can be read back."""
        for name, answer in engine_answers(case.save(tmp_path / "draft", case.draft(), standalone=True)).items():
            if isinstance(answer, DraftError):
                assert answer.problem, name
                assert "\n" not in str(answer), name
            else:
                assert answer == case.owner.name, name


class TrainingLossSuite(_Cases):
    """The objective: what it depends on, and what it must not depend on."""

    @pytest.mark.parametrize("answers", ["some", "none", "shorter than a round"])
    def test_every_parameter_gets_a_gradient(self, case: Case, answers: str) -> None:
        """Also where a rank has nothing supervised: ZeRO needs the same parameters on every rank."""
        batch = {
            "some": lambda: case.batch([25, 14]),
            "none": lambda: case.batch([12, 9], share=0.0),
            "shorter than a round": lambda: case.batch([3], share=1.0),
        }[answers]()
        model = case.draft()
        loss, gradients = loss_and_gradients(model, batch)
        assert loss == loss
        assert set(gradients) == {name for name, _ in model.named_parameters()}
        assert all(gradient.isfinite().all() for gradient in gradients.values())

    def test_padding_and_the_order_of_rows_change_nothing(self, case: Case) -> None:
        """What is after a row's length is garbage here."""
        model, batch = case.draft(), case.batch([25, 14, 19])
        loss, gradients = loss_and_gradients(model, batch)
        for other in (tiny.padded(batch, 6), tiny.rows_of(batch, [2, 0, 1])):
            again, changed = loss_and_gradients(model, other)
            assert again == pytest.approx(loss, rel=1e-5)
            equal_gradients(changed, gradients)

    def test_how_a_step_is_cut_into_micro_batches_changes_nothing(self, case: Case) -> None:
        """Every term's sum and weight are those of its rows, whichever come together."""
        model, batch = case.draft(), case.batch([25, 14, 19])
        joined = terms_of(model, batch)
        for cut in ([[0], [1], [2]], [[2, 0], [1]]):
            parts = [terms_of(model, tiny.rows_of(batch, rows)) for rows in cut]
            for name, term in joined.terms.items():
                for kind in ("total", "weight"):
                    found = sum(float(torch.as_tensor(getattr(part.terms[name], kind)).detach()) for part in parts)
                    assert found == pytest.approx(float(torch.as_tensor(getattr(term, kind)).detach()), rel=1e-4)

    def test_the_last_hidden_states_are_read_where_it_says_so(self, case: Case) -> None:
        """``needs_last_hidden``: a cache without them serves exactly the algorithms that need none."""
        model, batch = case.draft(), case.batch([25, 14])
        without = Batch(batch.supervision, batch.input_ids, batch.features, None)
        if case.owner.needs_last_hidden(case.config):
            with pytest.raises(CacheError, match="last_hidden"):
                terms_of(model, without)
        else:
            assert loss_and_gradients(model, without)[0] == loss_and_gradients(model, batch)[0]

    def test_activation_checkpointing_changes_nothing(self, case: Case) -> None:
        """Neither the loss nor a gradient."""
        model, batch = case.draft(), case.batch([25, 14])
        loss, gradients = loss_and_gradients(model, batch)
        model.activation_checkpointing = True
        again, changed = loss_and_gradients(model, batch)
        assert again == pytest.approx(loss, rel=1e-6)
        equal_gradients(changed, gradients)

    def test_a_few_steps_lower_the_loss(self, case: Case) -> None:
        """On one batch, by Adam."""
        model, batch = case.draft(), case.batch([40, 25])
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(4):
            losses.append(loss_and_gradients(model, batch)[0])
            optimizer.step()
        assert losses[-1] < losses[0]


class DecodingSuite(_Cases):
    """The drafter: a row's proposal is its own, and decoding stays the target's."""

    eager_pieces: ClassVar[set[str]] = set()  # those of a round that the host reads in: they are not captured

    def test_greedy_decoding_with_the_draft_is_the_targets_own(self, case: Case, tmp_path: Path) -> None:
        """A draft that was saved and loaded; alone and together with others."""
        loaded = load_draft(case.save(tmp_path / "draft", case.draft()), case.target)
        for batch_size in (1, 2 * len(PROMPTS)):
            proposals = case.decode(loaded, batch_size)
            assert max(map(len, proposals)) == case.config.max_draft + 1  # after the newest token

    def test_a_proposal_depends_on_its_own_row_alone(self, case: Case) -> None:
        """Not on the rows beside it, on rows that were moved there, or on what a row held before."""
        model = case.draft().eval()
        alone = [propose(started(case, model, 1, [prompt], [0]), [prompt]) for prompt in PROMPTS[:3]]
        together = started(case, model, 4, PROMPTS[:3], [0, 1, 2])
        equal_rows(propose(together, PROMPTS[:3]), alone)
        moved = started(case, model, 5, PROMPTS[:3], [1, 2, 4])
        moved.move_rows(torch.tensor([4, 1]), torch.tensor([1, 0]))
        order = [PROMPTS[0], PROMPTS[2], PROMPTS[1]]
        equal_rows(propose(moved, order), [alone[0], alone[2], alone[1]])
        moved.reset_rows(torch.tensor([0]))
        extend(case, moved, [PROMPTS[2]], [0])
        equal_rows(propose(moved, [PROMPTS[2]]), [alone[2]])

    def test_captured_rounds_draft_and_commit_what_eager_ones_do(self, case: Case) -> None:
        """A recorder of operations stands in for CUDA graphs; buffers grow, and contexts pass from bucket to bucket."""
        model = case.draft().eval()
        for temperature in (0.0, 1.0):
            settings = DecodeSettings(temperature, 12, seed=3, stop_token_ids=(2, 17))
            found = []
            for captured in (None, Captured(RecordedGraphs(), 8)):
                done = generate(case.target, case.owner.drafter(model, 3, 4), PROMPTS, settings, 3, None, captured)
                found.append([(one.output_ids, [step.sent for step in one.rounds]) for one in done])
            assert found[0] == found[1]
            assert captured is not None
            assert set(captured.refused) == self.eager_pieces
            assert all(captured.count(piece) > 0 for piece in {DRAFT, VERIFY} - self.eager_pieces)

    def test_fewer_tokens_are_the_first_of_all(self, case: Case) -> None:
        """``max_draft`` of a round cuts the proposal, and never lengthens it."""
        model = case.draft().eval()
        every = propose(started(case, model, 1, PROMPTS[:1], [0]), PROMPTS[:1])
        assert every.tokens.shape == (1, case.config.max_draft)
        for count in (1, case.config.max_draft + 3):
            fewer = propose(started(case, model, 1, PROMPTS[:1], [0]), PROMPTS[:1], count)
            assert torch.equal(fewer.tokens, every.tokens[:, :count])

    def test_a_confidence_comes_with_every_token_where_there_is_one(self, case: Case) -> None:
        """``confidence_head`` of the config decides."""
        proposal = propose(started(case, case.draft().eval(), 3, PROMPTS[:3], [0, 1, 2]), PROMPTS[:3])
        if not case.config.confidence_head:
            assert proposal.confidence_logits is None
            return
        assert proposal.confidence_logits is not None
        assert proposal.confidence_logits.shape == proposal.tokens.shape
        assert proposal.confidence_logits.isfinite().all()

    def test_a_reduced_vocabulary_is_drafted_within_and_stays_lossless(self, case: Case, tmp_path: Path) -> None:
        """Gradients too; the tokens come back with the folder."""
        try:
            model = case.draft(draft_vocab_size=REDUCED)
        except RecipeError:
            pytest.skip("it has no reduced vocabulary")
        tokens = torch.randperm(tiny.VOCAB, generator=torch.Generator().manual_seed(0))[:REDUCED].sort().values
        model.set_draft_vocab(tokens)
        _, gradients = loss_and_gradients(model, case.batch([30]))
        assert set(gradients) == {name for name, _ in model.named_parameters()}
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        with torch.no_grad():
            logits = model.expand_to_target_vocab(model.head.logits(torch.randn(3, tiny.HIDDEN)))
        assert logits.isfinite().nonzero()[:, 1].unique().tolist() == tokens.tolist()
        loaded = load_draft(case.save(tmp_path / "draft", model), case.target)
        assert loaded.draft_vocab_tokens is not None
        assert loaded.draft_vocab_tokens.tolist() == loaded.t2d.nonzero()[:, 0].tolist() == tokens.tolist()
        proposals = case.decode(loaded, len(PROMPTS))
        assert {token for proposal in proposals for token in proposal[1:]} <= set(tokens.tolist())
        with pytest.raises(RecipeError, match="draft_vocab_size"):
            case.draft(draft_vocab_size=tiny.VOCAB + 1)


class DeviceSuite(_Cases):
    """Training steps and rounds of decoding on fake CUDA tensors (:mod:`deepspec.testing.fake_cuda`)."""

    @pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
    def test_a_training_step_mixes_no_devices_and_never_waits(self, case: Case) -> None:
        """Objective, loss and backward, and the sums that are reported."""
        model, batch, meter = case.draft(), case.batch([25, 14]), Meter(torch.clone)
        batch = batch.planned(case.owner.plan(model.config, batch.supervision))
        with fake_cuda() as traffic:
            to_fake(model)
            model.attach(faked(case.target.embed_weight), faked(case.target.head_weight))
            for step in range(2):  # the first brings constants to the device
                traffic.clear()
                terms = terms_of(model, batch.to(CUDA, model.dtype))
                share = terms.weighted_sum() / 7.0
                torch.autograd.backward(share)
                meter.add(step, batch, terms, share.detach())
        assert traffic.reads == traffic.waits == []

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_a_round_of_decoding_reads_once_and_waits_for_nothing_else(self, case: Case, temperature: float) -> None:
        """More rounds make no other copies. At a temperature the rows verify different numbers of tokens; without one
        a draft that can draws a tree."""
        _check_rounds(case, temperature, captures=False)

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_what_is_captured_of_a_round_copies_nothing(self, case: Case, temperature: float) -> None:
        """All else is as in the test above, but for the tree, whose rounds stay eager."""
        _check_rounds(case, temperature, captures=True)


def _check_rounds(case: Case, temperature: float, captures: bool) -> None:
    """Assert that rounds on fake CUDA tensors read once each and wait for nothing else."""
    model, target = case.draft().eval(), copy.deepcopy(case.target.model)
    path, seen = decoding_path(case.target), []  # tried on values, which fakes have not
    with fake_cuda() as traffic:
        to_fake(model)
        to_fake(target)
        fake_target = Target(target, case.target.spec)
        take_path(fake_target, path)
        model.attach(fake_target.embed_weight, fake_target.head_weight)
        for new_tokens in (2, 3):
            traffic.clear()
            drafter = case.owner.drafter(model, 2, 16)
            grows = drafter.max_children and not temperature and not captures
            tree = (2,) * min(2, drafter.max_draft) if grows else ()
            settings = DecodeSettings(temperature=temperature, max_new_tokens=new_tokens, tree=tree)
            captured = Captured(FakeGraphs(traffic), 8) if captures else None
            policy = Uneven() if temperature else None
            decoder = Decoder(fake_target, drafter, settings, 2, policy, captured=captured)
            list(decoder.stream(deque(DecodeRequest(tuple(prompt), 0) for prompt in PROMPTS[:2])))
            seen.append((decoder.clock.rounds, len(traffic.reads), Counter(traffic.waits)))
            assert captured is None or not captured.refused
    (few, few_reads, few_waits), (many, many_reads, many_waits) = seen
    assert many_reads - few_reads == many - few > 0
    assert not many_waits - few_waits, "waits in every round"


class TrainingRunSuite(_Cases):
    """A training as a user starts one, to the draft that decodes."""

    @pytest.fixture(scope="session")
    def process_group(self) -> Iterator[None]:
        """Of this process, until the session ends: DeepSpeed cannot start a second one."""
        from deepspec.training.engine import training_processes  # DeepSpeed takes seconds to import

        with training_processes():
            yield

    @pytest.mark.usefixtures("process_group")
    def test_two_steps_of_training_become_a_draft_that_decodes(
        self, case: Case, zero_stage: int, tmp_path: Path
    ) -> None:
        """From a recipe file over conversations and the target itself to a consolidated folder."""
        from deepspec.export.consolidate import consolidate
        from deepspec.training import run

        recipe = write_run(tmp_path, case, zero_stage)
        assert run.train(recipe) == 0
        rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2]
        consolidate(tmp_path / "run", tmp_path / "draft")
        assert {*FROZEN} < set(read_weights(tmp_path / "draft"))
        target = load_target(tmp_path / "target", torch.float32)
        trained = replace(case, target=target)
        loaded = load_draft(tmp_path / "draft", trained.target)
        assert loaded.algorithm is case.owner
        trained.decode(loaded, len(PROMPTS))


class DrafterSuite(DraftFolderSuite, TrainingLossSuite, DecodingSuite, DeviceSuite, TrainingRunSuite):
    """Everything that an algorithm must hold."""
