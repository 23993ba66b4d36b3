"""Training steps of small drafts, from whose costs and seconds a machine's rates are found."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from deepspec import registry
from deepspec.batch import Batch
from deepspec.distributed import World, pick_device
from deepspec.planning.memory import Sizes
from deepspec.planning.trace import MicroBatchCost, example, trace
from deepspec.recipe import TrainSection
from deepspec.recipe_files import CONFIGS
from deepspec.targets import TargetSpec
from deepspec.training.engine import Engine
from deepspec.training.settings import deepspeed_settings

SIZES = (  # hidden, intermediate, vocabulary, tokens: of the probes in turn
    (128, 512, 4096, 384), (256, 1024, 6144, 512), (320, 1280, 12288, 384), (192, 512, 8192, 640),
)  # fmt: skip
LARGE = ((512, 1536, 6144, 384), (448, 2048, 8192, 256))  # a second one of each drafter: rates change with size
PRECISIONS = {"bfloat16": "zero1_bf16.json", "float32": "zero1_fp32.json"}
SUPERVISED = 0.6  # of a probe's tokens
MICRO_BATCHES = 3  # of a step that is timed; one before it is not
DRAWS = 15  # micro-batches of a step that shows what libraries keep


@dataclass(frozen=True)
class RateProbe:
    """One drafter at one size: what it costs by count, and what it took."""

    cost: MicroBatchCost
    sizes: Sizes
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


def _section(precision: str) -> TrainSection:
    return TrainSection(deepspeed=str(CONFIGS / PRECISIONS[precision]), global_batch=MICRO_BATCHES + 1)


def engine_settings(precision: str) -> dict[str, Any]:
    """DeepSpeed's settings of a probe."""
    return deepspeed_settings(_section(precision), 1)


def probe_batch(spec: TargetSpec, config: Any, tokens: int, dtype: torch.dtype) -> Batch:
    """Random hidden states of a conversation."""
    supervision = example(tokens, 1, SUPERVISED)
    shape, width = supervision.loss_mask.shape, len(config.target_layers) * spec.hidden_size
    ids = torch.randint(0, spec.vocab_size, shape)
    return Batch(
        supervision, ids, torch.randn(*shape, width).to(dtype), torch.randn(*shape, spec.hidden_size).to(dtype)
    )


def run_probe(name: str, size: Sequence[int], precision: str, world: World) -> RateProbe:
    """Train a drafter for a step, and count the same."""
    seconds, step_seconds = time_step(name, size, precision, world)
    return RateProbe(*count_step(name, size, precision, pick_device().type), seconds, step_seconds)


def count_step(name: str, size: Sequence[int], precision: str, device: str) -> tuple[MicroBatchCost, Sizes]:
    """What the probe of a drafter costs on a device of that type, and its weights."""
    spec, dtype = probe_spec(*size[:3]), getattr(torch, precision)
    config = probe_config(name, spec)
    with torch.device("meta"):
        counts = [one.numel() for one in registry.algorithm(name).empty(config, spec).parameters()]
    sizes = Sizes(sum(counts), max(counts), spec.vocab_size * spec.hidden_size, dtype.itemsize)
    kind = "cpu" if device == "cpu" else "accelerator"
    return trace(name, config, spec, example(size[3], 1, SUPERVISED), dtype, kind), sizes


def time_step(
    name: str, size: Sequence[int], precision: str, world: World, micro_batches: int = MICRO_BATCHES + 1
) -> tuple[float, float]:
    """Train a drafter for a step: seconds of a micro-batch (median) and of the optimizer's step.

    Args:
        name: a row of the registry.
        size: a row of SIZES.
        precision: a key of PRECISIONS.
        world: of one process.
        micro_batches: of the step. What is random is drawn for each, as in a training: where products then differ in
            their rows, libraries make and keep something for each.
    """
    spec = probe_spec(*size[:3])
    config, dtype = probe_config(name, spec), getattr(torch, precision)
    algorithm = registry.algorithm(name)
    model = algorithm.build(config, spec)
    head = (torch.randn(spec.vocab_size, spec.hidden_size) * 0.05).to(dtype)
    model.attach(head, head)
    engine = Engine(model, _section(precision), world)
    batch, seconds = probe_batch(spec, config, size[3], dtype), []
    for turn in range(micro_batches):
        batch = batch.planned(algorithm.plan(config, replace(batch.supervision, epoch=turn)))
        engine.begin_micro_batch(last=turn == micro_batches - 1)
        begun = time.process_time()
        terms = engine.forward(batch)
        engine.backward(terms, 1000.0)
        seconds.append(time.process_time() - begun)
        begun = time.process_time()
        engine.step(1e-4)
        step_seconds = time.process_time() - begun
    engine.close()
    return statistics.median(seconds[1:]), step_seconds
