"""Answers to prompts by the target itself: ``tools/regenerate.py --recipe R --prompts P.jsonl --output O.jsonl``."""

import argparse

from deepspec.data.regenerate import Plan, regenerate
from deepspec.errors import DataError, run_main
from deepspec.recipe import load_recipe


def main() -> int:
    """Parse the command line and regenerate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", help="states target, sampling, thinking, system prompt and seed")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--target", help="model folder or hub id (default: the recipe's)")
    parser.add_argument("--prompts", required=True, help="conversations (JSONL) whose user turns are answered")
    parser.add_argument("--output", required=True, help="conversations (JSONL) with the target's answers")
    parser.add_argument("--max-failed", type=float, default=0.02, help="share of conversations that may fail for good")
    parser.add_argument("--engine", choices=["local"], default="local")
    args = parser.parse_args()
    if not args.recipe and (args.set or not args.target):
        raise DataError("nothing says who answers and how", wanted="--recipe, or --target for the built-in sampling")
    plan = Plan.of_recipe(load_recipe(args.recipe, args.set), args.target) if args.recipe else Plan(args.target)
    summary = regenerate(args.prompts, args.output, plan.local_engine(), plan.settings(), args.max_failed)
    print(f"{args.output}: {summary.rows} conversations, {summary.failed} failed, {dict(summary.finish_reasons)}")
    return 0


if __name__ == "__main__":
    run_main(main)
