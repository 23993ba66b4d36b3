"""Hidden states out of a served target, with a server that plays vLLM's part over a tiny real model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from algorithm_tools import FAMILIES, tiny_target
from cache_tools import make_setup
from hidden_state_server import FakeServer
from safetensors.torch import save_file

from deepspec.cache.build import build_cache
from deepspec.cache.forward import forward_batch
from deepspec.cache.reader import TargetCache
from deepspec.data.chat import Rendered
from deepspec.errors import TargetError
from deepspec.sources.online import OnlineSource
from deepspec.targets import served
from deepspec.targets.load import Target, load_target
from deepspec.targets.served import ServedTarget, server_layers

LAYERS = [-1, 0, 2]


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Target, FakeServer, Path]]:
    yield from serve(request.param, tmp_path)


@pytest.fixture
def qwen(tmp_path: Path) -> Iterator[tuple[Target, FakeServer, Path]]:
    yield from serve("qwen3", tmp_path)


def serve(family: str, folder: Path) -> Iterator[tuple[Target, FakeServer, Path]]:
    tiny_target(family).model.save_pretrained(folder / "target")
    target = load_target(folder / "target", torch.float32)
    (folder / "states").mkdir()
    fake = FakeServer(target, folder / "states", server_layers(LAYERS, target.spec))
    yield target, fake, folder / "target"
    fake.server.shutdown()


def open_served(fake: FakeServer, path: Path, layers: list[int] = LAYERS) -> ServedTarget:
    return ServedTarget(fake.url, path, layers, torch.float32, timeout=1.0, storage=fake.folder)


def rows() -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for number, length in enumerate((7, 12, 3)):
        ids = torch.randint(3, 90, (length,), generator=generator).tolist()
        made.append((number, f"row-{number}", Rendered(ids, [0] + [1] * (length - 1))))
    return made


def test_equal_to_the_target_in_process_for_every_family(pair: tuple[Target, FakeServer, Path]) -> None:
    target, fake, path = pair
    remote = open_served(fake, path)
    assert remote.spec == target.spec
    assert torch.equal(remote.embed_weight, target.embed_weight)
    for layers in (LAYERS, [2], [2, -1]):
        size, block = forward_batch(target, layers, True, rows())  # what the cache builder calls
        size_there, block_there = forward_batch(remote, layers, True, rows())
        assert size == size_there
        here, there = block(), block_there()
        torch.testing.assert_close(torch.from_numpy(there.features), torch.from_numpy(here.features))
        torch.testing.assert_close(torch.from_numpy(there.last_hidden), torch.from_numpy(here.last_hidden))
    assert not list(fake.folder.iterdir())  # what was read is gone
    assert all(request["max_tokens"] == 1 for request in fake.requests)


def test_a_busy_server_is_asked_again(qwen: tuple[Target, FakeServer, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, fake, path = qwen
    monkeypatch.setattr(served, "PAUSE", 0.01)
    remote = open_served(fake, path)
    fake.change["codes"] = [503, 429]
    assert remote.forward(torch.tensor([[4, 5, 6]]), [0]).features.shape == (1, 3, 32)
    assert len(fake.requests) == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"no_params": True}, "returns no hidden states"),
        ({"tokens": [1, 2, 3]}, r"hidden states of other tokens.*prefix caching"),
        ({"codes": [404]}, r"does not answer; found '404"),
        ({"hangs": True}, "does not finish it"),
    ],
)
def test_what_a_server_does_wrong_is_named(
    change: dict[str, Any], reason: str, qwen: tuple[Target, FakeServer, Path]
) -> None:
    _, fake, path = qwen
    remote = open_served(fake, path)
    fake.change = change
    with pytest.raises(TargetError, match=reason):
        remote.forward(torch.tensor([[4, 5, 6]]), [0])


def spoil(fake: FakeServer, monkeypatch: pytest.MonkeyPatch, path: object) -> None:
    monkeypatch.setattr(fake, "write", lambda prompt: {"hidden_states_path": path})


def victim_in(folder: Path, tokens: int = 0) -> Path:
    """A file of safetensors with its lock; with tokens it has hidden states of so many tokens."""
    folder.mkdir(exist_ok=True)
    state = {"w": torch.ones(2)}
    if tokens:
        state = {"hidden_states": torch.zeros(tokens, len(LAYERS) + 1, 32), "token_ids": torch.arange(4, 4 + tokens)}
    save_file(state, folder / "victim.safetensors")
    (folder / "victim.safetensors.lock").touch()
    return folder / "victim.safetensors"


@pytest.mark.parametrize("value", ["nan", "inf", "integers"])
def test_hidden_states_that_are_no_numbers_are_refused(
    value: str, qwen: tuple[Target, FakeServer, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, fake, path = qwen
    remote = open_served(fake, path)
    file = victim_in(fake.folder, tokens=3)
    states = torch.zeros(3, len(LAYERS) + 1, 32)
    states[1, 0, 5] = 1.0 if value == "integers" else float(value)
    states = states.long() if value == "integers" else states
    save_file({"hidden_states": states, "token_ids": torch.arange(4, 7)}, file)
    spoil(fake, monkeypatch, str(file))
    with pytest.raises(TargetError, match=r"victim\.safetensors: hidden states must be finite floating-point numbers"):
        remote.forward(torch.tensor([[4, 5, 6]]), [0])
    assert file.exists()


def test_a_file_that_is_not_the_prompt_s_own_is_neither_used_nor_removed(
    qwen: tuple[Target, FakeServer, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, fake, path = qwen
    remote = open_served(fake, path)
    victim = victim_in(fake.folder)
    spoil(fake, monkeypatch, str(victim))
    with pytest.raises(TargetError, match="not a file of hidden states"):
        remote.forward(torch.tensor([[4, 5, 6]]), [0])
    victim_in(fake.folder, tokens=2)
    with pytest.raises(TargetError, match="hidden states of other tokens"):
        remote.forward(torch.tensor([[4, 5, 6]]), [0])
    victim.write_bytes(bytes(2 << 20))
    with pytest.raises(TargetError, match="a larger file than the prompt's hidden states"):
        remote.forward(torch.tensor([[4, 5, 6]]), [0])
    assert victim.is_file()


def test_no_file_outside_the_stated_folder_is_read_or_removed(
    qwen: tuple[Target, FakeServer, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, fake, path = qwen
    remote = open_served(fake, path)
    ids = torch.tensor([[4, 5, 6]])
    victim = victim_in(tmp_path / "elsewhere", tokens=3)
    inside = fake.folder / "sub"
    inside.mkdir()
    elsewhere = [str(victim), f"{fake.folder}/../elsewhere/{victim.name}", f"../elsewhere/{victim.name}"]
    odd = [str(fake.folder), f"{fake.folder}/a\nb", f"{fake.folder}x/{victim.name}", f"{fake.folder}//x"]
    for named in elsewhere + odd:
        spoil(fake, monkeypatch, named)
        with pytest.raises(TargetError, match="names a file outside its folder"):
            remote.forward(ids, [0])
    (inside / "link").symlink_to(victim)
    (inside / "link.lock").touch()
    (inside / "folder").symlink_to(victim.parent)
    os.mkfifo(inside / "pipe.lock")
    links = {"sub/link": "a link in its path", f"sub/folder/{victim.name}": "a link in its path",
             "sub/pipe": "a pipe or a device", "sub": "no such file", "sub/none": "no such file"}  # fmt: skip
    for name, words in links.items():
        spoil(fake, monkeypatch, str(fake.folder / name))
        with pytest.raises(TargetError, match=words):
            remote.forward(ids, [0])
    for odd in (7, ["x"], {}, None):
        spoil(fake, monkeypatch, odd)
        with pytest.raises(TargetError, match="returns no hidden states"):
            remote.forward(ids, [0])
    assert victim.is_file()
    assert victim.with_name(f"{victim.name}.lock").is_file()
    spoil(fake, monkeypatch, str(victim_in(inside, tokens=3)))  # as deep as the server likes
    assert remote.forward(ids, [0]).features.shape == (1, 3, 32)
    assert not (inside / victim.name).exists()


def test_without_a_stated_folder_no_server_is_asked(qwen: tuple[Target, FakeServer, Path], tmp_path: Path) -> None:
    _, fake, path = qwen
    for storage in (None, tmp_path / "none"):
        with pytest.raises(TargetError, match=r"data\.server_storage: no .*--server-storage"):
            ServedTarget(fake.url, path, LAYERS, torch.float32, storage=storage)


def test_other_layers_than_the_servers_are_refused(qwen: tuple[Target, FakeServer, Path]) -> None:
    _, fake, path = qwen
    remote = open_served(fake, path, [0])
    with pytest.raises(TargetError, match="does not give these layers"):
        remote.forward(torch.tensor([[4, 5]]), [1])
    with pytest.raises(TargetError, match="another shape"):  # the server was started for more of them
        remote.forward(torch.tensor([[4, 5]]), [0])
    with pytest.raises(TargetError, match="only complete prompts"):
        remote.forward(torch.tensor([[4, 5]]), [0], position_ids=torch.tensor([[3, 4]]))


def test_no_server_is_an_error_in_one_line(qwen: tuple[Target, FakeServer, Path], monkeypatch: Any) -> None:
    _, fake, path = qwen
    monkeypatch.setattr(served, "PAUSE", 0.0)
    fake.server.server_close()
    with pytest.raises(TargetError, match=r"does not answer.*is it up"):
        ServedTarget("http://127.0.0.1:9", path, LAYERS, torch.float32, storage=fake.folder)


def test_a_cache_and_online_samples_are_those_of_the_target_in_process(tmp_path: Path) -> None:
    setup = make_setup(tmp_path, samples=6, dtype="float32")
    recipe = setup.load()
    target = load_target(recipe.target.path, torch.float32)
    (tmp_path / "states").mkdir()
    fake = FakeServer(target, tmp_path / "states", server_layers(recipe.target.layers, target.spec))
    here = build_cache(recipe, setup.data, tmp_path / "here")
    there = build_cache(recipe, setup.data, tmp_path / "there", server=fake.url, server_storage=fake.folder)
    assert (there.fingerprint, there.samples, there.tokens) == (here.fingerprint, here.samples, here.tokens)
    one, other = TargetCache.open(tmp_path / "here"), TargetCache.open(tmp_path / "there")
    section = recipe.target
    remote = ServedTarget(fake.url, section.path, section.layers, torch.float32, storage=fake.folder)
    online = OnlineSource(recipe.for_target(target.spec), remote, setup.data)  # type: ignore[arg-type]
    for number in range(here.samples):
        expected = one.sample(number)
        sample, batch = other.sample(number), online.batch([number], 0, 0)
        for ids, features in ((sample.input_ids, sample.features), (batch.input_ids[0], batch.features[0])):
            assert ids.tolist() == expected.input_ids.tolist()
            torch.testing.assert_close(features, expected.features, atol=1e-5, rtol=1e-5)
    fake.server.shutdown()
