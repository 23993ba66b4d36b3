"""What a target is trained on: ``python tools/inspect_data.py --help``."""

from deepspec.cli.data import inspect
from deepspec.errors import run_main

if __name__ == "__main__":
    run_main(inspect)
