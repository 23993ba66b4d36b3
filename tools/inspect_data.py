"""What a target is trained on, supervised tokens in green: ``tools/inspect_data.py --recipe R DATA.jsonl``."""

from itertools import islice

from deepspec.arguments import COUNT, COUNT_OR_NONE, Parser
from deepspec.data.chat import Renderer
from deepspec.data.conversations import read_conversations
from deepspec.data.inspect import inspect
from deepspec.errors import DataError, run_main
from deepspec.recipe import DataSection, load_recipe
from deepspec.targets.load import load_spec, load_tokenizer


def main() -> int:
    """Parse the arguments and show the data."""
    parser = Parser(description=__doc__)
    parser.add_argument("data", help="conversations (JSONL)")
    parser.add_argument("--recipe", help="states target, thinking, system prompt, max_length and min_supervised")
    parser.add_argument("--target", help="model folder or hub id (default: the recipe's)")
    parser.add_argument("--show", type=COUNT_OR_NONE, default=3, help="samples to print")
    parser.add_argument("--limit", type=COUNT, help="conversations to read")
    parser.add_argument("--html", metavar="FILE", help="write the samples as a page")
    parser.add_argument("--histogram", metavar="FILE", help="write a histogram of the lengths")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe) if args.recipe else None
    path = args.target or (recipe.target.path if recipe else None)
    if path is None:
        raise DataError("no target named", wanted="--recipe or --target")
    data = recipe.data if recipe else DataSection()
    revision = recipe.target.revision if recipe and path == recipe.target.path else None
    spec = load_spec(path, revision)
    renderer = Renderer(load_tokenizer(path, revision), spec, data.system_prompt, data.thinking, data.max_length)
    rows = islice(read_conversations(args.data), args.limit)
    print(inspect(renderer, rows, data.min_supervised, args.show, args.html, args.histogram))
    return 0


if __name__ == "__main__":
    run_main(main)
