"""What the training tests share: a tiny target on disk, samples with its hidden states, small recipes, a runner."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cache_tools
import fork_server
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from deepspec import registry
from deepspec.batch import Batch
from deepspec.distributed import RANK_VARIABLES, free_port
from deepspec.drafts import save_draft
from deepspec.sources.base import FeatureSource, pad
from deepspec.targets import load_spec, load_target

ROOT = Path(__file__).parents[2]
LAYERS = [0, 1, 2]
DRAFTS: dict[str, dict[str, Any]] = {
    "dspark": {"num_layers": 1, "block_size": 4, "num_anchors": 4, "mask_token_id": 3, "markov_rank": 8},
    "dflash": {"num_layers": 1, "block_size": 4, "num_anchors": 4, "mask_token_id": 3},
    "dflash2": {"num_layers": 1, "block_size": 4, "num_anchors": 4, "mask_token_id": 3, "selector_rank": 6},
    "p_eagle": {"num_layers": 2, "num_depths": 3, "mask_token_id": 3},
    "eagle3": {"num_layers": 1, "ttt_length": 3},
    "mtp": {"num_layers": 1, "steps": 3},
}
STATES = {"mtp": [4]}  # that algorithms read which read no layers of one's choice


def make_target(folder: Path, seed: int = 7) -> Path:
    """A random tiny Qwen3 saved as a Hugging Face model."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20.0)  # peaked distributions: something to learn
    model.save_pretrained(folder)
    return folder


def make_talking_target(folder: Path) -> Path:
    """The cache tests' target with a tokenizer, in fp32, its tied embedding enlarged: it likes to repeat itself."""
    path = cache_tools.make_target(folder, torch.float32) / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"] *= 20
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def make_draft(folder: Path, target: Path, algorithm: str = "dspark", seed: int = 9) -> Path:
    """A random draft for :func:`make_target`'s target, in our layout."""
    spec = load_spec(str(target))
    owner = registry.algorithm(algorithm)
    config = owner.parse({**DRAFTS[algorithm], "target_layers": STATES.get(algorithm, LAYERS)}, spec)
    save_draft(folder, owner.build(config, spec, seed).state_dict(), owner.config_json(config, spec), {})
    return folder


class MemorySource(FeatureSource):
    """A feature source in memory: random token runs and what a target computes for them."""

    count = 24

    def __init__(self, target: Any, seed: int = 0, layers: Sequence[int] = LAYERS) -> None:
        random = np.random.default_rng(seed)
        self.samples = []
        for _ in range(self.count):
            ids = torch.from_numpy(random.integers(4, 64, int(random.integers(12, 40))))
            mask = torch.arange(len(ids)) >= int(random.integers(2, 6))
            made = target.forward(ids[None], layers)
            self.samples.append((ids, mask, made.features[0], made.last_hidden[0]))
        self.lengths = np.array([len(ids) for ids, *_ in self.samples])
        self.group_sizes = (self.count,)

    @classmethod
    def open(cls, recipe: Any, target: Any, held_out: bool = False) -> MemorySource:
        return cls(load_target(recipe.target.path, torch.float32), layers=recipe.target.layers)

    def sample_id(self, number: int) -> int:
        return 100 + number

    def loss_mask(self, number: int) -> np.ndarray:
        return self.samples[number][1].numpy()

    def tokens(self, number: int) -> np.ndarray:
        return self.samples[number][0].numpy()

    def batch(self, numbers: Sequence[int], seed: int, epoch: int) -> Batch:
        ids, _, features, last = (pad(rows) for rows in zip(*(self.samples[one] for one in numbers), strict=True))
        return Batch(self.supervision(numbers, seed, epoch), ids, features, last)

    def fingerprint(self) -> dict[str, object]:
        return {"source": "memory", "count": self.count}


def use_memory_source(patch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Recipes read the memory source instead of a cache."""
    patch.setitem(registry.SOURCES, "cache", "training_tools:MemorySource")
    for name, value in changes.items():
        patch.setattr(MemorySource, name, value)


def write_recipe(
    folder: Path,
    target: Path,
    algorithm: str = "dspark",
    zero: str = "zero1_fp32",
    data: dict[str, Any] | None = None,
    **train: Any,
) -> Path:
    """A recipe for the tiny target; ``train`` overrides keys of its `train:` section, ``data`` is another section."""
    settings = {
        "deepspeed": str(ROOT / "deepspeed_configs" / f"{zero}.json"),
        "epochs": 100,
        "max_steps": 12,
        "micro_batch": 1,
        "global_batch": 4,
        "lr": 3.0e-3,
        "warmup_ratio": 0.1,
        "log_every": 1,
        "save_every": 1000,
        "tensorboard": False,
        "workers": 1,
    }
    recipe = {
        "name": folder.name,
        "algorithm": algorithm,
        "seed": 3,
        "target": {"path": str(target), "layers": STATES.get(algorithm, LAYERS), "dtype": "float32"},
        "draft": DRAFTS[algorithm],
        "data": data or {},
        "train": settings | train,
        "output": str(folder / "run"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def log_of(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The rows of a run's log.jsonl."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def own_environment() -> dict[str, str]:
    """This environment for another process: one thread, no GPU, no place in the process group that pytest may be in."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in RANK_VARIABLES:
        environment.pop(name, None)
    return environment


def launch(script: Path, arguments: Sequence[str], processes: int = 1, **run: Any) -> Any:
    """Start a script as a user does: Python (in a fork) for one process, the deepspeed launcher for more."""
    environment = own_environment()
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    if processes == 1:
        return fork_server.run([sys.executable, script, *arguments], environment, **run)
    command = [str(Path(sys.executable).with_name("deepspeed")), "-q", "--num_gpus", str(processes)]
    command += ["--master_port", str(free_port()), str(script), *arguments]
    settings = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "check": False, **run}
    return subprocess.run(command, **settings)


def run_jobs(folder: Path, jobs: list[dict[str, Any]], processes: int) -> None:
    """Run trainings one after the other in one process group of that size (see training_worker.py).

    Args:
        folder: gets the file of the jobs.
        jobs: the trainings.
        processes: of the group.
    """
    path, worker = folder / f"jobs_{processes}.json", ROOT / "tests" / "helpers" / "training_worker.py"
    path.write_text(json.dumps(jobs))
    done = fork_server.run_ranks([sys.executable, worker, path], processes, free_port(), own_environment())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
