"""What the training tests share: a tiny target on disk, samples with its hidden states, small recipes, a runner."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cache_tools
import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

from deepspec.targets import load_target

ROOT = Path(__file__).parents[2]
LAYERS = [0, 1, 2]
DRAFTS: dict[str, dict[str, Any]] = {
    "dspark": {"num_layers": 1, "block_size": 4, "num_anchors": 4, "mask_token_id": 3, "markov_rank": 8},
    "dflash": {"num_layers": 1, "block_size": 4, "num_anchors": 4, "mask_token_id": 3},
    "eagle3": {"num_layers": 1, "ttt_length": 3},
}


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


@dataclass
class MemorySample:
    """The same attributes as a cache's sample."""

    sample_id: int
    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    features: torch.Tensor
    last_hidden: torch.Tensor


class MemorySource:
    """A feature source in memory: random token runs and what a target computes for them."""

    reads_ahead = True

    def __init__(self, target: Any, count: int = 24, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.samples = []
        for number in range(count):
            length = int(random.integers(12, 40))
            ids = torch.from_numpy(random.integers(4, 64, length))
            mask = torch.zeros(length, dtype=torch.bool)
            mask[int(random.integers(2, 6)) :] = True
            made = target.forward(ids[None], LAYERS)
            self.samples.append(MemorySample(100 + number, ids, mask, made.features[0], made.last_hidden[0]))
        self.lengths = np.array([len(sample.input_ids) for sample in self.samples])
        self.group_sizes = (count,)

    def sample_id(self, number: int) -> int:
        return self.samples[number].sample_id

    def loss_mask(self, number: int) -> np.ndarray:
        return self.samples[number].loss_mask.numpy()

    def tokens(self, number: int) -> np.ndarray:
        return self.samples[number].input_ids.numpy()

    def load(self, numbers: Sequence[int]) -> list[MemorySample]:
        return [self.samples[number] for number in numbers]

    def announce(self, numbers: Sequence[int]) -> None:
        """Everything is in memory."""

    def fingerprint(self) -> dict[str, object]:
        return {"source": "memory", "count": len(self.samples)}


def open_memory(recipe: Any, _target: Any, count: int = 24) -> MemorySource:
    """In place of `run.open_source`: the memory source of the recipe's target."""
    return MemorySource(load_target(recipe.target.path, torch.float32), count)


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
        "target": {"path": str(target), "layers": LAYERS, "dtype": "float32"},
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
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return environment


def launch(script: Path, arguments: Sequence[str], processes: int = 1, **run: Any) -> Any:
    """Start a script as a user does: plain Python for one process, the deepspeed launcher for more."""
    from deepspec.distributed import free_port

    folder = Path(sys.executable).parent
    command = [sys.executable]
    if processes > 1:
        command = [str(folder / "deepspeed"), "-q", "--num_gpus", str(processes), "--master_port", str(free_port())]
    environment = own_environment()
    environment["PATH"] = f"{folder}{os.pathsep}{environment['PATH']}"
    settings = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "check": False, **run}
    return subprocess.run([*command, str(script), *arguments], **settings)


def run_jobs(folder: Path, jobs: list[dict[str, Any]], processes: int) -> None:
    """Run trainings one after the other in one process group of that size (see training_worker.py)."""
    path = folder / f"jobs_{processes}.json"
    path.write_text(json.dumps(jobs))
    done = launch(ROOT / "tests" / "helpers" / "training_worker.py", [str(path)], processes)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
