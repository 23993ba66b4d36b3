"""A draft trained for thinking is evaluated so, unless the command line says otherwise."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from deepspec.errors import EvaluationError
from deepspec.evaluate import __main__ as command
from deepspec.evaluate import run
from deepspec.evaluate.results import trained_to_think


def draft(folder: Path, recipe: str | None) -> Path:
    folder.mkdir(exist_ok=True)
    if recipe is not None:
        (folder / "recipe.yaml").write_text(recipe)
    return folder


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [
        ("data: {thinking: true}", True),
        ("data: {thinking: false}", False),
        ("name: x", False),
        ("data: null", False),
        (None, False),
    ],
)
def test_the_recipe_in_the_draft_folder_says_whether_it_thinks(
    tmp_path: Path, recipe: str | None, wanted: bool
) -> None:
    assert trained_to_think(draft(tmp_path, recipe)) is wanted


def test_a_recipe_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"recipe\.yaml: not YAML"):
        trained_to_think(draft(tmp_path, "data: ["))


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(("flag", "wanted"), [(None, None), ("--thinking", True), ("--no-thinking", False)])
def test_an_explicit_flag_wins_over_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: bool, flag: str | None, wanted: bool | None
) -> None:
    seen: list[bool] = []

    class Recorded:
        def __init__(self, options: Any, _world: Any) -> None:
            seen.append(options.thinking)

        def run(self) -> None:
            """Measures nothing."""

    monkeypatch.setattr(run, "Evaluation", Recorded)
    folder = draft(tmp_path, f"data: {{thinking: {str(trained).lower()}}}")
    words = ["evaluate", "--target", "t", "--draft", str(folder), *([flag] if flag else [])]
    monkeypatch.setattr(sys, "argv", words)
    assert command.main() == 0
    assert seen == [trained if wanted is None else wanted]
