"""Answers to prompts by the target itself: ``tools/regenerate.py --recipe R --prompts P.jsonl --output O.jsonl``."""

import os

from deepspec.arguments import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, Parser
from deepspec.data.dialogue import AnswerEngine
from deepspec.data.regenerate import RegenerationPlan, regenerate
from deepspec.data.server import ServerOptions
from deepspec.errors import DataError, run_main
from deepspec.recipe import load_recipe


def main() -> int:
    """Parse the command line and regenerate."""
    parser = Parser(description=__doc__)
    parser.add_argument("--recipe", help="states target, sampling, thinking, system prompt and seed")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--target", help="model folder or hub id (default: the recipe's)")
    parser.add_argument("--prompts", required=True, help="conversations (JSONL) whose user turns are answered")
    parser.add_argument("--output", required=True, help="conversations (JSONL) with the target's answers")
    parser.add_argument("--max-failed", type=SHARE, default=0.02, help="share of conversations that may fail for good")
    parser.add_argument("--engine", choices=["server", "local"], help="default: server where --server is given")
    servers = parser.add_argument_group("servers (--engine server): vLLM, SGLang, transformers serve")
    servers.add_argument(
        "--server", action="append", default=[], metavar="URL", help="http://host:port; may be repeated"
    )
    servers.add_argument("--model", help="the model's name in requests (default: the target)")
    servers.add_argument("--concurrency", type=COUNT, default=64, help="requests in flight on each server")
    servers.add_argument("--timeout", type=POSITIVE, default=900.0, help="seconds for one answer")
    servers.add_argument("--attempts", type=COUNT, default=6, help="of one request")
    servers.add_argument(
        "--patience", type=NOT_NEGATIVE, default=300.0, help="seconds without a server before giving up"
    )
    args = parser.parse_args()
    if not args.recipe and (args.set or not args.target):
        raise DataError("nothing says who answers and how", wanted="--recipe, or --target for the built-in sampling")
    plan = RegenerationPlan(args.target)
    if args.recipe:
        plan = RegenerationPlan.of_recipe(load_recipe(args.recipe, args.set), args.target)
    kind = args.engine or ("server" if args.server else "local")
    if kind == "server":
        key = os.environ.get("OPENAI_API_KEY")
        limits = (args.concurrency, args.timeout, args.attempts, args.patience, key)
        engine: AnswerEngine = plan.server_engine(ServerOptions(tuple(args.server), args.model or plan.target, *limits))
    else:
        engine = plan.local_engine()
    settings = plan.settings(served=kind == "server") | {"engine": kind}
    summary = regenerate(args.prompts, args.output, engine, settings, args.max_failed)
    print(f"{args.output}: {summary.rows} conversations, {summary.failed} failed, {dict(summary.finish_reasons)}")
    return 0


if __name__ == "__main__":
    run_main(main)
