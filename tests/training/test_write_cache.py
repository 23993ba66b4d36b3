"""A run that writes the cache of what it computes: the bytes of a build, the steps of a run that reads them."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import training_tools as tools
from cache_tools import contents, conversation_rows, run_tool
from feature_server import RunningServer

from deepspec.batch import Batch
from deepspec.cache import write_through
from deepspec.cache.build import build_cache
from deepspec.cache.reader import TargetCache
from deepspec.cache.store import FolderStore, build_lock
from deepspec.checkpoints import read_manifest, read_weights, steps_of
from deepspec.data.conversations import write_conversations
from deepspec.distributed import World
from deepspec.errors import CacheError, RecipeError, TargetError
from deepspec.recipe import load_recipe
from deepspec.sources.base import FeatureSource, source_class
from deepspec.streaming.batcher import Limits
from deepspec.targets import load_target

CUT = ["cache.samples_per_part=7", "cache.tokens_per_batch=150"]  # 5 parts of about 4 batches
ROWS = 34


@dataclass(frozen=True)
class Inputs:
    """A recipe that trains online, and the cache that a build makes of its conversations."""

    recipe: Path
    built: Path
    server: RunningServer

    def served(self) -> list[str]:
        return ["data.source=served", f"data.servers=[{self.server.url}]"]

    def open(self, *overrides: str) -> FeatureSource:
        recipe = load_recipe(self.recipe, [*CUT, *overrides])
        target = load_target(recipe.target.path, torch.float32)
        return source_class(recipe).open(recipe.for_target(target.spec), target)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inputs]:
    folder = tmp_path_factory.mktemp("write")
    target = tools.make_talking_target(folder / "target")
    data = {"source": "online", "conversations": str(folder / "a.jsonl"), "max_length": 96, "min_supervised": 4}
    recipe = tools.write_recipe(folder / "r", target, data=data, max_steps=10)
    write_conversations(folder / "a.jsonl", conversation_rows(ROWS), {"made by": "a test"})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the target's sums are those of the runs in other processes
    build_cache(load_recipe(recipe, CUT), folder / "a.jsonl", folder / "built")
    server = RunningServer(load_target(str(target), torch.float32), limits=Limits(batch_tokens=150))
    yield Inputs(recipe, folder / "built", server)
    server.stop()
    torch.set_num_threads(threads)


def read(source: FeatureSource, numbers: list[int], epoch: int = 0) -> list[Batch]:
    return [source.batch([number], 1, epoch) for number in numbers]


def finish(source: FeatureSource) -> None:
    source.finish()
    source.close()


def check_equal_to_cache(batches: list[Batch], numbers: list[int], built: Path) -> None:
    cache = TargetCache.open(built)
    for batch, number in zip(batches, numbers, strict=True):
        sample = cache.sample(number)
        assert torch.equal(batch.features[0], sample.features)
        assert batch.last_hidden is not None
        assert sample.last_hidden is not None
        assert torch.equal(batch.last_hidden[0], sample.last_hidden)


@pytest.mark.parametrize(("seed", "served"), [(0, False), (1, True)])
def test_in_whatever_order_it_is_asked_the_cache_has_the_bytes_of_a_build(
    inputs: Inputs, tmp_path: Path, seed: int, served: bool
) -> None:
    source = inputs.open(f"data.write_cache={tmp_path / 'c'}", *(inputs.served() if served else ()))
    numbers = random.Random(seed).sample(range(len(source.lengths)), 20)  # never all of them
    check_equal_to_cache(read(source, numbers), numbers, inputs.built)
    with pytest.raises(CacheError, match="not finished"):
        TargetCache.open(tmp_path / "c")
    finish(source)
    assert contents(tmp_path / "c") == contents(inputs.built)


def test_what_is_there_is_not_computed_again(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three starts, each stopped: every batch goes through the target once."""
    seen: list[int] = []
    made = write_through.WriteThrough._conversations

    def noted(self: write_through.WriteThrough, part: int, batch: int) -> object:
        rows = made(self, part, batch)
        seen.extend(sample for sample, _, _ in rows)
        return rows

    monkeypatch.setattr(write_through.WriteThrough, "_conversations", noted)
    for begin in (0, 5, 10):
        source = inputs.open(f"data.write_cache={tmp_path / 'c'}")
        count = len(source.lengths)
        numbers = [number * 7 % count for number in range(begin, begin + 10)]
        check_equal_to_cache(read(source, numbers), numbers, inputs.built)
        source.close()
        assert (tmp_path / "c" / "spool").exists()
    source = inputs.open(f"data.write_cache={tmp_path / 'c'}")
    everything = list(range(count))
    check_equal_to_cache(read(source, everything, epoch=1), everything, inputs.built)
    assert contents(tmp_path / "c") == contents(inputs.built)  # a later epoch begins with the whole cache
    finish(source)
    assert sorted(seen) == TargetCache.open(inputs.built).sample_ids.tolist()


def two_ranks(inputs: Inputs, cache: Path) -> list[FeatureSource]:
    """Of one run; rank 1 neither writes the plan nor waits for rank 0."""
    ranks = []
    for rank in (1, 0):
        with mock.patch("deepspec.sources.written.world_from_environment", lambda rank=rank: World(rank, 2, rank)):
            ranks.append(inputs.open(f"data.write_cache={cache}"))
    return ranks


def test_a_batch_that_another_rank_takes_into_its_part_meanwhile_is_read_there(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = two_ranks(inputs, tmp_path / "c")
    read(other, [3])
    look = write_through.is_complete

    def then_it_goes(store: FolderStore, name: str) -> bool:
        there = look(store, name)
        if there and store.path.name == "spool":
            monkeypatch.undo()
            other.finish()
        return there

    while not list((tmp_path / "c" / "spool" / "parts").glob("0*")):
        time.sleep(0.01)
    monkeypatch.setattr(write_through, "is_complete", then_it_goes)
    check_equal_to_cache(read(one, [3]), [3], inputs.built)
    assert not (tmp_path / "c" / "spool").exists()
    for source in (one, other):
        source.close()


def test_two_ranks_share_the_work(inputs: Inputs, tmp_path: Path) -> None:
    """What one computed the other reads."""
    ranks = two_ranks(inputs, tmp_path / "c")
    for source, numbers in zip(ranks, ([3, 9, 27], [9, 4, 27, 1]), strict=True):
        check_equal_to_cache(read(source, numbers), numbers, inputs.built)
    for source in ranks:
        finish(source)
    assert contents(tmp_path / "c") == contents(inputs.built)


def test_a_build_goes_on_where_a_run_stopped(inputs: Inputs, tmp_path: Path) -> None:
    source = inputs.open(f"data.write_cache={tmp_path / 'c'}")
    read(source, list(range(9)))
    with pytest.raises(CacheError, match=r"another process works here"), build_lock(FolderStore(tmp_path / "c")):
        pass
    source.close()
    recipe = load_recipe(inputs.recipe, CUT)
    build_cache(recipe, recipe.data.files[0], tmp_path / "c")
    assert contents(tmp_path / "c") == contents(inputs.built)


def test_a_disk_that_refuses_a_write_ends_the_run_and_what_is_there_stays(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several threads ask: none waits for a lock of what is not written any more."""
    left, write = 5, write_through.write_part

    def full(*arguments: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "no room", str(tmp_path / "c"))
        write(*arguments)

    monkeypatch.setattr(write_through, "write_part", full)
    source = inputs.open(f"data.write_cache={tmp_path / 'c'}", "data.source=served", *inputs.served())
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(read, source, [number]) for number in range(len(source.lengths))]
    assert {type(one.exception()) for one in found} == {OSError, type(None)}
    with suppress(OSError):
        source.close()
    monkeypatch.undo()
    kept = len(list((tmp_path / "c").rglob("part.json")))
    assert kept >= 1
    source = inputs.open(f"data.write_cache={tmp_path / 'c'}")
    finish(source)
    assert contents(tmp_path / "c") == contents(inputs.built)


def test_a_broken_batch_in_the_spool_is_named(inputs: Inputs, tmp_path: Path) -> None:
    source = inputs.open(f"data.write_cache={tmp_path / 'c'}")
    read(source, [0])
    source.close()
    (shard,) = (tmp_path / "c" / "spool").rglob("features/c/0/0")
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    source = inputs.open(f"data.write_cache={tmp_path / 'c'}")
    with pytest.raises(CacheError, match=rf"features.*delete {tmp_path}/c/spool"):
        read(source, [0])
    source.close()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cache.level=near"], r"cache\.level: .*found 'near'; wanted raw or lossless.*recode"),
        (["data.server_level=near"], r"data\.server_level: .*found 'near'; wanted raw or lossless"),
        (["data.source=cache"], r"data\.write_cache: data\.source cache computes nothing"),
        (["data.conversations=[{data}, {data}]"], r"data\.write_cache: a run writes the cache of one file"),
        (["data.write_cache=memory://c"], r"data\.write_cache: a run writes its cache to a folder"),
    ],
)
def test_a_cache_that_a_run_cannot_write_is_refused(
    inputs: Inputs, tmp_path: Path, overrides: list[str], message: str
) -> None:
    data = load_recipe(inputs.recipe).data.files[0]
    with pytest.raises(RecipeError, match=message):
        inputs.open(f"data.write_cache={tmp_path / 'c'}", *(text.format(data=data) for text in overrides))
    assert not (tmp_path / "c").exists()


def test_a_server_that_takes_smaller_batches_says_so(inputs: Inputs, tmp_path: Path) -> None:
    """The batches of the plan are the recipe's; a build with other ones would have other bytes."""
    with pytest.raises(TargetError, match=r"takes batches of 150 tokens, .* of 400 \(its --batch-tokens"):
        inputs.open(f"data.write_cache={tmp_path / 'c'}", "cache.tokens_per_batch=400", *inputs.served())


def test_another_cache_in_the_folder_is_refused(inputs: Inputs) -> None:
    with pytest.raises(CacheError, match=r"the folder holds another cache: layers"):
        inputs.open(f"data.write_cache={inputs.built}", "target.layers=[0, 1]")


SHARING = (1, 2, 0, 2)  # two ranks that share conversations, and read what either computed
SLOW = [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in ((10, 1, 0, 1), (10, 1, 1, 1), (6, 2, 0, 1), (6, 2, 1, 1), SHARING)
]


@pytest.mark.parametrize(("kills", "ranks", "served", "sharing"), [(1, 1, 0, 1), *SLOW])
def test_a_run_killed_while_it_writes_ends_in_the_same_bits(
    inputs: Inputs, tmp_path: Path, kills: int, ranks: int, served: int, sharing: int
) -> None:
    """The draft of a run that read a cache, and the cache of a build."""
    settings = [
        *CUT,
        f"train.sequence_parallel={sharing}",
        "train.save_every=1",
        "train.keep_last=2",
        f"train.max_steps={10 + 2 * kills}",
    ]
    words = [inputs.recipe, tmp_path, inputs.built, kills, ranks, served, *settings]
    done = run_tool("tests/helpers/write_kill.py", *words, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    assert contents(tmp_path / "written") == contents(inputs.built)
    calm, rough = ({row["step"]: row["loss"] for row in tools.log_of(tmp_path / run)} for run in ("calm", "rough"))
    assert calm == rough
    one, other = (weights(tmp_path / run) for run in ("calm", "rough"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Of the last checkpoint."""
    folder = list(steps_of(run).values())[-1]
    return read_weights(folder, read_manifest(folder))
