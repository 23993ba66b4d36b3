"""Every benchmark: its help, what it says when it starts, and that it needs no words."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import start

from deepspec.arguments import parser_of
from deepspec.errors import DataError, run_main

FOLDER = Path(start.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if "Benchmark(__doc__" in path.read_text())
OF_THE_QUICKSTART = (
    "bench_cache",
    "bench_commands",
    "bench_data",
    "bench_decode",
    "bench_levels",
    "bench_quality",
    "bench_training",
)


def parser(name: str) -> argparse.ArgumentParser:
    return parser_of(importlib.import_module(name).main, name)


def test_every_script_that_can_be_started_is_a_benchmark() -> None:
    scripts = {path.stem for path in FOLDER.glob("*.py") if "__main__" in path.read_text()}
    assert scripts - set(NAMES) == {"decode_worker"}  # a process of bench_decode
    assert set(OF_THE_QUICKSTART) < set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_help_tells_bars_and_time_and_no_word_is_required(name: str) -> None:
    made = parser(name)
    text = made.format_help()
    assert "\nbars: " in text
    assert "\ntakes: " in text
    assert not [action.dest for action in made._actions if not action.help]
    assert vars(argparse.ArgumentParser.parse_args(made, []))["json"] is None


@pytest.mark.parametrize("name", OF_THE_QUICKSTART)
def test_without_the_quickstarts_files_one_line_says_so(name: str, tmp_path: Path, monkeypatch, capsys: Any) -> None:
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    with pytest.raises(SystemExit) as ended:
        run_main(module.main)
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1
    assert said[-1].startswith("error: build/quickstart/")
    assert said[-1].endswith("run `make quickstart` first (in this folder)")
    assert [line.split(":")[0] for line in said[-3:-1]] == ["bars", "takes"]
    assert list(tmp_path.iterdir()) == []


def test_an_input_of_ones_own_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--draft: not there; check the path"):
        start.quickstart_inputs(target=tmp_path, draft=tmp_path / "none")
