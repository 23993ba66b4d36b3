"""Prompts to train on: ``python tools/prepare_data.py --help``."""

from deepspec.cli.data import prepare
from deepspec.errors import run_main

if __name__ == "__main__":
    run_main(prepare)
