"""Bad input at the commands: one clear line, exit code 1, no traceback, nothing overwritten."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import fork_server
import pytest
import torch
import yaml
from training_tools import own_environment

from deepspec.demos.quickstart.target import build_model
from deepspec.demos.quickstart.text import distinct
from deepspec.demos.quickstart.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: object
    stderr: str


def save_target(folder: Path, seed: int) -> None:
    """An untrained target of the quickstart's shape."""
    rows = distinct(0, 50)
    tokenizer = train_tokenizer(text for row in rows for text in (row.question, row.answer))
    torch.manual_seed(seed)
    build_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_recipe(path: Path, target: Path, **data: object) -> None:
    """The quickstart's DSpark recipe for another target."""
    base = str(ROOT / "recipes" / "quickstart_dspark.yaml")
    over = {"extends": [base], "target": {"path": str(target)}, "data": data, "output": str(path.with_suffix(""))}
    path.write_text(yaml.safe_dump(over))


def run(command: list[str]) -> Outcome:
    """The command as a process of its own, in the checkout's root."""
    done = fork_server.run([sys.executable, *command], own_environment(), timeout=120)
    return Outcome(done.returncode, done.stderr)


def run_here(command: list[str], monkeypatch, capsys) -> Outcome:
    """The command's file as the main program of this process: an interpreter's start costs more than the test."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(command[0], run_name="__main__")
    return Outcome(end.value.code, capsys.readouterr().err)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two targets, a cache of the first, and files with faults."""
    folder: Path = tmp_path_factory.mktemp("errors")
    for name, seed in (("target", 0), ("other", 1)):
        save_target(folder / name, seed)
    rows = [{"id": str(i), "messages": row.messages()} for i, row in enumerate(distinct(0, 8))]
    (folder / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "empty.jsonl").touch()
    (folder / "broken.jsonl").write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[1])[:-9] + "\n")
    (folder / "precious.jsonl").write_text("kept\n")
    (folder / "run" / "checkpoints" / "step_5").mkdir(parents=True)
    data = {"conversations": str(folder / "good.jsonl"), "cache": [str(folder / "cache")]}
    write_recipe(folder / "recipe.yaml", folder / "target", **data)
    write_recipe(folder / "other.yaml", folder / "other", **data)
    built = run(["tools/build_cache.py", "--recipe", str(folder / "recipe.yaml"), "--output", str(folder / "cache")])
    assert built.code == 0, built.stderr
    return folder


BUILD = ("tools/build_cache.py", "--recipe", "{}/recipe.yaml", "--output", "{}/new-cache", "--data")
REGENERATE = ("tools/regenerate.py", "--recipe", "{}/recipe.yaml", "--output", "{}/precious.jsonl", "--prompts")
TRAIN = ("launch/train.py", "--recipe")
CONSOLIDATE = ("tools/zero_to_fp32.py", "{}/run/checkpoints/step_5", "{}/draft")
CASES = {  # name: (command, what its one line must say)
    "missing recipe": ((*TRAIN, "{}/no.yaml"), ("no.yaml", "no such")),
    "unknown key": ((*TRAIN, "{}/recipe.yaml", "--set", "train.learning_rate=1"), ("train.learning_rate", "lr")),
    "another target": ((*TRAIN, "{}/other.yaml"), ("{}/cache", "the cache is not the recipe's")),
    "missing conversations": ((*BUILD, "{}/no.jsonl"), ("no.jsonl", "No such file")),
    "empty conversations": ((*BUILD, "{}/empty.jsonl"), ("empty.jsonl", "no conversation")),
    "malformed prompt": ((*REGENERATE, "{}/broken.jsonl"), ("broken.jsonl", "line 2", "not JSON")),
    "missing prompts": ((*REGENERATE, "{}/no.jsonl"), ("no.jsonl", "no such prompts file")),
    "checkpoint without manifest": (CONSOLIDATE, ("step_5", "manifest")),
    "missing checkpoint": ((*CONSOLIDATE[:1], "{}/nothing", "{}/draft"), ("nothing",)),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_exit_code_1(folder: Path, name: str, monkeypatch, capsys) -> None:
    command, says = ([part.replace("{}", str(folder)) for part in parts] for parts in CASES[name])
    outcome = run(command) if command[0] == TRAIN[0] else run_here(command, monkeypatch, capsys)
    assert outcome.code == 1, outcome.stderr
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert not [word for word in says if word not in lines[0]], lines[0]
    assert (folder / "precious.jsonl").read_text() == "kept\n"
    assert not (folder / "new-cache" / "manifest.json").exists()
    assert not (folder / "draft").exists()
