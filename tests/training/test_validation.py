"""Validation on held-out samples, the best checkpoint by real decoding, and the evaluator on what was kept."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_tools as tools
from cache_tools import conversation_rows

from deepspec.cache.build import build_cache
from deepspec.checkpoints import read_manifest, steps_of
from deepspec.data.conversations import write_conversations
from deepspec.decoding.loop import generate
from deepspec.decoding.records import DecodeSettings
from deepspec.distributed import World
from deepspec.drafts import load_draft
from deepspec.errors import DataError
from deepspec.evaluate.run import Evaluation, Options
from deepspec.export.consolidate import consolidate
from deepspec.recipe import ValidationSection, load_recipe
from deepspec.targets import load_target
from deepspec.training import run
from deepspec.training.engine import Engine
from deepspec.training.loop import Trainer
from deepspec.training.validation import HeldOut

pytest_plugins = ["training_fixtures"]
RENDERING = {"max_length": 96, "min_supervised": 4}
DECODING = {"every": 2, "decode_every": 4, "decode_prompts": 4, "max_new_tokens": 12, "samples": 10}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target, a training cache, and held-out conversations as a file and as a cache."""
    folder = tmp_path_factory.mktemp("validation")
    places = {name: folder / name for name in ("target", "train.jsonl", "held.jsonl", "train", "held")}
    tools.make_talking_target(places["target"])
    recipe = load_recipe(tools.write_recipe(folder / "recipe", places["target"], data=RENDERING))
    for seed, (name, count) in enumerate((("train", 24), ("held", 14))):
        write_conversations(places[f"{name}.jsonl"], conversation_rows(count, seed), {"made by": "a test"})
        build_cache(recipe, places[f"{name}.jsonl"], places[name])
    return places


def recipe_of(folder: Path, inputs: dict[str, Path], algorithm: str = "dspark", **train: Any) -> Path:
    source = train.pop("source", "cache")
    section = RENDERING | {
        "cache": [str(inputs["train"])],
        "conversations": str(inputs["train.jsonl"]),
        "source": source,
    }
    held_out = str(inputs["held"] if source == "cache" else inputs["held.jsonl"])
    validation = DECODING | train.pop("validation", {}) | {"path": held_out}
    return tools.write_recipe(folder, inputs["target"], algorithm, data=section, validation=validation, **train)


@pytest.fixture
def held_out(inputs: dict[str, Path]) -> HeldOut:
    """One that decodes every four steps, without an engine."""
    made = HeldOut.__new__(HeldOut)
    made.section = ValidationSection(str(inputs["held"]), **DECODING)
    made.target = load_target(inputs["target"])
    return made


def test_a_validation_without_a_round_has_no_accepted_length_and_no_score(
    held_out: HeldOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_out, "_losses", lambda engine: {"loss": 1.0})
    monkeypatch.setattr(held_out, "_decode", lambda engine, target: (0.0, 0.0))
    assert held_out.run(None, 4) == ({"loss": 1.0, "decoded_rounds": 0}, None)  # type: ignore[arg-type]
    monkeypatch.setattr(held_out, "_decode", lambda engine, target: (9.0, 4.0))
    assert held_out.run(None, 4) == ({"loss": 1.0, "accepted_length": 2.25}, 2.25)  # type: ignore[arg-type]


def test_validation_prompts_beyond_the_targets_positions_are_left_out(
    held_out: HeldOut, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, positions = held_out.target.spec, 20 + DECODING["max_new_tokens"]
    held_out.target.spec = replace(spec, config={**spec.config, "max_position_embeddings": positions})
    assert held_out._fitting([[1] * 20, [1] * 21]) == [[1] * 20]
    assert "1 prompts do not fit" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"train.validation.max_new_tokens: longer than the target's positions"):
        held_out._fitting([[1] * 21])


def assembled(recipe: Path, world: World) -> Trainer:
    return run.assemble(run.prepare(load_recipe(recipe), world, False), world, profile=False)


def finish(trainer: Trainer) -> list[dict[str, Any]]:
    assert trainer.run(0)
    trainer.engine.close()
    return tools.log_of(trainer.checkpoints.run, "validation")


@pytest.mark.parametrize("algorithm", ["dspark", "dflash", "eagle3"])
def test_validation_measures_the_held_out_samples(
    tmp_path: Path, inputs: dict[str, Path], world: World, algorithm: str
) -> None:
    """Plain twin: one sample at a time through the module, no engine; and no matter how samples are cut or read."""
    seen = []
    for name, more in (("a", {}), ("b", {"micro_batch": 4}), ("c", {"source": "online"})):
        trainer = assembled(recipe_of(tmp_path / name, inputs, algorithm, max_steps=4, **more), world)
        values, score = trainer.validator.run(trainer.engine, 2)  # type: ignore[union-attr]
        assert score is None  # the score is that of decoding, every four steps
        seen.append(values)
        if name == "a":
            plain = plain_measures(trainer)
            assert finish(trainer)[0].keys() >= {"step", "loss", "tau", "accept_rate"}
        else:
            trainer.engine.close()
    for values in seen:
        assert values["samples"] == 10
        assert values["loss"] == pytest.approx(plain["loss"], abs=1e-5)
        assert values["tau"] == pytest.approx(plain["tau"], abs=1e-5)
        assert values["accept_rate"] == pytest.approx(plain["accept_rate"], abs=1e-5)


def plain_measures(trainer: Trainer) -> dict[str, Any]:
    """Loss, tau and acceptance by position as sums over samples."""
    held_out = trainer.validator.source  # type: ignore[union-attr]
    sums: dict[str, Any] = {}
    with torch.no_grad():
        for number in range(10):
            terms = trainer.engine.model(held_out.batch([number], trainer.recipe.seed, 0))
            for name, ratio in {**terms.terms, **terms.metrics}.items():
                old = sums.get(name, (0.0, 0.0))
                sums[name] = (old[0] + ratio.total.double(), old[1] + ratio.weight.double())
    means = {name: (total / weight).tolist() for name, (total, weight) in sums.items()}
    return means | {"loss": sum(factor * means[name] for name, factor in terms.coefficients.items())}


def test_the_best_checkpoint_by_real_decoding_is_kept(tmp_path: Path, inputs: dict[str, Path], world: World) -> None:
    decoding = {"validation": {"every": 1, "decode_every": 2}}
    recipe = recipe_of(tmp_path, inputs, max_steps=9, keep_best=True, keep_last=1, lr=1e-3, **decoding)
    rows = finish(assembled(recipe, world))
    assert [row["step"] for row in rows] == list(range(1, 10))
    scores = {row["step"]: row["accepted_length"] for row in rows if row["step"] % 2 == 0}
    assert all("accepted_length" not in row for row in rows if row["step"] % 2)
    kept = steps_of(tmp_path / "run")
    best = min(kept)
    assert set(kept) == {best, 9}
    assert read_manifest(kept[best]).score == scores[best] == max(scores.values()) > 1.0
    # what was kept decodes as was logged
    prepared = load_recipe(recipe)
    consolidate(kept[best], tmp_path / "draft", embeddings=False)
    target = load_target(inputs["target"], torch.float32)
    draft = load_draft(tmp_path / "draft", target)
    validator = assembled(recipe, world).validator
    drafter = run.registry.algorithm(prepared.algorithm).drafter(draft, 4, 640)
    settings = DecodeSettings(0.0, 12, validator.stops, prepared.seed)  # type: ignore[union-attr]
    done = generate(target, drafter, validator.prompts, settings, 4)  # type: ignore[union-attr]
    assert np.mean([n for one in done for n in one.acceptance_lengths]) == pytest.approx(scores[best], abs=1e-12)


class Scripted:
    """A validator whose scores are given."""

    def __init__(self, scores: dict[int, float | None]) -> None:
        self.scores = scores

    def run(self, engine: Engine, step: int) -> tuple[dict[str, Any], float | None]:
        """The score of that step."""
        return {"tau": 1.0}, self.scores[step]


def test_a_score_belongs_to_its_own_step_alone(tmp_path: Path, inputs: dict[str, Path], world: World) -> None:
    recipe = recipe_of(tmp_path, inputs, max_steps=8, save_every=3, keep_best=True, keep_last=8)
    trainer = assembled(recipe, world)
    trainer.validator = Scripted({2: 1.5, 4: 1.2, 6: 1.7, 8: None})
    finish(trainer)
    scores = {step: read_manifest(path).score for step, path in steps_of(tmp_path / "run").items()}
    assert scores == {2: 1.5, 3: None, 6: 1.7, 8: None}


def test_several_sets_are_measured_by_name_and_scored_by_weight(
    tmp_path: Path, inputs: dict[str, Path], world: World
) -> None:
    trainer = assembled(recipe_of(tmp_path / "alone", inputs, max_steps=4), world)
    alone, score = trainer.validator.run(trainer.engine, 4)  # type: ignore[union-attr]
    trainer.engine.close()
    sets = {"domain": str(inputs["train"]), "held": str(inputs["held"])}
    validation = DECODING | {"sets": sets, "weights": {"domain": 3.0}}
    recipe = tools.write_recipe(
        tmp_path / "sets", inputs["target"], data=RENDERING | {"cache": [str(inputs["train"])]}, validation=validation,
        max_steps=4, keep_best=True,
    )  # fmt: skip
    trainer = assembled(recipe, world)
    values, weighted = trainer.validator.run(trainer.engine, 4)  # type: ignore[union-attr]
    assert {name: values[f"held/{name}"] for name in alone} == alone
    assert weighted == pytest.approx((3 * values["domain/accepted_length"] + score) / 4)
    assert values["domain/loss"] != values["held/loss"]
    assert trainer.validator.run(trainer.engine, 2)[1] is None  # type: ignore[union-attr]  # nothing is decoded
    row = finish(trainer)[-1]
    assert row["score"] == read_manifest(tmp_path / "sets" / "run" / "checkpoints" / "step_4").score
    assert "held/tau" in row


def test_a_validation_that_names_no_data_is_off(
    tmp_path: Path, inputs: dict[str, Path], world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    data = RENDERING | {"cache": [str(inputs["train"])]}
    recipe = tools.write_recipe(tmp_path, inputs["target"], data=data, validation=DECODING, keep_best=True)
    trainer = assembled(recipe, world)
    trainer.engine.close()
    assert trainer.validator is None
    assert "train.validation names no held-out data" in capsys.readouterr().out


def test_a_run_ends_where_validations_no_longer_improve_and_goes_on_with_more_patience(
    tmp_path: Path, inputs: dict[str, Path], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recipe(patience: int) -> Path:
        patient = {"validation": {"every": 2, "patience": patience}}
        return recipe_of(tmp_path, inputs, max_steps=12, save_every=3, keep_best=True, keep_last=12, **patient)

    trainer = assembled(recipe(2), world)
    trainer.validator = Scripted({2: 1.5, 4: None, 6: 1.4, 8: 1.5})
    finish(trainer)
    saved = {step: read_manifest(path).stale for step, path in steps_of(tmp_path / "run").items()}
    assert saved == {2: 0, 3: 0, 6: 1, 8: 2}
    monkeypatch.setattr(run, "assemble", lambda *_: pytest.fail("it is finished"))
    monkeypatch.setattr(run, "training_processes", lambda: contextlib.nullcontext(world))
    assert run.train(recipe(2)) == 0
    prepared = run.prepare(load_recipe(recipe(3)), world, False)
    assert not run.exhausted(prepared.recipe.train, prepared.start.stale)
    assert prepared.manifest.stale == 2


SLOW = pytest.mark.slow
STAGES = [pytest.param(0, marks=SLOW), 1, pytest.param(2, marks=SLOW), pytest.param(3, marks=SLOW)]


@pytest.mark.parametrize("stage", STAGES)
def test_the_evaluator_measures_of_the_draft_folder_what_it_measures_of_the_live_model(
    tmp_path: Path, inputs: dict[str, Path], world: World, stage: int
) -> None:
    trainer = assembled(recipe_of(tmp_path, inputs, max_steps=6, zero=f"zero{stage}_fp32", lr=2e-2), world)
    assert trainer.run(0)
    consolidate(tmp_path / "run", tmp_path / "draft")
    target = load_target(inputs["target"], torch.float32)
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(f'{{"turns": ["the cache keeps {number}"]}}\n' for number in range(4)))
    options = Options(
        str(inputs["target"]),
        str(tmp_path / "draft"),
        str(tmp_path / "results"),
        tasks=(str(tasks),),
        temperatures=(0.0, 1.0),
        max_new_tokens=24,
        baseline=False,
    )
    exported = Evaluation(options, target=target).run()
    with trainer.engine.complete_model() as live:
        live.attach(target.embed_weight, target.head_weight)  # type: ignore[operator]
        of_live = replace(options, output=str(tmp_path / "live"))
        measured = Evaluation(of_live, target=target, draft=live).run()  # type: ignore[arg-type]
    trainer.engine.close()
    lengths = [[(row.task, row.acceptance_length) for row in one.summaries] for one in (exported, measured)]
    assert lengths[0] == lengths[1]
    assert all(length > 1.0 for _, length in lengths[0])
