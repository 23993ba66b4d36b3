"""Commands of training: train a draft, and make a draft folder of a checkpoint."""

from __future__ import annotations

import json

from deepspec.arguments import Parser
from deepspec.cli import rank_word, recipe_words


def train() -> int:
    """Train a draft: ``deepspeed --num_gpus N launch/train.py --recipe recipes/X.yaml [--set key.key=value ...]``.

    Also ``python launch/train.py ...`` as one process, torchrun or mpirun. Run again, it continues where it stopped.
    """
    parser = Parser(description=train.__doc__)
    recipe_words(parser, required=True)
    parser.add_argument("--init", metavar="DRAFT", help="start from this draft: a folder, checkpoint, run or hub id")
    parser.add_argument("--accept-changes", action="store_true", help="on resume, honour changed optimisation settings")
    parser.add_argument("--profile", action="store_true", help="write a profiler trace of a few steps")
    rank_word(parser)
    given = parser.parse_args()

    from deepspec.training.run import train as run

    start = [] if given.init is None else [f"train.init={json.dumps({'draft': given.init})}"]
    return run(given.recipe, [*start, *given.set], given.accept_changes, given.profile)


def consolidate() -> None:
    """A draft folder from a training checkpoint: ``python tools/zero_to_fp32.py CHECKPOINT OUT [--dtype bf16|fp32]``.

    CHECKPOINT is ``<run>/checkpoints/step_N``, or a run (its newest checkpoint). Every ZeRO stage, any number of
    processes.
    """
    parser = Parser(description=consolidate.__doc__)
    parser.add_argument("checkpoint", help="a checkpoint folder, or a run")
    parser.add_argument("output", help="the draft folder to create")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="of the weights; default: as trained")
    parser.add_argument("--without-embeddings", action="store_true", help="leave the target's embedding and head out")
    given = parser.parse_args()

    from deepspec.export.consolidate import consolidate as run

    taken = run(given.checkpoint, given.output, given.dtype, not given.without_embeddings)
    print(f"{taken} -> {given.output}")
