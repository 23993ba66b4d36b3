"""An engine's name stands in its own files and in registry rows; no other code asks which engine it has before it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepspec.registry import ENGINES, SERVERS

ROOT = Path(__file__).resolve().parents[2]
OURS = "deepspec"  # the release layout has the package's name
SERVED = re.compile("|".join(SERVERS))
NAMES = re.compile("|".join(name for name in {*ENGINES, *SERVERS} if name != OURS), re.IGNORECASE)
ROOMS = ("deepspec/export/engines/", "deepspec/export/forms/", "deepspec/registry.py")
CONTAINERS = ("deepspec/export/gguf_file.py", "deepspec/demos/smollm2/target.py")  # the file format, not its engine


def in_its_own_room(path: Path) -> bool:
    """Whether a file is an engine's: a table of forms, a layout, or what starts it."""
    name = path.relative_to(ROOT).as_posix()
    return name.startswith((*ROOMS, *CONTAINERS)) or (
        name.startswith("deepspec/serving/") and bool(SERVED.match(path.stem))
    )


def documentation(tree: ast.AST) -> Iterator[ast.AST]:
    """The docstrings, which tell the reader of engines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr):
                yield first.value


def naming(text: str) -> list[int]:
    """The lines of code that name an engine."""
    if not NAMES.search(text):
        return []
    tree = ast.parse(text)
    told = {id(node) for node in documentation(tree)}
    found = set()
    for node in ast.walk(tree):
        words = [value for _, value in ast.iter_fields(node) if isinstance(value, str)]
        words += [alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)]
        if id(node) not in told and any(NAMES.search(word) for word in words):
            found.add(getattr(node, "lineno", 0))
    return sorted(found)


def test_no_file_outside_an_engines_own_room_names_it() -> None:
    sources = [path for folder in ("deepspec", "launch", "tools") for path in (ROOT / folder).rglob("*.py")]
    outside = [path for path in sources if not in_its_own_room(path)]
    assert len(outside) > 100
    found = {str(path.relative_to(ROOT)): naming(path.read_text(encoding="utf-8")) for path in outside}
    assert not {path: lines for path, lines in found.items() if lines}


@pytest.mark.parametrize("name", [name for name in ENGINES if name != OURS])
def test_the_search_finds_a_name_in_code(name: str) -> None:
    for line in (f'if engine.name == "{name}":\n    pass', f"import {name}", f"{name.upper()} = 1", f"x.{name}()"):
        assert naming(f'"""Of {name}."""\n{line}\n') == [2]
