"""How every benchmark starts: what it measures, its bars, about how long it takes, and where its inputs come from."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

from deepspec.arguments import Parser
from deepspec.distributed import world_from_environment
from deepspec.errors import DataError
from deepspec.progress import byte_size, bytes_in

QUICKSTART = Path("build/quickstart")  # in the working directory: what `make quickstart` left


class Benchmark(Parser):
    """The command line of a benchmark, which needs no words.

    Args:
        text: the module's docstring; its first sentence is shown when it starts.
        bars: what has to hold.
        takes: about how long on two cores.
    """

    def __init__(self, text: str, *, bars: str, takes: str) -> None:
        super().__init__(description=f"{inspect.cleandoc(text)}\n\nbars: {bars}\ntakes: {takes}", example="")
        self.facts = f"bars: {bars}\ntakes: {takes}"
        self.add_argument("--json", type=Path, metavar="FILE", help="write the bars here")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and say what is known before anything is measured."""
        given = super().parse_args(args, namespace)
        tell(self.facts)
        return given


def tell(text: str) -> None:
    """Lines on stderr of rank 0: stdout is for what was measured."""
    if world_from_environment().is_main:
        print(text, file=sys.stderr, flush=True)


def quickstart_inputs(**paths: str | Path) -> None:
    """Say where the inputs come from, by option.

    Raises:
        DataError: one is missing; where the quickstart makes it, the remedy is to run that.
    """
    for option, path in paths.items():
        own = Path(path).is_relative_to(QUICKSTART)
        if not Path(path).exists():
            remedy = "run `make quickstart` first (in this folder)" if own else "check the path"
            raise DataError("not there", file=path, key=f"--{option}", remedy=remedy)
        tell(f"{option}: {path} ({byte_size(bytes_in(path))}{', of the quickstart' * own})")
