"""Answers to prompts by the target itself: ``python tools/regenerate.py --help``."""

from deepspec.cli.data import regenerate
from deepspec.errors import run_main

if __name__ == "__main__":
    run_main(regenerate)
