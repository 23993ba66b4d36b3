"""Loss plans: made once, by the threads that read, and enough for the objective to ask the device for nothing."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import training_tools as tools
from algorithm_tools import ALGORITHMS, random_batch, tiny_draft, tiny_target
from torch.utils._python_dispatch import TorchDispatchMode

from deepspec import registry
from deepspec.batch import Supervision
from deepspec.distributed import World
from deepspec.nn import loss_chunk
from deepspec.recipe import load_recipe
from deepspec.training import run

pytest_plugins = ["training_fixtures"]
WAITS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "bincount", "repeat_interleave.Tensor")


class NoWait(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: reading a value, and shapes that depend on values."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = str(func)
        assert not any(word in name for word in WAITS), name
        if "aten.index" in name and len(args) > 1 and isinstance(args[1], list | tuple):
            assert not any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1]), name
        return func(*args, **(kwargs or {}))


VARIANTS = {
    **{algorithm: (algorithm, {}) for algorithm in ALGORITHMS},
    "gated": ("dspark", {"markov_head": "gated"}),
    "rnn": ("dspark", {"markov_head": "rnn"}),
    "reduced": ("dspark", {"draft_vocab_size": 40}),
    "reduced-eagle3": ("eagle3", {"draft_vocab_size": 40}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_objective_by_its_plan_waits_for_nothing(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm, changes = VARIANTS[variant]
    monkeypatch.setattr(loss_chunk, "compiled_chunk_terms", lambda: loss_chunk.chunk_terms)  # as on a GPU
    model = tiny_draft(algorithm, tiny_target("qwen3"), **changes)
    model.loss, model.attention = "compiled", "sdpa"
    batch = random_batch([25, 14, 19], len(model.config.target_layers))
    batch = batch.planned(model.algorithm.plan(model.config, batch.supervision))
    with NoWait():
        terms = model(batch)
        terms.loss().backward()
    assert float(terms.loss().detach()) > 0
    assert all(torch.equal(term.weight, batch.plan.weight) for term in terms.terms.values())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_micro_batch_is_planned_once_by_the_threads_that_read(
    workers: int, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools.use_memory_source(monkeypatch)
    owner, planned = registry.algorithm("dspark"), []
    make = owner.plan

    def plan(config: Any, supervision: Supervision) -> Any:
        planned.append((supervision.epoch, supervision.sample_ids, threading.current_thread().name))
        return make(config, supervision)

    monkeypatch.setattr(owner, "plan", plan, raising=False)
    target = tools.make_target(tmp_path / "target")
    recipe = tools.write_recipe(tmp_path / "a", target, max_steps=3, micro_batch=2, workers=workers)
    trainer = run.assemble(run.prepare(load_recipe(recipe), world, False), world, profile=False)
    assert trainer.run(0)
    trainer.engine.close()
    seen = [one[:2] for one in planned]
    assert len(seen) == len(set(seen)) == 3 * 2
    assert all(name.startswith("prefetch" if workers else "MainThread") for *_, name in planned)
