"""Every command that README, CONTRIBUTING and docs/ show: its program exists, and its options parse."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from deepspec import cli
from deepspec.arguments import Parser, parser_of
from deepspec.cli import VERBS, function_of
from deepspec.errors import DeepSpecError

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {  # of a checkout -> verb
    "launch/train.py": "train",
    "tools/build_cache.py": "cache build",
    "tools/zero_to_fp32.py": "consolidate",
    "-m deepspec.evaluate compare": "compare",
    "-m deepspec.evaluate.calibration": "calibrate",
    "-m deepspec.evaluate": "evaluate",
    "--module deepspec.evaluate": "evaluate",
    "-m deepspec": "",
    "--module deepspec": "",
    "deepspec": "",
}
PROGRAM = re.compile(
    rf"(?:^|(?<=[ (]))(?:python |deepspeed .*?|torchrun .*?)?({'|'.join(map(re.escape, SCRIPTS))})(?= |$)"
)
OPEN = re.compile(r"\.\.\.|\[|\||\$\w")  # a line that stands for several


def blocks(text: str) -> Iterator[tuple[str, bool]]:
    """Code, and whether it is a line to be typed: of fences and indented blocks, not between backticks."""
    for language, fence in re.findall(r"^ *```(\w*)\n(.+?)^ *```", text, flags=re.M | re.S):
        if language in ("", "bash", "text"):
            yield from ((line, True) for line in fence.replace("\\\n", " ").splitlines())
    outside = re.sub(r"^ *```.+?^ *```", "", text, flags=re.M | re.S)
    yield from ((line, True) for line in re.findall(r"^ {4,}(\S.*)", outside.replace("\\\n", " "), flags=re.M))
    yield from ((code, False) for code in re.findall(r"`([^`\n]+)`", outside.replace("``", "")))


def commands() -> Iterator[tuple[str, str, bool]]:
    """(page, command of ours from its verb on, whether it is complete)."""
    for page in PAGES:
        for line, typed in blocks(page.read_text(encoding="utf-8")):
            line = re.sub(r"(^|\s)#.*", "", " ".join(line.split())).removeprefix("$ ")
            found = (PROGRAM.search if typed else PROGRAM.match)(line)
            if found and not line.startswith(("pip", "eval", "from ", "import ", "launch/train.py tools/*.py")):
                rest = re.split(r"\|\||;|>| && ", line[found.end() :])[0]
                yield page.name, f"{SCRIPTS[found[1]]} {rest}".strip(), typed and not OPEN.search(rest)


@cache
def parser(verb: str) -> Parser:
    """Of a verb; a page may leave out what it has said above, so nothing is required."""
    made = parser_of(function_of(verb), f"deepspec {verb}")
    for action in made._actions:
        action.required = False
    return made


def problem(command: str, complete: bool) -> str:
    """What is wrong with a command, or nothing."""
    words = shlex.split(re.sub(r"[][|]|\.\.\.", " ", command))
    verb = next((verb for count in (2, 1) if (verb := " ".join(words[:count])) in VERBS), "")
    if not verb:  # the program, one of its groups, its help
        groups = {name.split()[0] for name in VERBS}
        return "" if words[:1] in ([], ["VERB"], ["--help"]) or (len(words) == 1 and words[0] in groups) else "no verb"
    given = words[len(verb.split()) :]
    known = {name for action in parser(verb)._actions for name in action.option_strings}
    if unknown := {word.split("=")[0] for word in given if word.startswith("--")} - known:
        return f"unknown {unknown}"
    try:
        if given and complete:
            argparse.ArgumentParser.parse_args(parser(verb), given)
    except DeepSpecError as error:
        return str(error)
    return ""


def test_every_command_that_a_page_shows_exists_and_its_options_parse() -> None:
    found = list(commands())
    assert sum(complete for _, _, complete in found) > 60
    assert {page for page, _, _ in found} >= {"README.md", "qwen3_4b.md", "data.md", "cache.md", "serving.md"}
    wrong = {f"{page}: {command}": why for page, command, complete in found if (why := problem(command, complete))}
    assert wrong == {}


@pytest.mark.parametrize(
    "command", ["cache verfy caches/x", "train --recipe R --lr 3", "estimate --tokens many", "trian"]
)
def test_a_command_that_does_not_exist_is_noticed(command: str) -> None:
    assert problem(command, True)


def test_what_a_page_shows_as_an_output_is_the_output(monkeypatch, capsys) -> None:
    outputs = re.compile(r"^\$ (deepspec .+)\n((?:.+\n)+?)```", flags=re.M)
    shown = [found for page in PAGES for found in outputs.findall(page.read_text(encoding="utf-8"))]
    assert shown
    for command, output in shown:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        assert cli.main() == 0
        assert capsys.readouterr().out == output
