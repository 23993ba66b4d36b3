"""A conversation in regeneration: the user's turns are given, the target answers them one by one.

What a target wrote becomes the message to train on: no half characters, no half calls, reasoning apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

from deepspec.data.chat import Renderer
from deepspec.data.lines import value_problem
from deepspec.data.messages import (
    OPENINGS,
    THINK,
    UNTHINK,
    Message,
    Unusable,
    arguments_are_objects,
    normal_calls,
    split_reasoning,
)
from deepspec.errors import DataError

_HALF = re.compile("[\ufffd\ud800-\udfff]+$")  # what a decoder makes of the first bytes of a character
_PROBE = "deepspec_probe"


def split_turns(messages: Sequence[Message]) -> list[list[Message]]:
    """The given messages before each answer that the target is to write.

    A source answer that called tools cannot be rewritten, because the tools' results that follow belong to it: it
    stays as context, with ``weight`` 0. So does an answer that answers nothing. The other source answers are dropped.
    """
    turns: list[list[Message]] = []
    given: list[Message] = []
    for i, message in enumerate(messages):
        follower = messages[i + 1]["role"] if i + 1 < len(messages) else None
        if message["role"] != "assistant":
            given.append(message)
        elif follower == "tool" or (not turns and not any(one["role"] == "user" for one in given)):
            given.append(message | {"weight": 0})
        elif given:
            turns.append(given)
            given = []
    if given and given[-1]["role"] in ("user", "tool"):
        turns.append(given)
    return turns


class Dialogue:
    """One source row and the answers so far."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self.row, self.id, self.tools = row, row["id"], row.get("tools")
        self._turns = split_turns(row["messages"])
        self.messages: list[Message] = []
        self.turn, self.tokens, self._cut = 0, 0, False
        self._give()

    def _give(self) -> None:
        if self.open:
            self.messages.extend(self._turns[self.turn])

    @property
    def open(self) -> bool:
        """Whether ``messages`` wait for an answer; a cut answer or one that calls tools is the last."""
        return self.turn < len(self._turns) and not self._cut

    @property
    def key(self) -> str:
        """Names this turn's random numbers."""
        return f"{self.id}#{self.turn}"

    def answer(self, message: Mapping[str, Any], finish_reason: str, tokens: int) -> None:
        """Add the target's answer to the open turn: ``content`` and, where it has them, reasoning and tool calls.

        Calls end the conversation, whatever reason the server gives: their results are not known.
        """
        self.messages.append({"role": "assistant", **message, "finish_reason": finish_reason})
        self.tokens += tokens
        self._cut = finish_reason in ("length", "tool_calls") or bool(message.get("tool_calls"))
        self.turn += 1
        self._give()

    def result(self) -> dict[str, Any]:
        """The row to write: the source row with the new messages."""
        return {**self.row, "messages": self.messages}


@dataclass(frozen=True)
class Outcome:
    """The outcome of one conversation."""

    dialogue: Dialogue
    error: str | None = None  # None: every turn is answered
    again: bool = False  # the error was the servers' of the moment: another start may have an answer
    states: Any = None  # hidden states that the engine kept in the last turn, as it has them


class AnswerEngine(Protocol):
    """Something that answers conversations."""

    def run(self, dialogues: Iterable[Dialogue]) -> Iterator[Outcome]:
        """Every dialogue's outcome, in any order, taking dialogues as it has room for them."""


# -- what a target wrote -----------------------------------------------------------------------------------------------


def read_answer(
    content: str, reasoning: str | None, calls: Any, finish_reason: str, opened: bool
) -> tuple[Message, str]:
    """(the message without its role, how it ended).

    Args:
        content: the text, with ``<think>`` marks or without.
        reasoning: that a server gave apart.
        calls: tool calls that a server gave apart, or None.
        finish_reason: "stop", "tool_calls", or "length" where the answer was cut: then what the cut left of a
            character or of a call goes. An answer that is cut in its reasoning ends as "length" with that alone.
        opened: the prompt ends inside the reasoning.

    Raises:
        Unusable: there is nothing to train on, or it cannot be written.
    """
    cut = finish_reason == "length"
    message: Message = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    message |= split_reasoning(message, opened and not calls)
    message["content"] = message["content"].lstrip()
    last = "content" if message["content"] else "reasoning_content"
    if cut and message.get(last):
        message[last] = _HALF.sub("", message[last])
    if not message.get("reasoning_content"):
        message.pop("reasoning_content", None)
    found = normal_calls(calls)
    if cut and found and not arguments_are_objects(found[-1:]):
        found = found[:-1]
    if not arguments_are_objects(found):
        raise Unusable("the target called a tool with arguments that are not a JSON object")
    if found:
        message["tool_calls"] = found
    reason = message.pop("finish_reason", finish_reason)
    if not message["content"] and not found and not (reason == "length" and message.get("reasoning_content")):
        raise Unusable("the target answered nothing" + " after its reasoning" * ("reasoning_content" in message))
    problem = value_problem(message)
    if problem is not None:
        raise Unusable(f"the target's answer holds {problem}")
    del message["role"]
    return message, reason


def answer_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of generated ids without special tokens, but with ``<think>`` and its end where these are such.

    Raises:
        Unusable: reasoning between other special tokens (Gemma4's channel), without which it would be part of the text.
    """
    added = tokenizer.added_tokens_decoder.items()
    marks = {number: token.content for number, token in added if token.special and token.content in (THINK, UNTHINK)}
    runs = groupby(ids, key=marks.get)
    text = "".join(mark or tokenizer.decode(list(run), skip_special_tokens=True) for mark, run in runs)
    everything = tokenizer.decode(ids, skip_special_tokens=False)
    if any(mark in everything and mark not in text for mark in OPENINGS):
        raise Unusable("the target marked its reasoning by special tokens, which only --engine server can read")
    return text


def call_mark(renderer: Renderer, tools: Sequence[Any]) -> str | None:
    """The first line that the template writes of a tool call, up to its name; None where it writes no calls."""
    ask = {"role": "user", "content": "a"}
    call = {"type": "function", "id": "call00000", "function": {"name": _PROBE, "arguments": {}}}
    called: Mapping[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "content": "b", "name": _PROBE, "tool_call_id": "call00000"}
    try:
        with_call = renderer.prompt_text([ask, dict(called), result], tools)
        with_text = renderer.prompt_text([ask, {"role": "assistant", "content": _PROBE}, ask], tools)
    except DataError:
        return None
    before, found, _ = with_call.partition(_PROBE)
    answer = with_text.partition(_PROBE)[0]
    if not found or not before.startswith(answer):
        return None
    return (before.removeprefix(answer).strip() or "\n").splitlines()[0] or None
