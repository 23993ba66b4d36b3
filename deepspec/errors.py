"""The errors a user can cause, as one small tree.

Every error names what a user needs to fix it: the file, the key or sample, the value found, the value wanted and the
remedy. Entry points print the one line and exit with code 1; a traceback means a defect of deepspec itself.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import reprlib
import select
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

LONGEST_VALUE = 500  # characters of a value found: a message stays one line, whatever was in the file
LONGEST_PROBLEM = 4000
# What a terminal obeys instead of showing it, what reorders a line, and halves of pairs, which no terminal can be sent.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_LOGIN = re.compile(r"(\w://)[^\s/@]*@")


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
        where = ": ".join(_cut(str(part)) for part in (file, key) if part is not None)
        problem = _cut(problem, LONGEST_PROBLEM)
        text = f"{where}: {problem}" if where else problem
        if found is not None:
            text += f"; found {shown(found)}"
        if wanted is not None:
            text += f"; wanted {wanted}"
        if remedy is not None:
            text += f"; {remedy}"
        super().__init__(printable(without_logins(text)))


class RecipeError(DeepSpecError):
    """A recipe that cannot be read, or whose values contradict each other or the target."""


class DataError(DeepSpecError):
    """Conversations, prompts or chat templates that cannot be used."""


class TargetError(DeepSpecError):
    """A target model that cannot be loaded or is of an unknown family."""


class SourceLost(DeepSpecError):
    """A source of training data that cannot go on, through no fault of the run: it saves a checkpoint and ends."""


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


def shown(value: object) -> str:
    """``repr`` of a value for a message, cut where it is long: an alias in YAML can mean millions of items."""
    short = reprlib.Repr()
    short.maxlevel, short.maxdict, short.maxlist, short.maxtuple, short.maxset = 4, 30, 30, 30, 30
    short.maxstring = short.maxother = short.maxlong = LONGEST_VALUE
    try:
        text = short.repr(value)
    except ValueError:  # an int of more digits than Python writes
        text = "a number of thousands of digits"
    return _cut(text)


def _cut(text: str, longest: int = LONGEST_VALUE) -> str:
    return text if len(text) <= longest else f"{text[:longest]}..."


def printable(text: str) -> str:
    """Text for a terminal: what it would obey (colours, titles, cursor moves) as escapes; lines and tabs stay."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def without_logins(text: str) -> str:
    """Text without the user names and passwords of the URLs in it."""
    return _LOGIN.sub(r"\1", text)


_REMEDIES = (  # of what the system refused, by its error numbers
    ((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room, then run the same command again"),
    ((errno.EACCES, errno.EPERM, errno.EROFS), "fix the permissions, or name another path"),
    ((errno.ENOTDIR, errno.EEXIST), "a file is where a folder is wanted: name another path, or move the file"),
    ((errno.EISDIR,), "name a file, this is a folder"),
    ((errno.ENOENT,), "check the path: it must exist, and a folder must be one that can be made there"),
    ((errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP), "name another path"),
    ((errno.EMFILE, errno.ENFILE), "allow more open files (ulimit -n), then run the same command again"),
    ((errno.ENOMEM,), "use a machine with more memory, or smaller batches"),
    ((errno.EIO, errno.ESTALE), "look at the disk, then run the same command again"),
    ((errno.EADDRINUSE,), "choose another port (MASTER_PORT)"),
)
_NETWORK = "check the network and the address, or name local files"
_RUST = re.compile(r"\(os error (\d+)\)")  # safetensors and tokenizers put the system's error number into their text


def as_os_error(problem: BaseException) -> OSError | None:
    """``problem`` itself where it is one, or what a library in Rust made of one; None where it is something else."""
    if isinstance(problem, OSError):
        return problem
    match = _RUST.search(str(problem))
    return OSError(int(match[1]), os.strerror(int(match[1]))) if match else None


def system_error(
    problem: BaseException, file: str | Path | None = None, kind: type[DeepSpecError] = DeepSpecError
) -> DeepSpecError | None:
    """What the system refused, as one line with the file and a remedy; None where ``problem`` is something else.

    Args:
        problem: an OSError, or what a library made of one.
        file: the file at work, for an error that does not name it (a write names none, an open does).
        kind: the class of the result.
    """
    known = as_os_error(problem)
    if known is None:
        return None
    name = known.filename if known.filename2 is None else known.filename2
    text = known.strerror or next(iter(str(known).strip().splitlines()), type(known).__name__)
    remedy = next(
        (remedy for numbers, remedy in _REMEDIES if known.errno in numbers), _NETWORK if name is None else None
    )
    where = file if name is None or isinstance(name, int) else os.fsdecode(name)
    return kind(text, file=where, remedy=remedy or "look at the file")


_endings: list[list[Callable[[bool], None]]] = []  # of the commands that run, one inside the other


def at_end(call: Callable[[bool], None]) -> bool:
    """Have :func:`run_main` call this when its command ends, with whether it went well; False where none runs."""
    if _endings:
        _endings[-1].append(call)
    return bool(_endings)


def run_main(main: Callable[[], int | None]) -> None:
    """Run an entry point; bad input and what the system refuses become one line on stderr and exit code 1.

    A reader that closed the pipe (``| head``) is no error of ours: the command ends without a word. Ctrl-C is none
    either: exit code 130, as a shell has it.
    """
    went_well = False
    _endings.append([])
    try:
        try:
            code = main()
            sys.stdout.flush()
            went_well = not code
        finally:
            for call in _endings.pop():
                call(went_well)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except DeepSpecError as error:
        _fail(error)
    except Exception as problem:
        refused = system_error(problem)
        if refused is None:
            raise
        _fail(None if isinstance(problem, BrokenPipeError) and _reader_left() else refused)
    sys.exit(code or 0)


def _fail(error: DeepSpecError | None) -> NoReturn:
    if error is not None:
        print(f"error: {printable(' '.join(str(error).splitlines()))}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # discard what is still in the buffer: Python would try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


def _reader_left() -> bool:
    """Whether stdout is a pipe whose reader has closed it."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
