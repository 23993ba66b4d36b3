"""What each choice of a draft costs or brings: ``python tools/ablate.py --help``."""

from deepspec.cli.demos import ablate
from deepspec.errors import run_main

if __name__ == "__main__":
    run_main(ablate)
