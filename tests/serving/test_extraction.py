"""Hidden states out of a served target, with a server that plays vLLM's part over a tiny real model."""

from __future__ import annotations

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


def rows() -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for number, length in enumerate((7, 12, 3)):
        ids = torch.randint(3, 90, (length,), generator=generator).tolist()
        made.append((number, f"row-{number}", Rendered(ids, [0] + [1] * (length - 1))))
    return made


def test_equal_to_the_target_in_process_for_every_family(pair: tuple[Target, FakeServer, Path]) -> None:
    target, fake, path = pair
    remote = ServedTarget(fake.url, path, LAYERS, torch.float32)
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
    remote = ServedTarget(fake.url, path, LAYERS, torch.float32)
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
    remote = ServedTarget(fake.url, path, LAYERS, torch.float32, timeout=1.0)
    fake.change = change
    with pytest.raises(TargetError, match=reason):
        remote.forward(torch.tensor([[4, 5, 6]]), [0])


def test_a_file_that_is_not_the_prompt_s_own_is_neither_used_nor_removed(
    qwen: tuple[Target, FakeServer, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, fake, path = qwen
    remote = ServedTarget(fake.url, path, LAYERS, torch.float32, timeout=1.0)
    victim = tmp_path / "weights.safetensors"
    save_file({"w": torch.ones(2)}, victim)
    Path(f"{victim}.lock").touch()
    monkeypatch.setattr(fake, "write", lambda prompt: {"hidden_states_path": str(victim)})
    with pytest.raises(TargetError, match="not a file of hidden states"):
        remote.forward(torch.tensor([[4, 5, 6]]), [0])
    assert victim.is_file()
    link = tmp_path / "link"
    link.symlink_to(victim)
    monkeypatch.setattr(fake, "write", lambda prompt: {"hidden_states_path": str(link)})
    with pytest.raises(TargetError, match="not a file of the server's own"):
        remote.forward(torch.tensor([[4, 5, 6]]), [0])
    assert link.is_symlink()


def test_other_layers_than_the_servers_are_refused(qwen: tuple[Target, FakeServer, Path]) -> None:
    _, fake, path = qwen
    remote = ServedTarget(fake.url, path, [0], torch.float32)
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
        ServedTarget("http://127.0.0.1:9", path, LAYERS, torch.float32)


def test_a_cache_and_online_samples_are_those_of_the_target_in_process(tmp_path: Path) -> None:
    setup = make_setup(tmp_path, samples=6, dtype="float32")
    recipe = setup.load()
    target = load_target(recipe.target.path, torch.float32)
    (tmp_path / "states").mkdir()
    fake = FakeServer(target, tmp_path / "states", server_layers(recipe.target.layers, target.spec))
    here = build_cache(recipe, setup.data, tmp_path / "here")
    there = build_cache(recipe, setup.data, tmp_path / "there", server=fake.url)
    assert (there.fingerprint, there.samples, there.tokens) == (here.fingerprint, here.samples, here.tokens)
    one, other = TargetCache.open(tmp_path / "here"), TargetCache.open(tmp_path / "there")
    remote = ServedTarget(fake.url, recipe.target.path, recipe.target.layers, torch.float32)
    online = OnlineSource(recipe.for_target(target.spec), remote, setup.data)  # type: ignore[arg-type]
    for number in range(here.samples):
        expected = one.sample(number)
        sample, batch = other.sample(number), online.batch([number], 0, 0)
        for ids, features in ((sample.input_ids, sample.features), (batch.input_ids[0], batch.features[0])):
            assert ids.tolist() == expected.input_ids.tolist()
            torch.testing.assert_close(features, expected.features, atol=1e-5, rtol=1e-5)
    fake.server.shutdown()
