"""Conversations that two processes share (train.sequence_parallel): losses, gradients and weights of one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import fork_server
import pytest
import torch
import training_tools as tools
from sequence_worker import CASES

from deepspec.distributed import World, free_port
from deepspec.errors import RecipeError
from deepspec.recipe import load_recipe
from deepspec.training import run
from deepspec.training.settings import deepspeed_settings

pytest_plugins = ["training_fixtures"]

QUICK = {"cases": ["dspark", "eagle3"], "trainings": {"dspark": "zero3_fp32"}}
WHOLE = {"cases": list(CASES), "trainings": {"dspark": "zero2_fp32", "eagle3": "zero1_fp32", "dflash2": "zero0_fp32"}}
TRAIN: dict[str, Any] = {"max_steps": 3, "micro_tokens": 60, "lr": 5e-4}
CLOSE = 1e-5


@pytest.fixture(scope="module", params=[QUICK, pytest.param(WHOLE, marks=pytest.mark.slow)], ids=["quick", "whole"])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes that share conversations leave."""
    folder = tmp_path_factory.mktemp("sequence")
    target, jobs = tools.make_target(folder / "target"), []
    for algorithm, zero in request.param["trainings"].items():
        train = TRAIN | {"sequence_parallel": 2, "validation": {"path": "held_out", "every": 3, "samples": 3}}
        recipe = tools.write_recipe(folder / algorithm, target, algorithm, zero, **train)
        jobs.append({"recipe": str(recipe), "gather": str(folder / algorithm / "live.pt")})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(tools.ROOT / "tests" / "helpers" / "sequence_worker.py"), str(folder)]
    done = fork_server.run_ranks([*command, *request.param["cases"]], 2, free_port(), tools.own_environment(), 1800)
    assert done.returncode == 0, done.stdout[-6000:]
    return folder


def test_two_ranks_that_share_a_conversation_have_the_loss_and_gradients_of_one(shared: Path) -> None:
    differences = json.loads((shared / "differences.json").read_text())
    assert len(differences) >= 6
    assert {name: value for name, value in differences.items() if not value < CLOSE} == {}


def test_a_training_of_two_processes_that_share_conversations_is_that_of_one(
    shared: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools.use_memory_source(monkeypatch)
    for place in sorted(path.parent for path in shared.glob("*/live.pt")):
        output = tmp_path / place.name
        recipe = load_recipe(place / "recipe.yaml", ["train.sequence_parallel=1", f"output={output}"])
        trainer = run.assemble(run.prepare(recipe, world, False), world, profile=False)
        trainer.run(0)
        with trainer.engine.complete_model() as model:
            live = {name: weight.clone() for name, weight in model.state_dict().items()}
        trainer.engine.close()
        for kind, rows, keys in (("train", 3, ("loss", "grad_norm", "tau", "padding")), ("validation", 1, ("loss",))):
            alone, together = tools.log_of(output, kind), tools.log_of(place / "run", kind)
            assert len(alone) == len(together) == rows
            for key in keys:
                assert [row[key] for row in together] == pytest.approx([row[key] for row in alone], rel=CLOSE), key
        weights = torch.load(place / "live.pt", weights_only=True)
        for name, weight in live.items():
            torch.testing.assert_close(weights[name], weight, atol=CLOSE, rtol=1e-4)


def test_what_cannot_be_shared_is_refused_by_name(tmp_path: Path) -> None:
    target = tools.make_target(tmp_path / "target")
    for algorithm in ("p_eagle", "mtp"):
        recipe = tools.write_recipe(tmp_path / algorithm, target, algorithm, sequence_parallel=2)
        with pytest.raises(RecipeError, match=rf"sequence_parallel.*cannot share.*2 with {algorithm}"):
            load_recipe(recipe)
    recipe = load_recipe(tools.write_recipe(tmp_path / "three", target, sequence_parallel=3))
    with pytest.raises(RecipeError, match=r"sequence_parallel.*heads cannot be shared.*a divisor of 4"):
        recipe.for_target(tools.load_spec(str(target)))
    own = tools.write_recipe(tmp_path / "own", target, sequence_parallel=3)
    layers = {"num_heads": 6, "num_kv_heads": 2}  # the draft's heads are shared, whatever the target has
    assert load_recipe(own, [f"draft.layers={json.dumps(layers)}"]).for_target(tools.load_spec(str(target)))
    pair = load_recipe(own, ["draft.layers={num_heads: 3, num_kv_heads: 1}", "train.sequence_parallel=2"])
    with pytest.raises(RecipeError, match=r"sequence_parallel.*a divisor of 3"):
        pair.for_target(tools.load_spec(str(target)))
    with pytest.raises(RecipeError, match=r"sequence_parallel.*cannot be grouped.*a divisor of 4"):
        deepspeed_settings(recipe.train, 4)
