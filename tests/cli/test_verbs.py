"""Every verb of the program: its help, its example, how it is found, and its completion in a shell."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest
import shtab

from deepspec import cli
from deepspec.arguments import Parser, parser_of
from deepspec.cli import VERBS, function_of
from deepspec.cli.completion import whole_parser
from deepspec.errors import DeepSpecError
from deepspec.evaluate.study import StudyOptions

WANTED = {
    *("prepare", "regenerate", "inspect", "estimate", "train", "finetune", "consolidate", "evaluate", "study"),
    *("chat", "plan", "serve-features"),
    *("calibrate", "compare", "export", "import", "serve-check", "push", "quickstart", "completion"),
    *(f"cache {name}" for name in ("build", "verify", "inspect", "recode", "append", "export", "import", "estimate")),
    *(f"recipes {name}" for name in ("list", "show", "copy")),
    *(f"demo {name}" for name in ("real", "finetune", "ablate", "drafters", "results")),
}


def parser(verb: str) -> Parser:
    return parser_of(function_of(verb), f"deepspec {verb}")


def shown_help(action: argparse.Action, text: str) -> str:
    """What the help text says of one option, on one line."""
    name = action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)
    begin = re.search(rf"^  (-\w, )?{re.escape(name)}\b", text, flags=re.M)
    assert begin, name
    rest = text[begin.start() :].split("\n")
    more = takewhile(lambda line: line.startswith("    "), rest[1:])
    return " ".join(" ".join([rest[0], *more]).split())


def test_the_verbs_are_those_of_the_documentation() -> None:
    assert set(VERBS) == WANTED
    page = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()
    assert [verb for verb, (_, text) in VERBS.items() if f"| `{verb}` | {text} |" not in page] == []


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_has_a_help_text_and_its_default_is_shown(verb: str) -> None:
    made = parser(verb)
    text = made.format_help()
    for action in made._actions:
        assert action.help, action.dest
        if action.help == argparse.SUPPRESS:
            continue
        shown = shown_help(action, text)
        values = action.default if isinstance(action.default, list | tuple) else [action.default]
        if any(value not in (None, False, "", argparse.SUPPRESS) or type(value) in (int, float) for value in values):
            assert f"(default: {' '.join(map(str, values))})" in shown
        if not isinstance(action, argparse._HelpAction | argparse._StoreTrueAction):
            assert len(shown.split()) > 2, shown


def test_a_default_that_is_a_list_is_shown_as_it_is_typed() -> None:
    text = " ".join(parser("study").format_help().split())
    assert "requests at a time (default: 1 4 16 64)" in text
    assert "of sampling; 0 is greedy (default: 1.0)" in text
    made = parser("study")
    assert made.get_default("confidence_threshold") == StudyOptions.threshold
    assert tuple(made.get_default("concurrency")) == StudyOptions.concurrency
    assert "(default: False)" not in text
    assert "(default: None)" not in text


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_an_example_that_parses(verb: str) -> None:
    made = parser(verb)
    assert made.example is not None
    line = f"deepspec {verb} {made.example}".strip()
    assert made.format_help().endswith(f"\nexample:\n  {line}\n")
    words = shlex.split(line)[1 + len(verb.split()) :]
    given = vars(argparse.ArgumentParser.parse_args(made, words))
    for word in words:  # no word of it is dropped
        flag = word.lstrip("-").replace("-", "_").removeprefix("from")
        assert not word.startswith("--") or given.get(flag) not in (None, [], "")


def test_a_verb_runs_by_module_from_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deepspec"]
    done = subprocess.run([*command, "cache"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert re.findall(r"^  (cache \w+) ", done.stdout, flags=re.M) == [verb for verb in VERBS if verb[:6] == "cache "]
    done = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\nexample:\n  deepspec quickstart\n")
    done = subprocess.run([*command, "recipes", "show", "none"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: none: no such recipe file; name a YAML file, or one of deepspec's own")


def test_the_rank_that_a_launcher_puts_before_the_verb_is_understood(monkeypatch, capsys) -> None:
    seen = []
    monkeypatch.setattr(cli, "function_of", lambda verb: lambda: seen.append((verb, list(sys.argv))))
    monkeypatch.setattr(sys, "argv", ["deepspec", "--local_rank=1", "cache", "build", "--output", "o"])
    assert cli.main() == 0
    assert seen == [("cache build", ["deepspec cache build", "--output", "o", "--local_rank=1"])]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("cache", "verfy"), "found 'cache verfy'; did you mean 'cache verify'"),
        (("trian", "x"), "found 'trian'; did you mean 'train'"),
        (("--quiet", "train"), "unrecognized arguments: train"),
    ],
)
def test_a_verb_that_is_none_is_refused(words: tuple[str, ...], says: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["deepspec", *words])
    with pytest.raises(DeepSpecError, match=re.escape(says)):
        cli.main()


def test_fine_tuning_needs_a_draft_and_importing_needs_no_form(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["deepspec", "finetune", "--recipe", "dspark_qwen3_4b"])
    with pytest.raises(DeepSpecError, match="--init"):
        cli.main()
    given = argparse.ArgumentParser.parse_args(parser("import"), ["a", "b"])
    assert (given.source, given.output, given.origin, given.target) == ("a", "b", "auto", None)


def test_the_whole_parser_knows_every_verb() -> None:
    made = whole_parser()
    for verb in VERBS:
        words = shlex.split(f"{verb} {parser(verb).example}")
        made.parse_args(words)


COMPLETE = """
source {script}
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMP_LINE="${{COMP_WORDS[*]}}"
$(complete -p deepspec | sed 's/.*-F \\([^ ]*\\).*/\\1/') deepspec "${{COMP_WORDS[COMP_CWORD]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the program prints for bash."""
    path: Path = tmp_path_factory.mktemp("completion") / "deepspec.sh"
    command = [sys.executable, "-m", "deepspec", "completion", "bash"]
    path.write_text(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return path


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("deepspec ca", {"cache", "calibrate"}),
        ("deepspec cache ver", {"verify"}),
        ("deepspec train --in", {"--init"}),
        ("deepspec export a b --format vl", {"vllm"}),
        ("deepspec train --recipe dspark_qwen3_4", {"dspark_qwen3_4b"}),
        ("deepspec train --recipe oth", {"other.yaml"}),
        ("deepspec recipes show quickstart_e", {"quickstart_eagle3"}),
        ("deepspec inspect conv", {"conversations.jsonl"}),
    ],
)
def test_bash_completes(typed: str, offered: set[str], script: Path, tmp_path: Path) -> None:
    for name in ("other.yaml", "conversations.jsonl"):
        (tmp_path / name).touch()
    words = COMPLETE.format(script=script, words=" ".join(map(shlex.quote, typed.split(" "))))
    done = subprocess.run(["bash", "--norc", "-c", words], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == offered, done.stderr


def test_the_script_for_zsh_names_verbs_and_options() -> None:
    text = shtab.complete(whole_parser(), "zsh")
    assert text.startswith("#compdef deepspec")
    assert "serve-check" in text
    assert "--accept-changes" in text
