"""Every stage of the fine-tuning, in this process on a tiny target, tiny general drafts and their data."""

from __future__ import annotations

import contextlib
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import training_tools as tools
import yaml
from cache_tools import conversation_rows

from deepspec.cache.build import build_cache
from deepspec.data.conversations import read_conversations, write_conversations
from deepspec.demos.smollm2 import finetune
from deepspec.demos.stages import DEEPSPEC, PYTHON, Stage
from deepspec.distributed import World
from deepspec.files import read_json
from deepspec.recipe import load_recipe
from deepspec.training import run

pytest_plugins = ["training_fixtures"]
NAMES = ("dspark", "eagle3")


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: World) -> Path:
    """What `make real` leaves, tiny; the demonstration's paths point there."""
    general, target = tmp_path / "real", tools.make_talking_target(tmp_path / "target")
    data = {"max_length": 512, "min_supervised": 2, "cache": ["a", "b"], "cache_weights": [2, 1]}
    for name in NAMES:
        init = {"draft": str(general / f"{name}-draft")}
        path = tools.write_recipe(tmp_path / name, target, name, data=data, init=init)
        values = yaml.safe_load(path.read_text()) | {"evaluate": {"temperature": [0.0, 1.0], "max_new_tokens": 8}}
        path.write_text(yaml.safe_dump(values))
        tools.make_draft(general / f"{name}-draft", target, name)
    write_conversations(general / "answers.jsonl", conversation_rows(12, 0), {"made by": "a test"})
    build_cache(load_recipe(path), general / "answers.jsonl", general / "cache-0")
    (general / "prompts").mkdir()
    (general / "prompts" / "chat.jsonl").write_text('{"id": "a", "turns": ["the cache keeps"]}\n')
    monkeypatch.setattr(finetune, "recipe_of", lambda name: str(tmp_path / name / "recipe.yaml"))
    monkeypatch.setitem(finetune.real.SCALES, "smoke", replace(finetune.real.SCALES["smoke"], root=general))
    monkeypatch.setitem(finetune.SCALES, "smoke", replace(finetune.SCALES["smoke"], root=tmp_path / "finetune"))
    monkeypatch.setattr(run, "training_processes", lambda: contextlib.nullcontext(world))
    monkeypatch.chdir(tools.ROOT)
    return tmp_path / "finetune"


def run_stage(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage's command in this process."""
    words = list(stage.command)
    words = (
        words[2:] if words[0] == PYTHON else words[words.index(DEEPSPEC) :]
    )  # python -m MODULE, deepspeed ... MODULE
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"{words[0]}.__main__", run_name="__main__")
    assert end.value.code in (0, None), stage.name
    assert stage.artefact.exists(), stage.name


@pytest.mark.slow
def test_every_stage_runs_from_the_general_drafts_to_the_figures(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in finetune.plan("smoke", 1):
        if stage.name == "answers":  # a tiny target has little to say
            rows = list(read_conversations(made / "prompts" / "train.jsonl"))
            for row, other in zip(rows, conversation_rows(len(rows), 1), strict=True):
                row["messages"].append(other["messages"][-1])
            write_conversations(stage.artefact.with_name("answers.jsonl"), rows, {"made by": "a test"})
        else:
            run_stage(stage, monkeypatch)
    for name in NAMES:
        for start in (finetune.GENERAL, *finetune.STARTS):
            found = read_json(finetune.results_of("smoke", name, start) / "results.json")["summaries"]
            assert {(row["task"], row["temperature"]) for row in found} >= {
                (task, t) for task in finetune.TASKS for t in (0.0, 1.0)
            }
        trained = json.loads((made / f"{name}-tuned" / "run.json").read_text())
        assert trained["init"]["algorithm"] == name
        assert len(trained["fingerprint"]["caches"]) == 2
