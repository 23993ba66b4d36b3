"""Estimate, inspect, verify, import, export or recode a target cache: ``python tools/cache.py --help``."""

from deepspec.cli.cache import cache
from deepspec.errors import run_main

if __name__ == "__main__":
    run_main(cache)
