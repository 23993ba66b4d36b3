"""The drafts of the real run fine-tuned on a domain: ``python tools/finetune.py --help``."""

from deepspec.cli.demos import finetune
from deepspec.errors import run_main

if __name__ == "__main__":
    run_main(finetune)
