"""What the cache tests share: a tiny target with a tokenizer, conversations, a recipe, and running the tools."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fork_server
import numpy as np
import torch
import yaml

from deepspec.cache.assemble import finish_cache
from deepspec.cache.parts import Block, layout_of, next_supervised, write_part
from deepspec.cache.plan import CachePlan, PlannedPart
from deepspec.cache.reader import Sample, stored_view
from deepspec.cache.store import FolderStore
from deepspec.data.conversations import write_conversations
from deepspec.demos.quickstart.tokenizer import train_tokenizer
from deepspec.distributed import RANK_VARIABLES
from deepspec.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[2]
LAYERS = [0, 2]
HIDDEN = 32
WORDS = ["the", "cache", "keeps", "what", "a", "target", "computes", "for", "every", "token", "and", "else", "0", "12"]


@dataclass(frozen=True)
class Setup:
    """Paths of what a build needs."""

    recipe: Path
    data: Path

    def load(self, *overrides: str) -> Recipe:
        return load_recipe(self.recipe, list(overrides))


def make_target(folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 5) -> Path:
    """A random tiny Qwen3 with a byte-level tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=1536,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).to(dtype).save_pretrained(folder)
    train_tokenizer([" ".join(WORDS)] * 3).save_pretrained(folder)
    return folder


def conversation_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations of one or two turns; every eleventh has no answer."""
    dice = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(dice.choice(WORDS) for _ in range(dice.randint(low, high)))

    rows = []
    for number in range(count):
        messages = []
        for _ in range(dice.randint(1, 2)):
            messages += [{"role": "user", "content": text(2, 12)}, {"role": "assistant", "content": text(4, 40)}]
        if number % 11 == 5:
            messages = messages[:1]
        rows.append({"id": f"s{seed}-{number}", "messages": messages})
    return rows


def make_setup(
    folder: Path, samples: int = 40, algorithm: str = "dspark", dtype: str = "bfloat16", seed: int = 0
) -> Setup:
    """Target, conversations and recipe in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    target = make_target(folder / "target", getattr(torch, dtype))
    data = folder / f"conversations-{seed}.jsonl"
    write_conversations(data, conversation_rows(samples, seed), {"made by": "a test"})
    recipe = {
        "name": "tiny",
        "algorithm": algorithm,
        "target": {"path": str(target), "layers": LAYERS, "dtype": dtype},
        "draft": {"num_layers": 1, "block_size": 4, "num_anchors": 4, "mask_token_id": 3},
        "data": {"max_length": 256, "min_supervised": 4},
        "cache": {"samples_per_part": 8, "tokens_per_batch": 256},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return Setup(path, data)


def run_tool(*arguments: object, launcher: list[str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a tool of the repository and return what it said."""
    if launcher is None:
        return fork_server.run([sys.executable, *arguments], tool_environment(), **options)
    return subprocess.run(
        [*launcher, sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=tool_environment(),
        text=True,
        capture_output=True,
        **{"timeout": 300, **options},
    )


def tool_environment() -> dict[str, str]:
    """One thread per process: the sums of the target's forward then do not depend on the number of processes.

    Without the variables of a process group that pytest may be in: under mpirun they would hide the other ranks.
    """
    own = {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES} | own


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a cache, by relative path; lock file apart."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".deepspec.lock"
    }


def make_cache(
    folder: Path,
    samples: int = 9,
    level: str = "lossless",
    dtype: str = "bfloat16",
    samples_per_part: int = 4,
    layers: int = 2,
    hidden: int = 16,
    seed: int = 0,
) -> list[Sample]:
    """A cache of random hidden states, written without a target; returns the samples as they must be read."""
    random = np.random.default_rng(seed)
    truth = [_random_sample(random, number, layers, hidden, getattr(torch, dtype)) for number in range(samples)]
    store = FolderStore(folder)
    levels = {"features": level, "last_hidden": level}
    mark: dict[str, Any] = {"target": {"path": "none", "hidden_size": hidden}, "layers": list(range(layers))}
    mark |= {"dtype": dtype, "levels": levels, "sources": [], "max_length": 512, "min_supervised": 1}
    parts = tuple(
        PlannedPart(f"{i:05d}", 0, first, min(samples_per_part, samples - first), 0, first)
        for i, first in enumerate(range(0, samples, samples_per_part))
    )
    plan = CachePlan(mark, 0, 100.0, parts)
    with ThreadPoolExecutor(2) as pool:
        for part in parts:
            run = truth[part.first : part.first + part.rows]
            write_part(store, part.name, layout_of(mark), pool, (_block(sample) for sample in reversed(run)))
    store.write("plan.json", plan.to_bytes())
    finish_cache(store, plan)
    return truth


def _random_sample(random: np.random.Generator, number: int, layers: int, hidden: int, dtype: torch.dtype) -> Sample:
    length = int(random.integers(3, 200))
    mask = random.random(length) < 0.6
    mask[1] = True

    def states(columns: int) -> torch.Tensor:
        return torch.from_numpy(random.normal(size=(length, columns)).astype(np.float32)).to(dtype)

    last = states(hidden)
    last[:-1][torch.from_numpy(~mask[1:])] = 0
    last[-1] = 0
    return Sample(number, random.integers(0, 1000, length), mask, states(layers * hidden), last)


def _block(sample: Sample) -> Block:
    length = len(sample.input_ids)
    mask = sample.loss_mask.astype(np.uint8)
    chosen = next_supervised(mask, [length])
    last = stored_view(sample.last_hidden)[chosen]
    ids = sample.input_ids.astype(np.int32)
    return Block([sample.sample_id], [f"c{sample.sample_id}"], [length], ids, mask, stored_view(sample.features), last)
