"""A draft in an engine's form, or somebody else's in ours: ``python tools/export.py --help``."""

from deepspec.cli.export import export
from deepspec.errors import run_main

if __name__ == "__main__":
    run_main(export)
