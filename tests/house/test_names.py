"""An algorithm owns its name: outside its own room no line of code asks which algorithm it has before it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deepspec.registry import ALGORITHMS

ROOT = Path(__file__).resolve().parents[2]
NAMES = re.compile("|".join(ALGORITHMS), re.IGNORECASE)
ROOMS = (
    "deepspec/algorithms/",
    "deepspec/registry.py",  # its rows
    "deepspec/export/forms/",  # the layouts and engines that name the forms which they take
    "deepspec/export/engines/",
    "deepspec/serving/vllm.py",  # which of its forms need the CPU shim
    "deepspec/serving/sglang",  # which of its classes takes which draft
)
ALLOWED = re.compile(r"recipes/[\w./{}]+|\b\w+_qwen3_4b|the \w+ paper")  # a recipe's file or name, a paper


def naming(text: str) -> list[int]:
    """The numbers of the lines that name an algorithm."""
    lines = enumerate(text.splitlines(), 1)
    return [number for number, line in lines if NAMES.search(ALLOWED.sub("", line))]


def test_no_file_outside_an_algorithms_own_room_names_it() -> None:
    sources = [path for folder in ("deepspec", "launch", "tools") for path in (ROOT / folder).rglob("*.py")]
    outside = [path for path in sources if not path.relative_to(ROOT).as_posix().startswith(ROOMS)]
    assert len(outside) > 100
    found = {str(path.relative_to(ROOT)): naming(path.read_text(encoding="utf-8")) for path in outside}
    assert not {path: lines for path, lines in found.items() if lines}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_search_finds_a_name_in_code_comments_and_strings(name: str) -> None:
    lines = (f'if model.algorithm.name == "{name}":', f"# of {name.upper()} alone", f'registry.algorithm("{name}")')
    for line in lines:
        assert naming(f"pass\n{line}\n") == [2]
    assert not naming(f"--recipe recipes/{name}_qwen3_4b.yaml, {name}_qwen3_4b\nAlgorithm 1 of the {name} paper\n")
