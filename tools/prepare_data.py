"""Prompts to train on, from hub datasets or local files: ``tools/prepare_data.py --output data/blend [--recipe R]``.

Writes train.jsonl, held_out.jsonl and report.json; duplicates and evaluation prompts (--exclude) are dropped.
"""

import argparse

from deepspec.arguments import COUNT, POSITIVE, SEED, SHARE_BELOW_ONE, Parser
from deepspec.data.prepare import PrepareOptions, prepare
from deepspec.errors import DataError, run_main
from deepspec.recipe import DataSection, load_recipe

DEFAULT = "mlabonne/open-perfectblend"


def weighted(text: str) -> tuple[str, float]:
    """``NAME`` or ``NAME=WEIGHT``."""
    name, sign, weight = text.rpartition("=")
    try:
        value = float(weight) if sign else 1.0
    except ValueError:
        value = 0.0
    if not POSITIVE.fits(value):
        raise DataError("not a source", key="--source", found=text, wanted="NAME or NAME=WEIGHT with a weight above 0")
    return (name, value) if sign else (text, value)


def main() -> int:
    """Parse the arguments and prepare the data."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", help="states data.prompts and data.held_out; other words win over it")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument(
        "--source",
        action="append",
        metavar="NAME[=WEIGHT]",
        help=f"hub id or file (default: the recipe's, or {DEFAULT})",
    )
    parser.add_argument("--split", default="train", help="of hub datasets")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument(
        "--held-out", type=SHARE_BELOW_ONE, help="share kept from training (default: the recipe's, or 0.05)"
    )
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="FILE", help="evaluation prompts (JSONL, Parquet)"
    )
    parser.add_argument("--limit", type=COUNT, help="stop after this many conversations")
    parser.add_argument("--seed", type=SEED, default=0, help="of the mixing")
    args = parser.parse_args()
    if args.set and not args.recipe:
        raise DataError("no recipe to change", key="--set", found=args.set, wanted="--recipe")
    data = load_recipe(args.recipe, args.set).data if args.recipe else DataSection(prompts=DEFAULT)
    held_out = data.held_out if args.held_out is None else args.held_out
    if not args.source and data.prompts is None:
        raise DataError("the recipe names no prompts", file=args.recipe, key="data.prompts", remedy="or give --source")
    pairs = [weighted(text) for text in args.source] if args.source else [(str(data.prompts), 1.0)]
    sources = dict(pairs)
    if len(sources) < len(pairs):
        remedy = "give it once, with the weight that it shall have"
        raise DataError("the same source twice", key="--source", found=args.source, remedy=remedy)
    options = PrepareOptions(sources, held_out, tuple(args.exclude), args.limit, args.split, args.seed)
    print("\n".join(prepare(options, args.output).lines()))
    return 0


if __name__ == "__main__":
    run_main(main)
