"""The published greedy decodings: output ids, acceptance lengths, every proposal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deepspec.decoding.loop import generate
from deepspec.decoding.records import DecodeSettings
from deepspec.drafts import load_draft
from deepspec.targets import load_target

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden"
CASES = sorted(path.parent for path in GOLDEN.glob("infer_*/results.json"))


@pytest.mark.skipif(not CASES, reason="no reference data in ../shared/golden")
@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
@pytest.mark.parametrize("batch_size", [1, 8])
def test_reference_decodings_are_equal(case: Path, batch_size: int) -> None:
    reference = json.loads((case / "results.json").read_text())
    target = load_target(case / reference["target_dir"], torch.float32)
    model = load_draft(case / "draft", target)
    alike: dict[tuple, list[dict]] = {}  # runs that can be decoded together
    for run in reference["runs"]:
        key = (tuple(run["stop_token_ids"] or ()), run["confidence_threshold"])
        alike.setdefault(key, []).append(run)
    for (stops, threshold), runs in alike.items():
        settings = DecodeSettings(
            max_new_tokens=reference["max_new_tokens"],
            stop_token_ids=stops,
            confidence_threshold=threshold,
            release_counting=True,
        )
        prompts = [run["prompt"] for run in runs]
        drafter = model.algorithm.drafter(model, batch_size, 200)
        drafted = generate(target, drafter, prompts, settings, batch_size)
        plain = generate(target, None, prompts, settings, batch_size)
        for run, one, other in zip(runs, drafted, plain, strict=True):
            assert run["prompt"] + one.output_ids == run["output_ids"]
            assert other.output_ids == one.output_ids
            assert one.acceptance_lengths == run["acceptance_lengths"]
            lengths = [round_.length for round_ in one.rounds]
            assert lengths == run["proposal_lengths"]
            for mine, length, theirs in zip(one.proposals, lengths, run["proposals"], strict=True):
                assert mine == theirs["verify_input_ids"][: length + 1]
            for round_, theirs in zip(one.rounds, run["proposals"], strict=True):
                if "confidence_logits" in theirs:
                    wanted = theirs["confidence_logits"]
                    assert list(round_.confidence[: len(wanted)]) == pytest.approx(wanted, abs=1e-4)
