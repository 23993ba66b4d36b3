"""The whole pipeline on a tiny target: ``python tools/quickstart.py --help``."""

from deepspec.cli.demos import quickstart
from deepspec.errors import run_main

if __name__ == "__main__":
    run_main(quickstart)
