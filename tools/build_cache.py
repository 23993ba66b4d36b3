"""Build a target cache from conversations, alone or under mpirun, deepspeed or torchrun; killed and started again it
continues, with any number of processes.

    python tools/build_cache.py --recipe recipes/dspark_qwen3_4b.yaml --data qwen3_4b.jsonl --output caches/qwen3_4b
    mpirun -n 8 python tools/build_cache.py ...
"""

from __future__ import annotations

import argparse
import logging

from deepspec.arguments import Parser
from deepspec.cache.build import BuildStopped, build_cache
from deepspec.data.refusals import refusal_lines
from deepspec.distributed import process_group, world_from_environment
from deepspec.errors import CacheError, DataError, run_main
from deepspec.recipe import load_recipe

log = logging.getLogger("deepspec.tools.build_cache")


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
            log.info("build: %s", problem)
            return 143
    coded, raw, rejected = manifest.coded_bytes, manifest.raw_bytes, manifest.rejected
    size = f"{manifest.samples:,} samples, {manifest.tokens:,} tokens, {coded / 1e9:.3f} GB ({coded / raw:.3f} of raw)"
    log.info("%s: %s, %d rejected", options.output, size, sum(rejected.values()))
    for line in refusal_lines(rejected):
        log.info("  %s", line)
    return 0


if __name__ == "__main__":
    run_main(main)
