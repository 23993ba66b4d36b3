"""A new drafter is one file and one registry row: the file is written here, and nothing else is touched."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepspec import registry
from deepspec.drafts import draft_algorithm
from deepspec.errors import DraftError
from deepspec.testing.case import Case, engine_answers
from deepspec.testing.drafter import DrafterSuite

TOY = '''
"""Every slot guesses by itself from the newest feature and the newest token; the slots of a round see each other."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from deepspec.algorithms.base import Algorithm, DraftConfig, Drafter, DraftModel, Proposal, require_at_least
from deepspec.algorithms.own_fields import OwnField
from deepspec.batch import LossPlan
from deepspec.metrics import LossTerms, WeightedSum


@dataclass(frozen=True, kw_only=True)
class ToyConfig(DraftConfig):
    algorithm: ClassVar[str] = "toy"
    slots: int = 3

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, 1, "slots")

    @property
    def max_draft(self):
        return self.slots


@dataclass(frozen=True)
class ToyPlan(LossPlan):
    slot_R: torch.Tensor  # supervised slots in [B, S, K] flattened
    label_R: torch.Tensor  # their labels in [B, S] flattened


class ToyDraft(DraftModel):
    def __init__(self, algorithm, config, shape, family):
        super().__init__(algorithm, config, shape, family)
        self.slot = nn.Embedding(config.slots, shape.hidden_size)

    def slots(self, features, tokens):
        hidden = self.fc(features.to(self.dtype)) + self.frozen.embed(tokens)
        step = torch.arange(self.config.slots, device=hidden.device)
        hidden, table = hidden[..., None, :] + self.slot(step), self.rotary(step)
        for layer in self.layers:
            normed = layer.input_layernorm(hidden)
            keys, values = layer.self_attn.keys_values(normed, table)
            heads = (x.transpose(-2, -3) for x in (layer.self_attn.queries(normed, table), keys, values))
            mixed = F.scaled_dot_product_attention(*heads, scale=layer.self_attn.scale, enable_gqa=True)
            hidden = layer.finish(hidden, mixed.transpose(-2, -3))
        return self.norm(hidden)


class ToyDrafter(Drafter):
    def __init__(self, model, batch_size, max_length):
        super().__init__(model, batch_size, max_length)
        self.newest = model.fc.weight.detach().new_zeros(batch_size, model.fc.in_features)

    def move_rows(self, source, target):
        self.newest[target] = self.newest[source]

    def extend(self, features, tokens, counts, max_context_len, rows=None):
        rows = self._row_B[: len(features)] if rows is None else rows
        index = (counts - 1).clamp_min(0)
        newest = features[torch.arange(len(features), device=features.device), index].to(self.newest.dtype)
        self.newest[rows] = torch.where((counts > 0)[:, None], newest, self.newest[rows])

    @torch.no_grad()
    def propose(self, last_token, sample, max_draft=None):
        hidden = self.model.slots(self.newest[: len(last_token)], last_token)
        logits = self.model.expand_to_target_vocab(self.model.head.logits(hidden).float())
        drawn = [sample(logits[:, k], k) for k in range(min(max_draft or self.max_draft, self.max_draft))]
        probs = None if drawn[0][1] is None else torch.stack([one[1] for one in drawn], dim=1)
        return Proposal(torch.stack([one[0] for one in drawn], dim=1), probs, None)


class Toy(Algorithm):
    name = "toy"
    config_class, model_class, drafter_class = ToyConfig, ToyDraft, ToyDrafter
    architecture = "ToyModel"
    own_fields = (OwnField("toy_slots", "slots"),)
    tiny_section = {"num_layers": 1, "slots": 3}

    def plan(self, config, supervision):
        mask = supervision.loss_mask
        B, S = mask.shape
        label_SK = torch.arange(S)[:, None] + 2 + torch.arange(config.slots)
        inside = label_SK < supervision.lengths[:, None, None]
        supervised = inside & mask[:, label_SK.clamp_max(S - 1)]
        label_BSK = label_SK + S * torch.arange(B)[:, None, None]
        slot_R = supervised.flatten().nonzero()[:, 0]
        return ToyPlan(torch.tensor(float(len(slot_R))), slot_R, label_BSK.flatten()[slot_R])

    def objective(self, model, batch):
        next_ids = F.pad(batch.input_ids[:, 1:], (0, 1))
        hidden_RD = model.slots(batch.features, next_ids).flatten(0, 2)[batch.plan.slot_R]
        label_R, in_vocab_R = model.draft_ids(batch.input_ids.flatten()[batch.plan.label_R])
        loss_R = F.cross_entropy(model.head.logits(hidden_RD).float(), label_R, reduction="none")
        total = (loss_R if in_vocab_R is None else loss_R * in_vocab_R).sum()
        return LossTerms({"ce": WeightedSum(total, batch.plan.weight)}, {"ce": 1.0}, {})

    def needs_last_hidden(self, config):
        return False


TOY = Toy()
'''


@pytest.fixture(scope="module", autouse=True)
def _row(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The file in a folder that Python imports from, and its row."""
    folder = tmp_path_factory.mktemp("drafter")
    (folder / "toy_drafter.py").write_text(TOY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setitem(registry.ALGORITHMS, "toy", "toy_drafter:TOY")
        yield
        sys.modules.pop("toy_drafter", None)


class TestToyDrafter(DrafterSuite):
    algorithms = ("toy",)
    families = ("qwen3", "gemma4")

    def test_it_travels_in_our_own_layout_alone(self, case: Case, tmp_path: Path) -> None:
        answers = engine_answers(case.save(tmp_path / "draft", case.draft(), standalone=True))
        assert [name for name, answer in answers.items() if answer == "toy"] == ["deepspec"]


def test_two_algorithms_that_claim_a_folder_are_both_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.algorithm("toy"), "architecture", registry.algorithm("eagle3").architecture)
    with pytest.raises(DraftError, match=r"several algorithms claim this draft.*eagle3.*toy"):
        draft_algorithm({"architectures": ["Qwen3Eagle3Model"]})


def test_a_folder_that_nobody_claims_names_what_is_known() -> None:
    with pytest.raises(DraftError, match=r"unknown draft architecture.*\*ToyModel.*import it first"):
        draft_algorithm({"architectures": ["SomebodysModel"]})
