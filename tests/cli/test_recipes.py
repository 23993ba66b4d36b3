"""The recipes that deepspec brings along: found by name, listed, shown, copied, wherever the package lies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deepspec import cli
from deepspec.errors import RecipeError
from deepspec.recipe import load_recipe
from deepspec.recipe_files import CONFIGS, RECIPES, SHARE, copy_recipe, own_recipes, recipe_file

NAME = "quickstart_dspark"


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["deepspec", *map(str, words)])
    assert cli.main() == 0


def test_a_name_is_a_recipe_where_no_such_file_is(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe_file(NAME) == RECIPES / f"{NAME}.yaml"
    (tmp_path / NAME).mkdir()  # a folder is no recipe
    assert recipe_file(NAME) == RECIPES / f"{NAME}.yaml"
    (tmp_path / NAME).rmdir()
    (tmp_path / NAME).write_text(yaml.safe_dump({"extends": [str(RECIPES / f"{NAME}.yaml")], "name": "mine"}))
    assert load_recipe(NAME).name == "mine"
    for path in ("none.yaml", f"recipes/{NAME}", f"{NAME}.yaml"):
        with pytest.raises(RecipeError, match="no such recipe file"):
            load_recipe(path)
    with pytest.raises(RecipeError, match=r"dspark_qwen_4b: no such recipe file.*did you mean 'dspark_qwen3_4b'"):
        load_recipe("dspark_qwen_4b")


def test_what_a_named_recipe_makes_lies_in_the_working_directory(tmp_path: Path, monkeypatch) -> None:
    project = tmp_path / "project"
    (project / ".git").mkdir(parents=True)
    for place in (tmp_path, project, SHARE):
        monkeypatch.chdir(place)
        recipe = load_recipe("dspark_qwen3_4b")
        assert (recipe.output, recipe.data.cache) == ("runs/dspark_qwen3_4b", ("caches/qwen3_4b",))
        assert Path(recipe.train.deepspeed).resolve() == CONFIGS / "zero1_bf16.json"
        quick = load_recipe(NAME)
        assert (quick.output, quick.target.path) == ("build/quickstart/dspark", "build/quickstart/target")


def test_every_name_means_the_same_values_as_its_file(monkeypatch) -> None:
    monkeypatch.chdir(SHARE)
    assert len(own_recipes()) == len(list(RECIPES.glob("*.yaml"))) > 12
    for name in own_recipes():
        assert load_recipe(name) == load_recipe(RECIPES / f"{name}.yaml")
        assert load_recipe(name).name == name


def test_list_and_show(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "recipes", "list")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["name", "algorithm", "target"]
    assert [row[0] for row in rows[1:]] == own_recipes()
    assert ["dspark_qwen3_4b", "dspark", "Qwen/Qwen3-4B"] in rows
    run(monkeypatch, "recipes", "show", "dspark_qwen3_4b", "--set", "train.lr=3e-4")
    shown = capsys.readouterr().out
    (tmp_path / "shown.yaml").write_text(shown)
    assert load_recipe(tmp_path / "shown.yaml") == load_recipe("dspark_qwen3_4b", ["train.lr=3e-4"])


@pytest.mark.parametrize("name", own_recipes())
def test_a_copy_means_what_the_original_means(name: str, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "mine"
    files = copy_recipe(name, folder)
    assert files[0] == folder / f"{name}.yaml"
    assert sorted(files) == sorted(path for path in folder.rglob("*") if path.is_file())
    monkeypatch.chdir(tmp_path)
    wanted = load_recipe(name).to_dict()
    for place in (tmp_path, folder):
        monkeypatch.chdir(place)
        found = load_recipe(folder / f"{name}.yaml").to_dict()
        assert os.path.abspath(found["output"]) == str(folder / wanted["output"])
        config = Path(found["train"]["deepspeed"])
        assert config.resolve().parent == folder / "deepspeed_configs"
        assert config.read_bytes() == Path(wanted["train"]["deepspeed"]).read_bytes()
        assert os.path.abspath(found["data"]["cache"][0]) == str(folder / wanted["data"]["cache"][0])
        for part in ("draft", "algorithm", "seed", "regenerate", "cache", "evaluate"):
            assert found[part] == wanted[part]


def test_a_copy_overwrites_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "recipes", "copy", "dspark_qwen3_4b")
    assert capsys.readouterr().out.splitlines() == [
        "dspark_qwen3_4b.yaml", "base/dspark.yaml", "base/published.yaml", "base/qwen3_4b.yaml",
        "deepspeed_configs/zero1_bf16.json",
    ]  # fmt: skip
    copy_recipe("eagle3_qwen3_4b", tmp_path)  # shares files of the same content
    (tmp_path / "base" / "published.yaml").write_text("train: {lr: 1.0}\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(RecipeError, match=r"base/published\.yaml: the file exists, and is another one"):
        copy_recipe("dflash_qwen3_4b", tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with pytest.raises(RecipeError, match="did you mean 'dspark_qwen3_8b'"):
        copy_recipe("dspark_qwen3_8", tmp_path)


INSTALLED = """
import os, sys
from pathlib import Path
from deepspec.recipe import load_recipe
from deepspec.recipe_files import RECIPES
assert RECIPES == Path(sys.argv[1]) / "deepspec" / "share" / "recipes", RECIPES
for given in ("dspark_qwen3_4b", RECIPES / "dspark_qwen3_4b.yaml"):
    recipe = load_recipe(given)
    print(*map(os.path.abspath, (recipe.output, recipe.data.cache[0], recipe.train.deepspeed)))
"""


def test_an_installed_package_is_no_project(tmp_path: Path) -> None:
    """Laid out as a wheel is, in an environment inside of a user's own project."""
    site, work = tmp_path / "project" / ".venv" / "site", tmp_path / "work"
    (tmp_path / "project" / ".git").mkdir(parents=True)
    (work / "deepspeed_configs").mkdir(parents=True)
    (work / "deepspeed_configs" / "zero1_bf16.json").write_text("{}")  # a foreign one of the same name
    shutil.copytree(SHARE / "deepspec", site / "deepspec", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (RECIPES, CONFIGS):
        shutil.copytree(folder, site / "deepspec" / "share" / folder.name)
    done = subprocess.run(
        [sys.executable, "-c", INSTALLED, str(site)], cwd=work, env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    config = site / "deepspec" / "share" / "deepspeed_configs" / "zero1_bf16.json"
    wanted = f"{work}/runs/dspark_qwen3_4b {work}/caches/qwen3_4b {config}"
    assert done.stdout.splitlines() == [wanted, wanted]


NO_TORCH = """
import sys
from deepspec.cli import main
sys.argv = ["deepspec", "recipes", *sys.argv[1:]]
main()
print("torch" in sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize("words", [("list",), ("copy", NAME)])
def test_listing_and_copying_wait_for_no_torch(words: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, "-c", NO_TORCH, *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "False"
    assert NAME in done.stdout
