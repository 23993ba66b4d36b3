"""Train a draft: ``deepspeed --num_gpus N launch/train.py --recipe recipes/X.yaml [--set key.key=value ...]``.

Also ``python launch/train.py ...`` as one process, and torchrun or mpirun. Run again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse

from deepspec.arguments import Parser
from deepspec.errors import run_main


def main() -> int:
    """Parse the arguments and train."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="YAML file of recipes/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="train.lr=3e-4"
    )
    parser.add_argument("--accept-changes", action="store_true", help="on resume, honour changed optimisation settings")
    parser.add_argument("--profile", action="store_true", help="write a profiler trace of a few steps")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    options = parser.parse_args()

    from deepspec.training.run import train

    return train(options.recipe, options.overrides, options.accept_changes, options.profile)


if __name__ == "__main__":
    run_main(main)
