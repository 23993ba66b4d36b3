"""What each choice of a draft costs or brings, on the quickstart's target: ``make ablate``, after ``make quickstart``.

Run it in the checkout's root; what it makes stands under build/ablations. Run again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os

from deepspec.arguments import COUNT, Parser
from deepspec.errors import run_main


def main() -> None:
    """Parse the arguments and run what is not whole yet."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=COUNT, default=os.cpu_count() or 1, help="variants at a time, one process each")
    given = parser.parse_args()

    from deepspec.demos.smollm2.pipeline import ablate

    ablate(given.cores)


if __name__ == "__main__":
    run_main(main)
