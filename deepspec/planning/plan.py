"""A plan: memory, cache, hours and bandwidths of a training, and which of them is the limit; by formulas stated here.

Seconds of a micro-batch: FLOP / rate + bytes moved / rate + operators x seconds each, as counted by
:mod:`deepspec.planning.trace`. Of a step: its micro-batches, the optimizer, and what the ranks exchange; on GPUs
reading and decoding run beside them, so the slowest of the three is the step; on a CPU they share its cores and add up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from deepspec import registry
from deepspec.cache.estimate import Estimate, Totals, estimate
from deepspec.cache.parts import Layout
from deepspec.errors import RecipeError
from deepspec.files import read_json
from deepspec.planning.machines import Machine, Storage
from deepspec.planning.memory import Memory, Sizes, optimizer_bytes, rank_memory, step_bytes
from deepspec.planning.target import TargetCost, target_cost
from deepspec.planning.trace import MicroBatchCost, default_dtype, example, trace
from deepspec.recipe import Recipe
from deepspec.targets import TargetSpec
from deepspec.training.settings import accumulation_steps, deepspeed_settings, model_dtype, zero_stage

_counted: dict[Any, MicroBatchCost] = {}  # micro-batches that this process has counted: clusters differ, they do not
USABLE = 0.9  # of a GPU's memory, for a replica of the target


@dataclass(frozen=True)
class Cluster:
    """What the training runs on."""

    machine: Machine
    storage: Storage
    gpus: int  # of a host
    hosts: int = 1

    @property
    def ranks(self) -> int:
        """W."""
        return self.gpus * self.hosts


@dataclass(frozen=True)
class DataSize:
    """The data of a training."""

    totals: Totals
    longest: int  # tokens of the longest sample
    source: str  # where that is from


@dataclass(frozen=True)
class LevelPlan:
    """A cache at one level, and what reading it takes."""

    level: str
    bytes: float
    files: int
    write_hours: float
    read_rate: float  # bytes a second of a host that the training reads at full speed
    read_seconds: float  # of a step
    decode_seconds: float
    step_seconds: float
    limit: str
    served_rate: float  # bytes a second between servers and one training GPU


@dataclass(frozen=True)
class Plan:
    """All of it."""

    recipe: str
    target: str
    machine: Machine
    gpus: int
    hosts: int
    storage: str
    work: DataSize
    draft_parameters: int
    target_parameters: int
    target_active: int
    stage: int
    micro_batch: int
    accumulation: int
    memory: Memory
    largest_micro_batch: int
    micro_seconds: float
    steps: int
    step_parts: dict[str, float]  # seconds of a step: compute, optimizer, exchange
    forward_hours: float  # of the target over all data, on all GPUs
    replica_gpus: int  # that one copy of the target needs
    servers: float  # GPUs that serve the target for one that trains
    levels: list[LevelPlan] = field(default_factory=list)
    level: str = "lossless"

    @property
    def chosen(self) -> LevelPlan:
        """The recipe's level."""
        return next(one for one in self.levels if one.level == self.level)

    @property
    def train_hours(self) -> float:
        """Of the whole training at the recipe's level."""
        return self.steps * self.chosen.step_seconds / 3600

    @property
    def fits(self) -> bool:
        """Whether a rank's memory suffices."""
        return self.memory.total <= self.machine.memory


def draft_sizes(recipe: Recipe, spec: TargetSpec) -> Sizes:
    """Parameters of the draft, counted from the model on the meta device, and what it takes of the target."""
    algorithm = registry.algorithm(recipe.algorithm)
    with torch.device("meta"), default_dtype(torch.bfloat16):
        model = algorithm.empty(recipe.draft, spec)
    counts = [one.numel() for one in model.parameters()]
    tied = bool(spec.config.get("tie_word_embeddings"))
    frozen = spec.vocab_size * spec.hidden_size * (1 if tied else 2)
    if recipe.draft.draft_vocab_size is not None:
        frozen += recipe.draft.draft_vocab_size * spec.hidden_size
    return Sizes(sum(counts), max(counts), frozen, 2 if recipe.target.dtype == "bfloat16" else 4)


def micro_seconds(cost: MicroBatchCost, machine: Machine, parameters: int, weight_bytes: int) -> float:
    """Seconds of one micro-batch.

    Raises:
        RecipeError: the machine has no rate for a dtype.
    """
    seconds = cost.operators * machine.operator_seconds
    seconds += (cost.moved + step_bytes(parameters, weight_bytes)) / machine.memory_rate
    for dtype, flops in cost.flops.items():
        if dtype not in machine.flops:
            remedy = "another precision (train.deepspeed), or measure both: deepspec plan --measure FILE"
            raise RecipeError("the machine has no rate for it", key=dtype, found=sorted(machine.flops), remedy=remedy)
        seconds += flops / machine.flops[dtype]
    return seconds


def exchange_seconds(cluster: Cluster, parameters: int, stage: int, accumulation: int, zero: dict[str, Any]) -> float:
    """Seconds of a step in which ranks exchange gradients (4 P bytes) and weights (2 P), rings at full rate.

    Stages 0 and 1 reduce once a step, 2 and 3 at every micro-batch; stage 3 gathers weights twice a micro-batch.
    """
    machine, ranks = cluster.machine, cluster.ranks
    if ranks == 1:
        return 0.0
    rate = machine.link if cluster.hosts == 1 else min(machine.link, machine.network)
    share, gradient, weights = (ranks - 1) / ranks, 4.0 * parameters, 2.0 * parameters
    if stage == 0:
        return 2 * share * gradient / rate
    if stage == 1:
        return share * (2 * gradient + weights) / rate
    if stage == 2:
        return share * (accumulation * gradient + weights) / rate
    second = machine.link if int(zero.get("zero_hpz_partition_size", 1)) > 1 else rate  # hpZ: from the own host
    return share * accumulation * (weights / rate + weights / second + gradient / rate)


def _check_shared(of: int) -> None:
    if of > 1:
        remedy = "plan one process a conversation, which holds more: --set train.sequence_parallel=1"
        problem = "what processes hold that share a conversation is not counted"
        raise RecipeError(problem, key="train.sequence_parallel", found=of, wanted=1, remedy=remedy)


def make_plan(recipe: Recipe, spec: TargetSpec, work: DataSize, cluster: Cluster) -> Plan:
    """The plan of a recipe, already checked against its target (:meth:`Recipe.for_target`).

    Raises:
        RecipeError: conversations that processes share, or a global batch that the ranks cannot share.
    """
    train, machine = recipe.train, cluster.machine
    _check_shared(train.sequence_parallel)
    settings = deepspeed_settings(train, cluster.ranks)
    if machine.device != "cpu":  # what is left out on this machine counts there
        settings["zero_optimization"] = read_json(train.deepspeed, RecipeError).get("zero_optimization", {})
    dtype, stage, zero = model_dtype(settings), zero_stage(settings), settings.get("zero_optimization", {})
    sizes, mean = draft_sizes(recipe, spec), max(2, round(work.totals.mean_tokens))
    supervised = work.totals.last_rows / max(work.totals.tokens, 1)

    def count(tokens: int, samples: int) -> MicroBatchCost:
        how = (dtype, machine.device, train.activation_checkpointing)
        key = (recipe.algorithm, repr(recipe.draft), repr(spec), tokens, samples, supervised, *how)
        if key not in _counted:
            masks = example(tokens, samples, supervised)
            _counted[key] = trace(recipe.algorithm, recipe.draft, spec, masks, *how)
        return _counted[key]

    most = train.micro_batch if train.micro_tokens is None else max(1, train.micro_tokens // work.longest)
    usual = train.micro_batch if train.micro_tokens is None else max(1, train.micro_tokens // mean)
    accumulation = accumulation_steps(train, cluster.ranks)
    if train.micro_tokens is not None:
        accumulation = max(1, math.ceil(train.global_batch / cluster.ranks / usual))
    full = count(work.longest, most)
    memory = rank_memory(sizes, full, settings, cluster.ranks, machine, train.workers, recipe.algorithm)
    # activations and features grow with the samples; the loss's buffers are a chunk's
    growing = machine.slack * full.peak["activations"] + memory.device["features"]
    room, each = machine.memory - memory.total, growing / most
    one = full if (mean, usual) == (work.longest, most) else count(mean, usual)
    seconds = micro_seconds(one, machine, sizes.parameters, dtype.itemsize)
    stepped = sizes.parameters if stage == 0 else sizes.parameters / cluster.ranks
    exchange = exchange_seconds(cluster, sizes.parameters, stage, accumulation, zero)
    offload = 0.0
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        offload = 6.0 * stepped / machine.host_link  # gradients there (4), weights back (2)
    parts = {
        "compute": accumulation * seconds, "optimizer": optimizer_bytes(stepped) / machine.optimizer_rate + offload,
        "exchange": exchange,
    }  # fmt: skip
    steps = train.epochs * (work.totals.samples // train.global_batch)
    steps = steps if train.max_steps is None else min(steps, train.max_steps)
    target, flops = target_cost(spec), machine.flops.get(recipe.target.dtype, math.nan)
    forward = target.flops(mean) / flops
    plan = Plan(
        recipe.name, recipe.target.path, machine, cluster.gpus, cluster.hosts, cluster.storage.title, work,
        sizes.parameters, target.parameters, target.active, stage, usual, accumulation, memory,
        max(0, most + math.floor(room / each)), seconds, steps, parts,
        work.totals.samples * forward / cluster.ranks / 3600, replica_gpus(target, machine, recipe),
        forward * train.global_batch / cluster.ranks / max(sum(parts.values()), 1e-12), level=recipe.cache.level,
    )  # fmt: skip
    return replace(plan, levels=level_plans(recipe, spec, cluster, plan))


def replica_gpus(target: TargetCost, machine: Machine, recipe: Recipe) -> int:
    """GPUs that the weights of one copy of the target need."""
    each = 2 if recipe.target.dtype == "bfloat16" else 4
    return max(1, math.ceil(each * target.parameters / (USABLE * machine.memory)))


def level_plans(recipe: Recipe, spec: TargetSpec, cluster: Cluster, plan: Plan) -> list[LevelPlan]:
    """What each level of the cache means for disk, network and hours."""
    keeps_last = registry.algorithm(recipe.algorithm).needs_last_hidden(recipe.draft)
    channels = spec.hidden_size * len(recipe.target.layers)
    layout = Layout(channels, spec.hidden_size, recipe.target.dtype, "raw", "raw" if keeps_last else None)
    estimates = estimate(plan.work.totals, layout, recipe.cache.samples_per_part)
    raw = next(one.coded_bytes for one in estimates if one.level == "raw")
    return [_level(one, raw, recipe, cluster, plan) for one in estimates]


def _level(one: Estimate, raw: int, recipe: Recipe, cluster: Cluster, plan: Plan) -> LevelPlan:
    train, machine = recipe.train, cluster.machine
    share = train.global_batch / max(plan.work.totals.samples, 1)  # of the data, a step
    rate = storage_rate(cluster)
    threads = min(machine.cores, max(train.workers, 1) * cluster.gpus)
    decode = share * raw / cluster.hosts / (threads * machine.decode_rate.get(one.level, math.inf))
    read = share * one.coded_bytes / rate
    own = sum(plan.step_parts.values())
    ways = {**plan.step_parts, "decoding": decode} if machine.device == "cpu" else {"the GPUs": own, "decoding": decode}
    step = max(own + decode, read) if machine.device == "cpu" else max(own, decode, read)
    ways["reading"] = read
    if machine.device != "cpu" and max(ways, key=lambda name: ways[name]) == "the GPUs":
        ways = dict(plan.step_parts)
    return LevelPlan(
        one.level, float(one.coded_bytes), one.files, one.coded_bytes / rate / 3600,
        share * one.coded_bytes / cluster.hosts / max(own, 1e-12), read, decode, step,
        max(ways, key=lambda name: ways[name]),
        share * one.coded_bytes / cluster.ranks / max(own, 1e-12),
    )  # fmt: skip


def storage_rate(cluster: Cluster) -> float:
    """Bytes a second that all hosts read together."""
    together = cluster.hosts * cluster.storage.host_rate
    return together if cluster.storage.total_rate is None else min(together, cluster.storage.total_rate)
