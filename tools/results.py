"""docs/results.md, docs/results.json and the README's table from what was measured: ``make results``."""

from __future__ import annotations

import argparse

from deepspec.arguments import Parser
from deepspec.errors import run_main


def main() -> None:
    """Parse the arguments and write the page."""
    Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

    from deepspec.demos.smollm2.results import MEASURED, PAGE, README, write_results

    write_results()
    print(f"{PAGE}, {MEASURED}, {README}")


if __name__ == "__main__":
    run_main(main)
