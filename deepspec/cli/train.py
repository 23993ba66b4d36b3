"""Commands of training: train a draft, train on from one, and make a draft folder of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from deepspec.arguments import Parser
from deepspec.cli import about_recipe, rank_word, recipe_words
from deepspec.log import say
from deepspec.recipe import load_recipe

_CONSOLIDATE = "deepspec consolidate {output} drafts/NAME"


def train() -> int:
    """Train a draft, as one process; on N GPUs: ``deepspeed --num_gpus N --module deepspec train --recipe R``.

    From a checkout ``deepspeed --num_gpus N launch/train.py --recipe R`` is the same; torchrun and mpirun work too.
    Run again, it continues where it stopped. A launcher's exit code does not tell whether the run reached its end;
    ``--check`` does.
    """
    example = "--recipe dspark_qwen3_4b --set train.lr=3e-4"
    return _train(Parser(description=train.__doc__, example=example, following=_CONSOLIDATE), False)


def finetune() -> int:
    """Train on from a finished draft: for a domain, for thinking mode, or after its target (docs/finetune.md).

    It is ``deepspec train --init DRAFT``: any recipe, any launcher, the same options.
    """
    example = "--recipe my_recipe.yaml --init drafts/dspark_qwen3_4b"
    return _train(Parser(description=finetune.__doc__, example=example, following=_CONSOLIDATE), True)


def _train(parser: Parser, from_draft: bool) -> int:
    """Read the options that both verbs have, and train."""
    recipe_words(parser, required=True)
    text = "start from this draft: a folder, checkpoint, run or hub id"
    parser.add_argument("--init", metavar="DRAFT", required=from_draft, help=text)
    parser.add_argument("--accept-changes", action="store_true", help="on resume, honour changed optimisation settings")
    parser.add_argument("--check", action="store_true", help="only look: exit code 0 where the run reached its end")
    parser.add_argument("--profile", action="store_true", help="write a profiler trace of a few steps")
    rank_word(parser)
    given = parser.parse_args()
    about_recipe(given, given.check)
    if given.check:
        from deepspec.checkpoints import check_finished

        print(f"finished: {check_finished(Path(load_recipe(given.recipe, given.set).output))}")
        return 0

    from deepspec.training.run import train as run

    start = [] if given.init is None else [f"train.init={json.dumps({'draft': given.init})}"]
    return run(given.recipe, [*start, *given.set], given.accept_changes, given.profile)


def consolidate() -> None:
    """A draft folder from a training checkpoint, of every ZeRO stage and any number of processes.

    CHECKPOINT is ``<run>/checkpoints/step_N``, or a run (its newest checkpoint). tools/zero_to_fp32.py is the same.
    """
    example = "runs/dspark_qwen3_4b drafts/dspark_qwen3_4b --dtype bf16"
    following = "deepspec evaluate --target {target} --draft {output}"
    parser = Parser(description=consolidate.__doc__, example=example, following=following)
    parser.add_argument("checkpoint", help="a checkpoint folder, or a run")
    parser.add_argument("output", help="the draft folder to create")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="of the weights; default: as trained")
    parser.add_argument("--without-embeddings", action="store_true", help="leave the target's embedding and head out")
    parser.add_argument("--target", help="where the target is now; default: where the recipe has it")
    given = parser.parse_args()

    from deepspec.export.consolidate import consolidate as run

    taken = run(given.checkpoint, given.output, given.dtype, not given.without_embeddings, given.target)
    say(f"{taken} -> {given.output}")
