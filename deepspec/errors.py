"""The errors a user can cause, as one small tree.

Every error names what a user needs to mend it: the file, the key or sample, the value found, the value wanted and the
remedy. Entry points print the one line and exit with code 1; a traceback means a defect of deepspec itself.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path


class DeepSpecError(Exception):
    """Base class: bad input, named.

    Args:
        problem: what is wrong, in one sentence without a final full stop.
        file: the file or folder at fault.
        key: the recipe key, sample id, array or tensor at fault.
        found: the value found.
        wanted: the value wanted.
        remedy: what to do about it.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: str | Path | None = None,
        key: object | None = None,
        found: object | None = None,
        wanted: object | None = None,
        remedy: str | None = None,
    ) -> None:
        self.problem, self.file, self.key = problem, file, key
        self.found, self.wanted, self.remedy = found, wanted, remedy
        where = ": ".join(str(part) for part in (file, key) if part is not None)
        text = f"{where}: {problem}" if where else problem
        if found is not None:
            text += f"; found {found!r}"
        if wanted is not None:
            text += f"; wanted {wanted}"
        if remedy is not None:
            text += f"; {remedy}"
        super().__init__(text)


class RecipeError(DeepSpecError):
    """A recipe that cannot be read, or whose values contradict each other or the target."""


class DataError(DeepSpecError):
    """Conversations, prompts or chat templates that cannot be used."""


class TargetError(DeepSpecError):
    """A target model that cannot be loaded or is of an unknown family."""


class CacheError(DeepSpecError):
    """A target cache that is missing, broken, or of another target than the recipe's."""


class CheckpointError(DeepSpecError):
    """A training checkpoint that is missing, incomplete, or of another run."""


class DraftError(DeepSpecError):
    """A draft folder that cannot be loaded or does not fit its target."""


class EvaluationError(DeepSpecError):
    """A benchmark task or an evaluation result that cannot be used."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The remedy for a misspelt name: ``did you mean 'lr'? known: ...``."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names)}"


def run_main(main: Callable[[], int | None]) -> None:
    """Run an entry point; a :class:`DeepSpecError` becomes one line on stderr and exit code 1."""
    try:
        code = main()
    except DeepSpecError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    sys.exit(code or 0)
