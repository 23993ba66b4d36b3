"""Serve a target's hidden states to trainings: ``python tools/serve_features.py --help``."""

from deepspec.cli.features import serve_features
from deepspec.errors import run_main

if __name__ == "__main__":
    run_main(serve_features)
