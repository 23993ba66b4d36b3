"""No dead keys: every key of a recipe is read by a command, watched while the commands run on a tiny target."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import training_tools as tools
import yaml
from cache_tools import conversation_rows

from deepspec import recipe as recipes
from deepspec.data.conversations import write_conversations
from deepspec.distributed import World
from deepspec.errors import TargetError
from deepspec.evaluate.__main__ import parse
from deepspec.recipe import load_recipe
from deepspec.training import run

pytest_plugins = ["training_fixtures"]
SECTIONS = (
    recipes.Recipe, recipes.TargetSection, recipes.DataSection, recipes.RegenerateSection, recipes.CacheSection,
    recipes.ValidationSection, recipes.TrainSection, recipes.EvaluateSection,
)  # fmt: skip
KEYS = {(cls.__name__, key.name) for cls in SECTIONS for key in dataclasses.fields(cls)}
PROPERTIES = {one.fget.__code__ for cls in SECTIONS for one in vars(cls).values() if isinstance(one, property)}
COMMANDS = [tools.ROOT / name for name in ("deepspec",)]
NO_READERS = (
    "arguments.py",
    "recipe_files.py",
    "sections.py",
    "quickstart",
    "real",
)  # checks and copies; the demonstrations' own plans


class Watch:
    """The keys that code of the commands reads from a recipe's sections."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: set[tuple[str, str]] = set()
        for cls in SECTIONS:
            monkeypatch.setattr(cls, "__getattribute__", self._reader(cls), raising=False)

    def _reader(self, cls: type) -> Any:
        names = {key.name for key in dataclasses.fields(cls)}

        def read(section: Any, name: str) -> Any:
            if name in names and _by_a_command(sys._getframe(1)):
                self.read.add((cls.__name__, name))
            return object.__getattribute__(section, name)

        return read


def _by_a_command(frame: Any) -> bool:
    """Whether a command's code asks, not a recipe's own checks or a copy (``replace``, ``==``) of a whole section."""
    while (frame.f_code.co_filename == dataclasses.__file__ and frame.f_code.co_name != "replace") or (
        frame.f_code in PROPERTIES or frame.f_code.co_filename == __file__  # who asks for a property asks for the key
    ):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    if path == Path(recipes.__file__):
        return bool(frame.f_code.co_name == "for_target")
    ours = any(folder in path.parents for folder in COMMANDS)
    return ours and not any(part in NO_READERS for part in path.parts)


def settings(folder: Path, **data: Any) -> Path:
    """A recipe of the tiny target with all optional sections."""
    held = {"sets": {"held": str(folder / "held.jsonl")}} if "source" in data else {"path": str(folder / "held")}
    validation = held | {"every": 1, "decode_every": 1, "decode_prompts": 1, "max_new_tokens": 2, "samples": 2}
    section = {"max_length": 96, "min_supervised": 4, "conversations": str(folder / "train.jsonl")} | data
    place = folder / data.get("source", "cache")
    train = {"max_steps": 1, "wandb_project": "drafts", "keep_best": True, "validation": validation}
    path = tools.write_recipe(place, folder / "target", data=section, **train)
    values = yaml.safe_load(path.read_text()) | {"regenerate": {"max_tokens": 2, "temperature": 1.0}}
    path.write_text(yaml.safe_dump(values))
    return path


def tool(monkeypatch: pytest.MonkeyPatch, *command: object, ends: tuple[int, ...] = (0,)) -> None:
    """Run a tool in this process; ``ends`` are the exit codes that are right."""
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(tools.ROOT / str(command[0])), run_name="__main__")
    assert end.value.code in ends


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target that talks, and conversations."""
    place = tmp_path_factory.mktemp("readers")
    tools.make_talking_target(place / "target")
    for seed, (name, count) in enumerate((("train", 12), ("held", 4))):
        write_conversations(place / f"{name}.jsonl", conversation_rows(count, seed), {"made by": "a test"})
    return place


def test_every_key_is_read_by_a_command(folder: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    session = types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: session))
    online = settings(folder, source="online", prompts=str(folder / "held.jsonl"))
    cached = settings(folder, cache=[str(folder / "c")], cache_weights=[1.0])
    watch = Watch(monkeypatch)
    tool(monkeypatch, "tools/prepare_data.py", "--recipe", online, "--output", folder / "prompts")
    prompts = folder / "prompts" / "train.jsonl"
    answer = ("--recipe", online, "--prompts", prompts, "--output", folder / "o.jsonl")
    tool(monkeypatch, "tools/regenerate.py", *answer, ends=(0, 1))  # the tiny target may have nothing to say
    tool(monkeypatch, "tools/build_cache.py", "--recipe", cached, "--output", folder / "c")
    tool(monkeypatch, "tools/build_cache.py", "--recipe", cached, "--data", folder / "held.jsonl",
         "--output", folder / "held")  # fmt: skip
    run.prepare(load_recipe(cached), world, False)
    trainer = run.assemble(run.prepare(load_recipe(online), world, False), world, profile=False)
    assert trainer.run(0)
    trainer.engine.close()
    served = settings(folder, source="served", servers=["http://127.0.0.1:9"], server_storage=str(folder))
    with pytest.raises(TargetError, match="no server answers"):
        run.prepare(load_recipe(served), world, False)
    monkeypatch.setattr(sys, "argv", ["evaluate", "--recipe", str(online), "--draft", "d"])
    parse()
    assert KEYS - watch.read == set()


def test_a_key_without_a_reader_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above rests on: checks, copies and comparisons of a section are no readers."""
    watch = Watch(monkeypatch)
    section = recipes.EvaluateSection(temperature=(0.5,))
    assert dataclasses.replace(section, seed=1) != section
    assert recipes.section_to_dict(section)["seed"] == 980406
    assert section.max_new_tokens == 2048  # this file is no command
    assert watch.read == set()


def evaluation(monkeypatch: pytest.MonkeyPatch, *words: object) -> dict[str, Any]:
    """What the evaluator understands."""
    monkeypatch.setattr(sys, "argv", ["evaluate", "--draft", "d", *map(str, words)])
    return vars(parse())


def test_the_evaluator_takes_a_recipes_values_and_the_command_line_wins(tmp_path: Path, monkeypatch: Any) -> None:
    section = {"tasks": ["gsm8k", "mbpp"], "temperature": [0.0, 0.5], "max_new_tokens": 7, "batch_size": 3, "seed": 11}
    recipe = tools.write_recipe(tmp_path, tmp_path / "target", data={"thinking": True, "system_prompt": "Be brief."})
    values = yaml.safe_load(recipe.read_text())
    values["target"]["revision"] = "main"
    recipe.write_text(yaml.safe_dump(values | {"evaluate": section}))
    plain = evaluation(monkeypatch, "--target", "t")
    given = evaluation(monkeypatch, "--recipe", recipe)
    wanted = section | {"tasks": "gsm8k,mbpp", "target": str(tmp_path / "target"), "revision": "main"}
    wanted |= {"thinking": True, "system_prompt": "Be brief."}
    assert {key: given[key] for key in wanted} == wanted
    assert all(plain[key] != value for key, value in wanted.items())
    words = ["--recipe", recipe, "--set", "evaluate.seed=12", "--temperature", "1", "--no-thinking", "--target", "t"]
    changed = evaluation(monkeypatch, *words)
    assert (changed["seed"], changed["temperature"], changed["thinking"]) == (12, [1.0], False)
    assert (changed["target"], changed["revision"], changed["batch_size"]) == ("t", None, 3)


def test_prepare_takes_a_recipes_prompts_and_share(tmp_path: Path, monkeypatch: Any) -> None:
    write_conversations(tmp_path / "p.jsonl", conversation_rows(40), {"made by": "a test"})
    data = {"prompts": str(tmp_path / "p.jsonl"), "held_out": 0.5}
    recipe = tools.write_recipe(tmp_path, tmp_path / "target", data=data)
    tool(monkeypatch, "tools/prepare_data.py", "--recipe", recipe, "--output", tmp_path / "a")
    half = json.loads((tmp_path / "a" / "report.json").read_text())
    assert list(half["read"]) == [data["prompts"]]
    assert half["held_out"] > 8
    words = ("--recipe", recipe, "--set", "data.held_out=0.9", "--held-out", "0", "--output", tmp_path / "b")
    tool(monkeypatch, "tools/prepare_data.py", *words)
    assert json.loads((tmp_path / "b" / "report.json").read_text())["held_out"] == 0
