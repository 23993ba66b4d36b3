"""The whole pipeline on a tiny target of its own, from prompts to the table: ``make quickstart``.

Run it in the checkout's root; what it makes stands under build/quickstart. Run again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse

from deepspec.arguments import Parser
from deepspec.errors import run_main


def main() -> None:
    """Parse the arguments and run the pipeline."""
    Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

    from deepspec.demos.quickstart.pipeline import quickstart

    quickstart()


if __name__ == "__main__":
    run_main(main)
