"""Compare with a folder of reference cases; one row per case, exit code 1 past the tolerances.

python tools/check_reference.py        # the cases of this checkout
python tools/check_reference.py DIR    # others of the same form
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deepspec.arguments import Parser
from deepspec.errors import run_main

ROOT = Path(__file__).resolve().parents[1]
OWN = ROOT / "tests" / "reference"
ABOUT = """these are our own cases, made by tests/helpers/make_reference.py from plain code: they show what changes;
whether they are those of a published implementation is shown by cases of one, given as DIR"""
sys.path.append(str(ROOT / "tests" / "helpers"))


def main() -> int:
    """Parse arguments, check, print."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", nargs="?", type=Path, default=OWN, help="folder of reference cases")
    given = parser.parse_args()

    from reference_cases import check_folder, table

    results = list(check_folder(given.folder))
    print(table(results))
    if given.folder == OWN:
        print(f"\n{ABOUT}")
    return 0 if all(result.holds for result in results) else 1


if __name__ == "__main__":
    run_main(main)
