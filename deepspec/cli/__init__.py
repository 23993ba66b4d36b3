"""``deepspec VERB ...``: every command of the pipeline; the scripts of launch/ and tools/ are the same functions.

Each function parses ``sys.argv``, then imports what is slow to import and makes one call.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import takewhile
from typing import Any

from deepspec.arguments import RANK, Parser
from deepspec.errors import DeepSpecError, nearest, run_main
from deepspec.progress import about
from deepspec.recipe_files import read_files
from deepspec.registry import lookup

PROGRAM = "deepspec"
VERBS = {  # verb, or verb of a group -> (function, what it does)
    "prepare": ("deepspec.cli.data:prepare", "prompts to train on, from hub datasets or local files"),
    "regenerate": ("deepspec.cli.data:regenerate", "answers to prompts by the target itself"),
    "inspect": ("deepspec.cli.data:inspect", "what a target is trained on, supervised tokens marked"),
    "estimate": ("deepspec.cli.cache:estimate", "tokens, bytes per level, files and hours of a cache"),
    "plan": ("deepspec.cli.plan:plan", "memory, cache, hours and limits of a training, before it runs"),
    "cache build": ("deepspec.cli.cache:build", "a target cache from conversations"),
    "cache append": ("deepspec.cli.cache:append", "more conversations into a cache"),
    "cache estimate": ("deepspec.cli.cache:estimate", "the same as `deepspec estimate`"),
    "cache inspect": ("deepspec.cli.cache:inspect", "what a cache holds"),
    "cache verify": ("deepspec.cli.cache:verify", "check every byte; name broken parts, or build them again"),
    "cache recode": ("deepspec.cli.cache:recode", "an exact cache at another level"),
    "cache export": ("deepspec.cli.cache:export_raw", "ours as a raw-binary cache of the release"),
    "cache import": ("deepspec.cli.cache:import_raw", "a raw-binary cache of the release into ours"),
    "serve-features": ("deepspec.cli.features:serve_features", "a target's hidden states, served to trainings"),
    "train": ("deepspec.cli.train:train", "train a draft"),
    "finetune": ("deepspec.cli.train:finetune", "train on from a finished draft"),
    "consolidate": ("deepspec.cli.train:consolidate", "a draft folder from a training checkpoint"),
    "evaluate": ("deepspec.evaluate.__main__:main", "measure a draft"),
    "chat": ("deepspec.cli.chat:chat", "talk to a target and see its draft at work"),
    "study": ("deepspec.evaluate.__main__:study", "compare verification policies under load"),
    "calibrate": ("deepspec.evaluate.__main__:calibrate", "fit the confidence head's temperatures"),
    "compare": ("deepspec.evaluate.__main__:compare", "finished evaluations side by side"),
    "export": ("deepspec.cli.export:export", "a draft in an engine's form"),
    "import": ("deepspec.cli.export:import_foreign", "somebody else's draft in our form"),
    "push": ("deepspec.cli.export:push", "upload an exported draft to the hub"),
    "serve-check": ("deepspec.cli.demos:serve_check", "drafts in a real engine, compared with our decoding"),
    "recipes list": ("deepspec.cli.recipes:list_recipes", "the recipes that deepspec brings along"),
    "recipes show": ("deepspec.cli.recipes:show", "every key of a recipe with its value"),
    "recipes copy": ("deepspec.cli.recipes:copy", "a recipe and its files into a folder, to change it"),
    "quickstart": ("deepspec.cli.demos:quickstart", "the whole pipeline on a tiny target"),
    "demo real": ("deepspec.cli.demos:real", "three drafts for a small released model, with their tables"),
    "demo finetune": ("deepspec.cli.demos:finetune", "the real run's drafts fine-tuned on a domain"),
    "demo ablate": ("deepspec.cli.demos:ablate", "what each choice of a draft changes"),
    "demo drafters": ("deepspec.cli.demos:drafters", "every drafter and loss, side by side"),
    "demo results": ("deepspec.cli.demos:results", "docs/results.md from what was measured"),
    "completion": ("deepspec.cli.completion:completion", "a script that completes all this in a shell"),
}


def main(group: str = "") -> int:
    """Run the verb that the command line names, with the words after it.

    Args:
        group: the first word of the verb where the program states it itself.

    Raises:
        DeepSpecError: no such verb.
    """
    words = [*group.split(), *sys.argv[1:]]
    if words and words[0].startswith("--local_rank"):  # of `deepspeed --module deepspec`, whose script has no verbs
        words = [*words[1:], words[0]]
    for count in (2, 1):
        verb = " ".join(words[:count])
        if verb in VERBS:
            sys.argv = [f"{PROGRAM} {verb}", *words[count:]]
            return function_of(verb)() or 0
    named = list(takewhile(lambda word: not word.startswith("-"), words[:2]))
    verbs = [verb for verb in VERBS if not named or verb.split()[0] == named[0]]
    if not verbs or len(named) > 1:
        found = " ".join(named[: 2 if verbs else 1])
        raise DeepSpecError("no such verb", found=found, remedy=nearest(found, verbs or VERBS))
    lines = ["verbs (each has its own --help):", *(f"  {verb:15s} {VERBS[verb][1]}" for verb in verbs)]
    lines += [] if named else ["", "example:", f"  {PROGRAM} quickstart"]
    program = " ".join([PROGRAM, *named])
    own = Parser(prog=program, usage=f"{program} VERB ...", epilog="\n".join(lines))
    own.parse_args(words[len(named) :] or ["--help"])
    return 0


def function_of(verb: str) -> Callable[[], Any]:
    """The function of a verb, imported."""
    found: Callable[[], Any] = lookup("verb", {verb: VERBS[verb][0]}, verb)
    return found


def recipe_words(
    parser: argparse.ArgumentParser, required: bool = False, text: str = "a YAML file, or a name of `deepspec recipes`"
) -> None:
    """``--recipe`` and ``--set``, as every command that reads a recipe takes them."""
    parser.add_argument("--recipe", required=required, help=text)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, such as train.lr=3e-4"
    )


def about_recipe(given: argparse.Namespace, makes_nothing: bool = False) -> None:
    """Say what a training reads and writes, from the recipe's files: to check them takes what is slow to import."""
    with suppress(DeepSpecError, OSError):  # they are read again, and refused once
        values = read_files(given.recipe, given.set)
        target, data = (values[key] if isinstance(values.get(key), Mapping) else {} for key in ("target", "data"))
        output = values.get("output") or f"runs/{values.get('name')}"
        found = data.get("cache") or data.get("conversations")
        about(target=target.get("path"), data=found, output=None if makes_nothing else output)


def rank_word(parser: argparse.ArgumentParser) -> None:
    """``--local_rank``, which the deepspeed launcher puts on the command line of its processes."""
    parser.add_argument("--local_rank", type=RANK, help=argparse.SUPPRESS)


def run() -> None:
    """The program ``deepspec``."""
    run_main(main)
