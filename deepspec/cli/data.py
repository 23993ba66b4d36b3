"""Commands on conversations: prepare prompts, regenerate answers, inspect what is supervised."""

from __future__ import annotations

import os
from collections import deque
from itertools import islice
from pathlib import Path

from deepspec.arguments import (
    COUNT,
    COUNT_OR_NONE,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    SHARE_BELOW_ONE,
    TOGETHER,
    Parser,
)
from deepspec.cli import recipe_words
from deepspec.errors import DataError, nearest
from deepspec.files import refuse_same
from deepspec.log import in_colour, say
from deepspec.recipe import DataSection, load_recipe

DEFAULT = "mlabonne/open-perfectblend"


def prepare() -> None:
    """Prompts to train on, from hub datasets or files.

    Writes train.jsonl, held_out.jsonl and report.json; duplicates and evaluation prompts (--exclude) are dropped.
    """
    following = "deepspec regenerate --recipe {recipe} --prompts {output}/train.jsonl --output answers.jsonl"
    example = "--recipe dspark_qwen3_4b --exclude gsm8k --output data/prompts"
    parser = Parser(description=prepare.__doc__, example=example, following=following)
    recipe_words(parser, text="states data.prompts and data.held_out; other words win over it")
    parser.add_argument("--source", action="append", metavar="NAME[=WEIGHT]",
                        help=f"hub id or file (default: the recipe's, or {DEFAULT})")  # fmt: skip
    parser.add_argument("--split", default="train", help="of hub datasets")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--held-out", type=SHARE_BELOW_ONE,
                        help="share kept from training (default: the recipe's, or 0.05)")  # fmt: skip
    parser.add_argument("--exclude", action="append", default=[], metavar="NAME",
                        help="evaluation prompts: a JSONL, a Parquet, or a task such as gsm8k")  # fmt: skip
    parser.add_argument("--limit", type=COUNT, help="stop after this many conversations")
    parser.add_argument("--seed", type=SEED, default=0, help="of the mixing")
    given = parser.parse_args()
    if given.set and not given.recipe:
        raise DataError("no recipe to change", key="--set", found=given.set, wanted="--recipe")
    data = load_recipe(given.recipe, given.set).data if given.recipe else DataSection(prompts=DEFAULT)
    if not given.source and data.prompts is None:
        raise DataError("the recipe names no prompts", file=given.recipe, key="data.prompts", remedy="or give --source")
    pairs = [_weighted(text) for text in given.source] if given.source else [(str(data.prompts), 1.0)]
    if len(dict(pairs)) < len(pairs):
        remedy = "give it once, with the weight that you want"
        raise DataError("the same source twice", key="--source", found=given.source, remedy=remedy)

    from deepspec.data.prepare import PrepareOptions
    from deepspec.data.prepare import prepare as run

    held_out = data.held_out if given.held_out is None else given.held_out
    files, tasks = _excluded(given.exclude)
    options = PrepareOptions(dict(pairs), held_out, files, given.limit, given.split, given.seed, tasks)
    say("\n".join(run(options, given.output).lines()))


def _excluded(names: list[str]) -> tuple[tuple[str, ...], dict[str, list[str]]]:
    """The files among ``names``, and the prompts of those that are evaluation tasks and no file."""
    files = tuple(name for name in names if Path(name).exists() or Path(name).name != name or Path(name).suffix)
    if len(files) == len(names):
        return files, {}

    from deepspec.evaluate.tasks import bare_prompts, registered_tasks

    tasks = [name for name in names if name not in files]
    for name in tasks:
        if name not in registered_tasks():
            remedy = f"name a file, or a task: {nearest(name, registered_tasks())}"
            raise DataError("no such file or task", key="--exclude", found=name, remedy=remedy)
    return files, {name: bare_prompts(name) for name in tasks}


def _weighted(text: str) -> tuple[str, float]:
    """``NAME`` or ``NAME=WEIGHT``."""
    name, sign, weight = text.rpartition("=")
    try:
        value = float(weight) if sign else 1.0
    except ValueError:
        value = 0.0
    if not POSITIVE.fits(value):
        raise DataError("not a source", key="--source", found=text, wanted="NAME or NAME=WEIGHT with a weight above 0")
    return (name, value) if sign else (text, value)


def regenerate() -> None:
    """The target's own answers to prompts, from servers or in this process; started again, it continues."""
    example = "--recipe dspark_qwen3_4b --prompts data/prompts/train.jsonl --output qwen3_4b.jsonl"
    example, following = f"{example} --server http://localhost:8000", "deepspec inspect {output} --recipe {recipe}"
    parser = Parser(description=regenerate.__doc__, example=example, following=following)
    recipe_words(parser, text="states target, sampling, thinking, system prompt and seed")
    parser.add_argument("--target", help="model folder or hub id (default: the recipe's)")
    parser.add_argument("--prompts", required=True, help="conversations (JSONL) whose user turns are answered")
    parser.add_argument("--output", required=True, help="conversations (JSONL) with the target's answers")
    parser.add_argument("--max-failed", type=SHARE, default=0.02, help="share of conversations that may fail for good")
    parser.add_argument("--engine", choices=["server", "local"],
                        help="who answers (default: server where --server is given, else this process)")  # fmt: skip
    servers = parser.add_argument_group("OpenAI-compatible servers (--engine server)")
    servers.add_argument("--server", action="append", default=[], metavar="URL",
                         help="http://host:port; may be repeated")  # fmt: skip
    servers.add_argument("--model", help="the model's name in requests (default: the target)")
    servers.add_argument("--concurrency", type=TOGETHER, default=64, help="requests in flight on each server")
    servers.add_argument("--timeout", type=POSITIVE, default=900.0, help="seconds for one answer")
    servers.add_argument("--attempts", type=COUNT, default=6, help="of one request")
    servers.add_argument("--patience", type=NOT_NEGATIVE, default=300.0,
                         help="seconds without a server before giving up")  # fmt: skip
    given = parser.parse_args()
    if not given.recipe and (given.set or not given.target):
        raise DataError("nothing states who answers and how", wanted="--recipe, or --target for the built-in sampling")

    from deepspec.data.dialogue import AnswerEngine
    from deepspec.data.regenerate import RegenerationPlan
    from deepspec.data.regenerate import regenerate as run
    from deepspec.data.server import ServerOptions

    plan = RegenerationPlan(given.target)
    if given.recipe:
        plan = RegenerationPlan.of_recipe(load_recipe(given.recipe, given.set), given.target)
    kind = given.engine or ("server" if given.server else "local")
    if kind == "server":
        key = os.environ.get("OPENAI_API_KEY")
        limits = (given.concurrency, given.timeout, given.attempts, given.patience, key)
        options = ServerOptions(tuple(given.server), given.model or plan.target, *limits)
        engine: AnswerEngine = plan.server_engine(options)
    else:
        engine = plan.local_engine()
    settings = plan.settings(served=kind == "server") | {"engine": kind}
    summary = run(given.prompts, given.output, engine, settings, given.max_failed)
    say(f"{given.output}: {summary.rows} conversations, {summary.failed} failed, {dict(summary.finish_reasons)}")


def inspect() -> None:
    """What a target is trained on, supervised tokens in green."""
    following = "deepspec estimate --recipe {recipe} --data {data}"
    example = "qwen3_4b.jsonl --recipe dspark_qwen3_4b --show 5"
    parser = Parser(description=inspect.__doc__, example=example, following=following)
    parser.add_argument("data", help="conversations (JSONL)")
    parser.add_argument("--recipe", help="states target, thinking, system prompt, max_length and min_supervised")
    parser.add_argument("--target", help="model folder or hub id (default: the recipe's)")
    parser.add_argument("--show", type=COUNT_OR_NONE, default=3, help="samples to print")
    parser.add_argument("--limit", type=COUNT, help="conversations to read")
    parser.add_argument("--html", metavar="FILE", help="write the samples as a page")
    parser.add_argument("--histogram", metavar="FILE", help="write a histogram of the lengths")
    given = parser.parse_args()
    for written in filter(None, (given.html, given.histogram)):
        refuse_same(written, [given.data], DataError)
    recipe = load_recipe(given.recipe) if given.recipe else None
    path = given.target or (recipe.target.path if recipe else None)
    if path is None:
        raise DataError("no target named", wanted="--recipe or --target")

    from deepspec.data.chat import Renderer
    from deepspec.data.conversations import checked_lines, read_conversations
    from deepspec.data.inspect import inspect as run
    from deepspec.targets.load import load_spec, load_tokenizer

    data = recipe.data if recipe else DataSection()
    revision = recipe.target.revision if recipe and path == recipe.target.path else None
    spec = load_spec(path, revision)
    renderer = Renderer(load_tokenizer(path, revision), spec, data.system_prompt, data.thinking, data.max_length)
    deque(checked_lines(Path(given.data)), maxlen=0)  # with a limit the rows do not reach the file's end
    rows = islice(read_conversations(given.data), given.limit)
    print(run(renderer, rows, data.min_supervised, given.show, given.html, given.histogram, in_colour()))
