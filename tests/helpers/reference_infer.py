"""Greedy decodings of DFlash 2 by Automodel (``infer_dflash2*``): ids, acceptance lengths, every round's walk.

There the last round's length is cut so that the lengths add up to the limit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from reference_c import imported
from reference_cases import CaseErrors
from safetensors.torch import load_file
from torch import Tensor

from deepspec.decoding.loop import generate
from deepspec.decoding.records import DecodeSettings
from deepspec.errors import EvaluationError
from deepspec.files import read_json
from deepspec.targets import load_target


def check(case: Path) -> CaseErrors:
    """Every run of one case."""
    reference = read_json(case / "results.json", EvaluationError)
    target = load_target(target_folder(case, Path(reference["target_dir"])), torch.float32)
    config = dict(read_json(case / "draft" / "config.json", EvaluationError))
    model = imported(case / "draft", "zlab", config, load_file(case / "draft" / "model.safetensors"), target.spec)
    model.attach(target.embed_weight, target.head_weight)
    errors = CaseErrors(case.name, index=0.0, convention="rounds of Automodel's spec_generate")
    for run in reference["runs"]:
        rounds = Rounds(model.eval())
        settings = DecodeSettings(max_new_tokens=reference["max_new_tokens"], release_counting=True)
        capacity = len(run["prompt"]) + reference["max_new_tokens"] + model.config.max_draft + 2
        found = generate(target, model.algorithm.drafter(model, 1, capacity), [run["prompt"]], settings)[0]
        rounds.remove()
        equal = run["prompt"] + found.output_ids == run["output_ids"]
        lengths = list(found.acceptance_lengths)
        lengths[-1] = min(lengths[-1], reference["max_new_tokens"] - sum(lengths[:-1]))
        equal &= lengths == run["acceptance_lengths"]
        errors.worst("decoding", (errors.decoding or 0.0) + (not equal))
        errors.worst("index", float(len(found.rounds) != len(run["proposals"])))
        for mine, theirs in zip(rounds.seen, run["proposals"], strict=False):  # one round more was begun, and dropped
            wrong = [key for key, value in mine.items() if theirs[key] != value]
            errors.worst("index", float(len(wrong)))
    return errors


def target_folder(case: Path, given: Path) -> Path:
    """The target's folder, which is stated from the folder above ``shared``."""
    below = Path(*given.parts[given.parts[0] == "shared" :])
    places = [case / given, case.parents[1] / below, Path(__file__).parents[2].parent / "shared" / below]
    return next((place for place in places if place.is_dir()), places[0])


class Rounds:
    """What the draft's head and selector saw of each round, by the reference's names."""

    def __init__(self, model: Any) -> None:
        self.model, self.seen = model, []
        self.forward = model.candidate_selector.forward
        model.candidate_selector.forward = self.scores

    def scores(self, hidden: Tensor, previous: Tensor, candidates: Tensor) -> Tensor:
        """The selector's own, noted: called slot by slot, of a round's first slot first."""
        if not self.seen or len(self.seen[-1]["path"]) == self.model.config.max_draft:
            self.seen.append({"anchor_token": int(previous), "unary_argmax": [], "candidates": [], "path": []})
        now = self.seen[-1]
        found = self.forward(hidden, previous, candidates)
        unary = self.model.head.logits(hidden)
        now["unary_argmax"].append(int(unary.argmax(-1)))
        now["candidates"].append(candidates[0].tolist())
        scores = found + unary.gather(1, candidates)
        now["path"].append(int(candidates[0, scores[0].argmax()]))
        now["verify_input_ids"] = [now["anchor_token"], *now["path"]]
        return found

    def remove(self) -> None:
        """Leave the model as it was."""
        self.model.candidate_selector.forward = self.forward
