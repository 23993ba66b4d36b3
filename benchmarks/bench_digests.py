"""What the digests cost: their share of the CPU time of a training start and of a cache build.

    python benchmarks/bench_digests.py [--json FILE]

Everything happens in one fresh process, with a random target of SmolLM2's widths and few layers: a cache is built, a
training starts from it and saves a checkpoint, and a second start resumes from that. The clock is the CPU time of all
threads; that of the digests is taken inside them, so that a busy machine does not disturb the shares. A start counts
from the process's own beginning (imports) to the first step; "resumed" digests the checkpoint too. The digest of
the target's weights is remembered beforehand, as it is on a machine that has used the target once.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from bars import Bars, at_most, write_bars
from start import Benchmark

from deepspec.arguments import COUNT
from deepspec.cache.build import build_cache
from deepspec.data.conversations import write_conversations
from deepspec.demos.quickstart.tokenizer import train_tokenizer
from deepspec.distributed import World
from deepspec.errors import run_main
from deepspec.recipe import load_recipe
from deepspec.targets import load, stored
from deepspec.targets.digests import weights_digest
from deepspec.training import run
from deepspec.training.engine import training_processes

WORK = Path("build/bench_digests")
LIMITS = {"training start": 0.02, "training start, resumed": 0.02, "cache build": 0.03}
SENTENCE = "A draft model proposes several tokens and the target verifies all of them in a single pass."


class Meter:
    """CPU seconds that wrapped functions take, over all threads."""

    def __init__(self) -> None:
        self.seconds, self._lock = 0.0, threading.Lock()

    def wrap(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """``work`` with its time counted."""

        def timed(*given: Any, **more: Any) -> Any:
            begun = time.thread_time()
            try:
                return work(*given, **more)
            finally:
                with self._lock:
                    self.seconds += time.thread_time() - begun

        return timed

    def share(self, begun: float) -> float:
        """Of what the process used since ``begun`` without them; then the count begins anew."""
        rest = time.process_time() - begun - self.seconds
        share, self.seconds = self.seconds / rest, 0.0
        return share


class Digest:
    """A SHA-256 whose updates are counted."""

    def __init__(self, meter: Meter, data: bytes = b"") -> None:
        self._own = hashlib.new("sha256", data)
        self.update = meter.wrap(self._own.update)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


@contextlib.contextmanager
def metered() -> Iterator[Meter]:
    """Every digest of a file, a shard or a manifest and every look for numbers that are none is counted."""
    meter = Meter()
    kept = hashlib.sha256, hashlib.file_digest
    hashlib.sha256 = lambda data=b"": Digest(meter, data)  # type: ignore[assignment,misc]
    hashlib.file_digest = meter.wrap(kept[1])  # type: ignore[assignment]
    finite = meter.wrap(stored.check_finite)
    load.check_finite = stored.check_finite = finite  # type: ignore[assignment]
    try:
        yield meter
    finally:
        hashlib.sha256, hashlib.file_digest = kept  # type: ignore[misc]


def make_recipe(samples: int) -> Path:
    """Target, conversations and recipe in WORK."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=576, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(WORK / "target")
    train_tokenizer([SENTENCE] * 3).save_pretrained(WORK / "target")
    turns = [{"role": "user", "content": SENTENCE}, {"role": "assistant", "content": " ".join([SENTENCE] * 3)}]
    rows = ({"id": str(number), "messages": turns} for number in range(samples))
    write_conversations(WORK / "conversations.jsonl", rows, {})
    recipe = {
        "name": "digests",
        "algorithm": "eagle3",
        "target": {"path": str((WORK / "target").resolve()), "layers": [0, 2, 4], "dtype": "bfloat16"},
        "draft": {"num_layers": 1, "ttt_length": 2},
        "data": {"max_length": 512, "min_supervised": 4, "cache": [str((WORK / "cache").resolve())]},
        "train": {
            "deepspeed": str(Path("deepspeed_configs/zero1_fp32.json").resolve()), "epochs": 10, "max_steps": 2,
            "micro_batch": 1, "global_batch": 1, "save_every": 1, "tensorboard": False, "workers": 1,
        },
        "output": str((WORK / "run").resolve()),
    }  # fmt: skip
    path = WORK / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def start(recipe: Path, world: World, step: int) -> Any:
    """A training of one step up to where the first step would begin."""
    prepared = run.prepare(load_recipe(recipe, ["train.max_steps=2"]), world, False)
    if prepared.start.step != step:
        raise RuntimeError(f"the start is at step {prepared.start.step}, wanted {step}")
    return run.assemble(prepared, world, profile=False)


def measure(samples: int) -> dict[str, float]:
    """Shares by name."""
    imports = time.process_time()  # of the process up to here
    recipe, shares = make_recipe(samples), dict[str, float]()
    time.sleep(1.5)  # a file that has just changed is not remembered
    weights_digest(WORK / "target")
    with metered() as meter:
        begun = time.process_time()
        build_cache(load_recipe(recipe), WORK / "conversations.jsonl", WORK / "cache")
        shares["cache build"] = meter.share(begun)
        with training_processes() as world:
            begun = time.process_time() - imports
            trainer = start(recipe, world, 0)
            shares["training start"] = meter.share(begun)
            ask = trainer.prefetcher.steps
            trainer.prefetcher.steps = lambda first, stop: ask(first, min(stop, 1))
            trainer.run(0)
            trainer._stop(1)
            trainer.engine.close()
            meter.seconds = 0.0
            begun = time.process_time() - imports
            start(recipe, world, 1).engine.close()
            shares["training start, resumed"] = meter.share(begun)
    return shares


def main() -> None:
    """Parse arguments, measure, print the table."""
    bars = "digests take at most 2 % of a training start, 3 % of a cache build"
    parser = Benchmark(__doc__, bars=bars, takes="a minute")
    parser.add_argument("--samples", type=COUNT, default=96, help="conversations of the cache")
    given = parser.parse_args()
    logging.disable(logging.INFO)
    os.environ["XDG_CACHE_HOME"] = str(WORK.resolve())  # not the memory of this user
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    shares = measure(given.samples)
    size = sum(path.stat().st_size for path in (WORK / "run").rglob("*.pt"))
    bars: Bars = {f"share of digests: {name}": at_most(share, LIMITS[name]) for name, share in shares.items()}
    print("\n| | share of the CPU time | limit |\n|---|---|---|")
    print("\n".join(f"| {name} | {share:.2%} | {LIMITS[name]:.0%} |" for name, share in shares.items()))
    print(f"\nthe checkpoint holds {size / 1e6:,.0f} MB")
    write_bars(given.json, bars)
    shutil.rmtree(WORK)


if __name__ == "__main__":
    run_main(main)
