"""Cache, online and served sources pass the suite; what the suite cannot know of them is tested beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import training_tools as tools
from cache_tools import conversation_rows, make_cache
from feature_server import RunningServer
from hidden_state_server import FakeServer
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec.cache.build import build_cache
from deepspec.cache.reader import Sample, TargetCache
from deepspec.data.conversations import write_conversations
from deepspec.errors import DeepSpecError, RecipeError
from deepspec.recipe import Recipe, load_recipe
from deepspec.registry import SOURCES
from deepspec.sources.base import FeatureSource, source_class
from deepspec.sources.cache import CacheSource
from deepspec.streaming.batcher import Limits
from deepspec.targets import load_target
from deepspec.targets.served import server_layers
from deepspec.testing.source import SourceSuite

RENDERING = {"max_length": 96, "min_supervised": 4}


@dataclass(frozen=True)
class Inputs:
    """Two files of conversations, a cache of each, a recipe, and a server of the recipe's target."""

    folder: Path
    recipe: Recipe
    server: FakeServer
    opened: list[FeatureSource] = dataclasses.field(default_factory=list)

    def of(self, source: str, file: str = "a", **changes: object) -> Recipe:
        """The recipe over one of the files."""
        data = {"cache": (str(self.folder / f"cache-{file}"),), "conversations": str(self.folder / f"{file}.jsonl")}
        served = {"servers": (self.server.url,), "server_storage": str(self.server.folder)}
        data |= {"source": source, **served, **changes}
        return dataclasses.replace(self.recipe, data=dataclasses.replace(self.recipe.data, **data))

    def open(self, recipe: Recipe) -> FeatureSource:
        self.opened.append(source_class(recipe).open(recipe, load_target(recipe.target.path, torch.float32)))
        return self.opened[-1]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inputs]:
    folder = tmp_path_factory.mktemp("sources")
    path = tools.make_talking_target(folder / "target")
    target = load_target(path, torch.float32)
    recipe = load_recipe(tools.write_recipe(folder / "r", path, data=RENDERING))
    for seed, file in enumerate("ab"):
        write_conversations(folder / f"{file}.jsonl", conversation_rows(7, seed), {"made by": "a test"})
        build_cache(recipe, folder / f"{file}.jsonl", folder / f"cache-{file}")
    (folder / "states").mkdir()
    server = FakeServer(target, folder / "states", server_layers(tools.LAYERS, target.spec))
    yield Inputs(folder, recipe, server)
    server.server.shutdown()


@pytest.fixture(scope="module")
def feature_servers(inputs: Inputs) -> Iterator[tuple[str, ...]]:
    """Two of our own servers, one of small batches."""
    path = inputs.recipe.target.path  # a model each: the hooks of two forwards side by side would mix
    sizes = (Limits(batch_tokens=1024), Limits(batch_tokens=150))
    running = [RunningServer(load_target(path, torch.float32), limits=size) for size in sizes]
    yield tuple(one.url for one in running)
    for one in running:
        one.stop()


@pytest.fixture(autouse=True)
def closed(inputs: Inputs) -> Iterator[None]:
    """Sources that a test has opened end with it."""
    yield
    while inputs.opened:
        inputs.opened.pop().close()


def other_target(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe for a target with other weights."""
    path = tools.make_talking_target(folder / "other")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    return dataclasses.replace(recipe, target=dataclasses.replace(recipe.target, path=str(path)))


class TestCacheSource(SourceSuite):
    @pytest.fixture
    def opened(self, inputs: Inputs) -> Callable[[], FeatureSource]:
        return lambda: inputs.open(inputs.of("cache"))

    @pytest.fixture
    def others(self, inputs: Inputs) -> list[FeatureSource]:
        both = (str(inputs.folder / "cache-a"), str(inputs.folder / "cache-b"))
        return [inputs.open(inputs.of("cache", "b")), inputs.open(inputs.of("cache", cache=both, conversations=None))]


class TestSeveralCaches(SourceSuite):
    @pytest.fixture
    def opened(self, inputs: Inputs) -> Callable[[], FeatureSource]:
        both = (str(inputs.folder / "cache-a"), str(inputs.folder / "cache-b"))
        return lambda: inputs.open(inputs.of("cache", cache=both, conversations=None))


class TestOnlineSource(SourceSuite):
    tolerance = 1e-5

    @pytest.fixture
    def opened(self, inputs: Inputs) -> Callable[[], FeatureSource]:
        return lambda: inputs.open(inputs.of("online"))

    @pytest.fixture
    def others(self, inputs: Inputs, tmp_path: Path) -> list[FeatureSource]:
        recipe = inputs.of("online")
        fewer = dataclasses.replace(recipe, target=dataclasses.replace(recipe.target, layers=(0, 1)))
        shorter = inputs.of("online", max_length=70)
        return [inputs.open(one) for one in (inputs.of("online", "b"), fewer, shorter, other_target(recipe, tmp_path))]

    @pytest.fixture
    def cache(self, inputs: Inputs) -> FeatureSource:
        return inputs.open(inputs.of("cache"))


class TestOnlineSourceThatWritesACache(SourceSuite):
    """To the bit the cache that it writes; each source writes another one."""

    @pytest.fixture
    def opened(self, inputs: Inputs, tmp_path: Path) -> Callable[[], FeatureSource]:
        return lambda: inputs.open(inputs.of("online", write_cache=str(tmp_path / f"{len(inputs.opened)}")))

    @pytest.fixture
    def cache(self, inputs: Inputs) -> FeatureSource:
        return inputs.open(inputs.of("cache"))


class TestServedSource(TestOnlineSource):
    @pytest.fixture
    def opened(self, inputs: Inputs) -> Callable[[], FeatureSource]:
        return lambda: inputs.open(inputs.of("served"))

    @pytest.fixture
    def others(self, inputs: Inputs) -> list[FeatureSource]:
        return [inputs.open(inputs.of("served", "b"))]


class TestServedSourceThatWritesACache(TestOnlineSourceThatWritesACache):
    @pytest.fixture
    def opened(self, inputs: Inputs, feature_servers: tuple[str, ...], tmp_path: Path) -> Callable[[], FeatureSource]:
        def opened() -> FeatureSource:
            data = {"servers": feature_servers[:1], "server_storage": None}
            recipe = inputs.of("served", write_cache=str(tmp_path / f"{len(inputs.opened)}"), **data)
            fitting = dataclasses.replace(recipe.cache, tokens_per_batch=1024)  # one batch, as in the cache
            return inputs.open(dataclasses.replace(recipe, cache=fitting))

        return opened


class TestFeatureServers(TestOnlineSource):
    tolerance = 1e-5  # two servers that batch differently

    @pytest.fixture
    def opened(self, inputs: Inputs, feature_servers: tuple[str, ...]) -> Callable[[], FeatureSource]:
        return lambda: inputs.open(inputs.of("served", servers=feature_servers, server_storage=None))

    @pytest.fixture
    def others(self, inputs: Inputs, feature_servers: tuple[str, ...]) -> list[FeatureSource]:
        recipe = inputs.of("served", servers=feature_servers, server_storage=None)
        fewer = dataclasses.replace(recipe, target=dataclasses.replace(recipe.target, layers=(0, 1)))
        shorter = inputs.of("served", servers=feature_servers, max_length=70)
        return [inputs.open(one) for one in (inputs.of("served", "b", servers=feature_servers), fewer, shorter)]


def load_and_pad(samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The reference twin of a cache's batch: each sample alone, then copied into zeros."""
    S = max(len(sample.input_ids) for sample in samples)
    features = samples[0].features.new_zeros((len(samples), S, samples[0].features.shape[1]))
    last = samples[0].last_hidden.new_zeros((len(samples), S, samples[0].last_hidden.shape[1]))
    ids, mask = torch.zeros(len(samples), S, dtype=torch.int64), torch.zeros(len(samples), S, dtype=torch.bool)
    for row, sample in enumerate(samples):
        n = len(sample.input_ids)
        ids[row, :n], mask[row, :n] = torch.from_numpy(sample.input_ids), torch.from_numpy(sample.loss_mask)
        features[row, :n], last[row, :n] = sample.features, sample.last_hidden
    return ids, mask, features, last


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def random_caches(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[TargetCache]:
    """Two caches of random hidden states."""
    folder = tmp_path_factory.mktemp(request.param)
    for seed in range(2):
        make_cache(folder / str(seed), samples=9, dtype=request.param, hidden=40, layers=3, seed=seed)
    return [TargetCache.open(folder / str(seed)) for seed in range(2)]


@given(st.lists(st.integers(0, 17), min_size=1, max_size=6), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_batch_decoded_in_place_is_the_padded_samples(
    random_caches: list[TargetCache], numbers: list[int], last_hidden: bool
) -> None:
    batch = CacheSource(random_caches, last_hidden).batch(numbers, 1, 2)
    ids, mask, features, last = load_and_pad([random_caches[n // 9].sample(n % 9) for n in numbers])
    assert torch.equal(batch.input_ids, ids)
    assert torch.equal(batch.supervision.loss_mask, mask)
    assert torch.equal(batch.features, features)
    assert batch.features.dtype == random_caches[0].dtype
    assert batch.supervision.sample_ids == tuple(((n // 9) << 40) + n % 9 for n in numbers)
    assert (batch.last_hidden is not None) == last_hidden
    assert batch.last_hidden is None or torch.equal(batch.last_hidden, last)


def test_each_source_says_what_it_needs(inputs: Inputs) -> None:
    classes = {name: source_class(inputs.of(name)) for name in SOURCES}
    assert {name: one.needs_model for name, one in classes.items()} == {"cache": False, "online": True, "served": False}
    assert {name: one.reads_ahead for name, one in classes.items()} == {"cache": True, "online": False, "served": True}


@pytest.mark.parametrize(
    ("source", "missing"),
    [("online", "conversations"), ("served", "conversations"), ("served", "servers")],
)
def test_a_key_that_a_source_needs_is_named(inputs: Inputs, source: str, missing: str) -> None:
    empty = () if missing == "servers" else None
    with pytest.raises(RecipeError, match=rf"data\.{missing}: data\.source {source} needs it"):
        source_class(inputs.of(source, **{missing: empty}))


def test_a_cache_without_samples_or_no_cache_is_refused(inputs: Inputs) -> None:
    with pytest.raises(DeepSpecError, match=r"data\.cache: no cache is named.*deepspec cache build"):
        inputs.open(inputs.of("cache", cache=()))


def test_an_engine_without_a_stated_folder_is_refused(inputs: Inputs) -> None:
    with pytest.raises(DeepSpecError, match=r"data\.servers: .*no folder is stated"):
        inputs.open(inputs.of("served", server_storage=None))


@pytest.mark.parametrize("level", ["raw", "lossless"])
def test_one_server_of_each_kind_side_by_side_and_exact_levels_give_what_a_cache_holds(
    inputs: Inputs, feature_servers: tuple[str, ...], level: str
) -> None:
    cache = inputs.open(inputs.of("cache"))
    served = inputs.open(inputs.of("served", servers=(feature_servers[0], inputs.server.url), server_level=level))
    for number in range(len(cache.lengths)):
        there, here = cache.batch([number], 1, 1), served.batch([number], 1, 1)
        torch.testing.assert_close(here.features, there.features, rtol=0, atol=1e-5)
        torch.testing.assert_close(here.last_hidden, there.last_hidden, rtol=0, atol=1e-5)
