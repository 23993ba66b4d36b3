"""Exports in the real llama.cpp server: rounds are ours, tokens its own, and how it answers what we refuse."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from algorithm_tools import tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from deepspec import registry
from deepspec.algorithms.base import DraftModel
from deepspec.batch import Batch
from deepspec.decoding.loop import generate
from deepspec.decoding.records import DecodeSettings
from deepspec.demos.subjects import batch_of, learn
from deepspec.drafts import load_draft, save_draft
from deepspec.errors import DeepSpecError, TargetError
from deepspec.export.convert import ExportOptions, export_draft, read_draft
from deepspec.export.forms.gguf import BlockGGUF, Eagle3GGUF, GGUFForm
from deepspec.serving import llamacpp
from deepspec.serving.llamacpp import LlamaCppServer
from deepspec.targets import Target, load_target
from deepspec.testing import tiny

pytest.importorskip("xllamacpp", reason="the extra `llamacpp`")
PROMPTS = [[5, 9, 12, 40], [70, 3], [33, 41, 50, 60, 9, 10, 11]]
TOKENS = 40
STOP = (2,)
SETTINGS = DecodeSettings(0.0, TOKENS, STOP)
SIZES = {"hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.15, "head_dim": 16}


@dataclass(frozen=True)
class Drafted:
    """A target's folder, and what its drafts are taught: its own answers to PROMPTS."""

    folder: Path
    target: Target
    batch: Batch
    own: list[list[int]]  # these answers

    @cached_property
    def engines(self) -> list[list[int]]:
        """The engine's own answers, without a draft."""
        server = LlamaCppServer(self.folder / "work", self.folder / "never")
        return [row["tokens"] for row in run(self, server, None)]


def letters() -> Any:
    """A byte-level BPE of the bytes and two merges, without a token that an engine takes for an end."""
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {sign: number for number, sign in enumerate([*signs, "th", "the"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def answered(family: str, folder: Path) -> Drafted:
    """A random target with a tokenizer, and its answers with the features that drafts read."""
    tokenizer = letters()
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(tiny_config(family, vocab_size=len(tokenizer), **SIZES)).float()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    target = load_target(folder, torch.float32)
    own = [one.output_ids for one in answers(target, None)]
    texts = [[*prompt, *output] for prompt, output in zip(PROMPTS, own, strict=True)]
    return Drafted(folder, target, batch_of(target, texts, (0, 1, 2)), own)


def answers(target: Target, drafter: Any, settings: DecodeSettings = SETTINGS) -> list[Any]:
    return generate(target, drafter, PROMPTS, settings, 1)


def taught(drafted: Drafted, algorithm: str, steps: int = 30, **changes: Any) -> DraftModel:
    """A draft that has learned the answers, so that rounds accept none, some and all of what it drafts."""
    section = {**tiny.tiny_section(algorithm, target_layers=[0, 1, 2]), **changes}
    owner = registry.algorithm(algorithm)
    model: DraftModel = owner.build(owner.parse(section, drafted.target.spec), drafted.target.spec, 0)
    model.attach(drafted.target.embed_weight, drafted.target.head_weight)
    if model.config.draft_vocab_size:
        model.set_draft_vocab(drafted.batch.input_ids.unique()[: model.config.draft_vocab_size])
    return learn(model, drafted.batch, steps, lr=8e-3)


@pytest.fixture(scope="module")
def block_case(tmp_path_factory: pytest.TempPathFactory) -> Drafted:
    """A target whose layers norm their heads, as the engine's block drafters do."""
    return answered("qwen3", tmp_path_factory.mktemp("normed"))


@pytest.fixture(scope="module")
def flat_case(tmp_path_factory: pytest.TempPathFactory) -> Drafted:
    """A target of Llama layers, as the engine's Eagle3 has."""
    return answered("llama", tmp_path_factory.mktemp("flat"))


class Served:
    """A draft of ours, exported and served."""

    def __init__(self, drafted: Drafted, model: DraftModel, work: Path, dtype: str | None = None) -> None:
        self.drafted, self.work, self.folder = drafted, work, work / "draft"
        config = model.algorithm.config_json(model.config, drafted.target.spec)
        save_draft(self.folder, model.state_dict(), config, {})
        self.draft, self.dtype = read_draft(self.folder), dtype
        self.server = LlamaCppServer(drafted.folder / "work", work / "never")

    def export(self) -> Path:
        options = ExportOptions("gguf", target=str(self.drafted.folder), dtype=self.dtype)
        export_draft(self.folder, self.work / "out", options)
        return self.work / "out"

    def rows(self, exported: Path, **changes: Any) -> list[dict[str, Any]]:
        told = {**self.server.speculative("gguf", self.draft, exported), **changes}
        return run(self.drafted, self.server, told)

    def ours(self, settings: DecodeSettings = SETTINGS) -> list[list[int]]:
        model = load_draft(self.folder, self.drafted.target)
        return accepted(answers(self.drafted.target, model.algorithm.drafter(model, 1, 64), settings))


def run(drafted: Drafted, server: LlamaCppServer, told: dict[str, Any] | None) -> list[dict[str, Any]]:
    job = {"target": str(drafted.folder), "prompts": PROMPTS, "max_tokens": TOKENS, "max_model_len": 256,
           "stop_token_ids": list(STOP), "speculative_config": told}  # fmt: skip
    return server.generate("run", job)["rows"]


def accepted(generations: list[Any]) -> list[list[int]]:
    """Of every round that verified a draft, but a prompt's last, which the limit cuts elsewhere in every engine."""
    return [[one.accepted for one in generation.rounds[:-1] if one.length] for generation in generations]


def theirs(rows: list[dict[str, Any]]) -> list[list[int]]:
    return [[count for _, count in row["rounds"][:-1]] for row in rows]


def same(served: Served, rows: list[dict[str, Any]], ours: list[list[int]]) -> None:
    """Tokens as the target alone gives them, here and there, and as many accepted in every round."""
    assert [row["tokens"] for row in rows] == served.drafted.engines == served.drafted.own
    for mine, their in zip(ours, theirs(rows), strict=True):
        assert their == mine[: len(their)]
        assert len(mine) - len(their) in (0, 1)  # it has no round where the limit leaves nothing to draft
    counts = [count for prompt in ours for count in prompt]
    assert 0 < sum(count > 0 for count in counts) < len(counts)  # some rounds accept, some do not


FILL_IN, REDUCED = {"sample_from_anchor": False}, {"draft_vocab_size": 60}
NO_CONFIDENCE = {"confidence_head": False, "confidence_with_markov": False}


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        ("dspark", {}), ("dspark", FILL_IN), ("dspark", NO_CONFIDENCE), ("dspark", REDUCED),
        ("dflash", {}), ("dflash", FILL_IN), ("dflash", REDUCED), ("dflash", FILL_IN | REDUCED), ("dflash2", {}),
    ],
)  # fmt: skip
def test_rounds_of_a_block_drafter_are_ours(
    block_case: Drafted, algorithm: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    served = Served(block_case, taught(block_case, algorithm, **changes), tmp_path)
    same(served, served.rows(served.export()), served.ours())


@pytest.mark.parametrize("changes", [{}, REDUCED, {"norm_before_residual": True, "norm_before_fc": True}])
def test_rounds_of_eagle3_are_ours(flat_case: Drafted, changes: dict[str, Any], tmp_path: Path) -> None:
    served = Served(flat_case, taught(flat_case, "eagle3", **changes), tmp_path)
    same(served, served.rows(served.export()), served.ours())


def test_its_least_probability_is_our_confidence_threshold(block_case: Drafted, tmp_path: Path) -> None:
    served = Served(block_case, taught(block_case, "dspark"), tmp_path)
    every = served.ours()
    settings = [replace(SETTINGS, confidence_threshold=one) for one in (0.05, 0.1, 0.2, 0.4, 0.7)]
    cut = next(one for one in settings if sum(map(sum, served.ours(one))) < sum(map(sum, every)))
    same(served, served.rows(served.export(), p_min=cut.confidence_threshold), served.ours(cut))


@pytest.mark.parametrize("dtype", ["bf16", "q8_0"])
def test_smaller_weights_change_what_is_accepted_and_no_token(block_case: Drafted, dtype: str, tmp_path: Path) -> None:
    served = Served(block_case, taught(block_case, "dspark"), tmp_path, dtype)
    rows = served.rows(served.export())
    assert [row["tokens"] for row in rows] == block_case.engines
    assert sum(map(sum, theirs(rows))) > 0


def forced(served: Served, form: GGUFForm, folder: Path) -> Path:
    """What an engine's file would be of a draft that we refuse."""
    assert registry.engine("gguf").reason(served.draft) is not None
    written = form.write(served.draft)
    registry.engine("gguf").save(folder, written, {}, target=str(served.drafted.folder))
    return folder


def test_it_has_no_block_drafter_without_norms_on_the_heads(flat_case: Drafted, tmp_path: Path) -> None:
    served = Served(flat_case, taught(flat_case, "dspark", steps=0), tmp_path)
    out = forced(served, BlockGGUF({"llama": "dflash"}, "", zero_head=True), tmp_path / "out")
    with pytest.raises(DeepSpecError, match="exit code"):
        served.rows(out)


def test_it_has_no_eagle3_over_other_than_three_layers(flat_case: Drafted, tmp_path: Path) -> None:
    served = Served(flat_case, taught(flat_case, "eagle3", steps=0, target_layers=[0, 1]), tmp_path)
    out = forced(served, Eagle3GGUF({"llama": "eagle3"}, ""), tmp_path / "out")
    with pytest.raises(DeepSpecError, match="exit code"):
        served.rows(out)


def test_it_hands_out_no_state_after_the_last_layer(block_case: Drafted, tmp_path: Path) -> None:
    served = Served(block_case, taught(block_case, "dspark", steps=0, target_layers=[0, 1, 3]), tmp_path)
    out = forced(served, BlockGGUF({"qwen3": "dflash"}, ""), tmp_path / "out")
    with pytest.raises(DeepSpecError, match="exit code"):
        served.rows(out)


def test_an_anchor_slot_that_drafts_is_lost_on_its_plain_block_drafter(block_case: Drafted, tmp_path: Path) -> None:
    """Why such a draft is served as one with a Markov head that adds nothing."""
    served = Served(block_case, taught(block_case, "dflash"), tmp_path)
    rows = served.rows(served.export(), type="draft-dflash")
    assert sum(map(sum, theirs(rows))) < sum(map(sum, served.ours()))


def test_a_target_of_another_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeepSpecError, match="not written as GGUF here"):
        LlamaCppServer(tmp_path, tmp_path).check_target(tiny.tiny_target("gemma4").spec)


def test_a_trace_that_lacks_a_request_is_made_again_and_then_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, round_ = "launch_slot_: id 0 | task {} | processing task\n", "task {} | accepted 2/ 3 draft tokens\n"
    whole = "".join(begun.format(n) + round_.format(n) for n in (1, 2))
    logs = ["garbled\n" + begun.format(2), whole, "", ""]

    def run_job(command: object, work: Path, *rest: object) -> tuple[dict[str, Any], Path]:
        (work / "run.log").write_text(logs.pop(0))
        return {"rows": [{}, {}]}, work / "run.log"

    monkeypatch.setattr(llamacpp, "run_job", run_job)
    (tmp_path / "target.gguf").touch()
    server = LlamaCppServer(tmp_path, tmp_path)
    assert server.generate("run", {"target": ""}) == {"rows": [{"rounds": [(3, 2)]}] * 2}
    with pytest.raises(DeepSpecError, match=r"run\.log: the engine's trace is not whole; found 0; wanted 2 requests"):
        server.generate("run", {"target": ""})
    assert logs == []


def test_a_target_with_scaled_positions_is_not_written_as_a_plain_one(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    tiny_config("llama", rope_parameters=rope).save_pretrained(tmp_path)
    with pytest.raises(TargetError, match="rope_type"):
        llamacpp.write_target(tmp_path, tmp_path / "target.gguf")
    assert not (tmp_path / "target.gguf").exists()
