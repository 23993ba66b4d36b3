"""Completion of the program's verbs and options in a shell."""

from __future__ import annotations

import argparse

from deepspec.arguments import Parser, Range, parser_of
from deepspec.cli import PROGRAM, VERBS, function_of
from deepspec.recipe_files import own_recipes

RECIPE = "_deepspec_recipe"  # the shell's function: names of recipes, and files


def completion() -> None:
    """Print a script that completes verbs, options and their values.

    bash: write it to ~/.local/share/bash-completion/completions/deepspec, or ``eval "$(deepspec completion bash)"``.
    zsh: write it to a file _deepspec in a folder of $fpath.
    """
    parser = Parser(description=completion.__doc__, example="bash", piped=True)
    parser.add_argument("shell", choices=("bash", "zsh"), metavar="SHELL", help="who reads it: bash or zsh")
    shell = parser.parse_args().shell

    import shtab

    print(shtab.complete(whole_parser(), shell))


def whole_parser() -> argparse.ArgumentParser:
    """The program as one parser: groups, verbs and their options."""
    whole = argparse.ArgumentParser(prog=PROGRAM)
    groups = {"": whole.add_subparsers()}
    for verb, (_, text) in VERBS.items():
        group, _, name = verb.rpartition(" ")
        if group not in groups:
            groups[group] = groups[""].add_parser(group, help=f"verbs: {PROGRAM} {group} --help").add_subparsers()
        own = parser_of(function_of(verb), f"{PROGRAM} {verb}")
        for action in own._actions:
            _name_values(action)
        groups[group].add_parser(name, help=text, parents=[own], add_help=False)
    return whole


def _name_values(action: argparse.Action) -> None:
    """Say what the shell offers for a value without choices: names of recipes, or files."""
    import shtab

    if action.dest == "recipe":
        names = " ".join(own_recipes())
        functions = {
            "bash": f'{RECIPE}() {{ compgen -W "{names}" -- "$1"; compgen -f -- "$1"; }}',
            "zsh": f"{RECIPE}() {{ _alternative 'names:name:({names})' 'files:file:_files' }}",
        }
        action.complete = dict.fromkeys(functions, RECIPE) | {"preamble": functions}  # type: ignore[attr-defined]
    elif action.choices is None and action.nargs != 0 and not isinstance(action.type, Range):
        action.complete = shtab.FILE  # type: ignore[attr-defined]
