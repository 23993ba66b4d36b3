"""Where training samples come from: real caches, several of them by weight, and the target itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_tools as tools
from cache_tools import conversation_rows

from deepspec.cache.build import build_cache
from deepspec.cache.reader import TargetCache
from deepspec.data.conversations import write_conversations
from deepspec.distributed import World
from deepspec.errors import CheckpointError
from deepspec.recipe import load_recipe
from deepspec.training import run
from deepspec.training.loop import Trainer

pytest_plugins = ["training_fixtures"]
ALGORITHMS = ("dspark", "dflash", "eagle3")
RENDERING = {"max_length": 96, "min_supervised": 4}


@dataclass(frozen=True)
class Inputs:
    """A target in fp32, two files of conversations, and a lossless cache of each."""

    target: Path
    conversations: tuple[Path, Path]
    caches: tuple[Path, Path]

    def recipe(self, folder: Path, algorithm: str = "dspark", data: dict[str, Any] | None = None, **train: Any) -> Path:
        section = {"cache": [str(self.caches[0])], "conversations": str(self.conversations[0])}
        return tools.write_recipe(folder, self.target, algorithm, data=RENDERING | section | (data or {}), **train)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("data")
    target = tools.make_talking_target(folder / "target")
    conversations = (folder / "a.jsonl", folder / "b.jsonl")
    caches = (folder / "cache-a", folder / "cache-b")
    for seed, (path, cache, count) in enumerate(zip(conversations, caches, (24, 12), strict=True)):
        write_conversations(path, conversation_rows(count, seed), {"made by": "a test"})
        recipe = load_recipe(tools.write_recipe(folder / cache.name, target, data=RENDERING))
        build_cache(recipe, path, cache)
    return Inputs(target, conversations, caches)


def assembled(recipe: Path, world: World, *overrides: str) -> Trainer:
    return run.assemble(run.prepare(load_recipe(recipe, overrides), world, False), world, profile=False)


def train(trainer: Trainer) -> list[float]:
    assert trainer.run(0)
    trainer.engine.close()
    return [row["loss"] for row in tools.log_of(trainer.checkpoints.run)]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_online_gives_the_losses_of_a_lossless_cache(
    tmp_path: Path, inputs: Inputs, world: World, algorithm: str
) -> None:
    settings = {"max_steps": 6, "micro_batch": 2, "online_micro_batch": 3}
    cached = assembled(inputs.recipe(tmp_path / "cache", algorithm, **settings), world)
    online = assembled(inputs.recipe(tmp_path / "online", algorithm, {"source": "online"}, **settings), world)
    for step in range(6):
        plans = [trainer.prefetcher.plan.step(step) for trainer in (cached, online)]
        assert np.array_equal(plans[0].samples, plans[1].samples)
        for numbers in (part.tolist() for part in plans[0].micro_batches(1)):
            one, other = (trainer.prefetcher.source.batch(numbers, 3, plans[0].epoch) for trainer in (cached, online))
            assert one.supervision.sample_ids == other.supervision.sample_ids
            assert torch.equal(one.input_ids, other.input_ids)
            assert torch.equal(one.supervision.loss_mask, other.supervision.loss_mask)
            torch.testing.assert_close(one.features, other.features, rtol=1e-5, atol=1e-5)
    losses, wanted = train(online), train(cached)
    assert len(wanted) == 6
    assert losses == pytest.approx(wanted, abs=1e-5)


def test_several_caches_are_mixed_by_weight(tmp_path: Path, inputs: Inputs, world: World) -> None:
    both = {"cache": [str(cache) for cache in inputs.caches], "cache_weights": [1, 3], "conversations": None}
    trainer = assembled(inputs.recipe(tmp_path, data=both, max_steps=20, micro_batch=2), world)
    readers = [TargetCache.open(cache) for cache in inputs.caches]
    drawn: list[int] = []
    epoch = trainer.prefetcher.plan.steps_per_epoch
    for step in trainer.prefetcher.steps(0, epoch):
        for batch in step.batches:
            for row, sample_id in enumerate(batch.supervision.sample_ids):
                group, own_id = sample_id >> 40, sample_id & (1 << 40) - 1
                sample = readers[group].sample(int(np.flatnonzero(readers[group].sample_ids == own_id)[0]))
                length = int(batch.supervision.lengths[row])
                assert batch.input_ids[row, :length].tolist() == sample.input_ids.tolist()
                assert torch.equal(batch.features[row, :length], sample.features)
                drawn.append(group)
    total = sum(map(len, readers))
    assert len(drawn) == epoch * 4 >= total - 3
    assert sum(drawn) == pytest.approx(total * 3 / 4, abs=4)  # an epoch leaves its last incomplete step out
    assert np.isfinite(train(trainer)).all()
    swapped = both | {"cache": both["cache"][::-1]}
    with pytest.raises(CheckpointError, match="data are not the run's"):
        run.prepare(load_recipe(inputs.recipe(tmp_path, data=swapped, max_steps=20, micro_batch=2)), world, False)
    files = {"source": "online", "conversations": [str(path) for path in inputs.conversations]}
    online = files | {"conversation_weights": [1, 3]}
    prepared = run.prepare(load_recipe(inputs.recipe(tmp_path / "o", data=online, max_steps=20)), world, False)
    for step in range(epoch):
        assert np.array_equal(prepared.plan.step(step).samples, trainer.prefetcher.plan.step(step).samples)
    ids = [prepared.source.sample_id(number) for number in range(total)]
    assert ids == [trainer.prefetcher.source.sample_id(number) for number in range(total)]
    reweighted = both | {"cache_weights": [1, 1]}
    with pytest.raises(CheckpointError, match=r"data\.cache_weights: a run cannot change this"):
        run.prepare(load_recipe(inputs.recipe(tmp_path, data=reweighted, max_steps=20, micro_batch=2)), world, False)
