"""Conformance of an engine of ``deepspec export``, as a pytest class. Subclass it and name its row in the registry::

    from deepspec.testing.engine import EngineSuite

    class TestMine(EngineSuite):
        engine = "mine"

Every kind of draft that the registry's algorithms can have is then offered to the engine, over every family of layers:
it is taken, and comes back bit for bit, or it is refused with a reason. ``families`` narrows the families.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from deepspec import registry
from deepspec.drafts import FROZEN, read_weights, save_draft
from deepspec.errors import DraftError
from deepspec.export.convert import ExportOptions, export_draft, import_draft
from deepspec.export.engines.base import ExportEngine
from deepspec.export.parts import DraftCheckpoint, ImportHints
from deepspec.targets import Target
from deepspec.testing import tiny

LAYERS, MIXED = (0, 1, 2), (2, 0, 1)  # that the drafts read: in rising order, and not
REDUCED = 20  # tokens of a reduced vocabulary
ANCHOR = "sample_from_anchor"
VARIANTS: dict[str, dict[str, Any]] = {  # keys of `draft:`, for every algorithm that has them
    "": {},
    "-k-1": {ANCHOR: False},
    "-reduced": {"draft_vocab_size": REDUCED},
    "-causal-k-1": {"causal": True, ANCHOR: False},
    "-window-k-1": {"sliding_window": 8, "full_layers": [0], ANCHOR: False},
    "-convolutions": {"conv_kernel_size": 3, "conv_group_size": 8},
    "-fc-norm": {"fc_norm": True},
    "-norms": {"norm_before_fc": True, "norm_before_residual": True},
    "-norm-output": {"norm_output": True},
    "-gated": {"markov_head": "gated"},
    "-rnn": {"markov_head": "rnn"},
    "-no-markov": {"markov_rank": 0, "confidence_with_markov": False},
    "-no-confidence": {"confidence_head": False, "confidence_with_markov": False},
}


@dataclass(frozen=True)
class Offer:
    """One kind of draft over one family of layers."""

    algorithm: str
    variant: str
    family: str

    def __str__(self) -> str:
        return f"{self.algorithm}{self.variant}-{self.family}"

    def draft(self, layers: tuple[int, ...] = LAYERS) -> DraftCheckpoint:
        """A random draft of this kind with its target's embedding and head, in our layout."""
        return _draft(self, layers)


@cache
def _draft(offer: Offer, layers: tuple[int, ...]) -> DraftCheckpoint:
    target = _target(offer.family)
    section = {**tiny.tiny_section(offer.algorithm, target_layers=list(layers)), **VARIANTS[offer.variant]}
    model = tiny.tiny_draft(section, offer.algorithm, target)
    if model.config.draft_vocab_size:
        model.set_draft_vocab(torch.arange(1, 1 + 2 * REDUCED, 2))
    state = {**model.state_dict(), **dict(zip(FROZEN, (target.embed_weight, target.head_weight), strict=True))}
    return DraftCheckpoint(_as_read(model.algorithm.config_json(model.config, target.spec)), state)


@cache
def _target(family: str) -> Target:
    return tiny.tiny_target(family)


def _as_read(config: dict[str, Any]) -> dict[str, Any]:
    """A config as a file gives it back."""
    return dict(json.loads(json.dumps(config)))


def offers(families: Iterable[str]) -> list[Offer]:
    """Every kind of draft over every family."""
    found = []
    for algorithm in registry.ALGORITHMS:
        known = {one.name for one in fields(registry.algorithm(algorithm).config_class) if one.init}
        variants = [name for name, keys in VARIANTS.items() if known >= set(keys)]
        found += [Offer(algorithm, variant, family) for variant in variants for family in families]
    return found


def stated(config: Any, key: str) -> Iterator[Any]:
    """Every value of ``key``, or of one that ends in ``.key``, in a config, however deep."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            if name == key or name.endswith(f".{key}"):
                yield value
            yield from stated(value, key)


class EngineSuite:
    """What an export relies on in an :class:`~deepspec.export.engines.base.ExportEngine`."""

    engine: ClassVar[str]
    families: ClassVar[tuple[str, ...] | None] = None  # None: every family of the registry

    @classmethod
    def every(cls) -> list[Offer]:
        """What is offered to the engine."""
        return offers(registry.FAMILIES if cls.families is None else cls.families)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Every kind of draft with every family."""
        if "offer" in metafunc.fixturenames:
            metafunc.parametrize("offer", self.every(), ids=str)

    @pytest.fixture
    def subject(self) -> ExportEngine:
        """The engine under test."""
        found: ExportEngine = registry.engine(self.engine)
        return found

    @pytest.fixture
    def written(self, subject: ExportEngine) -> dict[Offer, DraftCheckpoint]:
        """What the engine takes, in its layout."""
        return {one: subject.write(one.draft()) for one in self.every() if subject.reason(one.draft()) is None}

    @pytest.fixture
    def forms(self, written: dict[Offer, DraftCheckpoint]) -> list[Offer]:
        """One offer of each architecture that the engine takes."""
        return list({str(draft.config.get("architectures")): offer for offer, draft in written.items()}.values())

    def test_its_row_in_the_registry_has_its_name(self, subject: ExportEngine) -> None:
        """``--format`` and provenance use the same name."""
        assert subject.name == self.engine

    def test_it_takes_a_draft(self, forms: list[Offer]) -> None:
        """At least one kind of today's."""
        assert forms

    def test_a_draft_comes_back_bit_for_bit_or_is_refused_with_a_reason(
        self, subject: ExportEngine, offer: Offer
    ) -> None:
        """A reason names a key of the draft."""
        ours = offer.draft()
        if reason := subject.reason(ours):
            assert reason.key in {*ours.config, "algorithm"}
            told = rf"{re.escape(reason.key)}: the {self.engine} format .*{re.escape(reason.problem)}"
            with pytest.raises(DraftError, match=told):
                subject.write(ours)
            return
        written = subject.write(ours)
        back = subject.read(replace(written, config=_as_read(written.config)), ImportHints())
        assert (back.kind, back.parsed, back.shape) == (ours.kind, ours.parsed, ours.shape)
        expected = dict(ours.state)
        if not subject.holds_frozen or ("d2t" in expected and subject.cuts_head):  # the target has them, or the rest
            expected = {key: tensor for key, tensor in expected.items() if key not in FROZEN}
        embedding = FROZEN[0]  # with a row of the draft's own in the file: the target has the rest
        if embedding in written.state and not torch.equal(written.state[embedding], ours.state[embedding]):
            expected.pop(embedding, None)
        assert sorted(back.state) == sorted(expected)
        assert all(torch.equal(back.state[key], tensor) for key, tensor in expected.items())

    def test_its_layout_states_the_slot_convention(self, written: dict[Offer, DraftCheckpoint]) -> None:
        """Read the wrong way a draft is accepted about 1.1 tokens a round, without an error."""
        for offer, draft in written.items():
            wanted = {offer.draft().config[ANCHOR]} if ANCHOR in offer.draft().config else set()
            assert set(stated(draft.config, ANCHOR)) == wanted, offer

    def test_a_reduced_vocabulary_has_its_rows_and_its_offsets(
        self, subject: ExportEngine, written: dict[Offer, DraftCheckpoint]
    ) -> None:
        """``d2t`` int64, target id minus draft id; the rows of the head where the engine needs them in the file."""
        for offer, draft in written.items():
            offsets = [tensor for name, tensor in draft.state.items() if name.endswith("d2t")]
            if offer.draft().parsed.draft_vocab_size is None:
                assert not offsets, offer
                continue
            first = torch.arange(REDUCED) if subject.absolute_ids else 0
            assert torch.equal(offsets[0] - first, torch.arange(1, 1 + REDUCED)), offer
            if subject.cuts_head:
                (head,) = (tensor for name, tensor in draft.state.items() if f".{name}".endswith(f".{subject.head}"))
                assert torch.equal(head, offer.draft().state[FROZEN[1]][1 : 2 * REDUCED : 2]), offer

    def test_folders_hold_the_layers_in_rising_order_and_the_columns_of_fc_with_them(
        self, forms: list[Offer], tmp_path: Path
    ) -> None:
        """Engines hand features out layer by layer, whatever the order of the list."""
        for offer in forms:
            folder, ours = tmp_path / str(offer), offer.draft(MIXED)
            save_draft(folder / "ours", ours.state, ours.config, {})
            target = str(tiny.tiny_folder(_target(offer.family), folder / "target"))
            export_draft(folder / "ours", folder / "out", ExportOptions(self.engine, target=target))
            back, name = import_draft(folder / "out", folder / "back", self.engine)
            assert (name, back.parsed.target_layers) == (self.engine, LAYERS)
            parts = ours.state["fc.weight"].split(back.shape.hidden_size, dim=1)
            columns = dict(zip(MIXED, parts, strict=True))
            found = read_weights(folder / "back")
            assert torch.equal(found.pop("fc.weight"), torch.cat([columns[layer] for layer in LAYERS], dim=1))
            assert all(torch.equal(tensor, ours.state[name]) for name, tensor in found.items())

    def test_nothing_is_left_of_a_refused_export(self, subject: ExportEngine, tmp_path: Path) -> None:
        """The message names an engine that takes the draft."""
        refused = next((one for one in self.every() if subject.reason(one.draft())), None)
        if refused is None:
            pytest.skip("it refuses nothing")
        save_draft(tmp_path / "ours", refused.draft().state, refused.draft().config, {})
        with pytest.raises(DraftError, match="export to "):
            export_draft(tmp_path / "ours", tmp_path / "out", ExportOptions(self.engine))
        assert not (tmp_path / "out").exists()

    def test_the_command_names_target_and_folder(self, subject: ExportEngine, forms: list[Offer]) -> None:
        """It is in the model card."""
        for offer in forms:
            command = subject.command(offer.draft(), "my/target", "the-folder")
            assert "my/target" in command
            assert "the-folder" in command

    def test_it_knows_its_own_folders_and_no_others(
        self, subject: ExportEngine, written: dict[Offer, DraftCheckpoint]
    ) -> None:
        """What ``--from auto`` calls."""
        assert all(subject.matches(draft.config) for draft in written.values())
        assert not subject.matches({"architectures": ["Unknown"], "model_type": "unknown"})
        assert not subject.matches({})

    def test_an_import_refuses_what_it_does_not_know(
        self, subject: ExportEngine, written: dict[Offer, DraftCheckpoint], forms: list[Offer], tmp_path: Path
    ) -> None:
        """A weight too many, one too few, an architecture of somebody else's."""
        for offer in forms:
            draft, folder = written[offer], tmp_path / str(offer)
            norm = next(name for name in draft.state if name.endswith("norm.weight"))
            target = str(tiny.tiny_folder(_target(offer.family), folder / "target"))
            fewer = {name: tensor for name, tensor in draft.state.items() if name != norm}
            more = draft.state | {norm.replace("norm.weight", "gate.weight"): torch.zeros(1)}
            for number, state in enumerate((more, fewer)):
                subject.save(folder / str(number), replace(draft, state=state), {}, target=target)
                with pytest.raises(DraftError, match="weights do not fit the config"):
                    import_draft(folder / str(number), folder / "never", self.engine)
            assert not (folder / "never").exists()
            unknown = DraftCheckpoint({"architectures": ["Unknown"], "num_target_layers": 4}, draft.state)
            with pytest.raises(DraftError):
                subject.read(unknown, ImportHints())
