"""A recipe's files: paths that mean the same from anywhere, and YAML that would hang or crash a careless reader."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import yaml

from deepspec.errors import RecipeError
from deepspec.recipe import Recipe, load_recipe, recipe_at
from deepspec.training.settings import deepspeed_settings
from deepspec.training.validation import sets_of

SMALL = {
    "name": "small",
    "algorithm": "eagle3",
    "target": {"path": "models/t", "layers": [1, 3]},
    "draft": {"num_layers": 1, "ttt_length": 3},
    "data": {"conversations": "data/a.jsonl", "cache": ["caches/a", "s3://bucket/b"], "prompts": "owner/name"},
    "train": {"deepspeed": "deepspeed_configs/z.json", "global_batch": 8, "validation": {"path": "data/v.jsonl"}},
    "evaluate": {"tasks": ["gsm8k", "data/t.jsonl"]},
}


@dataclass(frozen=True)
class Project:
    """A checkout with a recipe, what it names, and folders to stand in."""

    root: Path
    recipe: Path
    places: tuple[Path, ...] = field(default=())

    def where(self, recipe: Recipe) -> dict[str, str]:
        """The absolute path of everything that the recipe names."""
        paths = {
            "target": recipe.target.path, "conversations": recipe.data.conversations, "cache": recipe.data.cache[0],
            "deepspeed": recipe.train.deepspeed, "validation": getattr(recipe.train.validation, "path", None),
            "task": recipe.evaluate.tasks[1], "output": recipe.output,
        }  # fmt: skip
        return {name: os.path.abspath(str(path)) for name, path in paths.items()}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    root = tmp_path / "checkout"
    for name in ("deepspeed_configs", "recipes/base", "data", "models/t", "sub"):
        (root / name).mkdir(parents=True)
    (root / "deepspeed_configs" / "z.json").write_text("{}")
    for name in ("a.jsonl", "v.jsonl", "t.jsonl"):
        (root / "data" / name).touch()
    recipe = root / "recipes" / "small.yaml"
    recipe.write_text(yaml.safe_dump(SMALL))
    return Project(root, recipe, (root, root / "sub", root / "recipes", tmp_path))


def test_a_recipe_names_the_same_files_from_any_working_directory(project: Project, monkeypatch) -> None:
    wanted = {
        "target": "models/t", "conversations": "data/a.jsonl", "cache": "caches/a", "validation": "data/v.jsonl",
        "deepspeed": "deepspeed_configs/z.json", "task": "data/t.jsonl", "output": "runs/small",
    }  # fmt: skip
    for place in project.places:
        monkeypatch.chdir(place)
        for name in (project.recipe, os.path.relpath(project.recipe)):
            recipe = load_recipe(name)
            assert project.where(recipe) == {key: str(project.root / text) for key, text in wanted.items()}
            assert (recipe.data.prompts, recipe.data.cache[1]) == ("owner/name", "s3://bucket/b")
            assert recipe.evaluate.tasks[0] == "gsm8k"
            assert deepspeed_settings(recipe.train, 1)["train_batch_size"] == 8


def test_from_the_projects_root_every_path_stays_as_it_is_written(project: Project, monkeypatch) -> None:
    monkeypatch.chdir(project.root)
    values = load_recipe("recipes/small.yaml").to_dict()
    assert values["output"] == "runs/small"
    for section, given in SMALL.items():
        for key, value in given.items() if isinstance(given, dict) else ():
            found = values[section][key]
            assert found == value or (isinstance(value, dict) and value.items() <= found.items())


def test_a_path_belongs_to_the_file_that_states_it(project: Project, tmp_path: Path, monkeypatch) -> None:
    """A recipe elsewhere that starts from one of a checkout, with a file of its own beside it."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "v.jsonl").touch()
    own = {"extends": str(project.recipe), "name": "mine", "train": {"validation": {"path": "v.jsonl"}}}
    (mine / "r.yaml").write_text(yaml.safe_dump(own))
    for place in (tmp_path, mine, project.root):
        monkeypatch.chdir(place)
        found = project.where(load_recipe(mine / "r.yaml"))
        assert found["validation"] == str(mine / "v.jsonl")
        assert found["deepspeed"] == str(project.root / "deepspeed_configs" / "z.json")
        assert found["conversations"] == str(project.root / "data" / "a.jsonl")
        assert found["output"] == str(place / "runs" / "mine")  # outside of any project


def test_the_default_deepspeed_file_is_found_from_anywhere(tmp_path: Path, monkeypatch) -> None:
    values = {key: value for key, value in SMALL.items() if key != "train"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    train = load_recipe(tmp_path / "r.yaml").train
    assert deepspeed_settings(train, 1)["bf16"]["enabled"]


def test_sets_of_validation_are_paths_too(project: Project, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    changed = SMALL | {"train": {"validation": {"sets": {"domain": "data/v.jsonl", "chat": "s3://bucket/c"}}}}
    project.recipe.write_text(yaml.safe_dump(changed))
    sections = sets_of(load_recipe(project.recipe).train)
    assert {name: one.path for name, one in sections.items()} == {
        "domain": str(project.root / "data" / "v.jsonl"), "chat": "s3://bucket/c",
    }  # fmt: skip


def test_a_path_on_the_command_line_is_the_working_directorys(project: Project, monkeypatch) -> None:
    here = project.root / "sub"
    (here / "data").mkdir()
    (here / "data" / "a.jsonl").touch()
    monkeypatch.chdir(here)
    texts = ["output=runs/other", "data.conversations=data/a.jsonl", "data.cache=new/cache"]
    recipe = load_recipe(project.recipe, [*texts, "train.deepspeed=deepspeed_configs/z.json"])
    found = project.where(recipe)
    assert found["output"] == str(here / "runs" / "other")
    assert found["conversations"] == str(here / "data" / "a.jsonl")
    assert found["cache"] == str(here / "new" / "cache")
    assert found["deepspeed"] == str(project.root / "deepspeed_configs" / "z.json")  # it is only there


@pytest.mark.parametrize("output", ["runs/x", "{}/elsewhere"])
def test_a_recorded_recipe_names_the_same_files_from_anywhere(
    output: str, project: Project, tmp_path: Path, monkeypatch
) -> None:
    """In the project as it was written, so that a moved checkout works; outside of it with absolute paths."""
    output = output.format(tmp_path)
    monkeypatch.chdir(project.root)
    recipe = load_recipe("recipes/small.yaml", [f"output={output}"])
    wanted = project.where(recipe)
    recipe.save(Path(output) / "recipe.yaml")
    checkpoint = Path(os.path.abspath(output)) / "checkpoints" / "step_1"
    values = recipe.to_dict(checkpoint)  # as its manifest holds it
    assert (values["train"]["deepspeed"] == SMALL["train"]["deepspeed"]) == (output == "runs/x")  # type: ignore[index]
    saved = Path(os.path.abspath(output)) / "recipe.yaml"
    for place in project.places:
        monkeypatch.chdir(place)
        assert project.where(load_recipe(saved)) == wanted
        assert project.where(recipe_at(checkpoint, values)) == wanted


def test_extends_is_found_beside_the_file_or_above_it(project: Project, monkeypatch) -> None:
    (project.root / "recipes" / "base" / "b.yaml").write_text("train: {lr: 1.0e-3}\n")
    monkeypatch.chdir(project.root.parent)
    for text in ("base/b.yaml", "recipes/base/b.yaml"):
        project.recipe.write_text(yaml.safe_dump({**SMALL, "extends": text}))
        assert load_recipe(project.recipe).train.lr == 1e-3


def test_one_value_stands_for_a_list_of_it(project: Project) -> None:
    texts = ["data.cache=caches/x", "evaluate.temperature=0", "evaluate.tasks=gsm8k", "target.layers=2"]
    recipe = load_recipe(project.recipe, texts)
    assert recipe.data.cache[0].endswith("caches/x")
    assert (len(recipe.data.cache), recipe.evaluate.temperature, recipe.evaluate.tasks) == (1, (0.0,), ("gsm8k",))
    assert recipe.target.layers == (2,)
    with pytest.raises(RecipeError, match=r"evaluate\.temperature: wrong type or value; found 'hot'; wanted float"):
        load_recipe(project.recipe, ["evaluate.temperature=hot"])


def test_an_override_changes_one_key_where_two_share_an_alias(tmp_path: Path) -> None:
    text = "name: n\nalgorithm: eagle3\ntarget: {path: p, layers: &l [1]}\ndraft: {num_layers: 1}\n"
    (tmp_path / "r.yaml").write_text(f"{text}regenerate: &s {{temperature: 0.5}}\nevaluate: *s\n")
    recipe = load_recipe(tmp_path / "r.yaml", ["evaluate.temperature=0.25"])
    assert (recipe.regenerate.temperature, recipe.evaluate.temperature) == (0.5, (0.25,))


BOMB = "- &y0 [lol,lol,lol,lol,lol,lol,lol,lol,lol]\n" + "".join(
    f"- &y{n} [{','.join([f'*y{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
SECTION = "name: t\nalgorithm: dspark\ntarget: {path: p, layers: [1]}\ndraft:\n  num_layers:\n"
BAD = {
    "a list of aliases": (BOMB, "too many values"),
    "a value of aliases": (SECTION + "".join(f"  {line}\n" for line in BOMB.splitlines()), "too many values"),
    "merged keys of aliases": (
        "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{','.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12)),
        "too many values",
    ),
    "a long list": ("name: [" + "1," * 5_000 + "]", "name: wrong type or value"),
    "an alias in its anchor": ("draft: &a {x: *a}", "alias inside its own anchor"),
    "nested deeply": ("[" * 1_500, "nested too deeply"),
    "many keys twice": ("{" + ",".join(f"k{n}: 1" for n in range(2_000)) + ", k7: 2}", "k7: key given twice"),
    "a number without end": (f"seed: {'9' * 5000}", "cannot be read"),
    "a long hexadecimal number": (SECTION.replace("draft:", "seed: 0x" + "f" * 9000 + "\ndraft:"), "seed: "),
    "a rate beyond floats": (f"train: {{lr: {'9' * 400}}}", "train.lr: wrong type or value"),
    "an int that is none": ("seed: !!int x", "cannot be read"),
    "a day that is none": ("seed: 2001-99-99", "cannot be read"),
    "a Python object": ("seed: !!python/object:os.system {}", "not a YAML file"),
    "20,000 keys": ("".join(f"k{n}: 1\n" for n in range(20_000)), "unknown key"),
    "a long key": (f"? {'k' * 100_000}\n: 1\n", "unknown key"),
    "megabytes": ("# " + "x" * 3_000_000, "too long for a recipe"),
    "a name of 300 characters": (SECTION.replace("name: t", f"name: {'n' * 300}"), "name: not a name"),
    "control characters": (SECTION.replace("name: t", 'name: "a\\e[2Jb"'), "name: not a name"),
    "an empty name": (SECTION.replace("name: t", 'name: ""'), "name: not a name"),
    "an integer beyond 64 bits": (SECTION.replace("draft:", "train: {epochs: 9223372036854775808}\ndraft:"), "epochs"),
    "no server": (SECTION.replace("draft:", "data: {servers: ['me:secret@host']}\ndraft:"), "data.servers: not the"),
    "a thousand bases": (f"extends: [{','.join(['b.yaml'] * 1000)}]", "extends: too many files"),
    "half a surrogate pair": ('name: "\\ud800"', "name: wrong type or value"),
    "a NUL": ('name: "a\\0b"', "name: wrong type or value"),
    "no text": ("\x00\x01", "not a YAML file"),
    "nothing": ("", "not a recipe"),
    "extends of another type": ("extends: 7", "extends: not files"),
    "extends of nothing": ("extends: null", "extends: not files"),
    "extends of a mapping": ("extends: {a: b}", "extends: not files"),
    "extends of numbers": ("extends: [1, 2]", "extends: not files"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_short_line_at_once(name: str, tmp_path: Path) -> None:
    text, words = BAD[name]
    (tmp_path / "r.yaml").write_text(text)
    begun = time.process_time()
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert time.process_time() - begun < 10
    line = str(caught.value)
    assert line.startswith(str(tmp_path / "r.yaml"))
    assert words in line
    assert "\n" not in line
    assert len(line) < 1500
    assert "secret" not in line


def test_files_that_extend_one_another_are_each_read_once(tmp_path: Path) -> None:
    for number in range(12):
        bases = ", ".join([f"b{number + 1}.yaml"] * 10)
        (tmp_path / f"b{number}.yaml").write_text(f"extends: [{bases}]\n")
    (tmp_path / "b12.yaml").write_text("name: t\n")
    with pytest.raises(RecipeError, match="algorithm: missing key"):
        load_recipe(tmp_path / "b0.yaml")
    for number in range(1000):
        (tmp_path / f"b{number}.yaml").write_text(f"extends: b{number + 1}.yaml\n")
    with pytest.raises(RecipeError, match="too many files that extend one another"):
        load_recipe(tmp_path / "b0.yaml")


def test_a_login_in_a_servers_url_is_used_and_not_recorded(project: Project, tmp_path: Path) -> None:
    recipe = load_recipe(project.recipe, ["data.servers=['http://me:secret@a:1', 'http://b']"])
    assert recipe.data.servers[0] == "http://me:secret@a:1"
    recipe.save(tmp_path / "recipe.yaml")
    for text in (recipe.to_yaml(), str(recipe.to_dict()), (tmp_path / "recipe.yaml").read_text()):
        assert "secret" not in text
    assert load_recipe(tmp_path / "recipe.yaml").data.servers == ("http://a:1", "http://b")
    assert recipe.digest() == load_recipe(project.recipe, ["data.servers=['http://a:1', 'http://b']"]).digest()


@pytest.mark.parametrize("text", [f"seed={'9' * 5000}", "draft=&a [*a]", "draft=[", "seed=!!int x", "draft=2001-99-99"])
def test_a_bad_override_is_one_line(text: str, project: Project) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(project.recipe, [text])
    assert str(project.recipe) in str(caught.value)
    assert text.split("=")[0] in str(caught.value)


def test_a_section_of_the_deepspeed_file_that_is_none_is_named(project: Project) -> None:
    train = load_recipe(project.recipe).train
    (project.root / "deepspeed_configs" / "bad.json").write_text('{"zero_optimization": 1}')
    bad = replace(train, deepspeed=str(project.root / "deepspeed_configs" / "bad.json"))
    with pytest.raises(RecipeError, match=r"bad\.json: zero_optimization: not a section; found 1"):
        deepspeed_settings(bad, 1)
