"""What the suite of algorithms works on: a case, and what it checks of a draft, an engine and a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from deepspec import registry
from deepspec.algorithms.base import Algorithm, Drafter, DraftModel, Proposal
from deepspec.batch import Batch
from deepspec.data.conversations import write_conversations
from deepspec.decoding.loop import generate
from deepspec.decoding.records import DecodeSettings
from deepspec.demos.quickstart.tokenizer import VOCAB_SIZE, train_tokenizer
from deepspec.drafts import FROZEN, RECIPE, save_draft
from deepspec.errors import DraftError
from deepspec.export.convert import read_draft
from deepspec.export.parts import ImportHints, ascending
from deepspec.metrics import LossTerms
from deepspec.targets import Target
from deepspec.testing import tiny

PROMPTS = [[1, 5, 9, 12], [7], [3, 3, 8, 20, 33, 41, 50, 6, 9, 10, 11], [2, 90, 4]]
SETTINGS = DecodeSettings(temperature=0.0, max_new_tokens=16, stop_token_ids=(2,))


@dataclass(frozen=True)
class Case:
    """One algorithm with one family of layers, on a tiny random target."""

    owner: Algorithm
    target: Target
    section: Mapping[str, Any]
    target_config: Mapping[str, Any]

    @cached_property
    def config(self) -> Any:
        """The config of :attr:`section`."""
        return self.owner.parse(self.section, self.target.spec)

    def draft(self, **changes: Any) -> DraftModel:
        """A random draft; ``changes`` are keys of its section."""
        return tiny.tiny_draft({**self.section, **changes}, self.owner.name, self.target)

    def batch(self, lengths: list[int], share: float = 0.7) -> Batch:
        """A random batch as wide as the draft reads it."""
        return tiny.random_batch(lengths, len(self.config.target_layers), share=share)

    def config_json(self, model: DraftModel) -> dict[str, Any]:
        """config.json of ``model``, as a file would give it back."""
        written: dict[str, Any] = json.loads(json.dumps(self.owner.config_json(model.config, self.target.spec)))
        return written

    def save(self, folder: Path, model: DraftModel, standalone: bool = False) -> Path:
        """A draft folder of ``model``, with the target's embedding and head if ``standalone``."""
        weights = (self.target.embed_weight, self.target.head_weight)
        frozen = dict(zip(FROZEN, weights, strict=True)) if standalone else {}
        save_draft(folder, {**model.state_dict(), **frozen}, self.config_json(model), {"suite": "DrafterSuite"})
        return folder

    @cached_property
    def greedy_text(self) -> list[list[int]]:
        """What the target alone answers to PROMPTS."""
        return [one.output_ids for one in generate(self.target, None, PROMPTS, SETTINGS, len(PROMPTS))]

    def decode(self, model: DraftModel, batch_size: int) -> list[list[int]]:
        """Decode PROMPTS greedily with the draft, compare with the target's own; returns every proposal."""
        drafter = self.owner.drafter(model.eval(), batch_size, 16)  # shorter than the rows get: it must grow
        drafted = generate(self.target, drafter, PROMPTS, SETTINGS, batch_size)
        assert [one.output_ids for one in drafted] == self.greedy_text
        return [proposal for one in drafted for proposal in one.proposals]


class Uneven:
    """A policy that verifies one drafted token more of every row than of the one before."""

    max_draft = None

    def admit(self, confidence: np.ndarray | None, slots: int, rows: int) -> np.ndarray:
        """See :class:`deepspec.decoding.scheduler.Policy`."""
        return np.minimum(np.arange(rows), slots)


def terms_of(model: DraftModel, batch: Batch) -> LossTerms:
    """The objective of a batch as training computes it."""
    terms: LossTerms = model(batch)
    return terms


def loss_and_gradients(model: DraftModel, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """The loss of a batch and every parameter's gradient."""
    model.zero_grad(set_to_none=True)
    loss = terms_of(model, batch).loss()
    torch.autograd.backward(loss)
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def equal_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Assert that they are the same but for rounding."""
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def greedy(logits: Tensor, _slot: int) -> tuple[Tensor, None]:
    """A sampler that takes the likeliest token."""
    return logits.argmax(-1), None


def newest(prompt: list[int]) -> int:
    """A token that comes after a prompt's own."""
    return 3 + sum(prompt) % 90


def extend(case: Case, drafter: Drafter, prompts: list[list[int]], rows: list[int]) -> None:
    """Give ``rows`` the contexts of ``prompts``: every position with the token after it."""
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    features = torch.zeros(*tokens.shape, len(case.config.target_layers) * case.target.spec.hidden_size)
    for row, prompt in enumerate(prompts):
        features[row, : len(prompt)] = case.target.forward(torch.tensor([prompt]), case.config.target_layers).features[
            0
        ]
        tokens[row, : len(prompt)] = torch.tensor([*prompt[1:], newest(prompt)])
    drafter.extend(features, tokens, torch.tensor([len(prompt) for prompt in prompts]), longest, torch.tensor(rows))


def started(case: Case, model: DraftModel, size: int, prompts: list[list[int]], rows: list[int]) -> Drafter:
    """A drafter of ``size`` rows, ``rows`` of them with the contexts of ``prompts``."""
    drafter = case.owner.drafter(model, size, 4)
    drafter.reset_rows(torch.arange(size))
    extend(case, drafter, prompts, rows)
    return drafter


def propose(drafter: Drafter, prompts: list[list[int]], max_draft: int | None = None) -> Proposal:
    """What the first rows draft greedily after the newest tokens of ``prompts``."""
    return drafter.propose(torch.tensor([newest(prompt) for prompt in prompts]), greedy, max_draft)


def equal_rows(proposal: Proposal, alone: list[Proposal]) -> None:
    """Assert that every row of a proposal is what it would be alone."""
    assert torch.equal(proposal.tokens, torch.cat([one.tokens for one in alone]))
    if proposal.confidence_logits is not None:
        wanted = torch.cat([one.confidence_logits for one in alone if one.confidence_logits is not None])
        torch.testing.assert_close(proposal.confidence_logits, wanted, atol=1e-4, rtol=1e-4)


def engine_answers(folder: Path) -> dict[str, str | DraftError]:
    """What every engine makes of the draft in ``folder``: the algorithm that it reads back, or its refusal."""
    answers: dict[str, str | DraftError] = {}
    for name in registry.ENGINES:
        engine = registry.engine(name)
        try:
            answers[name] = engine.read(engine.write(ascending(read_draft(folder))), ImportHints()).algorithm.name
        except DraftError as refusal:
            answers[name] = refusal
    return answers


def write_run(folder: Path, case: Case, zero_stage: int) -> Path:
    """A recipe of two steps, its target with a tokenizer and its conversations beside it."""
    model = tiny.tiny_model(case.target.spec.family.name, **{"vocab_size": VOCAB_SIZE, **case.target_config})
    model.save_pretrained(folder / "target")
    train_tokenizer(["one two three four five six seven eight nine ten"] * 3).save_pretrained(folder / "target")
    return write_recipe(folder, case.owner.name, case.section, zero_stage)


def write_recipe(folder: Path, algorithm: str, section: Mapping[str, Any], zero_stage: int, **data: Any) -> Path:
    """A recipe of two steps over conversations, for the target with its tokenizer in ``folder``.

    ``section`` is ``draft:`` with its ``target_layers``; ``data`` changes keys of ``data:``.
    """
    texts = [f"count to {number} and back: " + "one two three " * number for number in range(4, 12)]
    turns = [[{"role": "user", "content": "go on"}, {"role": "assistant", "content": text}] for text in texts]
    rows = [{"id": str(number), "messages": messages} for number, messages in enumerate(turns)]
    write_conversations(folder / "conversations.jsonl", rows, {"made by": "deepspec.testing"})
    (folder / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": zero_stage}}))
    online = {"source": "online", "conversations": str(folder / "conversations.jsonl"), "min_supervised": 4}
    recipe = {
        "name": "suite", "algorithm": algorithm, "output": str(folder / "run"),
        "draft": {key: value for key, value in section.items() if key != "target_layers"},
        "target": {"path": str(folder / "target"), "layers": list(section["target_layers"]), "dtype": "float32"},
        "data": online | data,
        "train": {
            "deepspeed": str(folder / "zero.json"), "max_steps": 2, "global_batch": 4, "log_every": 1,
            "tensorboard": False,
        },
    }  # fmt: skip
    path = folder / RECIPE
    path.write_text(yaml.safe_dump(recipe))
    return path
