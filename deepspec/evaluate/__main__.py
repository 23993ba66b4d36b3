"""Measure a draft; ``python -m deepspec.evaluate compare RUN RUN ...`` puts finished runs side by side.

``--recipe R`` takes target, thinking, system prompt and the `evaluate:` section of a recipe; arguments win over it.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from deepspec.arguments import COUNT, COUNT_OR_NONE, POSITIVE, RANK, SEED, SHARE, TEMPERATURE, TOGETHER, Parser, program
from deepspec.errors import EvaluationError, run_main
from deepspec.log import in_colour
from deepspec.progress import made
from deepspec.registry import CLIENTS, SERVERS

log = logging.getLogger(__name__)


def parse() -> argparse.Namespace:
    """The command line of an evaluation."""
    example = "--target Qwen/Qwen3-4B --draft drafts/dspark_qwen3_4b --tasks gsm8k,humaneval --temperature 0 1"
    following = "deepspec compare OTHER {output}, or deepspec export {draft} served/NAME --format FORMAT"
    parser = Parser(prog=program("deepspec.evaluate"), description=__doc__, example=example, following=following)
    _model_words(parser, "DRAFT/evaluation; of a study DRAFT/study, of a server DRAFT/served")
    parser.add_argument("--confidence-threshold", type=SHARE, default=0.0, help="verify while the draft is confident")
    parser.add_argument("--temperature", type=TEMPERATURE, nargs="+", default=[1.0], help="of sampling; 0 is greedy")
    parser.add_argument("--batch-size", type=COUNT, default=1, help="prompts decoded together")
    parser.add_argument("--first-turn", action="store_true", help="only the first turn of each prompt, as in the paper")
    parser.add_argument("--tree", default="", help="draft a static tree: children of every node by depth, as 4,2,1,1")
    parser.add_argument("--no-plain", action="store_true", help="skip the baseline (no speed-up, no equality check)")
    parser.add_argument("--no-capture", action="store_true", help="on CUDA, launch each operation of a round by itself")
    parser.add_argument(
        "--show", type=COUNT_OR_NONE, default=0, metavar="N", help="print N answers, their tokens in colour"
    )
    parser.add_argument("--study", choices=("scheduler",), help="compare verification policies under load instead")
    parser.add_argument(
        "--concurrency", type=TOGETHER, nargs="+", help="of the study and of --server: requests at a time"
    )
    server = parser.add_argument_group("a running server instead of the target in this process")
    server.add_argument("--server", metavar="URL", help="http://host:port of one that drafts")
    server.add_argument("--baseline-server", metavar="URL", help="one of the same target without a draft")
    server.add_argument("--engine", choices=("auto", *CLIENTS), default="auto", help="which engine it is")
    server.add_argument("--serve", choices=SERVERS, metavar="ENGINE",
                        help=f"start both, the draft exported to the engine's form: {', '.join(SERVERS)}")  # fmt: skip
    server.add_argument("--context", type=COUNT, help="with --serve: positions of a request (default: the target's)")
    server.add_argument("--timeout", type=POSITIVE, default=900.0, help="seconds of one answer")
    given = _read(parser)
    _check_server(given)
    return given


def parse_study() -> argparse.Namespace:
    """The command line of a study, as that of an evaluation with ``--study scheduler`` gives it."""
    example = "--target Qwen/Qwen3-4B --draft drafts/dspark_qwen3_4b --concurrency 1 4 16"
    description = "Compare verification policies under load; the same as ``deepspec evaluate --study scheduler``."
    following = "deepspec export {draft} served/NAME --format FORMAT"
    parser = Parser(prog=program("deepspec.evaluate"), description=description, example=example, following=following)
    _model_words(parser, "DRAFT/study")
    parser.add_argument("--temperature", type=TEMPERATURE, nargs=1, default=[1.0], help="of sampling; 0 is greedy")
    parser.add_argument("--concurrency", type=TOGETHER, nargs="+", default=[1, 4, 16, 64], help="requests at a time")
    text = "of the policy that verifies while the draft is confident"
    parser.add_argument("--confidence-threshold", type=SHARE, default=0.5, help=text)
    absent = dict.fromkeys(("server", "baseline_server", "serve", "context"))
    parser.set_defaults(
        study="scheduler", show=0, tree="", no_plain=False, no_capture=False, batch_size=1, engine="auto", **absent
    )
    given = _read(parser)
    _check_server(given)
    return given


def _model_words(parser: Parser, output: str) -> None:
    """What an evaluation and a study both take."""
    parser.add_argument("--recipe", help="a recipe: target, thinking, system prompt and the `evaluate:` section")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--target", help="a folder or hub id (default: the recipe's)")
    parser.add_argument("--draft", help="draft folder, or owner/name on the hub; of a server's draft only its name")
    parser.add_argument(
        "--tasks", default="", help="comma-separated names, .jsonl files or folders (default: all of tasks.yaml)"
    )
    parser.add_argument("--max-new-tokens", type=COUNT, default=2048, help="at most, of each answer")
    parser.add_argument("--samples", type=COUNT, help="at most so many prompts of each task")
    parser.add_argument("--seed", type=SEED, default=980406, help="of sampling")
    parser.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        help="let the target think, by its template's own switch (default: as the draft was trained)",
    )
    parser.add_argument("--system-prompt", help="before every prompt (default: the recipe's)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of target and draft")
    parser.add_argument("--output", help=f"folder of the results (default: {output})")
    parser.add_argument("--local_rank", type=RANK, help=argparse.SUPPRESS)  # put there by the deepspeed launcher
    parser.set_defaults(revision=None)


def _read(parser: Parser) -> argparse.Namespace:
    """The command line, a recipe's values where it gives none."""
    known = argparse.ArgumentParser.parse_args(parser)
    if known.recipe:  # its values are the defaults
        parser.set_defaults(**of_recipe(known.recipe, known.set, known.target))
    given: argparse.Namespace = parser.parse_args()
    if given.set and not given.recipe:
        raise EvaluationError("no recipe to change", key="--set", found=given.set, wanted="--recipe")
    if given.target is None:
        raise EvaluationError("no target named", wanted="--target or --recipe")
    return given


def _check_server(given: argparse.Namespace) -> None:
    """Refuse what a server cannot be asked for, and what only a server can."""
    if given.serve:
        named = [f"--{name.replace('_', '-')}" for name in ("server", "baseline_server") if getattr(given, name)]
        if named or given.draft is None:
            problem = "names a server beside one to start" if named else "no draft named"
            raise EvaluationError(problem, key=(named or ["--serve"])[0], wanted="--serve ENGINE --draft DRAFT alone")
    elif given.context:
        raise EvaluationError("without a server to start", key="--context", remedy="set it where the server is started")
    if not (given.server or given.serve):
        if given.draft is None:
            raise EvaluationError("no draft named", wanted="--draft")
        if given.baseline_server or given.engine != "auto":
            flag = "--baseline-server" if given.baseline_server else "--engine"
            raise EvaluationError("without a server", key=flag, remedy="name the --server, or leave it out")
        return
    values = vars(given)
    names = ("tree", "confidence_threshold", "study", "no_plain", "no_capture", "show")
    ours = {f"--{name.replace('_', '-')}": values[name] for name in names}
    ours["--dtype"] = given.dtype != "auto" and not given.serve
    ours["--batch-size"] = given.batch_size != 1 and not given.recipe
    for flag, value in ours.items():
        if value:
            remedy = "leave it out here and set it where the server is started"
            raise EvaluationError("not of a server: its own options decide", key=flag, remedy=remedy)
    if not (given.draft or given.output):
        raise EvaluationError("no output named", wanted="--output, or --draft")


def of_recipe(path: str, overrides: list[str], target: str | None) -> dict[str, Any]:
    """The values of a recipe, by the names of the command line.

    Args:
        path: the recipe.
        overrides: ``key.key=value`` texts.
        target: that of the command line; the recipe's revision belongs to the recipe's own target.

    Raises:
        RecipeError: a recipe that cannot be read.
    """
    from deepspec.recipe import load_recipe

    recipe = load_recipe(path, overrides)
    section = recipe.evaluate
    return {
        "target": recipe.target.path,
        "revision": recipe.target.revision if target in (None, recipe.target.path) else None,
        "thinking": recipe.data.thinking,
        "system_prompt": recipe.data.system_prompt,
        "tasks": ",".join(section.tasks),
        "temperature": list(section.temperature),
        "max_new_tokens": section.max_new_tokens,
        "batch_size": section.batch_size,
        "seed": section.seed,
    }


def main() -> int:
    """Run, write, print the table."""
    if sys.argv[1:2] == ["compare"]:
        sys.argv[:2] = [f"{sys.argv[0]} compare"]
        return compare()
    return _run(parse())


def study() -> int:
    """The study alone: ``deepspec study``."""
    return _run(parse_study())


def compare(arguments: Sequence[str] | None = None) -> int:
    """Finished runs side by side; ``arguments``: instead of those of the command line.

    Differences are against the first run, over the prompts that both decoded, with a paired bootstrap: the same prompts
    are drawn for both, so what is hard for every draft does not widen the interval.
    """
    example, following = "drafts/a/evaluation drafts/b/evaluation", "deepspec export DRAFT served/NAME --format FORMAT"
    parser = Parser(
        prog=program("deepspec.evaluate compare"), description=compare.__doc__, example=example, following=following
    )
    parser.add_argument("runs", nargs="+", type=Path, help="results folders; differences are against the first")
    given = parser.parse_args(arguments)
    if len(given.runs) < 2:
        raise EvaluationError("nothing to compare", found=str(given.runs[0]), wanted="two results folders or more")

    from deepspec.evaluate.compare import Run, comparison

    print(comparison([Run.load(folder) for folder in given.runs]))
    return 0


def calibrate() -> None:
    """Confidence against what happened: reliability, ECE, AUC, Brier; Sequential Temperature Scaling fitted and saved.

    Reads the rounds of finished evaluations that verified everything (the same prompts with other seeds, for instance),
    fits one temperature a position on the prompts of even index, prints ECE before and after on both halves, and saves
    ``sts.json`` into the draft folder, from where later evaluations take it. A fit that makes ECE worse on the prompts
    of odd index is reported and not saved.
    """
    example = "--draft drafts/dspark_qwen3_4b --results drafts/dspark_qwen3_4b/evaluation --temperature 1"
    following = "deepspec evaluate --target TARGET --draft {draft} --confidence-threshold 0.5"
    name, text = program("deepspec.evaluate.calibration"), calibrate.__doc__
    parser = Parser(prog=name, description=text, example=example, following=following)
    parser.add_argument("--draft", required=True, type=Path, help="draft folder; sts.json is written there")
    parser.add_argument("--results", required=True, type=Path, nargs="+", help="folders of evaluations of that draft")
    parser.add_argument("--temperature", type=TEMPERATURE, default=1.0, help="sampling temperature of the rounds used")
    parser.add_argument("--report", type=Path, help="write all figures into this JSON file too")
    given = parser.parse_args()

    from deepspec.evaluate import calibration
    from deepspec.files import write_json

    result = calibration.calibrate(given.draft, given.results, given.temperature)
    print(calibration.markdown(result))
    if given.report is not None:
        write_json(given.report, result)
    file = given.draft / calibration.STS_FILE
    if result["saved"]:
        made(file)
    elif file.exists():
        log.info("%s: the earlier fit stays in use; remove it to decode without one", file)


def _run(given: argparse.Namespace) -> int:
    from deepspec.evaluate.results import trained_to_think
    from deepspec.export.hub import fetch_draft

    given.tasks = tuple(name for name in given.tasks.split(",") if name)
    if given.draft is None:
        return _serve(given)
    if not given.output and not Path(given.draft).is_dir():  # of the hub: results do not go into its download
        given.output = given.draft.strip("/").replace("/", "--") + "-evaluation"
    given.draft = str(fetch_draft(given.draft))
    folder = "served" if given.server or given.serve else "study" if given.study else "evaluation"
    given.output = given.output or str(Path(given.draft) / folder)
    made(given.output)
    if given.thinking is None:
        given.thinking = trained_to_think(Path(given.draft))
        if given.thinking:
            log.info("thinking: on, as the draft was trained (--no-thinking turns it off)")
    if given.serve:
        return _start_and_serve(given)
    if given.server:
        return _serve(given)
    return _study(given) if given.study else _evaluate(given)


def _start_and_serve(given: argparse.Namespace) -> int:
    from deepspec.serving.base import Serving
    from deepspec.serving.started import ServedPair

    how = Serving(max(given.concurrency or (1,)), given.dtype, given.context)
    pair = ServedPair(given.serve, given.target, Path(given.draft), Path(given.output) / "servers", how)
    with pair.start() as (given.server, given.baseline_server):
        given.started = f"{given.serve}, {given.dtype}, context {given.context or 'of the target'}"
        return _serve(given)


def _serve(given: argparse.Namespace) -> int:
    from deepspec.distributed import world_from_environment
    from deepspec.evaluate.report import write_report
    from deepspec.evaluate.server import ServerEvaluation, ServerEvaluationOptions, load_table

    if (size := world_from_environment().size) > 1:
        raise EvaluationError("one process asks a server", found=f"{size} processes", remedy="start without torchrun")
    more = {
        "draft": given.draft or "",
        "thinking": bool(given.thinking),
        "temperatures": tuple(given.temperature),
        "concurrency": tuple(given.concurrency or (1,)),
    }
    results = ServerEvaluation(ServerEvaluationOptions(**_fields(ServerEvaluationOptions, vars(given) | more))).run()
    for concurrency, one in results.items():
        folder = Path(given.output) / f"concurrency-{concurrency}"
        write_report(one.to_row(), folder)
    print(load_table(results))
    return 0


def _evaluate(given: argparse.Namespace) -> int:
    from deepspec.decoding.tree import parse_tree
    from deepspec.distributed import pick_device, world_from_environment
    from deepspec.evaluate.report import markdown, write_report
    from deepspec.evaluate.run import Evaluation, Options

    world = world_from_environment()
    more = {
        "temperatures": tuple(given.temperature),
        "tree": parse_tree(given.tree),
        "baseline": not given.no_plain,
        "capture": not given.no_capture,
        "device": str(pick_device(world.local_rank)),
    }
    results = Evaluation(Options(**_fields(Options, vars(given) | more)), world).run()
    if results is not None:
        rows = write_report(results.to_row(), Path(given.output))
        print(markdown(results.to_row()))
        if given.show:
            from deepspec.evaluate.transcript import show

            print(f"\n{show(rows, given.show, in_colour())}\n")
    return 0


def _study(given: argparse.Namespace) -> int:
    if given.tree:
        raise EvaluationError(
            "the study compares policies of chains", key="--tree", remedy="leave --tree or --study out"
        )
    if len(given.temperature) > 1:
        raise EvaluationError(
            "the study decodes at one temperature", key="--temperature", found=given.temperature, remedy="name one"
        )
    from deepspec.distributed import pick_device
    from deepspec.evaluate.study import StudyOptions, markdown, run_study

    more = {
        "temperature": given.temperature[0],
        "concurrency": tuple(given.concurrency or (1, 4, 16, 64)),
        "threshold": given.confidence_threshold or StudyOptions.threshold,
        "device": str(pick_device()),
    }
    print(markdown(run_study(StudyOptions(**_fields(StudyOptions, vars(given) | more)))))
    return 0


def _fields(options: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Those of the command line's values that a class of options has."""
    names = {one.name for one in fields(options)}
    return {name: value for name, value in values.items() if name in names}


if __name__ == "__main__":
    run_main(main)
