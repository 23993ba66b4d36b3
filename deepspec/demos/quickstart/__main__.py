"""The quickstart's own stages, each alone: ``python -m deepspec.demos.quickstart {prompts,target} --output DIR``."""

from __future__ import annotations

from pathlib import Path

from deepspec.arguments import COUNT, Parser
from deepspec.demos.quickstart import TYPES, USUAL_TYPE
from deepspec.errors import run_main


def main() -> int:
    """Parse the arguments and run one stage; the exit code."""
    parser = Parser(prog="python -m deepspec.demos.quickstart", description=__doc__)
    stages = parser.add_subparsers(dest="stage", required=True)
    prompts = stages.add_parser("prompts", help="write training and held-out prompts")
    prompts.add_argument("--train", type=COUNT, default=4000, help="prompts to train on")
    prompts.add_argument("--held-out", type=COUNT, default=32, help="prompts to evaluate on")
    prompts.add_argument("--output", type=Path, required=True)
    target = stages.add_parser("target", help="train the tiny target")
    target.add_argument("--steps", type=COUNT, help="optimizer steps")
    target.add_argument("--target-type", choices=TYPES, default=USUAL_TYPE, help="transformers' model type")
    target.add_argument("--output", type=Path, required=True)
    served = stages.add_parser("served", help="run a training beside a feature server of its target")
    served.add_argument("--recipe", required=True, help="whose target it is")
    served.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of it")
    served.add_argument("--log", type=Path, required=True, help="of the server")
    served.add_argument("command", nargs="+", help="of the training, after --")
    given = parser.parse_args()
    if given.stage == "served":
        from deepspec.demos.quickstart.served import train_served

        return train_served(given.recipe, given.set, given.log, given.command)
    if given.stage == "prompts":
        from deepspec.demos.quickstart.text import write_prompts

        write_prompts(given.output, given.train, given.held_out)
    else:
        from deepspec.demos.quickstart.target import STEPS, make_target

        make_target(given.output, given.steps or STEPS, model_type=given.target_type)
    return 0


if __name__ == "__main__":
    run_main(main)
