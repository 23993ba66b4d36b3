"""Memory of a rank by part: what each ZeRO stage holds, and what the fullest moment adds.

P trained weights, W ranks, e bytes of a weight (2 in bfloat16, 4 in float32). What DeepSpeed 0.19 holds (the live
tensors of every file of deepspeed_configs/ on one and two ranks were counted; tests/planning has the counts):

    part                 stage 0       1                   2                   3
    draft weights        e P           e P                 e P                 e P / W
    gradients            e P           4 P (accumulated)   4 P / W             4 P / W
    master copy          4 P (bf16)    4 P / W             4 P / W             4 P / W
    moments              8 P           8 P / W             8 P / W             8 P / W

`offload_optimizer` moves master copy and moments to the host (or to NVMe), `offload_param` the weights. AdamW's step
needs two more copies of what a rank steps at a time (one on a GPU); activations are gone by then, so the fullest moment
is the larger of the two.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from deepspec.planning.machines import Machine
from deepspec.planning.trace import MicroBatchCost
from deepspec.training.settings import model_dtype, zero_stage

PARTS = (
    "draft weights", "gradients", "master copy", "moments", "embedding and head", "features", "activations",
    "loss buffers", "optimizer's step", "buckets", "libraries",
)  # fmt: skip

# of a process that is measured: what is freed goes back to the system at once; bytes, glibc's, fixed
HANDED_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


@dataclass(frozen=True)
class Sizes:
    """What the memory of a rank follows from, beside the micro-batch."""

    parameters: int  # P
    largest: int  # values of the largest weight
    frozen: int  # values of embedding and head
    target_bytes: int  # of such a value as the target has it


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its fullest moment."""

    device: dict[str, float] = field(default_factory=dict)  # by part
    host: dict[str, float] = field(default_factory=dict)
    nvme: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Of the device."""
        return sum(self.device.values())


def optimizer_bytes(parameters: float) -> float:
    """Bytes that a step of AdamW reads and writes: gradient, master copy, moments, weights, and the gradient's norm."""
    return 34.0 * parameters


def step_bytes(parameters: float, weight_bytes: int) -> float:
    """Bytes that a micro-batch reads and writes to add its gradient to the step's."""
    return (weight_bytes + 8.0) * parameters


def sharded_parts(sizes: Sizes, settings: dict[str, Any], world: int) -> Memory:
    """Weights, gradients and optimizer state by ZeRO stage and offload."""
    stage, dtype = zero_stage(settings), model_dtype(settings)
    zero, count, each = settings.get("zero_optimization", {}), sizes.parameters, dtype.itemsize
    mine = count / world
    on_gpu: dict[str, float] = {"draft weights": each * (mine if stage == 3 else count)}
    if stage == 3:  # a layer is gathered while it runs
        on_gpu["draft weights"] += (
            0.0 if world == 1 else each * min(count, sizes.largest + bucket(zero, "stage3_prefetch"))
        )
        hpz = int(zero.get("zero_hpz_partition_size", 1))
        on_gpu["draft weights"] += each * count / hpz if hpz > 1 else 0.0
    on_gpu["gradients"] = {0: each * count, 1: 4.0 * count}.get(stage, 4.0 * mine)
    state = {"moments": 8.0 * (count if stage == 0 else mine)}
    if stage or dtype == torch.bfloat16:
        state["master copy"] = 4.0 * (count if stage == 0 else mine)
    host: dict[str, float] = {}
    nvme: dict[str, float] = {}
    places = {"cpu": host, "nvme": nvme}
    place = places.get(zero.get("offload_optimizer", {}).get("device", "none"), on_gpu)
    place.update(state)
    if place is not on_gpu:  # the gradients of a rank's share go with them
        host["gradients"] = 4.0 * mine
        on_gpu["gradients"] = 0.0 if stage > 1 else on_gpu["gradients"]
    weights = zero.get("offload_param", {}).get("device", "none")
    if stage == 3 and weights in places:
        places[weights]["draft weights"] = each * mine
        on_gpu["draft weights"] -= each * mine
    return Memory(on_gpu, host, nvme)


def bucket(zero: dict[str, Any], name: str = "reduce") -> int:
    """Values of a bucket."""
    key = "reduce_bucket_size" if name == "reduce" else f"{name}_bucket_size"
    return int(float(zero.get(key, 5e8 if name == "reduce" else 5e7)))


def rank_memory(
    sizes: Sizes, cost: MicroBatchCost, settings: dict[str, Any], world: int, machine: Machine, workers: int,
    algorithm: str = "",
) -> Memory:  # fmt: skip
    """Memory of a rank at its fullest moment.

    Args:
        sizes: of draft and target.
        cost: of one micro-batch.
        settings: DeepSpeed's, of :func:`deepspec.training.settings.deepspeed_settings`.
        world: W.
        machine: its libraries' bytes, and what its allocator loses.
        workers: the recipe's `train.workers`.
        algorithm: the drafter, for what libraries take of its training where that was measured.
    """
    found, zero, dtype = (
        sharded_parts(sizes, settings, world),
        settings.get("zero_optimization", {}),
        model_dtype(settings),
    )
    device, on_cpu, stage = found.device, machine.device == "cpu", zero_stage(settings)
    each = dtype.itemsize
    device["embedding and head"] = sizes.frozen * each
    if on_cpu and each != sizes.target_bytes:  # the target's own stay beside the draft's
        device["embedding and head"] += sizes.frozen * sizes.target_bytes
    queue = cost.last * (2 * workers + 2)
    device["features"] = queue if on_cpu else 2 * cost.last
    if not on_cpu:
        found.host["features"] = queue
    stepped = sizes.parameters if stage == 0 else sizes.parameters / world
    temporary = 16.0 * sizes.largest if stage == 0 else (8.0 if on_cpu else 4.0) * stepped * ("moments" in device)
    forward = {part: machine.slack * size for part, size in cost.peak.items()}
    if sum(forward.values()) >= temporary:
        device.update(forward)
    else:
        device["optimizer's step"] = temporary
    if stage == 3 or (stage == 2 and not on_cpu):
        size = bucket(zero) * each
        device["buckets"] = size * (2 if zero.get("overlap_comm") and stage == 2 else 1)
    device["libraries"] = machine.reserve_of.get(algorithm, machine.reserve)
    return found
