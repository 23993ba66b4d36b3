"""Train a draft: ``python launch/train.py --help``."""

from deepspec.cli.train import train
from deepspec.errors import run_main

if __name__ == "__main__":
    run_main(train)
