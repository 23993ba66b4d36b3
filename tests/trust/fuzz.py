"""Recipes, command lines and small files with something wrong in them: one line of ours, in time, or they work."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from counts import Row
from processes import ROOT, Ended, each, fork
from stages import HALF, Place, building, evaluating, training

from deepspec.data.conversations import read_conversations
from deepspec.errors import DeepSpecError, run_main
from deepspec.files import read_index
from deepspec.recipe import load_recipe
from deepspec.registry import lookup
from deepspec.targets import load_spec

SECONDS = 45.0  # that one may take
LONGEST = 5000  # characters of a message
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 10**30, -(10**30), 0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"), "", " ", "x",
    "a" * 300, "\0", "\x1b[2J", "..", "../../x", "${HOME}", "nan", "1e5", "é\u202e", [], [[]], [None], [0, 0], {},
    {"x": 1}, {"": None}, {1: 2}, list(range(50)),
)  # fmt: skip
TEXTS = ("", " ", "0", "-1", "1.5", "nan", "inf", "-inf", "1e400", "9" * 40, "0x10", "１", "none", "x", "a" * 300,
         "\x1b[2J", "é", "--", "-", "..", "../x", "{}", "[", "a=b", "=", "k.k=1", "train.lr=", "train=1", "\udcff",
         "http://", "http://[", "file:///x", "model:8000", "a b", ";x", "*", "%s", "{0}")  # fmt: skip


def fuzz_recipes(n: int, place: Place, seed: int = 0) -> Row:
    """Spoil the real recipes ``n`` times, as values and as text, and load them.

    Returns:
        The counts.
    """
    sources = [path for path in sorted((ROOT / "recipes").glob("*.yaml")) if "extends" in path.read_text()]
    folder = place.root / "work" / "fuzz" / "recipes"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "recipes", folder)
    shutil.copytree(ROOT / "deepspeed_configs", folder.parent / "deepspeed_configs", dirs_exist_ok=True)

    def one(number: int) -> dict[str, str]:
        dice = random.Random(f"recipe {seed} {number}")
        source = dice.choice(sources)
        whole = load_recipe(source).to_yaml(folder) if number % 2 else source.read_text()
        path = folder / "fuzzed.yaml"
        text = spoilt_yaml(whole, dice) if number % 3 else spoilt_text(whole, dice)
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        return judged(lambda: load_recipe(path).digest(), f"{source.name}, number {number}")

    return _count("recipes", n, one, place)


def fuzz_files(n: int, place: Place, seed: int = 0) -> Row:
    """Spoil conversations, an index of weights and a target's config.json ``n`` times, and read them."""
    folder = place.root / "work" / "fuzz" / "files"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place.given / "target", folder)
    index = json.dumps({"metadata": {}, "weight_map": {"a.weight": "model.safetensors", "b": "model.safetensors"}})
    readers: tuple[tuple[str, str, Callable[[Path], Any]], ...] = (
        ("x.jsonl", "\n".join((place.given / "data.jsonl").read_text().splitlines()[:4]),
         lambda path: list(read_conversations(path))),
        ("x.index.json", index, lambda path: read_index(path, DeepSpecError)),
        ("config.json", (folder / "config.json").read_text(), lambda path: load_spec(path.parent)),
    )  # fmt: skip

    def one(number: int) -> dict[str, str]:
        dice = random.Random(f"file {seed} {number}")
        name, whole, read = readers[number % len(readers)]
        text = spoilt_json(whole, dice) if number % 3 else spoilt_text(whole, dice)
        (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
        return judged(lambda: read(folder / name), f"{name}, number {number}")

    return _count("conversations, indexes, configs", n, one, place)


def fuzz_commands(n: int, place: Place, seed: int = 0) -> Row:
    """Spoil the command lines of all verbs ``n`` times and run them, each in a process of its own."""
    lines = commands(place)

    def one(number: int) -> dict[str, str]:
        dice = random.Random(f"command {seed} {number}")
        work = place.work("fuzz")
        shutil.rmtree(work, ignore_errors=True)
        (work / "out" / "here").mkdir(parents=True)
        verb = sorted(lines)[number % len(lines)]
        words = spoilt_words([str(word) for word in lines[verb](work / "out")], dice)
        logs = work.parent / "fuzz-logs"

        def command() -> None:
            os.chdir(work / "out" / "here")  # a relative path of a spoilt line stays inside
            sys.argv = ["deepspec", *verb.split(".")[:1], *words]
            run_main(lookup("verb", {"main": "deepspec.cli:main"}, "main"))

        ended = fork(command, logs, work / "tmp").wait(SECONDS)
        return judged_end(ended, f"{verb} {words}"[:600])

    return _count("command lines", n, one, place, 2 * SECONDS)


def _count(name: str, n: int, one: Callable[[int], dict[str, str]], place: Place, seconds: float = SECONDS) -> Row:
    row = Row("fuzz", name)
    for number, found in enumerate(each(n, one, place.root / "work" / "fuzz-each", seconds)):
        row.add({found["verdict"]: found.get("note") or f"number {number}"})
    return row


def judged(read: Callable[[], Any], what: str) -> dict[str, str]:
    """The verdict on reading a file in this process."""
    try:
        read()
    except DeepSpecError as error:
        text = str(error)
        if len(text) > LONGEST or re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text):
            return {"verdict": "lost", "note": f"{what}: a message of {len(text)} characters: {text[:200]!r}"}
        return {"verdict": "refused"}
    except Exception as problem:
        note = f"{what}: {type(problem).__name__}: {str(problem)[:200]}"
        return {"verdict": "refused" if isinstance(problem, OSError) else "traceback", "note": note}
    return {"verdict": "right"}


def judged_end(ended: Ended, what: str) -> dict[str, str]:
    """The verdict on a command: it works, or refuses in one line and exit code 1 or 2."""
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    if ended.hung:
        return {"verdict": "hang", "note": what}
    if ended.has_traceback:
        return {"verdict": "traceback", "note": f"{ended.last_words} of {what}"}
    if ended.code == 0:
        return {"verdict": "right"}
    if ended.code not in (1, 2) or (len(errors) != 1 and not ended.stdout) or any(len(one) > LONGEST for one in errors):
        return {"verdict": "lost", "note": f"{ended.last_words} of {what}"}
    if any(re.search(r"[\x00-\x08\x0b-\x1f\x7f]", one) for one in errors):
        return {"verdict": "lost", "note": f"control characters in a message: {errors[0][:200]!r}"}
    return {"verdict": "refused"}


# -- what is spoilt ----------------------------------------------------------------------------------------------------


def commands(place: Place) -> dict[str, Callable[[Path], Sequence[object]]]:
    """Working command lines of the verbs; what follows a point tells two of one verb apart."""
    given = place.given
    waits = ["--concurrency", 2, "--timeout", 1, "--attempts", 1, "--patience", 1]
    answers = ["--recipe", place.recipe, "--prompts", given / "data.jsonl", "--output"]
    target = ["--target", given / "target"]
    totals = ["--tokens", 1e6, "--hidden-size", 64, "--layers", 3, "--mean", 500, "--supervised", 0.5]
    return {
        "prepare": lambda out: ["--source", given / "data.jsonl", "--output", out / "p", "--seed", 1],
        "regenerate": lambda out: [*answers, out / "a.jsonl", "--max-failed", 0.5],
        "regenerate.served": lambda out: [*answers, out / "a.jsonl", "--server", "http://127.0.0.1:1", *waits],
        "inspect": lambda out: [given / "data.jsonl", "--recipe", place.recipe, "--show", 1, "--html", out / "x.html"],
        "build-cache": lambda out: building(place, out / "c"),
        "cache.estimate": lambda out: ["estimate", *totals],
        "cache.probe": lambda out: ["estimate", "--recipe", place.recipe, "--data", given / "data.jsonl", "--probe", 5],
        "cache.inspect": lambda out: ["inspect", given / "cache", "--sample", 1],
        "cache.verify": lambda out: ["verify", given / "cache", "--workers", 2],
        "cache.recode": lambda out: ["recode", given / "cache", out / "c", "--level", "near"],
        "cache.export": lambda out: ["export", given / "cache16", out / "r"],
        "cache.import": lambda out: ["import", given / "raw", out / "c", "--recipe", place.recipe, *HALF],
        "train": lambda out: [*training(place, out / "run"), "--set", "train.max_steps=1"],
        "consolidate": lambda out: [given / "zero1_fp32", out / "d", "--dtype", "bf16"],
        "evaluate": lambda out: [*evaluating(place, out / "r"), "--batch-size", 1, "--samples", 1, "--seed", 1],
        "evaluate.compare": lambda out: ["compare", given / "results", given / "results"],
        "calibrate": lambda out: [*target, "--draft", given / "draft", "--tasks", given / "tasks"],
        "export": lambda out: [given / "draft", out / "d", "--format", "vllm", "--shard-gb", 1],
        "export.import": lambda out: [given / "served", out / "d", "--from", "auto", *target, "--max-draft", 4],
    }  # fmt: skip


def spoilt_words(words: list[str], dice: random.Random) -> list[str]:
    """A command line with one to three words changed, dropped, doubled or added; its paths stay where they are."""
    words = list(words)
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        place = dice.randrange(len(words)) if words else 0
        kind = dice.choice(("value", "value", "value", "drop", "double", "add", "flag"))
        if kind == "add" or not words:
            words.insert(place, dice.choice(TEXTS))
        elif kind == "drop":
            del words[place]
        elif kind == "double":
            words.insert(place, words[place])
        elif kind == "flag" and words[place].startswith("--"):
            words[place] = words[place][:-1] + dice.choice(("", "x", "="))
        elif not words[place].startswith("/"):
            words[place] = dice.choice(TEXTS)
    return [word for word in words if "\0" not in word]  # the system passes none


def spoilt_yaml(text: str, dice: random.Random) -> str:
    """YAML with one to three values or keys changed."""
    return yaml.safe_dump(_spoilt(yaml.safe_load(text), dice), allow_unicode=True)


def spoilt_json(text: str, dice: random.Random) -> str:
    """JSON, or lines of it, with values changed."""
    try:
        return json.dumps(_spoilt(json.loads(text), dice))
    except ValueError:
        lines = text.splitlines()
        place = dice.randrange(len(lines))
        lines[place] = json.dumps(_spoilt(json.loads(lines[place]), dice))
        return "\n".join(lines)


def _spoilt(value: Any, dice: random.Random) -> Any:
    for _ in range(dice.randint(1, 3)):
        places = list(_places(value))
        if not places:
            return dice.choice(ODD)
        owner, key = dice.choice(places)
        kind = dice.choice(("value", "value", "value", "drop", "rename", "move"))
        if kind == "value" or isinstance(owner, list):
            owner[key] = dice.choice(ODD)
        elif kind == "drop":
            del owner[key]
        else:
            new = dice.choice((f"{key}x", "", 1, None, "name", "extends", "draft")) if kind == "rename" else key
            owner[new] = owner.pop(key) if kind == "rename" else {key: owner[key]}
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]


def spoilt_text(text: str, dice: random.Random) -> str:
    """A text with pieces cut, doubled, or put in that mean something to a parser."""
    pieces = ("&a [*a]", "*x", "!!python/object:os.system", "{{", "]", ": ", "\t", "\0", "\ufeff", "\udcff", "- ",
              "---\n",
              "? ", "\x1b[31m", "<<: *x", "[" * 2000, "1" * 5000, '"', "'", "#", "\u2028", "%YAML 9\n", "NaN", "1e999",
              "a: &a [x,x,x]\nb: &b [*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b]\nd: [*c,*c,*c,*c]\n")  # fmt: skip
    for _ in range(dice.randint(1, 3)):
        first, last = sorted(dice.randrange(len(text) + 1) for _ in range(2))
        kind = dice.choice(("put", "put", "cut", "double"))
        middle = {"put": dice.choice(pieces), "cut": "", "double": text[first:last] * 2}[kind]
        text = text[:first] + middle + (text[first:] if kind == "put" else text[last:])
    return text
