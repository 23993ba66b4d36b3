"""Make a draft folder from a training checkpoint: ``python tools/zero_to_fp32.py CHECKPOINT OUT [--dtype bf16|fp32]``.

CHECKPOINT is ``<run>/checkpoints/step_N``, or a run (its newest checkpoint). Every ZeRO stage, any number of processes.
"""

from __future__ import annotations

import argparse

from deepspec.arguments import Parser
from deepspec.errors import run_main


def main() -> None:
    """Parse the arguments and consolidate."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint folder, or a run")
    parser.add_argument("output", help="the draft folder to create")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="of the weights; default: as trained")
    parser.add_argument("--without-embeddings", action="store_true", help="leave the target's embedding and head out")
    options = parser.parse_args()

    from deepspec.export.consolidate import consolidate

    taken = consolidate(options.checkpoint, options.output, options.dtype, not options.without_embeddings)
    print(f"{taken} -> {options.output}")


if __name__ == "__main__":
    run_main(main)
