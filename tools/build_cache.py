"""A target cache from conversations: ``python tools/build_cache.py --help``."""

from deepspec.cli.cache import build
from deepspec.errors import run_main

if __name__ == "__main__":
    run_main(build)
