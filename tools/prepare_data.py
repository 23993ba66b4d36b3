"""Prompts to train on, from hub datasets or local files: ``tools/prepare_data.py --output data/blend``.

Writes train.jsonl, held_out.jsonl and report.json; duplicates and evaluation prompts (--exclude) are dropped.
"""

import argparse

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
    if value <= 0:
        raise DataError("not a source", key="--source", found=text, wanted="NAME or NAME=WEIGHT with a weight above 0")
    return (name, value) if sign else (text, value)


def main() -> int:
    """Parse the arguments and prepare the data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", action="append", metavar="NAME[=WEIGHT]", help=f"hub id or file (default: {DEFAULT})"
    )
    parser.add_argument("--split", default="train", help="of hub datasets")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--held-out", type=float, default=0.05, help="share of the conversations kept from training")
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="FILE", help="evaluation prompts (JSONL, Parquet)"
    )
    parser.add_argument("--limit", type=int, help="stop after this many conversations")
    parser.add_argument("--seed", type=int, default=0, help="of the mixing")
    args = parser.parse_args()
    if not 0 <= args.held_out < 1:
        raise DataError("not a share", key="--held-out", found=args.held_out, wanted="0 to below 1")
    sources = dict(weighted(text) for text in args.source or [DEFAULT])
    options = PrepareOptions(sources, args.held_out, tuple(args.exclude), args.limit, args.split, args.seed)
    print("\n".join(prepare(options, args.output).lines()))
    return 0


if __name__ == "__main__":
    run_main(main)
