"""Building: equal bytes whoever builds and however often it is interrupted; rejects, refusals, fingerprints, levels."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from cache_tools import LAYERS, Setup, contents, conversation_rows, make_setup
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deepspec import distributed
from deepspec.cache import build
from deepspec.cache.build import BuildStopped, build_cache
from deepspec.cache.fingerprint import fingerprint_of, mismatches, require_fingerprint
from deepspec.cache.plan import BuildJob, batches, plan_build, samples_per_part, scan
from deepspec.cache.reader import TargetCache
from deepspec.cache.recode import recode_cache
from deepspec.cache.store import FolderStore, build_lock
from deepspec.cache.verify import verify_cache
from deepspec.data.chat import load_renderer
from deepspec.data.conversations import write_conversations
from deepspec.distributed import World
from deepspec.errors import CacheError, DataError
from deepspec.targets import load_spec, load_target, load_tokenizer


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return make_setup(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def built(setup: Setup) -> Path:
    output = setup.recipe.parent / "built"
    build_cache(setup.load(), setup.data, output)
    return output


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hidden_states_are_the_target_s(tmp_path: Path, dtype: str) -> None:
    setup = make_setup(tmp_path, samples=12, dtype=dtype)
    recipe = setup.load()
    build_cache(recipe, setup.data, tmp_path / "c")
    cache = TargetCache.open(tmp_path / "c")
    target = load_target(recipe.target.path, getattr(torch, dtype))
    renderer = load_renderer(recipe, target.spec)
    rows = [json.loads(line) for line in setup.data.read_text().splitlines()]
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == "float32" else {"atol": 2e-2, "rtol": 2e-2}
    assert 5 not in cache.sample_ids  # the one without an answer
    for number in range(len(cache)):
        sample = cache.sample(number)
        rendered = renderer.conversation(rows[sample.sample_id]["messages"])
        assert sample.input_ids.tolist() == rendered.input_ids
        assert sample.loss_mask.astype(int).tolist() == rendered.loss_mask
        alone = target.forward(torch.tensor([rendered.input_ids]), LAYERS)
        torch.testing.assert_close(sample.features, alone.features[0], **tolerance)
        needed = np.append(sample.loss_mask[1:], False)
        torch.testing.assert_close(sample.last_hidden[needed], alone.last_hidden[0][needed], **tolerance)
        assert not sample.last_hidden[~needed].any()


def test_rejects_are_counted_and_listed(built: Path) -> None:
    cache = TargetCache.open(built)
    listed = [json.loads(line) for line in (built / "rejected.jsonl").read_text().splitlines()]
    assert [row["sample_id"] for row in listed] == [5, 16, 27, 38]
    assert {row["id"] for row in listed} == {"s0-5", "s0-16", "s0-27", "s0-38"}
    assert sum(cache.manifest.rejected.values()) == 4
    assert len(cache) == 36
    assert verify_cache(built) == []


def test_ranks_only_cut_the_list_of_parts(setup: Setup, built: Path, tmp_path: Path) -> None:
    """Three ranks one after the other, then one that finishes: the same bytes as one process."""
    for rank in (2, 0):
        exchange = _rank_0_as_it_answers(rank, tmp_path / "c", setup)
        with mock.patch.object(distributed, "_exchange", exchange), pytest.raises((CacheError, SystemExit)):
            build_cache(setup.load(), setup.data, tmp_path / "c", World(rank, 3, rank))
    build_cache(setup.load(), setup.data, tmp_path / "c")
    assert contents(tmp_path / "c") == contents(built)


def _rank_0_as_it_answers(rank: int, output: Path, setup: Setup) -> Callable[..., None]:
    """In place of the ranks' messages: each rank gets rank 0's answers and waits for none."""
    recipe = setup.load()
    target = load_target(recipe.target.path, torch.bfloat16)
    recipe = recipe.for_target(target.spec)
    job = BuildJob(recipe, FolderStore(output), setup.data, target, load_renderer(recipe, target.spec))
    answers = iter(
        [(None, False), (plan_build(job, append=False), False), (None, True)]
    )  # (result, failed): a part is missing

    def exchange(collective: str, *arguments: list[object], **_: object) -> None:
        if rank > 0 and collective == "broadcast_object_list":
            arguments[0][0] = next(answers)

    return exchange


def test_stopping_keeps_finished_parts_and_going_on_gives_the_same_bytes(
    setup: Setup, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    forward = build.forward_batch

    def stop_at_the_sixth(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(*arguments)  # type: ignore[arg-type]

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(build, "forward_batch", stop_at_the_sixth)
    with pytest.raises(BuildStopped, match="it continues"):
        build_cache(setup.load(), setup.data, tmp_path / "c")
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.undo()
    parts = sorted(path.name for path in (tmp_path / "c/parts").iterdir())
    assert 0 < len(parts) < 5
    assert not any(name.startswith(".") for name in parts)
    with pytest.raises(CacheError, match="not finished"):
        TargetCache.open(tmp_path / "c")
    build_cache(setup.load(), setup.data, tmp_path / "c")
    assert contents(tmp_path / "c") == contents(built)


def test_building_again_changes_nothing_and_mends_what_is_missing(setup: Setup, built: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "c"))
    stamp = (copy / "manifest.json").stat().st_mtime_ns
    build_cache(setup.load(), setup.data, copy)
    assert (copy / "manifest.json").stat().st_mtime_ns == stamp
    (copy / "parts/00002/features/c/0/0").unlink()
    shutil.rmtree(copy / "parts/00003")
    build_cache(setup.load(), setup.data, copy)
    assert contents(copy) == contents(built)


def test_another_cache_in_the_folder_is_refused_field_by_field(setup: Setup, built: Path) -> None:
    recipe = setup.load("target.layers=[0, 1]", "data.max_length=128", "cache.level=near")
    with pytest.raises(CacheError) as caught:
        build_cache(recipe, setup.data, built)
    for word in ("layers: cache [0, 2], recipe [0, 1]", "max_length: cache 256, recipe 128", "levels.features"):
        assert word in str(caught.value)


def test_append_adds_and_keeps_what_is_there(setup: Setup, built: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "c"))
    more = tmp_path / "more.jsonl"
    write_conversations(more, conversation_rows(20, seed=9), {})
    with pytest.raises(CacheError, match=r"sources: cache without more\.jsonl"):
        build_cache(setup.load(), more, copy)
    before = contents(copy)
    manifest = build_cache(setup.load(), more, copy, append=True)
    after = contents(copy)
    kept = [name for name in before if name.startswith("parts/0")]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    cache = TargetCache.open(copy)
    assert len(cache) == manifest.samples == 36 + 18
    assert cache.sample_ids.tolist() == sorted(cache.sample_ids.tolist())
    assert cache.sample_ids.max() == 59
    assert [entry["name"] for entry in cache.fingerprint["sources"]] == [setup.data.name, "more.jsonl"]
    assert verify_cache(copy) == []
    build_cache(setup.load(), setup.data, copy)  # the first source is still known
    assert contents(copy) == after
    shutil.rmtree(copy / "parts/00006")
    with pytest.raises(CacheError, match=r"another source.*--data more.jsonl"):
        build_cache(setup.load(), setup.data, copy)


def test_a_second_builder_is_refused(setup: Setup, tmp_path: Path) -> None:
    with (
        build_lock(FolderStore(tmp_path / "c")),
        pytest.raises(CacheError, match=r"another process works here.*process \d+"),
    ):
        build_cache(setup.load(), setup.data, tmp_path / "c")
    build_cache(setup.load("cache.samples_per_part=100"), setup.data, tmp_path / "c")


def test_a_loss_without_last_hidden_keeps_none(tmp_path: Path) -> None:
    setup = make_setup(tmp_path, samples=9, algorithm="dflash")
    build_cache(setup.load(), setup.data, tmp_path / "c")
    cache = TargetCache.open(tmp_path / "c")
    assert cache.sample(0).last_hidden is None
    assert not (tmp_path / "c/parts/00000/last_hidden").exists()


def test_levels_by_array_and_recoding_equals_building(setup: Setup, built: Path, tmp_path: Path) -> None:
    levels = ("cache.features_level=smallest", "cache.last_hidden_level=near")
    manifest = build_cache(setup.load(*levels), setup.data, tmp_path / "direct")
    recoded = recode_cache(built, tmp_path / "recoded", "smallest", "near")
    assert recoded == manifest
    assert contents(tmp_path / "recoded") == contents(tmp_path / "direct")
    assert manifest.fingerprint["levels"] == {"features": "smallest", "last_hidden": "near"}
    with pytest.raises(CacheError, match="rounded already"):
        recode_cache(tmp_path / "direct", tmp_path / "again", "near", "near")
    with pytest.raises(CacheError, match="holds another cache"):
        recode_cache(built, tmp_path / "direct", "raw", "raw")


def test_fingerprint_is_compared_whole(setup: Setup, built: Path, tmp_path: Path) -> None:
    recipe = setup.load(f"data.conversations={setup.data}", f"data.cache=[{built}]")
    spec, tokenizer = load_spec(recipe.target.path), load_tokenizer(recipe.target.path)
    cache = TargetCache.open(built)
    require_fingerprint(cache, recipe, fingerprint_of(recipe, spec, tokenizer, []))
    moved = Path(shutil.copytree(recipe.target.path, tmp_path / "moved"))
    elsewhere = setup.load(f"target.path={moved}")
    require_fingerprint(cache, elsewhere, fingerprint_of(elsewhere, load_spec(moved), tokenizer, []))
    other_data = tmp_path / "other.jsonl"
    other_data.write_text("{}")
    sole = setup.load(f"data.conversations={other_data}", f"data.cache=[{built}]")
    with pytest.raises(CacheError, match=r"sources: cache without other\.jsonl"):
        require_fingerprint(cache, sole, fingerprint_of(sole, spec, tokenizer, []))
    several = setup.load(f"data.conversations={other_data}", "data.cache=[a, b]")
    require_fingerprint(cache, several, fingerprint_of(several, spec, tokenizer, []))
    weights = load_file(moved / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] += 1
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    tokenizer.chat_template += " "
    other = setup.load("data.thinking=true", "target.dtype=float32", "cache.level=raw")
    with pytest.raises(CacheError) as caught:
        require_fingerprint(cache, other, fingerprint_of(other, load_spec(moved), tokenizer, []))
    for field in ("target.weights", "template", "thinking", "dtype", "levels.features", "levels.last_hidden"):
        assert f"{field}: cache " in str(caught.value)
    assert "tokenizer" not in str(caught.value).replace("template", "")


def test_a_cache_with_more_than_the_recipe_needs_fits(setup: Setup, built: Path) -> None:
    recipe = setup.load()
    found = TargetCache.open(built).fingerprint
    wanted = fingerprint_of(recipe, load_spec(recipe.target.path), load_tokenizer(recipe.target.path), [])
    assert mismatches(found, wanted) == []
    wanted["levels"]["last_hidden"] = None
    assert mismatches(found, wanted) == []
    assert len(mismatches(wanted, found)) == 2  # no last_hidden, and the source


def test_unusable_input_is_named(setup: Setup, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"")
    with pytest.raises(DataError, match=r"empty.jsonl.*no conversation"):
        build_cache(setup.load(), empty, tmp_path / "a")
    bad = tmp_path / "bad.jsonl"
    good = json.dumps(conversation_rows(1)[0])
    bad.write_text(good + "\nnot json\n")
    with pytest.raises(DataError, match=r"bad.jsonl: line 2: not JSON"):
        build_cache(setup.load(), bad, tmp_path / "b")
    assert not (tmp_path / "b" / "manifest.json").exists()
    bad.write_text(good + '\n{"id": 3}\n')
    manifest = build_cache(setup.load(), bad, tmp_path / "b")
    assert manifest.samples == 1
    assert list(manifest.rejected) == ["a row needs an `id`, a non-empty string"]
    with pytest.raises(CacheError, match=r"no sample can be used.*fewer than 999 supervised tokens"):
        build_cache(setup.load("data.min_supervised=999"), setup.data, tmp_path / "c")
    with pytest.raises(CacheError, match="did you mean 'lossless'"):
        build_cache(setup.load("cache.level=losless"), setup.data, tmp_path / "d")


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60), budget=st.integers(1, 1000))
def test_batches_hold_every_sample_once_within_the_budget(lengths: list[int], budget: int) -> None:
    found = batches(lengths, budget)
    assert sorted(place for batch in found for place in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(lengths[place] for place in batch) <= budget


def test_part_sizes() -> None:
    token_bytes = 2 * 6 * 2560
    assert samples_per_part(1_300_000, 2048, 950, token_bytes) == (8 << 30) // (950 * token_bytes)
    assert samples_per_part(1500, 2048, 150, 1536) == 64
    assert samples_per_part(100_000, 2048, 150, 1536) == 2048
    assert samples_per_part(40, 8, 100, 100) == 8


def test_scan_notes_where_rows_begin(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"{}\n[12]\n{}")
    assert list(scan(file).offsets) == [0, 3, 8]
    with pytest.raises(DataError, match=r"missing\.jsonl: No such file"):
        scan(tmp_path / "missing.jsonl")
