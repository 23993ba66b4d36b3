"""Why a row is refused: the reasons and how they are counted, shared by build, online, inspect and prepare.

A reason is short and the same for every row that it meets (no id, no text of the row in it), so that it can be counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from deepspec.errors import DataError

NO_SUPERVISION = "no supervised token"
NO_SPAN = "cannot tell the answer from the rest of the rendering"
HALF_TOKEN = "a token is half prompt and half answer: the target never sees it in this place"
OTHER_HISTORY = "the chat template renders the history otherwise in a prompt"
OTHER_TOKENS = "the history has other tokens in a prompt"
OPEN_THOUGHT = "the chat template opens the reasoning before an answer without reasoning"
REPLACED = "an answer with U+FFFD in it: bytes that its text does not tell"
TOO_LONG = "more characters than its tokens can be kept for"
CUT_CALL = "an answer cut inside a tool call"
_PARTS = {  # what the field of a message is called
    "tools": "the tools",
    "tool_calls": "tool calls",
    "reasoning_content": "the reasoning of an answer",
    "assistant": "an answer",
    "system": "a system message",
    "developer": "a developer message",
    "user": "a user message",
    "tool": "a tool's result",
}


class NoSupervision(DataError):
    """A conversation none of whose tokens is supervised."""


def left_out(part: str) -> str:
    """The reason where the rendering lacks a part: a role, ``tools``, ``tool_calls`` or ``reasoning_content``."""
    return f"the chat template leaves out {_PARTS[part]}"


def too_little(wanted: int) -> str:
    """The reason where ``data.min_supervised`` is not reached."""
    return f"fewer than {wanted} supervised tokens"


def template_refuses(problem: Exception) -> str:
    """The reason where the template raises; with its own words where it chose them itself (``raise_exception``)."""
    from jinja2.exceptions import TemplateError

    words = str(problem).strip().splitlines() if type(problem) is TemplateError else []
    return "the chat template refuses the messages" + (f" ({words[0][:100]})" if words else "")


def reason_of(problem: DataError) -> str:
    """What a refused row is counted under."""
    return NO_SUPERVISION if isinstance(problem, NoSupervision) else problem.problem


def refusal_lines(reasons: Mapping[str, int], first: Mapping[str, str] | None = None) -> list[str]:
    """A line a reason, the most frequent first; ``first``: the id of the first row of each reason."""
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    ids = first or {}
    return [f"dropped, {reason}: {n}" + (f" (first: {ids[reason]})" if reason in ids else "") for reason, n in ordered]


@dataclass
class RenderCounts:
    """What became of the conversations that were rendered."""

    rendered: int = 0
    tokens: int = 0
    supervised: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> conversations
    examples: dict[str, str] = field(default_factory=dict)  # reason -> id of the first

    def drop(self, reason: str, sample: str) -> None:
        """Count a conversation that cannot be used."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.examples.setdefault(reason, sample)

    def lines(self) -> list[str]:
        """What was dropped and why."""
        return refusal_lines(self.dropped, self.examples)
