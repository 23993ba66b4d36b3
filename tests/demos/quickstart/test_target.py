"""The tiny target: its optimizer against a plain one, its batches, and a short training."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from deepspec.demos.quickstart import TYPES
from deepspec.demos.quickstart import target as target_stage
from deepspec.demos.quickstart.muon import NEWTON_SCHULZ, Muon, orthogonalize
from deepspec.demos.quickstart.target import MANIFEST, PROMPT_WEIGHT, build_model, collate, losses, make_target
from deepspec.demos.quickstart.text import conversations
from deepspec.demos.quickstart.tokenizer import END, MASK_TOKEN_ID, VOCAB_SIZE, train_tokenizer
from deepspec.distributed import multiplies_bfloat16
from deepspec.targets import load_spec, load_target, load_tokenizer


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 32), (2, 32, 8)])
def test_orthogonal_updates_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)).float())
    assert values.min() > 0.3
    assert values.max() < 1.4


def test_muon_on_many_matrices_equals_muon_on_each() -> None:
    torch.manual_seed(0)
    start, gradients = [torch.randn(12, 6) for _ in range(3)], [[torch.randn(12, 6) for _ in range(3)] for _ in "ab"]
    together = [torch.nn.Parameter(value.clone()) for value in start]
    batched = Muon(together, lr=0.1)
    for step in gradients:
        for parameter, gradient in zip(together, step, strict=True):
            parameter.grad = gradient.clone()
        batched.step()
    for i, value in enumerate(start):
        plain, momentum = value.clone(), torch.zeros_like(value)
        for step in gradients:
            momentum = 0.95 * momentum + 0.05 * step[i]
            update = 0.05 * step[i] + 0.95 * momentum
            x = (update / update.norm()).mT
            x = x.bfloat16() if multiplies_bfloat16() else x
            for a, b, c in NEWTON_SCHULZ:
                x = a * x + (b * (x @ x.mT) + c * (x @ x.mT) @ (x @ x.mT)) @ x
            plain -= 0.1 * 2**0.5 * x.mT.float()
        torch.testing.assert_close(together[i].detach(), plain, atol=5e-3, rtol=0)


def test_muon_on_a_stack_equals_muon_on_its_matrices() -> None:
    torch.manual_seed(0)
    stack, gradient = torch.nn.Parameter(torch.randn(3, 12, 6)), torch.randn(3, 12, 6)
    apart = [torch.nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    stack.grad = gradient
    for parameter, part in zip(apart, gradient, strict=True):
        parameter.grad = part
    Muon([stack], lr=0.1).step()
    Muon(apart, lr=0.1).step()
    torch.testing.assert_close(stack.detach(), torch.stack([one.detach() for one in apart]), atol=5e-3, rtol=0)


@pytest.mark.parametrize(
    ("model_type", "family"), [("qwen3", "qwen3"), ("qwen3_moe", "qwen3"), ("qwen3_next", "llama")]
)
def test_a_target_of_every_type_learns_and_its_drafts_have_layers_of_its_width(
    model_type: str, family: str, tmp_path: Path
) -> None:
    rows = list(islice(conversations(0), 40))
    tokenizer = train_tokenizer(text for row in rows for text in (row.question, row.answer))
    torch.manual_seed(0)
    model = build_model(tokenizer, model_type)
    losses(model, *collate(tokenizer, rows[:2]))[0].backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    layers = load_spec(tmp_path).draft_layers()
    shape = layers.shape
    assert (layers.family.name, shape.num_heads, shape.head_dim, shape.intermediate_size) == (family, 4, 32, 384)
    assert model_type in TYPES


def test_batches_weigh_prompt_answer_and_padding_apart() -> None:
    rows = list(islice(conversations(0), 40))
    tokenizer = train_tokenizer(text for row in rows for text in (row.question, row.answer))
    ids, weights = collate(tokenizer, rows[:4])
    for row, row_ids, row_weights in zip(rows, ids, weights, strict=False):
        answer = tokenizer.decode(row_ids[row_weights == 1])
        assert answer == row.answer + END + "\n"
        assert row.question in tokenizer.decode(row_ids[row_weights == PROMPT_WEIGHT])
    assert weights.unique().tolist() == pytest.approx([0.0, PROMPT_WEIGHT, 1.0])


def test_a_short_training_ends_in_a_target_that_the_pipeline_loads(tmp_path: Path, capsys) -> None:
    make_target(tmp_path / "target", steps=12)
    assert "target: 12 steps in 0:00:" in capsys.readouterr().err
    assert (tmp_path / "target" / MANIFEST).exists()
    spec = load_spec(tmp_path / "target")
    assert (spec.family.name, spec.num_layers, spec.hidden_size) == ("qwen3", 6, 128)
    assert spec.vocab_size == VOCAB_SIZE > MASK_TOKEN_ID >= len(load_tokenizer(tmp_path / "target"))
    target = load_target(tmp_path / "target", torch.float32)
    assert target.embed_weight.data_ptr() == target.head_weight.data_ptr()


def test_an_output_that_cannot_be_made_is_refused_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(target_stage, "train", lambda *_: pytest.fail("it trained"))
    with pytest.raises(NotADirectoryError):
        make_target(tmp_path / "file" / "target")
