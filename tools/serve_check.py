"""Drafts in a real engine, compared with our decoding: ``python tools/serve_check.py --help``."""

from deepspec.cli.demos import serve_check
from deepspec.errors import run_main

if __name__ == "__main__":
    run_main(serve_check)
