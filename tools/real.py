"""Three drafts for a small released model: ``python tools/real.py --help``."""

from deepspec.cli.demos import real
from deepspec.errors import run_main

if __name__ == "__main__":
    run_main(real)
