"""From characters to tokens: the first and last token of every answer of a rendered text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deepspec.data.refusals import HALF_TOKEN
from deepspec.errors import DataError


@dataclass(frozen=True)
class Answer:
    """The characters of one assistant turn in the rendered text, its end of turn included where it has one."""

    start: int
    stop: int
    supervised: bool


def bounds_from_offsets(
    offsets: Sequence[tuple[int, int]], length: int, answers: Sequence[Answer]
) -> list[tuple[int, int]] | None:
    """[first, last) token of every answer from the tokens' character offsets; the fast way.

    None where the offsets leave characters out (some tokenizers trim or normalise): then they cannot be trusted.

    Raises:
        DataError: a token begins before an answer and ends in it.
    """
    reach, starts = 0, dict[int, int]()
    for index, (begin, end) in enumerate(offsets):
        if begin > reach:
            return None
        if begin == reach:
            starts.setdefault(begin, index)
        reach = max(reach, end)
    if reach != length:
        return None
    starts[length] = len(offsets)
    for answer in answers:
        if answer.start not in starts or answer.stop not in starts:
            raise _straddles()
    return [(starts[answer.start], starts[answer.stop]) for answer in answers]


def bounds_from_prefixes(
    encode: Callable[[str], list[int]], text: str, ids: Sequence[int], answers: Sequence[Answer]
) -> list[tuple[int, int]]:
    """[first, last) token of every answer by comparing the ids of growing prefixes with ``ids``; the plain way.

    The piece since the last border found is tried first (after a special token it is tokenised as in the whole), so
    that a long conversation is tokenised once; the whole prefix decides where the piece does not fit.

    Raises:
        DataError: a prefix whose ids are no prefix of ``ids``: a token is half prompt and half answer.
    """
    found, done, reach = dict[int, int](), 0, 0  # characters and tokens up to the last border
    for place in sorted({edge for answer in answers for edge in (answer.start, answer.stop)}):
        piece = encode(text[done:place])
        if list(ids[reach : reach + len(piece)]) == piece:
            reach += len(piece)
        else:
            prefix = encode(text[:place])
            if list(ids[: len(prefix)]) != prefix:
                raise _straddles()
            reach = len(prefix)
        done, found[place] = place, reach
    return [(found[answer.start], found[answer.stop]) for answer in answers]


def _straddles() -> DataError:
    return DataError(
        HALF_TOKEN,
        key="messages",
        remedy="strip the white space at the answer's beginning (prepare_data and regenerate do)",
    )
