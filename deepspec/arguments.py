"""Numbers on command lines and in settings: their allowed ranges, and a parser that reports an error in one line.

A range is written once and used twice: as the ``type=`` of an argument, and to check a setting that came from code.
"""

from __future__ import annotations

import argparse
import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from deepspec.errors import DeepSpecError
from deepspec.log import LEVELS, start_logging
from deepspec.progress import opening


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may take; called with text, it reads one.

    Args:
        kind: int or float.
        holds: whether a finite number lies inside.
        wanted: the same in words.
    """

    kind: type[int] | type[float]
    holds: Callable[[float], bool]
    wanted: str

    def __call__(self, text: str) -> int | float:
        """Read an argument; argparse names the flag.

        Raises:
            argparse.ArgumentTypeError: not a number, or outside.
        """
        try:
            value = self.kind(text) + 0  # -0.0 is 0.0
        except ValueError:
            value = math.nan
        if not self.fits(value):
            raise argparse.ArgumentTypeError(f"found {text!r}; wanted {self.wanted}")
        return value

    def fits(self, value: float) -> bool:
        """Whether ``value`` is a finite number inside; never for NaN and infinities."""
        return abs(value) < math.inf and self.holds(value)

    def check(self, key: str, value: float | None, error: type[DeepSpecError]) -> None:
        """Refuse a setting outside; None is a setting that was not given.

        Raises:
            DeepSpecError: of type ``error``, naming key and value.
        """
        if value is not None and not self.fits(value):
            raise error("out of range", key=key, found=value, wanted=self.wanted)

    def check_each(self, key: str, values: Sequence[float], error: type[DeepSpecError]) -> None:
        """Refuse values outside, an empty list, and a value that is named twice: its rows would be counted twice.

        Raises:
            DeepSpecError: of type ``error``.
        """
        for value in values:
            self.check(key, value, error)
        if not values or len(set(values)) < len(values):
            problem = "named twice" if values else "nothing named"
            raise error(problem, key=key, found=list(values), wanted="each value once")


def check_fields(settings: object, ranges: Mapping[str, Range], error: type[DeepSpecError]) -> None:
    """Refuse settings with an attribute outside its range; see :meth:`Range.check`.

    Raises:
        DeepSpecError: of type ``error``.
    """
    for key, allowed in ranges.items():
        allowed.check(key, getattr(settings, key), error)


MOST = 2**31 - 1  # of anything counted
COUNT = Range(int, lambda value: 1 <= value <= MOST, "an integer, 1 or more")
COUNT_OR_NONE = Range(int, lambda value: 0 <= value <= MOST, "an integer, 0 or more")
RANK = Range(int, lambda value: -1 <= value <= MOST, "an integer, -1 or more")  # -1: of no launcher
TOGETHER = Range(int, lambda value: 1 <= value <= 4096, "an integer from 1 to 4096")  # requests at a time
SEED = Range(int, lambda value: 0 <= value < 2**63, "an integer from 0 to 2^63 - 1")
SHARE = Range(float, lambda value: 0 <= value <= 1, "a share from 0 to 1")
SHARE_BELOW_ONE = Range(float, lambda value: 0 <= value < 1, "a share, 0 to below 1")
# Within these, products and quotients of two stay finite.
POSITIVE = Range(float, lambda value: 1e-9 <= value <= 1e15, "a number above 0 (1e-9 to 1e15)")
NOT_NEGATIVE = Range(float, lambda value: 0 <= value <= 1e15, "a number, 0 or more (to 1e15)")
# Below .01 the division makes every logit an infinity in some dtype; above 100 all tokens are alike.
TEMPERATURE = Range(float, lambda value: value == 0 or 0.01 <= value <= 100, "0 (greedy), or 0.01 to 100")


def program(module: str) -> str:
    """What a message calls a command that is a verb and a module: as it was started."""
    return sys.argv[0] if sys.argv[0].startswith("deepspec ") else f"python -m {module}"


class _Help(argparse.RawDescriptionHelpFormatter):
    """Descriptions keep their lines; a default stands behind the help of its option."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if not has_default(action) or "(default" in text:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
        return f"{text} (default: {shown.replace('%', '%%')})"


def has_default(action: argparse.Action) -> bool:
    """Whether an option that is left out has a value worth naming: neither nothing nor a switch that is off."""
    empty = action.default is None or action.default is False or action.default in ("", [], (), argparse.SUPPRESS)
    return not empty and bool(action.option_strings or action.nargs in ("?", "*"))


class _Parsed(Exception):
    """A parser that is complete; see :func:`parser_of`."""

    def __init__(self, parser: Parser) -> None:
        self.parser = parser


_only_parser: ContextVar[bool] = ContextVar("only_parser", default=False)


def parser_of(command: Callable[[], object], program: str) -> Parser:
    """The parser of a command, whose first act is to parse; nothing else of it is run.

    Args:
        command: without arguments, as :func:`deepspec.errors.run_main` takes it.
        program: what its help calls it.
    """
    words, token = sys.argv, _only_parser.set(True)
    sys.argv = [program]
    try:
        command()
    except _Parsed as found:
        return found.parser
    finally:
        sys.argv = words
        _only_parser.reset(token)
    raise TypeError(f"{program} does not parse a command line")


class Parser(argparse.ArgumentParser):
    """An argparse parser of a command: it starts logging, and refuses in one line as every other error is.

    Args:
        description: shown as it is written, without its indentation.
        example: the words of a typical call, which ``--help`` shows behind the program's name.
        following: the command that usually comes next, with ``{options}`` of this one.
        piped: its output is data: where stdout is no terminal, nothing else is printed.
        kwargs: of argparse.
    """

    def __init__(
        self, *, description: str | None = None, example: str | None = None, following: str = "", piped: bool = False,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        text = None if description is None else inspect.cleandoc(description)
        self.example, self.following, self.piped = example, following, piped
        shown = None if example is None else f"example:\n  %(prog)s {example}".rstrip()
        if sys.argv[0].endswith(".py"):
            kwargs.setdefault("prog", f"python {sys.argv[0]}")
        super().__init__(description=text, **{"formatter_class": _Help, "epilog": shown} | kwargs)
        reports = self.add_argument_group("reports")
        reports.add_argument("--quiet", action="store_true", default=argparse.SUPPRESS, help="only warnings and errors")
        reports.add_argument(
            "--log-level", choices=LEVELS, default=argparse.SUPPRESS, help="the least that is reported (default: info)"
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, start logging as the command line asks, and say what the command is about to do."""
        if _only_parser.get():
            raise _Parsed(self)
        given = vars(super().parse_args(args, namespace))
        start_logging(given.pop("log_level", "info"), given.pop("quiet", False))
        if not self.piped or sys.stdout.isatty():
            what = re.split(r"(?<=[.])\s", self.description or "starts")[0].replace("\n", " ")
            opening(self.prog, what, given, self._telling(given), self.following)
        return argparse.Namespace(**given)

    def _telling(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options that say what a command works on: names and paths, and of the others what is not the default."""
        found = {}
        for action in self._actions:
            value = given.get(action.dest)
            texts = value if isinstance(value, list | tuple) else [value]
            named = action.choices is None and all(isinstance(one, str | Path) for one in texts)
            if action.help != argparse.SUPPRESS and (named or value != self.get_default(action.dest)):
                found[action.dest] = value
        return found

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            DeepSpecError: always; :func:`deepspec.errors.run_main` prints it.
        """
        raise DeepSpecError(message, remedy=f"see {self.prog} --help")
