"""Prompts to train on, from hub datasets or local files: ``tools/prepare_data.py --output data/blend``.

Writes train.jsonl, held_out.jsonl and report.json; duplicates and evaluation prompts (--exclude) are dropped.
"""

import argparse

from deepspec.arguments import COUNT, POSITIVE, SEED, SHARE_BELOW_ONE, Parser
from deepspec.data.prepare import PrepareOptions, prepare
from deepspec.errors import DataError, run_main

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
    parser.add_argument(
        "--source", action="append", metavar="NAME[=WEIGHT]", help=f"hub id or file (default: {DEFAULT})"
    )
    parser.add_argument("--split", default="train", help="of hub datasets")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument(
        "--held-out", type=SHARE_BELOW_ONE, default=0.05, help="share of conversations kept from training"
    )
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="FILE", help="evaluation prompts (JSONL, Parquet)"
    )
    parser.add_argument("--limit", type=COUNT, help="stop after this many conversations")
    parser.add_argument("--seed", type=SEED, default=0, help="of the mixing")
    args = parser.parse_args()
    sources = dict(weighted(text) for text in args.source or [DEFAULT])
    options = PrepareOptions(sources, args.held_out, tuple(args.exclude), args.limit, args.split, args.seed)
    print("\n".join(prepare(options, args.output).lines()))
    return 0


if __name__ == "__main__":
    run_main(main)
