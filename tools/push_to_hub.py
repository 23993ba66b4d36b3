"""Upload an exported draft: ``python tools/push_to_hub.py FOLDER OWNER/NAME [--public] [--update]``.

FOLDER is what ``tools/export.py`` wrote, model card included. New repositories are private unless --public is given.
"""

from __future__ import annotations

import argparse

from deepspec.arguments import Parser
from deepspec.errors import run_main


def main() -> int:
    """Parse the arguments and upload."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="an exported draft")
    parser.add_argument("repository", help="owner/name on the hub")
    parser.add_argument("--public", action="store_true", help="a new repository is open to all")
    parser.add_argument("--update", action="store_true", help="replace the files of a repository that holds a model")
    given = parser.parse_args()

    from deepspec.export.hub import push_draft

    print(push_draft(given.folder, given.repository, not given.public, given.update))
    return 0


if __name__ == "__main__":
    run_main(main)
