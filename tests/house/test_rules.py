"""The house rules that a program can check."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import house
import pytest
from house import ROOT, SOURCES, parsed


def test_sources_are_found() -> None:
    assert len(SOURCES) > 50


def test_every_module_and_public_name_has_a_docstring() -> None:
    missing = []
    for path, tree in parsed():
        if tree.body and ast.get_docstring(tree) is None:
            missing.append(str(path))
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                missing.append(f"{path}:{node.lineno} {node.name}")
    assert not missing


def test_no_file_and_no_function_is_too_long() -> None:
    assert house.long_files() == []
    assert house.long_functions() == []


def test_no_two_classes_share_a_name() -> None:
    assert house.doubles(parsed()) == []


@pytest.mark.parametrize(
    ("first", "other", "found"),
    [
        ("class Answer: ...", "class Answer: ...", ["Answer"]),
        ("class Answer: ...", "Answer = tuple[int, str]", ["Answer"]),
        ("class _Row: ...", "class _Row: ...", []),  # private to its file
        ("Row = dict", "Row = dict", []),
    ],
)
def test_a_second_class_of_a_name_is_found(first: str, other: str, found: list[str]) -> None:
    files = [(Path(f"{number}.py"), ast.parse(text)) for number, text in enumerate((first, other))]
    assert house.doubles(files) == found


def test_no_assert_outside_tests() -> None:
    found = [f"{path}:{n.lineno}" for path, tree in parsed() for n in ast.walk(tree) if isinstance(n, ast.Assert)]
    assert not [place for place in found if not place.startswith("deepspec/testing/")]  # the suites are tests


def test_no_unfinished_work_is_marked_in_the_code() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX)\b")
    assert not [str(path) for path in SOURCES if marks.search(path.read_text())]


def test_only_the_engine_imports_deepspeed() -> None:
    importers = {
        str(path)
        for path, tree in parsed()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Import) and any(a.name.split(".")[0] == "deepspeed" for a in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deepspeed")
    }
    assert importers <= {"deepspec/training/engine.py", "deepspec/checkpoints.py"}


def test_only_the_distributed_floor_asks_for_cuda_by_name() -> None:
    calls = [str(path.relative_to(ROOT)) for path in SOURCES if re.search(r"\.cuda\(\)", path.read_text())]
    assert not calls


def test_the_import_contracts_hold() -> None:
    if not Path(sys.executable).with_name("lint-imports").exists():
        pytest.skip("import-linter is not installed (extra `dev`)")
    assert house.broken_contracts() == []


def test_entry_points_print_one_line_and_no_traceback_on_bad_input() -> None:
    tools = [path for path in SOURCES if path.parent.name in ("tools", "launch")]
    assert not [path.name for path in tools if "run_main(" not in path.read_text()]


def test_the_licences_name_what_deepspec_owes() -> None:
    notice = (ROOT / "NOTICE").read_text()
    assert not [name for name in ("DeepSpec", "DSpark", "DFlash", "EAGLE-3", "SpecForge") if name not in notice]
    assert "MIT" in (ROOT / "LICENSE").read_text()


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "make lint test" in (ROOT / ".ci" / "run").read_text()
    assert "make lint test" in (ROOT / "README.md").read_text()
