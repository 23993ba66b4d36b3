"""Upload an exported draft: ``python tools/push_to_hub.py --help``."""

from deepspec.cli.export import push
from deepspec.errors import run_main

if __name__ == "__main__":
    run_main(push)
