"""The house rules that a program can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for folder in ("deepspec", "launch", "tools") for path in (ROOT / folder).rglob("*.py"))
LONG_FUNCTIONS = 5  # functions over 60 lines that the whole package may have


def parsed() -> Iterator[tuple[Path, ast.Module]]:
    """Every source file with its syntax tree."""
    for path in SOURCES:
        yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a file, methods included."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


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


def test_no_file_is_over_450_lines() -> None:
    long = {str(path): lines for path in SOURCES if (lines := len(path.read_text().splitlines())) > 450}
    assert not long


def test_few_functions_are_over_60_lines() -> None:
    long = [
        f"{path}:{node.lineno} {node.name}"
        for path, tree in parsed()
        for node in functions(tree)
        if (node.end_lineno or 0) - node.lineno + 1 > 60
    ]
    assert len(long) <= LONG_FUNCTIONS, long


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
    program = Path(sys.executable).with_name("lint-imports")
    if not program.exists():
        pytest.skip("import-linter is not installed (extra `dev`)")
    report = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert report.returncode == 0, report.stdout


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
