"""Two ranks that share conversations against one that has them alone: ``sequence_worker.py FOLDER CASE ...``.

Every rank computes each case alone and together with the other; rank 0 writes what differs most to
FOLDER/differences.json. Then the trainings of FOLDER/jobs.json run, as in training_worker.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from algorithm_tools import random_batch, tiny_draft, tiny_target
from training_worker import train

from deepspec import registry
from deepspec.batch import WHOLE, Batch
from deepspec.log import start_logging
from deepspec.nn.sequence import ALONE
from deepspec.training.engine import sequence_group, training_processes

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dflash": ("dflash", {}),
    "dspark": ("dspark", {"num_anchors": 7}),
    "dspark rnn": ("dspark", {"markov_head": "rnn"}),
    "causal window, D-PACE": ("dflash", {"causal": True, "sliding_window": 9, "num_layers": 2, "d_pace": 0.5}),
    "dflash2": ("dflash2", {}),
    "eagle3": ("eagle3", {}),
    "eagle3 of two layers": ("eagle3", {"num_layers": 2, "ttt_length": 4}),
}
LENGTHS = {"one": [41], "several": [30, 23, 7], "nothing supervised": [3]}


def losses(model: Any, batch: Batch, part: Any) -> list[torch.Tensor]:
    """The loss of this rank's part, its weight, the sums of its metrics, and the gradients."""
    model.zero_grad(set_to_none=True)
    plan = model.algorithm.plan_part(model.config, part, batch.supervision)
    terms = model(batch.shared(part).planned(plan))
    terms.weighted_sum().backward()
    metrics = [ratio.total.detach().float().reshape(-1) for ratio in terms.metrics.values()]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return [terms.weighted_sum().detach().reshape(1), plan.weight.reshape(1), torch.cat(metrics), *gradients]


def difference(model: Any, batch: Batch, group: Any) -> float:
    """The largest difference of any value between alone and the sum of both ranks, of the largest of its tensor."""
    model.sequence = ALONE
    wanted = losses(model, batch, WHOLE)
    model.sequence = group
    found = losses(model, batch, group.part)
    worst = 0.0
    for alone, shared in zip(wanted, found, strict=True):
        dist.all_reduce(shared)
        worst = max(worst, float((alone - shared).abs().max() / alone.abs().max().clamp_min(1.0)))
    return worst


def compare(world: Any, names: list[str]) -> dict[str, float]:
    group, found = sequence_group(world, world.size), {}
    targets = [tiny_target("qwen3", num_key_value_heads=heads) for heads in (1, 2)]  # 1: fewer than ranks
    for number, (name, (algorithm, changes)) in enumerate(CASES.items()):
        if name not in names:
            continue
        model = tiny_draft(algorithm, targets[number % 2], **changes)
        for kind in LENGTHS if name in ("dspark", "eagle3") else ("several",):
            batch = random_batch(LENGTHS[kind], share=0.0 if kind == "nothing supervised" else 0.7)
            if kind == "several":  # as long contexts are trained: features of a narrower type, computed again
                batch = replace(batch, features=batch.features.bfloat16())
            model.activation_checkpointing = kind == "several"
            found[f"{name}, {kind}"] = difference(model, batch, group)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("cases", nargs="+", choices=CASES)
    given = parser.parse_args()
    folder = given.folder
    registry.SOURCES["cache"] = "training_tools:MemorySource"
    start_logging()
    with training_processes() as world:
        found = compare(world, given.cases)
        if world.is_main:
            (folder / "differences.json").write_text(json.dumps(found))
        for job in json.loads((folder / "jobs.json").read_text()):
            train(job, world)


if __name__ == "__main__":
    main()
