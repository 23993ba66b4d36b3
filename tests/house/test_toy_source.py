"""A new feature source is one file and one registry row: the file is written here, and nothing else is touched."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import training_tools as tools

from deepspec import registry
from deepspec.distributed import World
from deepspec.errors import RecipeError
from deepspec.recipe import load_recipe
from deepspec.sources.base import FeatureSource
from deepspec.targets import load_target_embeddings
from deepspec.testing.source import SourceSuite
from deepspec.training import run

pytest_plugins = ["training_fixtures"]

TOY = '''
"""Arithmetic instead of a target: the hidden states of a token are sines of its id."""

import numpy as np
import torch

from deepspec.batch import Batch
from deepspec.sources.base import FeatureSource, pad


class ToySource(FeatureSource):
    required = ("prompts",)

    def __init__(self, count, hidden, layers):
        self.lengths = np.arange(12, 12 + count)
        self.group_sizes = (count,)
        self.hidden, self.layers = hidden, layers

    @classmethod
    def open(cls, recipe, target, held_out=False):
        return cls(int(recipe.data.prompts), target.spec.hidden_size, len(recipe.target.layers))

    def sample_id(self, number):
        return number

    def loss_mask(self, number):
        return np.arange(self.lengths[number]) >= 3

    def tokens(self, number):
        return np.arange(self.lengths[number]) * (number + 7) % 60 + 4

    def batch(self, numbers, seed, epoch):
        ids = [torch.from_numpy(self.tokens(number)) for number in numbers]
        states = [torch.sin(row[:, None] * torch.arange(1.0, 1 + self.hidden)) for row in ids]
        features = pad([state.repeat(1, self.layers) for state in states])
        return Batch(self.supervision(numbers, seed, epoch), pad(ids), features, pad(states))

    def fingerprint(self):
        return {"source": "toy", "count": len(self.lengths)}
'''


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that names the toy."""
    folder = tmp_path_factory.mktemp("toy")
    target = tools.make_target(folder / "target")
    return tools.write_recipe(folder / "a", target, data={"source": "toy", "prompts": "9"}, max_steps=2)


@pytest.fixture(autouse=True)
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one file and the one row."""
    (tmp_path / "toy_source.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.SOURCES, "toy", "toy_source:ToySource")


class TestToySource(SourceSuite):
    @pytest.fixture
    def opened(self, recipe: Path) -> Callable[[], FeatureSource]:
        loaded = load_recipe(recipe)
        target = load_target_embeddings(loaded.target.path, torch.float32)
        return lambda: registry.source("toy").open(loaded, target)


def test_it_trains(recipe: Path, world: World) -> None:
    trainer = run.assemble(run.prepare(load_recipe(recipe), world, False), world, profile=False)
    assert trainer.run(0)
    trainer.engine.close()
    losses = [row["loss"] for row in tools.log_of(trainer.checkpoints.run)]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))


def test_what_it_needs_is_asked_for(recipe: Path, world: World) -> None:
    with pytest.raises(RecipeError, match=r"data\.prompts: data\.source toy needs it"):
        run.prepare(load_recipe(recipe, ["data.prompts=null"]), world, False)
