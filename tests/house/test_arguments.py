"""Numbers out of their range: one line at every command, and the same refusal of settings from code."""

from __future__ import annotations

import argparse
import importlib
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deepspec import cli
from deepspec.arguments import COUNT, SEED, SHARE, TEMPERATURE, Range, parser_of
from deepspec.cli import VERBS
from deepspec.cli.cache import cache
from deepspec.data.prepare import PrepareOptions, prepare
from deepspec.data.regenerate import regenerate
from deepspec.decoding.records import DecodeSettings
from deepspec.errors import DataError, DeepSpecError, EvaluationError, RecipeError, run_main
from deepspec.evaluate.run import Options
from deepspec.recipe import EvaluateSection, RegenerateSection

ROOT = Path(__file__).resolve().parents[2]
EVALUATE = ("deepspec.evaluate.__main__", "--target", "t", "--draft", "d")
CALIBRATE = ("deepspec.cli", "calibrate", "--draft", "d", "--results", "r")
REFUSED = [
    (EVALUATE, "--temperature", "-1"), (EVALUATE, "--temperature", "nan"), (EVALUATE, "--temperature", "inf"),
    (EVALUATE, "--temperature", "1e-40"), (EVALUATE, "--samples", "0"), (EVALUATE, "--samples", "-1"),
    (EVALUATE, "--batch-size", "0"), (EVALUATE, "--max-new-tokens", "-3"), (EVALUATE, "--max-new-tokens", "0"),
    (EVALUATE, "--max-new-tokens", "1.5"), (EVALUATE, "--confidence-threshold", "nan"), (EVALUATE, "--seed", "-1"),
    (EVALUATE, "--confidence-threshold", "1.1"), (EVALUATE, "--concurrency", "0"),
    (EVALUATE, "--concurrency", "99999"), (CALIBRATE, "--temperature", "nan"),
    (("tools/cache.py", "estimate"), "--mean", "0"), (("tools/cache.py", "estimate"), "--tokens", "nan"),
    (("tools/cache.py", "estimate"), "--supervised", "2"), (("tools/cache.py", "estimate"), "--rate", "-1"),
    (("tools/cache.py", "verify", "c"), "--workers", "0"), (("tools/cache.py", "inspect", "c"), "--sample", "-1"),
    (("tools/export.py", "a", "b", "--format", "vllm"), "--shard-gb", "0"),
    (("tools/export.py", "a", "b", "--from", "vllm"), "--max-draft", "0"),
    (("tools/export.py", "a", "b", "--from", "vllm"), "--target-layers", "1,x"),
    (("tools/serve_check.py",), "--prompts", "0"), (("tools/serve_check.py",), "--max-tokens", "-2"),
    (("tools/regenerate.py", "--prompts", "p", "--output", "o"), "--attempts", "0"),
    (("tools/regenerate.py", "--prompts", "p", "--output", "o"), "--max-failed", "nan"),
    (("tools/prepare_data.py", "--output", "o"), "--held-out", "1"),
    (("tools/prepare_data.py", "--output", "o"), "--limit", "0"),
    (("tools/prepare_data.py", "--output", "o"), "--source", "s=inf"),
    (("tools/prepare_data.py", "--output", "o", "--source", "s=2"), "--source", "s=1"),
    (("tools/build_cache.py", "--recipe", "r", "--output", "o"), "--local_rank", "x"),
    (("launch/train.py", "--recipe", "r"), "--local_rank", "x"),
    (("tools/inspect_data.py", "d"), "--show", "-1"), (("tools/ablate.py",), "--cores", "0"),
    (("tools/real.py",), "--cores", "-2"),
    (("deepspec.demos.quickstart.__main__", "target", "--output", "o"), "--steps", "0"),
    (("deepspec.demos.smollm2.__main__", "prompts", "--shards", "1", "--each", "1", "--output", "o"),
     "--held-out", "0"),
]  # fmt: skip


def start(program: str) -> None:
    """A tool's file as the main program, or a module's ``main`` as its own last lines call it."""
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    run_main(importlib.import_module(program).main)


@pytest.mark.parametrize(("command", "flag", "value"), REFUSED, ids=lambda part: part if isinstance(part, str) else "")
def test_a_number_out_of_its_range_is_refused_in_one_line(
    command: tuple[str, ...], flag: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [*command, flag, value, "--quiet"])
    with pytest.raises(SystemExit) as end:
        start(command[0])
    said = capsys.readouterr().err.strip().split("\n")
    assert end.value.code == 1
    assert len(said) == 1
    assert flag in said[0]
    assert value in said[0]


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """It and those of its verbs."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from parsers(one)


PLACES = sorted(
    {place for place, _ in VERBS.values()}
    | {f"deepspec.{name}:main" for name in ("evaluate.__main__", "demos.quickstart.__main__",
                                            "demos.smollm2.__main__")}
)  # fmt: skip
NO_NUMBER = ("nan", "inf", "-inf", "1e999", "-1e999", "", "x", "1,5", "9" * 5000, "0x10", "-9", "1e16", "-1e-300")


@pytest.mark.parametrize("place", PLACES)
def test_every_number_of_every_command_has_a_range(place: str) -> None:
    module, function = place.split(":")
    found = parser_of(getattr(importlib.import_module(module), function), "x")
    for action in [action for parser in parsers(found) for action in parser._actions]:
        first = action.default[0] if isinstance(action.default, list) and action.default else action.default
        numeric = type(first) in (int, float) and action.nargs != 0
        assert isinstance(action.type, Range) or (not numeric and action.type not in (int, float)), action.dest
        for text in NO_NUMBER if isinstance(action.type, Range) else ():
            with pytest.raises(argparse.ArgumentTypeError, match="wanted"):
                action.type(text)


@pytest.mark.parametrize("verb", VERBS)
def test_a_refused_verb_names_its_own_help(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["deepspec", *verb.split(), "--no-such-flag"])
    with pytest.raises(DeepSpecError, match=f"see deepspec {verb} --help$"):
        cli.main()


@pytest.mark.parametrize(
    "changed",
    [
        {"temperatures": (-1.0,)}, {"temperatures": (float("nan"),)}, {"temperatures": (1.0, 1.0)},
        {"temperatures": ()}, {"samples": 0}, {"batch_size": 0}, {"max_new_tokens": 0}, {"seed": -1},
        {"confidence_threshold": -0.1},
    ],
    ids=str,
)  # fmt: skip
def test_settings_from_code_are_held_to_the_same_ranges(changed: dict) -> None:
    with pytest.raises(EvaluationError, match=next(iter(changed)).rstrip("s")):
        Options("t", "d", "o", **changed)


@pytest.mark.parametrize(
    "changed",
    [{"temperature": float("inf")}, {"max_new_tokens": 0}, {"seed": 2**63}, {"confidence_temperatures": (0.0,)}],
    ids=str,
)
def test_decoding_itself_refuses_them_too(changed: dict) -> None:
    with pytest.raises(EvaluationError, match=next(iter(changed))):
        DecodeSettings(**changed)


def test_recipes_are_held_to_the_same_ranges() -> None:
    for section, changed in (
        (EvaluateSection, {"temperature": (0.0, 0.0)}),
        (EvaluateSection, {"temperature": (1e-40,)}),
        (EvaluateSection, {"seed": -1}),
        (RegenerateSection, {"temperature": -0.5}),
    ):
        with pytest.raises(RecipeError, match=next(iter(changed))):
            section(**changed)


def test_ranges_at_their_ends() -> None:
    inside: list[tuple[Range, str, float]] = [
        (TEMPERATURE, "0", 0), (TEMPERATURE, "-0.0", 0), (TEMPERATURE, "0.01", 0.01), (COUNT, "1", 1), (SEED, "0", 0),
        (SHARE, "1", 1),
    ]  # fmt: skip
    assert [kind(text) for kind, text, _ in inside] == [value for *_, value in inside]
    assert str(TEMPERATURE("-0.0")) == "0.0"
    TEMPERATURE.check_each("temperature", (0.0, 1.0), EvaluationError)


def test_every_verb_is_a_function_and_a_script_of_today_calls_one(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for verb, (place, _) in VERBS.items():
        module, function = place.split(":")
        assert callable(getattr(importlib.import_module(module), function)), verb
    scripts = [*(ROOT / "tools").glob("*.py"), *(ROOT / "launch").glob("*.py")]
    places = {place.split(":")[1] for place, _ in VERBS.values()}
    called = {re.search(r"run_main\((\w+)\)", path.read_text())[1] for path in scripts}
    assert called <= {*places, "cache", "main"}  # tools/cache.py has the verbs of `deepspec cache`
    monkeypatch.setattr(sys, "argv", ["deepspec", "cache", "inspect", "nothing"])
    with pytest.raises(DeepSpecError, match="nothing"):
        cli.main()
    monkeypatch.setattr(sys, "argv", ["deepspec", "trian"])
    with pytest.raises(DeepSpecError, match="did you mean 'train'"):
        cli.main()
    monkeypatch.setattr(sys, "argv", ["deepspec"])
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().out
    assert all(f"\n  {verb} " in shown for verb in VERBS)
    monkeypatch.setattr(sys, "argv", ["tools/cache.py"])
    with pytest.raises(SystemExit):
        run_main(cache)
    assert "\n  cache verify " in capsys.readouterr().out


@pytest.mark.parametrize("way", ["itself", "link", "hard link"])
def test_an_output_that_is_an_input_is_refused(way: str, tmp_path: Path) -> None:
    rows, output = tmp_path / "rows.jsonl", tmp_path / "train.jsonl"
    rows.write_text('{"id": "a", "messages": [{"role": "user", "content": "Why?"}]}\n')
    if way == "link":
        output.symlink_to(rows)
    elif way == "hard link":
        output.hardlink_to(rows)
    else:
        output = rows
    with pytest.raises(DataError, match="the output is an input"):
        regenerate(rows, output, None, {})  # type: ignore[arg-type]
    if way != "itself":
        with pytest.raises(DataError, match="the output is an input"):
            prepare(PrepareOptions({str(rows): 1.0}), tmp_path)
    assert rows.read_text().endswith("\n")
