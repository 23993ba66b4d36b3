"""The command line: estimate, inspect, verify and rebuild, import and export, recode."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_tools import Setup, contents, make_cache, make_setup, run_tool

from deepspec.cache.build import build_cache
from deepspec.cache.estimate import Totals, estimate, estimate_recipe
from deepspec.cache.levels import LEVELS
from deepspec.cache.parts import Layout
from deepspec.cache.raw_cache import RECORD, export_raw_cache, import_raw_cache
from deepspec.cache.reader import TargetCache
from deepspec.cache.recode import recode_cache
from deepspec.cli.cache import cache
from deepspec.errors import CacheError, DeepSpecError


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return make_setup(tmp_path_factory.mktemp("cache"), samples=60)


@pytest.fixture(scope="module")
def built(setup: Setup) -> Path:
    output = setup.recipe.parent / "built"
    build_cache(setup.load("cache.level=raw"), setup.data, output)
    return output


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["cache.py", *map(str, arguments)])
    return cache()


def test_the_estimate_is_within_three_percent(setup: Setup, tmp_path: Path) -> None:
    recipe = setup.load("cache.samples_per_part=64", "data.max_length=400")
    totals, estimates = estimate_recipe(recipe, setup.data, probed=1000, measured=20)
    manifest = build_cache(recipe, setup.data, tmp_path / "lossless")
    recode_cache(tmp_path / "lossless", tmp_path / "compact", "compact", "compact")
    assert (totals.samples, totals.tokens, totals.last_rows) == (manifest.samples, manifest.tokens, manifest.rows)
    by_level = {one.level: one for one in estimates}
    for level in ("lossless", "compact"):
        files = contents(tmp_path / level)
        assert (by_level[level].parts, by_level[level].files) == (len(manifest.parts), len(files))
        size = sum((tmp_path / level / name).stat().st_size for name in files)
        assert by_level[level].coded_bytes == pytest.approx(size, rel=0.03)


def test_38_terabytes_take_fewer_than_60_000_files() -> None:
    tokens = round(38e12 / (2560 * 6 * 2))
    rows = tokens // 950
    layout = Layout(2560 * 5, 2560, "bfloat16", "raw", "raw")
    found = {one.level: one for one in estimate(Totals(rows, rows, tokens, tokens), layout, 2048)}
    assert found["raw"].coded_bytes == pytest.approx(38e12, rel=0.001)
    assert found["lossless"].files < 60_000
    assert found["lossless"].coded_bytes < 0.68 * 38e12


def test_the_command_line_estimates_from_totals_and_from_data(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call(monkeypatch, "estimate", "--tokens", 1e9, "--hidden-size", 2560, "--rate", 1e5) == 0
    text = capsys.readouterr().out
    assert "2:46:40 at 100,000 tokens/s" in text
    assert all(level in text for level in LEVELS)
    assert (
        call(monkeypatch, "estimate", "--recipe", setup.recipe, "--data", setup.data, "--output", tmp_path / "x") == 0
    )
    text = capsys.readouterr().out
    assert "60 conversations, 55 samples" in text
    assert re.search(rf"\d [MGT]B free at {re.escape(str(tmp_path))}", text)
    with pytest.raises(DeepSpecError, match="--recipe"):
        call(monkeypatch, "estimate")


def test_inspect_says_what_the_cache_is(
    built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "inspect", built, "--sample", 0) == 0
    text = capsys.readouterr().out
    for words in ("target.weights: ", "levels.features: raw", "samples: 55 in 8 parts", "5 x ", "sample 0: "):
        assert words in text


def test_verify_names_broken_parts_and_rebuilds_just_those(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build_cache(setup.load(), setup.data, tmp_path / "c")
    before = contents(tmp_path / "c")
    shard = tmp_path / "c/parts/00003/features/c/0/0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 4
    shard.write_bytes(data)
    (tmp_path / "c/parts/00005/part.json").unlink()
    assert call(monkeypatch, "verify", tmp_path / "c") == 1
    text = capsys.readouterr().out
    assert "00003: " in text
    assert "00005: " in text
    assert "2 broken parts" in text
    stamp = (tmp_path / "c/parts/00002/part.json").stat().st_ino
    rebuild = ("--rebuild", "--recipe", setup.recipe, "--data", setup.data)
    assert call(monkeypatch, "verify", tmp_path / "c", *rebuild) == 0
    assert "built again: 00003, 00005" in capsys.readouterr().out
    assert contents(tmp_path / "c") == before
    assert (tmp_path / "c/parts/00002/part.json").stat().st_ino == stamp
    assert call(monkeypatch, "verify", tmp_path / "c") == 0


def test_export_and_import_give_the_cache_back(
    setup: Setup, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "export", built, tmp_path / "raw") == 0
    assert "draft that goes token by token" in capsys.readouterr().err
    assert "its loss differs" in json.loads((tmp_path / "raw/manifest.json").read_text())["deepspec_caution"]
    assert call(monkeypatch, "import", tmp_path / "raw", tmp_path / "c", "--recipe", setup.recipe) == 0
    ours, theirs = TargetCache.open(built), TargetCache.open(tmp_path / "c")
    assert len(ours) == len(theirs)
    assert theirs.fingerprint["levels"]["features"] == "lossless"
    assert theirs.fingerprint["target"] == ours.fingerprint["target"]
    assert np.diff(ours.sample_ids).max() > 1, "rejected conversations leave gaps"
    index = np.fromfile(tmp_path / "raw/samples.idx", RECORD)
    assert index["sample"].tolist() == list(range(len(ours)))
    names = [name for part in range(len(theirs.manifest.parts)) for name in theirs.part(part).manifest.conversations]
    assert names == [str(number) for number in ours.sample_ids.tolist()], "our ids are kept beside the index"
    for number in range(len(ours)):
        one, other = ours.sample(number), theirs.sample(number)
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
        np.testing.assert_array_equal(one.loss_mask, other.loss_mask)
        assert torch.equal(one.features, other.features)
        assert torch.equal(one.last_hidden, other.last_hidden)


def test_the_release_s_layout_byte_by_byte(tmp_path: Path) -> None:
    truth = make_cache(tmp_path / "c", samples=5)
    export_raw_cache(tmp_path / "c", tmp_path / "p", shard_bytes=20_000)
    manifest = json.loads((tmp_path / "p/manifest.json").read_text())
    assert manifest["num_samples"] == 5
    assert manifest["version"] == 2
    assert manifest["index_record_size"] == RECORD.itemsize == 56
    assert manifest["num_shards"] == len(manifest["shards"]) > 1
    index = np.fromfile(tmp_path / "p/samples.idx", RECORD)
    assert index["sample"].tolist() == [0, 1, 2, 3, 4], "the release's reader asserts sample_id == index"
    for record, sample in zip(index, truth, strict=True):
        data = (tmp_path / "p" / manifest["shards"][record["shard"]]["file_name"]).read_bytes()
        tokens = int(record["tokens"])

        def tensor(place: int, dtype: str, count: int, data: bytes = data) -> np.ndarray:
            return np.frombuffer(data, dtype, count, place)

        np.testing.assert_array_equal(tensor(record["input_ids"], "<i4", tokens), sample.input_ids)
        assert tensor(record["attention_mask"], "u1", tokens).all()
        np.testing.assert_array_equal(tensor(record["loss_mask"], "u1", tokens), sample.loss_mask)
        features = sample.features.view(torch.uint16).numpy().reshape(-1)
        np.testing.assert_array_equal(tensor(record["features"], "<u2", tokens * 32), features)
        last = sample.last_hidden.view(torch.uint16).numpy().reshape(-1)
        np.testing.assert_array_equal(tensor(record["last_hidden"], "<u2", tokens * 16), last)


def test_import_refuses_what_does_not_fit(tmp_path: Path) -> None:
    make_cache(tmp_path / "c", samples=5)
    mark = TargetCache.open(tmp_path / "c").fingerprint
    export_raw_cache(tmp_path / "c", tmp_path / "p")
    with pytest.raises(CacheError, match="not empty"):
        export_raw_cache(tmp_path / "c", tmp_path / "p")
    with pytest.raises(CacheError, match=r"target_layer_ids.*\[0, 1\]"):
        import_raw_cache(tmp_path / "p", tmp_path / "d", {**mark, "layers": [0, 2]}, 4)
    shard = tmp_path / "p/shard-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CacheError, match="shard too short"):
        import_raw_cache(tmp_path / "p", tmp_path / "d", mark, 4)
    shard.unlink()
    with pytest.raises(CacheError, match=r"shard-00000.bin.*cannot read"):
        import_raw_cache(tmp_path / "p", tmp_path / "d", mark, 4)
    manifest = tmp_path / "p/manifest.json"
    manifest.write_text(manifest.read_text().replace('"bfloat16"', '"float8_e4m3fn"'))
    with pytest.raises(CacheError, match="another kind"):
        import_raw_cache(tmp_path / "p", tmp_path / "d", mark, 4)


def test_recode_from_the_command_line(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "recode", built, tmp_path / "c", "--level", "smallest", "--last-hidden-level", "near") == 0
    said = capsys.readouterr()
    assert "of raw" in said.out
    assert "level smallest" in said.err, "a level that costs accepted length says so"
    assert "level near" not in said.err
    assert TargetCache.open(tmp_path / "c").fingerprint["levels"] == {"features": "smallest", "last_hidden": "near"}


@pytest.mark.slow
def test_errors_are_one_line(tmp_path: Path) -> None:
    done = run_tool("tools/cache.py", "inspect", tmp_path / "nothing")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {tmp_path}/nothing: no cache here")
    assert "Traceback" not in done.stderr
