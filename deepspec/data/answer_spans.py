"""Where the answers are in a rendered conversation: first in its characters, then in its tokens.

Characters: from the marks of a second rendering (:mod:`deepspec.data.marks`) and from what the template writes between
two messages, which it is asked once; the work grows with the length of the conversation. Where that does not fit, by
comparing growing renderings; the work grows with the square of the number of turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from deepspec.data.marks import Reading
from deepspec.data.messages import Message
from deepspec.data.refusals import HALF_TOKEN, NO_SPAN
from deepspec.errors import DataError

MARK = "\ue000\uf8ff\ue000"  # private use: in no real text
_OTHER = "\ue000\uf8fe\ue000"
_ASK = {"role": "user", "content": "x"}

Span = tuple[int, int]  # the first character (or token) of an answer, and the one after its last
Tools = Sequence[Any] | None
Render = Callable[[list[Message], Tools, bool], str]


class SpanFinder:
    """Finds answers in renderings.

    Args:
        render: the chat template: of messages, tools and whether a prompt for an answer follows.
        tail: what it writes after an answer.
    """

    def __init__(self, render: Render, tail: str) -> None:
        self._render, self._tail = render, tail
        self._known: dict[tuple[Any, ...], str | None] = {}  # what the template writes between two messages

    def find(self, messages: list[Message], tools: Tools, full: str, reading: Reading) -> list[Span]:
        """The span of every answer of ``messages`` in their rendering ``full``, without its end of turn.

        Raises:
            DataError: it cannot be found.
        """
        return self.by_marks(messages, tools, full, reading) or self.by_comparing(messages, tools, full)

    def by_marks(self, messages: list[Message], tools: Tools, full: str, reading: Reading) -> list[Span] | None:
        """The spans, or None where the marks do not show one of them."""
        spans = []
        for i in _answers(messages):
            start = self._start(messages, tools, full, reading, i)
            end = None if start is None else self._end(messages, tools, full, reading, i)
            if start is None or end is None or start > end:
                return None
            spans.append((start, end))
        return spans

    def _start(self, messages: list[Message], tools: Tools, full: str, reading: Reading, i: int) -> int | None:
        given = reading.span(i - 1, "content") if i and messages[i - 1]["role"] != "assistant" else None
        if given is None:
            return None
        _, end, field = given
        for border in (self._prompt_border(messages[i - 1], tools), self._answer_border(messages[i - 1], tools)):
            for kept in _most_first(len(field.after)) if border is not None else ():  # of the white space after it
                head = field.after[:kept] + str(border)
                if full.startswith(head, end):
                    return end + len(head)
        return None

    def _end(self, messages: list[Message], tools: Tools, full: str, reading: Reading, i: int) -> int | None:
        if i == len(messages) - 1:
            return len(full) - (len(self._tail) if full.endswith(self._tail) else 0)
        following = reading.span(i + 1, "content") if messages[i + 1]["role"] != "assistant" else None
        border = self._end_border(messages[i], messages[i + 1], tools) if following is not None else None
        if following is None or border is None:
            return None
        start, _, field = following
        for kept in _most_first(len(field.before)):  # of the white space before it
            head = border + field.before[len(field.before) - kept :]
            if full.startswith(head, start - len(head)) and start >= len(head):
                return start - len(head)
        return None

    def _prompt_border(self, given: Message, tools: Tools) -> str | None:
        """The text between a user's or tool's text and an answer in a prompt."""
        key = ("prompt", given["role"], given.get("name"), bool(tools))
        return self._once(key, lambda: self._after(MARK, _up_to(given), tools, True))

    def _answer_border(self, given: Message, tools: Tools) -> str | None:
        """The same in a conversation with later messages."""
        key = ("answer", given["role"], given.get("name"), bool(tools))
        return self._once(key, lambda: self._after(MARK, [*_up_to(given), _answer(_OTHER), _ASK], tools, False, _OTHER))

    def _end_border(self, answer: Message, following: Message, tools: Tools) -> str | None:
        """The text between an answer and the text of the message after it."""
        call = (answer.get("tool_calls") or [None])[-1]
        name = call["function"]["name"] if call else None
        begin = [_ASK, _answer("", _call(name, MARK, following)) if name else _answer(MARK)]

        def ask() -> str | None:
            alone = self._after(MARK, begin, tools, False)
            more = self._after(MARK, [*begin, following | {"content": _OTHER}], tools, False, _OTHER)
            if alone is None or more is None:
                return None
            own = alone.removesuffix(self._tail)
            return more[len(own) :] if more.startswith(own) else None

        return self._once(("end", name, following["role"], following.get("name"), bool(tools)), ask)

    def _after(self, mark: str, messages: list[Message], tools: Tools, prompt: bool, stop: str = "") -> str | None:
        """What is rendered after ``mark``, up to ``stop`` where one is given."""
        try:
            _, found, after = self._render(messages, tools, prompt).rpartition(mark)
        except DataError:
            return None
        if not found or stop not in after:
            return None
        return after.partition(stop)[0] if stop else after

    def _once(self, key: tuple[Any, ...], ask: Callable[[], str | None]) -> str | None:
        if key not in self._known:
            self._known[key] = ask()
        return self._known[key]

    def by_comparing(self, messages: list[Message], tools: Tools, full: str) -> list[Span]:
        """The spans by comparing growing renderings, else renderings with the answer replaced by a mark.

        Raises:
            DataError: they cannot be found.
        """
        spans = []
        for i in _answers(messages):
            grown = full if i == len(messages) - 1 else self._render(messages[: i + 1], tools, False)
            prompt = self._render(messages[:i], tools, True)
            start = len(prompt) if full.startswith(prompt) else None
            end = None
            if full.startswith(grown):
                end = len(grown) - (len(self._tail) if grown.endswith(self._tail, start or 0) else 0)
            if start is None or end is None:
                marked = [*messages[:i], _answer(MARK), *messages[i + 1 :]]
                before, _, after = self._render(marked, tools, False).partition(MARK)
                start = len(before) if start is None and full.startswith(before) else start
                end = len(full) - len(after) if end is None and full.endswith(after) else end
            if start is None or end is None or start > end:
                raise DataError(NO_SPAN, key=f"messages[{i}]")
            spans.append((start, end))
        return spans


def _answers(messages: list[Message]) -> Iterator[int]:
    return (i for i, message in enumerate(messages) if message["role"] == "assistant")


def _up_to(given: Message) -> list[Message]:
    """A short conversation up to a message of that kind, its text a mark."""
    marked = given | {"content": MARK}
    if given["role"] != "tool":
        return [marked]
    return [_ASK, _answer("", _call(str(given.get("name") or "f"), "a", given)), marked]


def _most_first(length: int) -> Sequence[int]:
    """How many characters of white space a template may have left: all, some or none; of very many all or none."""
    return range(length, -1, -1) if length <= 64 else (length, 0)


def _answer(content: str, *calls: Message) -> Message:
    return {"role": "assistant", "content": content} | ({"tool_calls": list(calls)} if calls else {})


def _call(name: str, argument: str, result: Message) -> Message:
    """A call that the tool message ``result`` answers."""
    given = {"id": result["tool_call_id"]} if "tool_call_id" in result else {}
    return {"type": "function", "function": {"name": name, "arguments": {"a": argument}}, **given}


# -- from characters to tokens ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnswerSpan:
    """The characters of one assistant turn in the rendered text, its end of turn included where it has one."""

    start: int
    stop: int
    supervised: bool


def spans_from_offsets(
    offsets: Sequence[tuple[int, int]], length: int, answers: Sequence[AnswerSpan]
) -> list[Span] | None:
    """The tokens of every answer from the tokens' character offsets; the fast way.

    None where the offsets leave characters out (some tokenizers trim or normalise): then they cannot be trusted.

    Raises:
        DataError: a token begins before an answer and ends in it.
    """
    covered, starts = 0, dict[int, int]()
    for index, (begin, end) in enumerate(offsets):
        if begin > covered:
            return None
        if begin == covered:
            starts.setdefault(begin, index)
        covered = max(covered, end)
    if covered != length:
        return None
    starts[length] = len(offsets)
    if any(answer.start not in starts or answer.stop not in starts for answer in answers):
        raise _half_token()
    return [(starts[answer.start], starts[answer.stop]) for answer in answers]


def spans_from_prefixes(
    encode: Callable[[str], list[int]], text: str, ids: Sequence[int], answers: Sequence[AnswerSpan]
) -> list[Span]:
    """The tokens of every answer by comparing the ids of growing prefixes with ``ids``; for any tokenizer.

    The piece since the last border found is tried first (after a special token it is tokenised as in the complete
    text), so that a long conversation is tokenised once; the prefix decides where the piece does not fit.

    Raises:
        DataError: a prefix whose ids are no prefix of ``ids``: a token is half prompt and half answer.
    """
    found, done, tokens = dict[int, int](), 0, 0  # characters and tokens up to the last border
    for border in sorted({one for answer in answers for one in (answer.start, answer.stop)}):
        piece = encode(text[done:border])
        if list(ids[tokens : tokens + len(piece)]) == piece:
            tokens += len(piece)
        else:
            prefix = encode(text[:border])
            if list(ids[: len(prefix)]) != prefix:
                raise _half_token()
            tokens = len(prefix)
        done, found[border] = border, tokens
    return [(found[answer.start], found[answer.stop]) for answer in answers]


def _half_token() -> DataError:
    remedy = "strip the white space at the answer's beginning (prepare_data and regenerate do)"
    return DataError(HALF_TOKEN, key="messages", remedy=remedy)
