"""The made pages hold every key of a recipe, every option of a verb, every module; what they show has a text."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import house
import pytest
import yaml

from deepspec import recipe_files
from deepspec.arguments import parser_of
from deepspec.cli import VERBS, function_of
from deepspec.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
MAPPINGS = ("train.validation.sets", "train.validation.weights")  # whose keys are the user's own


@pytest.fixture(scope="module")
def made() -> ModuleType:
    """docs/reference.py."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(made: ModuleType) -> dict[str, str]:
    found: dict[str, str] = made.pages()
    return found


def leaves(values: dict[str, Any], where: str = "") -> Iterator[str]:
    """The dotted keys of a resolved recipe."""
    for name, value in values.items():
        key = f"{where}{name}"
        if isinstance(value, dict) and key not in MAPPINGS:
            yield from leaves(value, f"{key}.")
        else:
            yield key


def test_every_key_of_every_recipe_has_a_row_with_type_default_meaning_and_reader(pages: dict[str, str]) -> None:
    rows = [line.strip("| ").split(" | ") for line in pages["recipe-keys.md"].splitlines() if line.startswith("| `")]
    short = [cells[0] for cells in rows if len(cells) != 5 or not all(cell.strip() for cell in cells)]
    assert short == []
    used = {key for name in recipe_files.own_recipes() for key in leaves(load_recipe(name).to_dict())}
    assert len(used) > 80
    shown = {cells[0].strip("`") for cells in rows}
    assert used - shown == set()


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_a_verb_is_shown_with_its_help(verb: str, pages: dict[str, str]) -> None:
    section = re.search(rf"^## {verb}$(.+?)(?=^## |\Z)", pages["command-line.md"], flags=re.M | re.S)
    assert section
    text = " ".join(section[1].split())
    for action in parser_of(function_of(verb), f"deepspec {verb}")._actions:
        if action.help != argparse.SUPPRESS:
            assert all(name in text for name in action.option_strings or [str(action.metavar or action.dest)])
            assert action.help
            assert " ".join(action.help.replace("%%", "%").split()) in text


def undocumented(path: Path, tree: ast.Module) -> list[str]:
    """Public functions, classes and methods without a docstring; a method may have its base's, a test its name."""
    found = []
    for node in tree.body:
        inner = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else []
        own = isinstance(node, ast.ClassDef) and not node.bases
        for one in (node, *(inner if own else [])):
            public = isinstance(one, ast.FunctionDef | ast.ClassDef) and not one.name.startswith(("_", "test_"))
            if public and not ast.get_docstring(one):
                found.append(f"{path}:{one.lineno} {one.name}")
    return found


def test_every_public_function_is_on_a_page_with_its_docstring(pages: dict[str, str]) -> None:
    modules = set(re.findall(r"^::: (\S+)$", "\n".join(pages.values()), flags=re.M))
    for path, tree in house.parsed():
        if path.parts[0] == "deepspec" and path not in (Path("deepspec/__init__.py"), Path("deepspec/__main__.py")):
            assert ".".join(path.with_suffix("").parts).removesuffix(".__init__") in modules
            assert undocumented(path, tree) == []


def test_the_menu_names_every_page(pages: dict[str, str]) -> None:
    menu = yaml.safe_load((ROOT / ".mkdocs.yml").read_text())["nav"]
    named = {name for group in menu for name in ([group] if isinstance(group, str) else next(iter(group.values())))}
    known = {path.name for path in (ROOT / "docs").glob("*.md")} | {name for name in pages if "/" not in name}
    assert named == known
