"""Which parts of the messages are in a rendering, and where: found by rendering them again with marks in their texts.

Between the marks is the text without white space at its ends, because templates trim; the marks are ASCII letters
and digits, which templates neither trim nor escape.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepspec.data.messages import Message

_OPEN, _CLOSE = "Qj7vo", "Qj7vc"
_MARK = re.compile(r"Qj7v([oc])(\d+)x")
TOOLS = -1  # used as the number of a message in fields of the tools


@dataclass(frozen=True)
class Field:
    """A text of a message or tool."""

    message: int  # its number, or TOOLS
    part: str  # "content", "reasoning_content", "tool_calls" or "tools"
    core: str  # the text without white space at its ends
    before: str  # that white space
    after: str


class _Marker:
    """Marks texts one after the other."""

    def __init__(self) -> None:
        self.fields: list[Field] = []

    def text(self, text: str, message: int, part: str) -> str:
        """The text with its marks; one of white space alone stays as it is, but for an empty one."""
        core = text.strip()
        if not core and text:
            return text
        begin = len(text) - len(text.lstrip())
        before, after, number = text[:begin], text[begin + len(core) :], len(self.fields)
        self.fields.append(Field(message, part, core, before, after))
        return f"{before}{_OPEN}{number}x{core}{_CLOSE}{number}x{after}"

    def leaves(self, value: Any, message: int) -> Any:
        """A tool call's arguments with every text of them marked."""
        if isinstance(value, str):
            return self.text(value, message, "tool_calls") if value.strip() else value
        if isinstance(value, Mapping):
            return {key: self.leaves(one, message) for key, one in value.items()}
        if isinstance(value, list):
            return [self.leaves(one, message) for one in value]
        return value

    def message(self, message: Message, number: int) -> Message:
        """A message with marks. Empty texts get none (templates test for it), unless they are a user's or a tool's."""
        new = dict(message)
        if message["content"] or message["role"] in ("user", "tool"):
            new["content"] = self.text(message["content"], number, "content")
        if message.get("reasoning_content"):
            new["reasoning_content"] = self.text(message["reasoning_content"], number, "reasoning_content")
        if message.get("tool_calls"):
            new["tool_calls"] = [self.call(call, number) for call in message["tool_calls"]]
        return new

    def call(self, call: Mapping[str, Any], number: int) -> dict[str, Any]:
        """A tool call with marks in its name and arguments."""
        function = call.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            return dict(call)
        marked = {"name": self.text(function["name"], number, "tool_calls")}
        if "arguments" in function:
            marked["arguments"] = self.leaves(function["arguments"], number)
        return {**call, "function": {**function, **marked}}

    def tool(self, tool: Any) -> Any:
        """A tool with marks in its name and description."""
        if not isinstance(tool, Mapping):
            return tool
        if isinstance(tool.get("function"), Mapping):
            return {**tool, "function": self.tool(tool["function"])}
        named = {key: tool[key] for key in ("name", "description") if isinstance(tool.get(key), str) and tool[key]}
        return {**tool, **{key: self.text(text, TOOLS, "tools") for key, text in named.items()}}


def mark(
    messages: Sequence[Message], tools: Sequence[Any] | None
) -> tuple[list[Message], list[Any] | None, list[Field]]:
    """Messages and tools with marks, and what was marked: mark number ``i`` belongs to field ``i``."""
    marker = _Marker()
    marked = [marker.message(message, number) for number, message in enumerate(messages)]
    return marked, [marker.tool(tool) for tool in tools] if tools else None, marker.fields


class Reading:
    """What the marks of a rendering show about the one without.

    Args:
        fields: of :func:`mark`.
        marked: the rendering with marks; None where the template refuses it.
        unmarked: the rendering without marks.
    """

    def __init__(self, fields: Sequence[Field], marked: str | None, unmarked: str) -> None:
        self.fields, self._unmarked = fields, unmarked
        self._marks: dict[int, tuple[list[int], list[int]]] = {}  # field -> where its text begins and ends
        bare, done, length, text = [], 0, 0, marked or ""
        for found in _MARK.finditer(text):
            bare.append(text[done : found.start()])
            done, length = found.end(), length + found.start() - done
            self._marks.setdefault(int(found[2]), ([], []))[found[1] == "c"].append(length)
        bare.append(text[done:])
        self.exact = "".join(bare) == unmarked  # the marks changed nothing else, so they show where the texts are
        self._texts = {(one.message, one.part): number for number, one in enumerate(fields)}

    def missing(self) -> Iterator[Field]:
        """The fields that the rendering lacks."""
        return (field for number, field in enumerate(self.fields) if not self._has(number))

    def has(self, message: int, part: str) -> bool:
        """Whether the rendering has a message's ``content`` or ``reasoning_content``."""
        number = self._texts.get((message, part))
        return number is not None and self._has(number)

    def span(self, message: int, part: str) -> tuple[int, int, Field] | None:
        """[first, last) character of a text without white space at its ends; None where that is not certain."""
        number = self._texts.get((message, part))
        opens, closes = self._marks.get(-1 if number is None else number, ([], []))
        if number is None or not self.exact or len(opens) != 1 or len(closes) != 1 or opens[0] > closes[0]:
            return None
        return opens[0], closes[0], self.fields[number]

    def _has(self, number: int) -> bool:
        core = self.fields[number].core
        if not core or all(self._marks.get(number, ([], []))):
            return True
        return not self.exact and core in self._unmarked
