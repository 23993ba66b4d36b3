"""A draft folder from a training checkpoint: ``python tools/zero_to_fp32.py --help``."""

from deepspec.cli.train import consolidate
from deepspec.errors import run_main

if __name__ == "__main__":
    run_main(consolidate)
