"""The rates of this machine, from real training steps of small drafts: ``deepspec plan --measure FILE``.

Every drafter of the registry trains a few micro-batches under the real engine, at widths of its own; what each costs is
counted as a plan counts it, and the seconds a FLOP, a byte and an operator are those that explain the CPU seconds
measured best (least squares of relative errors, none below 0).
"""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from deepspec import registry
from deepspec.batch import Batch
from deepspec.cache.format import HIDDEN_CHUNK
from deepspec.cache.levels import LEVELS
from deepspec.distributed import pick_device
from deepspec.errors import RecipeError
from deepspec.planning.machines import Machine
from deepspec.planning.memory import optimizer_bytes, step_bytes
from deepspec.planning.trace import MicroBatchCost, example, trace
from deepspec.progress import Progress
from deepspec.recipe import TrainSection
from deepspec.recipe_files import CONFIGS
from deepspec.targets import TargetSpec
from deepspec.training.engine import Engine, training_processes

SIZES = (  # hidden, intermediate, vocabulary, tokens: of the probes in turn
    (128, 512, 4096, 384), (256, 1024, 6144, 512), (320, 1280, 12288, 384), (192, 512, 8192, 640),
)  # fmt: skip
PRECISIONS = {"bfloat16": "zero1_bf16.json", "float32": "zero1_fp32.json"}
LEFT = 18.0  # bytes a weight that stage 1 in bfloat16 holds after a step
MICRO_BATCHES = 3  # of a step that is timed; one before it is not


@dataclass(frozen=True)
class RateProbe:
    """One drafter at one size: what it costs by count, and what it took."""

    cost: MicroBatchCost
    parameters: int
    seconds: float  # of a micro-batch
    step_seconds: float  # of the optimizer's step


def probe_spec(hidden: int, intermediate: int, vocabulary: int) -> TargetSpec:
    """A target of these sizes, without weights."""
    config = {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 64, "head_dim": 32, "vocab_size": vocabulary, "rms_norm_eps": 1e-6,
        "hidden_act": "silu", "max_position_embeddings": 4096, "num_hidden_layers": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "initializer_range": 0.02,
    }  # fmt: skip
    return TargetSpec("probe", registry.family("qwen3"), config, "qwen3")


def probe_config(name: str, spec: TargetSpec, **changes: Any) -> Any:
    """The smallest section of an algorithm, with as many layers and anchors as make it work."""
    algorithm = registry.algorithm(name)
    section = {"target_layers": [0, 1, 3], **algorithm.tiny_section}
    usual = {"num_anchors": 64, "block_size": 7, "num_layers": 2}
    section |= {key: value for key, value in usual.items() if key in algorithm.tiny_section}
    return algorithm.parse({**section, **changes}, spec)


def probe_batch(spec: TargetSpec, config: Any, tokens: int, dtype: torch.dtype) -> Batch:
    """Random hidden states of a conversation."""
    supervision = example(tokens, 1, 0.6)
    shape, width = supervision.loss_mask.shape, len(config.target_layers) * spec.hidden_size
    ids = torch.randint(0, spec.vocab_size, shape)
    return Batch(
        supervision, ids, torch.randn(*shape, width).to(dtype), torch.randn(*shape, spec.hidden_size).to(dtype)
    )


def run_probe(name: str, size: Sequence[int], precision: str, world: Any) -> RateProbe:
    """Train a drafter for a step, and count the same."""
    spec = probe_spec(*size[:3])
    config, dtype = probe_config(name, spec), getattr(torch, precision)
    algorithm = registry.algorithm(name)
    model = algorithm.build(config, spec)
    head = (torch.randn(spec.vocab_size, spec.hidden_size) * 0.05).to(dtype)
    model.attach(head, head)
    train = TrainSection(deepspeed=str(CONFIGS / PRECISIONS[precision]), global_batch=MICRO_BATCHES + 1)
    engine = Engine(model, train, world)
    batch = probe_batch(spec, config, size[3], dtype)
    batch = batch.planned(algorithm.plan(config, batch.supervision))
    seconds = []
    for turn in range(MICRO_BATCHES + 1):
        engine.begin_micro_batch(last=turn == MICRO_BATCHES)
        begun = time.process_time()
        terms = engine.forward(batch)
        engine.backward(terms, 1000.0)
        seconds.append(time.process_time() - begun)
        begun = time.process_time()
        engine.step(1e-4)
        step_seconds = time.process_time() - begun
    engine.close()
    parameters = sum(one.numel() for one in model.parameters())
    cost = trace(name, config, spec, batch.supervision, dtype, "cpu" if engine.device.type == "cpu" else "accelerator")
    return RateProbe(cost, parameters, statistics.median(seconds[1:]), step_seconds)


def fit(rows: NDArray[np.float64], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Coefficients, none below 0, that explain the seconds with the least relative error."""
    scaled, ones = rows / seconds[:, None], np.ones(len(seconds))
    best, least = np.zeros(rows.shape[1]), float("inf")
    for count in range(1, rows.shape[1] + 1):
        for chosen in itertools.combinations(range(rows.shape[1]), count):
            part = scaled[:, chosen]
            scale = np.maximum(np.abs(part).max(axis=0), 1e-300)
            found = np.linalg.lstsq(part / scale, ones, rcond=None)[0] / scale
            error = float(((part @ found - 1) ** 2).sum())
            if found.min() >= 0 and error < least:
                best, least = np.zeros(rows.shape[1]), error
                best[list(chosen)] = found
    return best


def decode_rates() -> dict[str, float]:
    """Raw bytes a second that one core decodes, by level."""
    values = torch.randn(HIDDEN_CHUNK, 1280, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    words, rates = values.view(torch.int16).numpy().view(np.uint16), {}
    for name, level in LEVELS.items():
        codec = level.features(words)
        data, out = np.frombuffer(codec.encode_rows(words), np.uint8), np.empty_like(words)
        times = []
        for _ in range(5):
            begun = time.process_time()
            codec.decode_rows(data, out, 0, len(out))
            times.append(time.process_time() - begun)
        rates[name] = words.nbytes / max(statistics.median(times[1:]), 1e-6)
    return rates


def measure(precisions: Sequence[str] = tuple(PRECISIONS)) -> Machine:
    """The machine that this process runs on.

    Args:
        precisions: whose rates are wanted.

    Raises:
        RecipeError: several processes, of which each would measure.
    """
    jobs = [
        (name, SIZES[(number + turn) % len(SIZES)], precision)
        for turn, precision in enumerate(precisions)
        for number, name in enumerate(registry.ALGORITHMS)
    ]
    with training_processes() as world:
        if world.size > 1:
            raise RecipeError("rates are measured by one process", found=world.size, wanted="1 process")
        progress, probes, reserve = Progress("measuring", len(jobs), noun="probes"), [], 0.0
        before = psutil.Process().memory_info().rss
        for job in jobs:
            probes.append(run_probe(*job, world))
            if len(probes) == 1:  # the libraries of a training are loaded by its first step
                reserve = psutil.Process().memory_info().rss - before - LEFT * probes[0].parameters
            progress.add()
        progress.close()
    return machine_of(probes, precisions, max(reserve, 0.0))


def machine_of(probes: Sequence[RateProbe], precisions: Sequence[str], reserve: float) -> Machine:
    """The rates that explain the probes; ``reserve``: bytes that libraries take."""
    rows = np.array(
        [
            [*(one.cost.flops[dtype] for dtype in precisions), one.cost.moved + step_bytes(one.parameters, 2),
             float(one.cost.operators)]
            for one in probes
        ]
    )  # fmt: skip
    found = fit(rows, np.array([one.seconds for one in probes]))
    *products, moving, each = (float(one) for one in found)
    stepping = statistics.median(one.step_seconds / optimizer_bytes(one.parameters) for one in probes)
    device, memory = pick_device(), psutil.virtual_memory().total
    accelerator = device.type != "cpu"
    title = torch.cuda.get_device_name() if accelerator else platform.processor() or platform.machine()
    return Machine(
        platform.node(), f"{title}, one process" + f" of {torch.get_num_threads()} threads" * (not accelerator), True,
        f"deepspec plan --measure, {len(probes)} probes", "accelerator" if accelerator else "cpu",
        float(torch.cuda.get_device_properties(device).total_memory if accelerator else memory), reserve, 1.0,
        {dtype: 1 / max(one, 1e-18) for dtype, one in zip(precisions, products, strict=True)}, 1 / max(moving, 1e-15),
        each, 1 / stepping, gpus=max(torch.cuda.device_count(), 1), cores=os.cpu_count() or 1,
        host_memory=float(memory), decode_rate=decode_rates(),
    )  # fmt: skip
