"""Where the answers stand in the rendering of a conversation, without the end of turn.

From the marks of a second rendering (:mod:`deepspec.data.marks`) and from what the template writes between two
messages, which it is asked once: the work grows with the length of the conversation. Where that does not fit, by
comparing growing renderings: the work grows with the square of the number of turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from deepspec.data.conversations import Message
from deepspec.data.marks import Reading
from deepspec.data.refusals import NO_PLACE
from deepspec.errors import DataError

MARK = "\ue000\uf8ff\ue000"  # private use: in no real text
_OTHER = "\ue000\uf8fe\ue000"

Place = tuple[int, int]  # first character of an answer's text, and the one after its last
Tools = Sequence[Any] | None


class Render(Protocol):
    """The chat template."""

    def __call__(self, messages: Sequence[Message], tools: Tools, generation_prompt: bool = False) -> str: ...


class PlaceFinder:
    """Finds answers.

    Args:
        render: the chat template.
        tail: what it writes after an answer.
    """

    def __init__(self, render: Render, tail: str) -> None:
        self._render, self._tail = render, tail
        self._known: dict[tuple[Any, ...], str | None] = {}  # what the template writes between two messages

    def find(self, messages: list[Message], tools: Tools, full: str, reading: Reading) -> list[Place]:
        """The place of every answer of ``messages`` in their rendering ``full``.

        Raises:
            DataError: it cannot be told.
        """
        return self.by_marks(messages, tools, full, reading) or self.by_comparing(messages, tools, full)

    # -- by marks -----------------------------------------------------------------------------------------------------

    def by_marks(self, messages: list[Message], tools: Tools, full: str, reading: Reading) -> list[Place] | None:
        """The places, or None where the marks do not tell one of them."""
        places = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = self._start(messages, tools, full, reading, i)
            end = None if start is None else self._end(messages, tools, full, reading, i)
            if start is None or end is None or start > end:
                return None
            places.append((start, end))
        return places

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
        """What stands between a user's or tool's text and an answer in a prompt."""
        key = ("prompt", given["role"], given.get("name"), bool(tools))
        return self._ask(key, lambda: self._after(MARK, self._before(given), tools, True))

    def _answer_border(self, given: Message, tools: Tools) -> str | None:
        """The same in a conversation that has gone on."""
        messages = [*self._before(given), _answer(_OTHER), {"role": "user", "content": "x"}]
        key = ("answer", given["role"], given.get("name"), bool(tools))
        return self._ask(key, lambda: self._after(MARK, messages, tools, False, _OTHER))

    def _end_border(self, answer: Message, following: Message, tools: Tools) -> str | None:
        """What stands between an answer and the text of the message after it."""
        call = (answer.get("tool_calls") or [None])[-1]
        name = call["function"]["name"] if call else None
        key = ("end", name, following["role"], following.get("name"), bool(tools))
        probe = _answer("", _call(name, MARK, following)) if name else _answer(MARK)
        begin = [{"role": "user", "content": "x"}, probe]

        def ask() -> str | None:
            alone = self._after(MARK, begin, tools, False)
            more = self._after(MARK, [*begin, following | {"content": _OTHER}], tools, False, _OTHER)
            if alone is None or more is None:
                return None
            own = alone.removesuffix(self._tail)
            return more[len(own) :] if more.startswith(own) else None

        return self._ask(key, ask)

    def _before(self, given: Message) -> list[Message]:
        """A short conversation up to a message of that kind, its text a mark."""
        marked = given | {"content": MARK}
        if given["role"] != "tool":
            return [marked]
        call = _call(str(given.get("name") or "f"), "a", given)
        return [{"role": "user", "content": "x"}, _answer("", call), marked]

    def _after(self, mark: str, messages: list[Message], tools: Tools, prompt: bool, stop: str = "") -> str | None:
        """What is rendered after ``mark``, up to ``stop`` where one is given."""
        try:
            text = self._render(messages, tools, prompt)
        except DataError:
            return None
        after = text.rpartition(mark)[2] if mark in text else None
        if after is None or not stop:
            return after
        return after.partition(stop)[0] if stop in after else None

    def _ask(self, key: tuple[Any, ...], ask: Any) -> str | None:
        if key not in self._known:
            self._known[key] = ask()
        return self._known[key]

    # -- by comparing -------------------------------------------------------------------------------------------------

    def by_comparing(self, messages: list[Message], tools: Tools, full: str) -> list[Place]:
        """The places by comparing growing renderings, else renderings with the answer replaced by a mark.

        Raises:
            DataError: they cannot be told.
        """
        places = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            grown = full if i == len(messages) - 1 else self._render(messages[: i + 1], tools)
            prompt = self._render(messages[:i], tools, generation_prompt=True)
            start = len(prompt) if full.startswith(prompt) else None
            end = None
            if full.startswith(grown):
                end = len(grown) - (len(self._tail) if grown.endswith(self._tail, start or 0) else 0)
            if start is None or end is None:
                before, after = self._around(messages, tools, i)
                start = len(before) if start is None and full.startswith(before) else start
                end = len(full) - len(after) if end is None and full.endswith(after) else end
            if start is None or end is None or start > end:
                raise DataError(NO_PLACE, key=f"messages[{i}]")
            places.append((start, end))
        return places

    def _around(self, messages: list[Message], tools: Tools, i: int) -> tuple[str, str]:
        """What stands before and after answer ``i``: the text that stays when it alone is replaced."""
        marked = [*messages[:i], _answer(MARK), *messages[i + 1 :]]
        before, _, after = self._render(marked, tools).partition(MARK)
        return before, after


def _most_first(length: int) -> Sequence[int]:
    """How many characters of white space a template may have kept: all, some or none; of very many all or none."""
    return range(length, -1, -1) if length <= 64 else (length, 0)


def _answer(content: str, *calls: Message) -> Message:
    return {"role": "assistant", "content": content} | ({"tool_calls": list(calls)} if calls else {})


def _call(name: str, argument: str, result: Message) -> Message:
    """A call that the tool message ``result`` answers."""
    given = {"id": result["tool_call_id"]} if "tool_call_id" in result else {}
    return {"type": "function", "function": {"name": name, "arguments": {"a": argument}}, **given}
