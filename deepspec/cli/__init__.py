"""``deepspec VERB ...``: every command of the pipeline; the scripts of launch/ and tools/ are the same functions.

Each function parses ``sys.argv``, then imports what is slow to import and makes one call.
"""

from __future__ import annotations

import argparse
import sys

from deepspec.arguments import RANK, Parser
from deepspec.errors import DeepSpecError, nearest, run_main
from deepspec.registry import lookup

VERBS = {  # verb -> (function, what it does)
    "prepare": ("deepspec.cli.data:prepare", "prompts to train on, from hub datasets or local files"),
    "regenerate": ("deepspec.cli.data:regenerate", "answers to prompts by the target itself"),
    "inspect": ("deepspec.cli.data:inspect", "what a target is trained on, supervised tokens marked"),
    "build-cache": ("deepspec.cli.cache:build", "a target cache from conversations"),
    "cache": ("deepspec.cli.cache:cache", "estimate, inspect, verify, import, export or recode a cache"),
    "train": ("deepspec.cli.train:train", "train a draft"),
    "consolidate": ("deepspec.cli.train:consolidate", "a draft folder from a training checkpoint"),
    "evaluate": ("deepspec.evaluate.__main__:main", "measure a draft; compare runs"),
    "calibrate": ("deepspec.evaluate.calibration:main", "fit the confidence head's temperatures"),
    "export": ("deepspec.cli.export:export", "a draft in an engine's form, or somebody else's in ours"),
    "push": ("deepspec.cli.export:push", "upload an exported draft to the hub"),
    "serve-check": ("deepspec.cli.demos:serve_check", "drafts in a real engine, compared with our decoding"),
    "quickstart": ("deepspec.cli.demos:quickstart", "the whole pipeline on a tiny target"),
    "real": ("deepspec.cli.demos:real", "three drafts for a small released model, with their tables"),
    "finetune": ("deepspec.cli.demos:finetune", "the real run's drafts fine-tuned on a domain"),
    "ablate": ("deepspec.cli.demos:ablate", "what each choice of a draft changes"),
    "results": ("deepspec.cli.demos:results", "docs/results.md from what was measured"),
}


def main() -> int | None:
    """Run the verb that the command line names, with the words after it.

    Raises:
        DeepSpecError: no such verb.
    """
    verb, *words = sys.argv[1:] or ["--help"]
    if verb in VERBS:
        sys.argv = [f"deepspec {verb}", *words]
        command = lookup("verb", {verb: VERBS[verb][0]}, verb)
        code: int | None = command()
        return code
    if not verb.startswith("-"):
        raise DeepSpecError("no such verb", found=verb, remedy=nearest(verb, VERBS))
    lines = (f"  {name:12s} {text}" for name, (_, text) in VERBS.items())
    Parser(prog="deepspec", usage="deepspec VERB ...", epilog="\n".join(["verbs:", *lines])).parse_args([verb])
    return 0


def recipe_words(parser: argparse.ArgumentParser, required: bool = False, text: str = "YAML file of recipes/") -> None:
    """``--recipe`` and ``--set``, as every command that reads a recipe takes them."""
    parser.add_argument("--recipe", required=required, help=text)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, such as train.lr=3e-4"
    )


def rank_word(parser: argparse.ArgumentParser) -> None:
    """``--local_rank``, which the deepspeed launcher puts on the command line of its processes."""
    parser.add_argument("--local_rank", type=RANK, help=argparse.SUPPRESS)


def run() -> None:
    """The program ``deepspec``."""
    run_main(main)
