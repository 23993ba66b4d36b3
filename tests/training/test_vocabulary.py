"""A reduced vocabulary from the data through training to the draft folder; Gemma's buffers travel too."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import training_tools as tools
import yaml
from safetensors.torch import load_file

from deepspec.drafts import load_draft
from deepspec.export.consolidate import consolidate
from deepspec.targets import load_target
from deepspec.training.initial import reduced_vocabulary


@pytest.mark.parametrize(
    ("algorithm", "zero"),
    [
        pytest.param("eagle3", "zero1_bf16", marks=pytest.mark.slow),
        ("eagle3", "zero2_fp32"),
        pytest.param("dspark", "zero1_bf16", marks=pytest.mark.slow),
    ],
)
def test_vocabulary_is_counted_trained_and_exported(algorithm: str, zero: str, tmp_path: Path) -> None:
    target = tools.make_target(tmp_path / "target")
    path = tools.write_recipe(tmp_path / zero, target, algorithm, zero, max_steps=3, save_every=3)
    recipe = yaml.safe_load(path.read_text())
    recipe["draft"]["draft_vocab_size"] = 20
    path.write_text(yaml.safe_dump(recipe))
    tools.run_jobs(tmp_path, [{"recipe": str(path)}], 1)
    consolidate(tmp_path / zero / "run", tmp_path / "draft", embeddings=False)
    loaded = load_draft(tmp_path / "draft", load_target(target, torch.float32))
    source = tools.MemorySource(load_target(target, torch.float32))
    counts = np.zeros(64, dtype=int)
    for ids, mask, *_ in source.samples:
        for token in ids[mask].tolist():
            counts[token] += 1
    wanted = sorted(sorted(range(64), key=lambda token: (-counts[token], token))[:20])
    assert loaded.draft_vocab_tokens.tolist() == wanted
    assert reduced_vocabulary(source, 64, 20).tolist() == wanted
    stored = load_file(tmp_path / "draft" / "model.safetensors")
    assert stored["d2t"].dtype == torch.int64
    assert stored["t2d"].dtype == torch.bool
    assert json.loads((tmp_path / "draft" / "config.json").read_text())["draft_vocab_size"] == 20


def test_a_kept_vocabulary_that_lacks_much_of_the_data_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tools.MemorySource(load_target(tools.make_target(tmp_path / "target"), torch.float32))
    answers = np.concatenate([ids[mask].numpy() for ids, mask, *_ in source.samples])
    frequent = reduced_vocabulary(source, 64, 20)
    assert not [one for one in caplog.records if one.levelname == "WARNING"]
    rare = torch.tensor(np.setdiff1d(np.arange(64), frequent.numpy())[:20])
    assert reduced_vocabulary(source, 64, 20, rare) is rare
    share = np.isin(answers, frequent.numpy()).mean()
    lost = 1 - np.isin(answers, rare.numpy()).mean()
    warning = next(one.getMessage() for one in caplog.records if one.levelname == "WARNING")
    assert f"{100 * lost:.1f} % are tokens that the draft it starts from cannot propose" in warning
    assert f"train.init.vocabulary: data they would be {100 * (1 - share):.1f} %" in warning
