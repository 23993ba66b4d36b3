"""Build a target cache from conversations, alone or under mpirun, deepspeed or torchrun; killed and started again it
continues, with any number of processes.

    python tools/build_cache.py --recipe recipes/dspark_qwen3_4b.yaml --data qwen3_4b.jsonl --output caches/qwen3_4b
    mpirun -n 8 python tools/build_cache.py ...
"""

from __future__ import annotations

import argparse

from deepspec.arguments import Parser
from deepspec.cache.build import BuildStopped, build_cache
from deepspec.data.refusals import refusal_lines
from deepspec.distributed import process_group, world_from_environment
from deepspec.errors import CacheError, DataError, run_main
from deepspec.recipe import load_recipe


def main() -> int:
    """Parse the command line and build."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="recipe file")
    parser.add_argument("--data", help="conversations (JSONL); default: the recipe's data.conversations")
    parser.add_argument("--output", required=True, help="folder or URL of the cache")
    parser.add_argument("--append", action="store_true", help="add the conversations to the cache that is there")
    parser.add_argument("--server", help="URL of a server of the target that hands out hidden states (docs/serving.md)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    options = parser.parse_args()
    recipe = load_recipe(options.recipe, options.set)
    data = options.data or recipe.data.conversations
    if data is None:
        raise DataError("no conversations named", key="data.conversations", remedy="give --data")
    with process_group(world_from_environment(), error=CacheError) as world:
        try:
            manifest = build_cache(recipe, data, options.output, world, options.append, options.server)
        except BuildStopped as problem:
            print(f"build: {problem}", flush=True)
            return 143
        if world.is_main:
            rejected = sum(manifest.rejected.values())
            print(
                f"{options.output}: {manifest.samples:,} samples, {manifest.tokens:,} tokens, "
                f"{manifest.coded_bytes / 1e9:.3f} GB ({manifest.coded_bytes / manifest.raw_bytes:.3f} of raw), "
                f"{rejected} rejected" + "".join(f"\n  {line}" for line in refusal_lines(manifest.rejected))
            )
    return 0


if __name__ == "__main__":
    run_main(main)
