"""Conversations are compared with their manifest by every reader; what goes on does so under one identity alone."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_tools import conversation_rows, make_setup
from evaluate_tools import Folders, make_folders, write_task
from safetensors.torch import load_file, save_file

from deepspec.cache.build import build_cache
from deepspec.cache.estimate import estimate_recipe
from deepspec.cache.plan import scan
from deepspec.data.conversations import manifest_path, write_conversations
from deepspec.data.dialogue import Dialogue, Outcome
from deepspec.data.regenerate import RegenerationPlan, regenerate
from deepspec.data.sources import read_source
from deepspec.errors import CacheError, DataError, EvaluationError
from deepspec.evaluate.run import Evaluation
from deepspec.files import read_json
from deepspec.sources.online import OnlineSource
from deepspec.targets import load_target
from deepspec.targets.digests import sampled_digest


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- conversations ----------------------------------------------------------------------------------------------------


def test_a_cut_file_is_refused_by_every_reader_before_the_target_runs(tmp_path: Path) -> None:
    setup = make_setup(tmp_path, samples=8)
    lines = setup.data.read_bytes().splitlines(keepends=True)
    setup.data.write_bytes(b"".join(lines[:5]))
    recipe = setup.load()
    readers = (
        lambda: build_cache(recipe, setup.data, tmp_path / "c"),
        lambda: build_cache(recipe, setup.data, tmp_path / "c", append=True),
        lambda: estimate_recipe(recipe, setup.data, 100, 0),
        lambda: OnlineSource(recipe.for_target(target.spec), target, setup.data),
        lambda: list(read_source(str(setup.data))),
    )
    target = load_target(recipe.target.path)
    for reader in readers:
        with pytest.raises(DataError, match=r"manifest\.json: rows: the file is not the one its manifest describes"):
            reader()
    assert not (tmp_path / "c" / "plan.json").exists()
    manifest_path(setup.data).unlink()
    assert scan(setup.data).rows == 5  # a file without a manifest is taken as it is


def test_an_edited_answer_and_an_id_that_comes_twice_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "a.jsonl"
    write_conversations(data, conversation_rows(3), {})
    data.write_bytes(data.read_bytes().replace(b"the", b"teh", 1))
    with pytest.raises(DataError, match="sha256: the file is not the one"):
        scan(data)
    twice = tmp_path / "b.jsonl"
    twice.write_text("".join(json.dumps(row) + "\n" for row in conversation_rows(2) + conversation_rows(1)))
    with pytest.raises(DataError, match=r"b\.jsonl: line 3: the same id twice; found 's0-0'"):
        scan(twice)


def test_conversations_that_a_cache_lacks_are_to_be_appended(tmp_path: Path) -> None:
    setup = make_setup(tmp_path, samples=8)
    build_cache(setup.load(), setup.data, tmp_path / "c")
    more = tmp_path / "more.jsonl"
    write_conversations(more, conversation_rows(4, seed=9), {})
    with pytest.raises(CacheError, match=r"sources: cache without more\.jsonl.*deepspec cache append"):
        build_cache(setup.load(), more, tmp_path / "c")
    edit(tmp_path / "target" / "tokenizer.json", normalizer={"type": "Lowercase"})
    with pytest.raises(CacheError, match=r'tokenizer\.normalizer: cache .*NFC.*, recipe {"type": "Lowercase"}'):
        build_cache(setup.load(), more, tmp_path / "c", append=True)


# -- regeneration -----------------------------------------------------------------------------------------------------


class StoppingEngine:
    """Answers with one word; stops after ``limit`` dialogues as a kill would."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def run(self, dialogues: Any) -> Iterator[Outcome]:
        for number, dialogue in enumerate(dialogues):
            if number == self.limit:
                raise KeyboardInterrupt
            one: Dialogue = dialogue
            while one.open:
                one.answer({"content": "yes"}, "stop", 1)
            yield Outcome(one)


def test_a_regeneration_does_not_go_on_under_another_template_or_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = make_setup(tmp_path, samples=4)
    plan, output = RegenerationPlan(str(tmp_path / "target")), tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        regenerate(setup.data, output, StoppingEngine(2), plan.settings())
    template, config = tmp_path / "target" / "chat_template.jinja", tmp_path / "target" / "config.json"
    known = template.read_text(), config.read_text()
    template.write_text(known[0] + " ")
    with pytest.raises(DataError, match=r"unfinished regeneration.*template: then \w+\.\.\., now"):
        regenerate(setup.data, output, StoppingEngine(9), plan.settings())
    template.write_text(known[0])
    edit(config, rms_norm_eps=1e-2)
    with pytest.raises(DataError, match=r"target\.config\.rms_norm_eps: then 1e-06, now 0\.01"):
        regenerate(setup.data, output, StoppingEngine(9), plan.settings())
    config.write_text(known[1])
    assert regenerate(setup.data, output, StoppingEngine(9), plan.settings()).rows == 4
    edit(config, rms_norm_eps=1e-2)
    with pytest.raises(DataError, match=r"output exists.*rms_norm_eps"):
        regenerate(setup.data, output, StoppingEngine(9), plan.settings())
    about = read_json(manifest_path(output))
    del about["provenance"]["identity"]  # of an earlier version
    manifest_path(output).write_text(json.dumps(about))
    capsys.readouterr()
    assert regenerate(setup.data, output, StoppingEngine(9), plan.settings()).rows == 4
    assert "is of an earlier version" in capsys.readouterr().err


def test_a_target_behind_a_server_needs_no_weights_here(tmp_path: Path) -> None:
    make_setup(tmp_path, samples=1)
    (tmp_path / "target" / "model.safetensors").unlink()
    found = RegenerationPlan(str(tmp_path / "target")).settings(served=True)
    assert found["identity"]["target"]["weights"] is None


# -- evaluation -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A finished run in ``output``."""
    root = tmp_path_factory.mktemp("evaluated")
    made = make_folders(root)
    folders = Folders(made.target, made.draft, write_task(root / "one" / "one.jsonl", [["What?"], ["Why?"]]))
    folders.run(root / "output", max_new_tokens=4)
    return folders


@pytest.mark.parametrize(
    ("file", "edited", "named"),
    [
        ("chat_template.jinja", None, r"template: run \w+\.\.\., now"),
        ("config.json", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "rope_theta"),
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>"}, "stop_tokens: run"),
        ("tokenizer.json", {"normalizer": None}, r"tokenizer\.normalizer"),
        ("model.safetensors", None, r"target\.weights"),
    ],
)
def test_an_evaluation_does_not_go_on_under_another_identity(
    evaluated: Folders, tmp_path: Path, file: str, edited: dict[str, Any] | None, named: str
) -> None:
    root = Path(shutil.copytree(evaluated.target.parent, tmp_path / "copy"))
    path = root / "target" / file
    if edited is not None:
        edit(path, **edited)
    elif file == "model.safetensors":
        weights = load_file(path)
        weights["model.embed_tokens.weight"][900, 1] += 1
        save_file(weights, path, metadata={"format": "pt"})
    else:
        path.write_text(path.read_text() + " ")
    (root / "output" / "results.json").unlink()
    options = evaluated.options(root / "output", max_new_tokens=4)
    values = read_json(root / "output" / "run.json")
    values["identity"]["target"] = str(root / "target")  # the same run, whose target changed in its place
    (root / "output" / "run.json").write_text(json.dumps(values))
    moved = dataclasses.replace(options, target=str(root / "target"))
    with pytest.raises(EvaluationError, match=rf"holds another run: .*{named}"):
        Evaluation(moved).run()


def test_an_evaluation_of_before_goes_on_with_a_word(
    evaluated: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = Path(shutil.copytree(evaluated.target.parent / "output", tmp_path / "output"))
    values = read_json(output / "run.json")
    values["digest"], old = "x", values["identity"]
    del old["identity"], old["target_dtype"]
    old["target_digest"] = sampled_digest(evaluated.target, torch.float32)
    (output / "run.json").write_text(json.dumps(values))
    evaluated.run(output, max_new_tokens=4)
    assert "is of an earlier version" in capsys.readouterr().err
    old["target_digest"] = "0" * 64
    (output / "run.json").write_text(json.dumps(values))
    with pytest.raises(EvaluationError, match=r"target\.weights: run 000000000000\.\.\., now"):
        evaluated.run(output, max_new_tokens=4)
