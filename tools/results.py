"""The page of results from what was measured: ``python tools/results.py --help``."""

from deepspec.cli.demos import results
from deepspec.errors import run_main

if __name__ == "__main__":
    run_main(results)
