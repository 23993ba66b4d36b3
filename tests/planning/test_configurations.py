"""Every file of deepspeed_configs/: DeepSpeed reads it, it trains two steps and is saved, or the reason why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training_tools import own_environment

from deepspec.recipe_files import CONFIGS

FILES = sorted(path.stem for path in CONFIGS.glob("*.json"))
JOB = """
import sys
from pathlib import Path
import torch
from torch import nn
from deepspec.recipe import TrainSection
from deepspec.training.engine import Engine, training_processes

with training_processes() as world:
    train = TrainSection(deepspeed=sys.argv[1], global_batch=2 * world.size, micro_batch=1)
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(2)))
    engine = Engine(model, train, world)
    for turn in range(4):
        engine.begin_micro_batch(turn % 2 == 1)
        engine.engine.backward(engine.engine(torch.ones(1, 256, dtype=engine.dtype)).float().sum() * 1e-3)
        engine.step(1e-3)
    engine.save(Path(sys.argv[2]), "saved")
"""


def test_every_kind_of_sharding_has_both_precisions() -> None:
    kinds = {name.rsplit("_", 1)[0] for name in FILES}
    assert {f"{kind}_{precision}" for kind in kinds for precision in ("bf16", "fp32")} == set(FILES)
    assert {"zero3_nvme", "zero3_hpz"} < kinds


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_it_trains_two_steps_on_two_processes_and_is_saved(name: str, tmp_path: Path) -> None:
    settings = json.loads((CONFIGS / f"{name}.json").read_text())
    zero = settings["zero_optimization"]
    if zero.get("offload_optimizer", {}).get("device") == "nvme":
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible(verbose=False):
            pytest.skip("DeepSpeed's async_io is compiled with libaio-dev, which is not installed")
        zero["offload_optimizer"]["nvme_path"] = str(tmp_path)
    if "zero_hpz_partition_size" in zero:  # it divides the number of processes
        zero["zero_hpz_partition_size"] = 2
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps(settings))
    (tmp_path / "job.py").write_text(JOB)
    launcher = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "2", "--standalone"]
    words = [str(tmp_path / "job.py"), str(file), str(tmp_path / "out")]
    environment = {**os.environ, **own_environment()}
    done = subprocess.run([*launcher, *words], env=environment, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert any((tmp_path / "out" / "saved").iterdir())
