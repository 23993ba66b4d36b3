"""Whatever a parser is given, it answers with a value or with an error of ours, in one line that a terminal can show.

``DEEPSPEC_FUZZ`` is the number of inputs of each parser: few in the quick tests, thousands under ``make trust``.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepspec.cache.codecs.lossless import LosslessCodec
from deepspec.cache.codecs.uniform import UniformCodec
from deepspec.cache.format import CacheManifest, PartManifest
from deepspec.cache.plan import CachePlan
from deepspec.cache.shard import UNDECODED, _parse_metadata
from deepspec.cache.store import FolderStore
from deepspec.data.conversations import read_conversations
from deepspec.drafts import draft_algorithm
from deepspec.errors import DeepSpecError, TargetError, printable
from deepspec.files import read_index
from deepspec.recipe import load_recipe
from deepspec.targets.load import load_spec
from deepspec.testing.tiny import tiny_folder, tiny_target

ARTEFACTS = Path(__file__).parents[1] / "house" / "artefacts"
fuzzed = settings(
    max_examples=int(os.environ.get("DEEPSPEC_FUZZ", "25")), deadline=None, database=None,
    derandomize="DEEPSPEC_FUZZ" not in os.environ, suppress_health_check=list(HealthCheck),
)  # fmt: skip
ODD = st.sampled_from(
    [None, True, -1, 0, 7, 2**70, -0.5, 1e308, float("nan"), "", "x", "../x", "\ud800", "a\0b", "\x1b[2J", "9" * 5000,
     "k" * 10_000, [], {}, [[]], [None], {"a": {}}, ["x", 1], "2001-99-99", [1.5]]
)  # fmt: skip


@st.composite
def spoiled(draw: Any, value: Any) -> Any:
    """``value`` with up to three of its parts removed, replaced, doubled or put elsewhere."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        place, parts = value, draw(st.integers(0, 4))
        for _ in range(parts):
            inner = [
                one
                for one in (place.values() if isinstance(place, dict) else place)
                if one and type(one) in (dict, list)
            ]
            if not inner:
                break
            place = draw(st.sampled_from(inner))
        key = draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place)))) if place else None
        if key is None:
            continue
        way = draw(st.integers(0, 9))
        if way == 0:
            del place[key]
        elif way == 1 and isinstance(place, dict):
            place["unknown \x1b[31m"] = place.pop(key)
        else:
            place[key] = draw(ODD)
    return value


def damaged(data: bytes) -> st.SearchStrategy[bytes]:
    """``data`` cut, with bytes changed, or put in; or other bytes altogether."""
    place, some = st.integers(0, len(data)), st.binary(max_size=12)
    edits = st.tuples(place, st.integers(0, 12), some).map(lambda e: data[: e[0]] + e[2] + data[e[0] + e[1] :])
    return st.one_of(edits, edits, place.map(lambda end: data[:end]), st.binary(max_size=300))


def as_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


def survives(parse: Callable[[], object]) -> None:
    try:
        parse()
    except DeepSpecError as error:
        line = " ".join(str(error).splitlines())
        assert len(line) < 6000
        printable(line).encode()


def either(value: Any) -> st.SearchStrategy[bytes]:
    return st.one_of(spoiled(value).map(as_bytes), damaged(as_bytes(value)))


def known(*names: str) -> Any:
    return json.loads(ARTEFACTS.joinpath(*names).read_text())


RECIPE = yaml.safe_load((ARTEFACTS / "recipe.yaml").read_text())
ROW = {
    "id": "a", "system": "Be kind.", "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "messages": [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "<think>hm</think>", "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"role": "tool", "content": "b"},
        {"role": "assistant", "content": "So.", "reasoning_content": "c", "finish_reason": "stop", "weight": 1},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache and a target whose files the tests spoil."""
    return Path(shutil.copytree(ARTEFACTS, tmp_path_factory.mktemp("fuzz") / "old"))


@settings(fuzzed, max_examples=max(10, fuzzed.max_examples // 5))
@given(st.data())
def test_recipes(place: Path, data: st.DataObject) -> None:
    path = place / "r.yaml"
    as_yaml = spoiled(RECIPE).map(lambda value: json.dumps(value).encode())
    path.write_bytes(data.draw(st.one_of(as_yaml, damaged((ARTEFACTS / "recipe.yaml").read_bytes()))))
    survives(lambda: load_recipe(path).to_yaml())
    path.write_bytes((ARTEFACTS / "recipe.yaml").read_bytes())
    text = data.draw(st.one_of(st.text(max_size=30), ODD.map(lambda value: f"train.lr={value}")))
    survives(lambda: load_recipe(path, [text]))


@fuzzed
@given(either(ROW))
def test_conversations(place: Path, line: bytes) -> None:
    (place / "rows.jsonl").write_bytes(line + b"\n")
    survives(lambda: list(read_conversations(place / "rows.jsonl")))


VALUES = np.arange(24, dtype=np.uint16).reshape(8, 3)
CODECS = [LosslessCodec.calibrate(VALUES), UniformCodec.per_channel(VALUES, 4), UniformCodec.constant(VALUES, 4)]


@fuzzed
@given(st.sampled_from(CODECS), st.data())
def test_chunks_of_a_codec(codec: LosslessCodec | UniformCodec, data: st.DataObject) -> None:
    given_bytes = np.frombuffer(data.draw(damaged(codec.encode_rows(VALUES))), np.uint8)
    with contextlib.suppress(*UNDECODED):  # the shard's reader names chunk and file
        codec.decode_rows(given_bytes, np.empty((5, 3), np.uint16), 2, 8)


PARSERS: dict[str, tuple[Any, str, Callable[[Path], object]]] = {
    "the cache's manifest": (
        known("cache", "manifest.json"), "cache/manifest.json",
        lambda place: CacheManifest.load(FolderStore(place / "cache")),
    ),
    "a part": (
        known("cache", "parts", "00000", "part.json"), "cache/parts/00000/part.json",
        lambda place: PartManifest.load(FolderStore(place / "cache"), "00000"),
    ),
    "the plan": (
        known("cache", "plan.json"), "cache/plan.json", lambda place: CachePlan.load(FolderStore(place / "cache"))
    ),
    "an array": (
        known("cache", "parts", "00000", "features", "zarr.json"), "zarr.json",
        lambda place: _parse_metadata((place / "zarr.json").read_bytes(), "zarr.json"),
    ),
    "an index of weights": (
        {"metadata": {"total_size": 1}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}},
        "index.json", lambda place: read_index(place / "index.json"),
    ),
    "a target's config": (
        known("target", "config.json"), "target/config.json",
        lambda place: load_spec(place / "target").check_layers([0]),
    ),
    "a draft's config": (
        known("draft", "config.json"), "draft.json",
        lambda place: draft_algorithm(json.loads((place / "draft.json").read_text())),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARSERS)
@fuzzed
@given(data=st.data())
def test_files_of_json(name: str, place: Path, data: st.DataObject) -> None:
    value, file, parse = PARSERS[name]
    kept = (place / file).read_bytes() if (place / file).exists() else None
    (place / file).write_bytes(data.draw(spoiled(value).map(as_bytes) if name == "a draft's config" else either(value)))
    try:
        survives(lambda: parse(place))
    finally:
        if kept is not None:
            (place / file).write_bytes(kept)


def test_a_config_that_transformers_fails_on_is_one_line(tmp_path: Path) -> None:
    """Found by make trust: its own code raises an IndexError."""
    folder = tiny_folder(tiny_target("qwen3"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": float("inf")}))
    with pytest.raises(TargetError, match="cannot load the target"):
        load_spec(folder)


def test_a_message_shows_what_a_terminal_would_obey_as_escapes() -> None:
    text = str(DeepSpecError("no such file", file="a\x1b[2J", key="b\x07", found="c\x1b]0;", remedy="d\x7f"))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert text.startswith(r"a\x1b[2J: b\x07: no such file")
