"""A conversation on its way through regeneration: the user's turns are given, the target answers them one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepspec.data.conversations import Message


def split_turns(messages: Sequence[Message]) -> list[list[Message]]:
    """The given messages before each answer that the target shall write.

    A source answer that called tools cannot be written anew, because the tools' results that follow belong to it: it
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

        Calls end the conversation, whatever the server says of the reason: their results are not known.
        """
        self.messages.append({"role": "assistant", **message, "finish_reason": finish_reason})
        self.tokens += tokens
        self._cut = finish_reason in ("length", "tool_calls") or bool(message.get("tool_calls"))
        self.turn += 1
        self._give()

    def result(self) -> dict[str, Any]:
        """The row to write: the source row with the new messages."""
        return {**self.row, "messages": self.messages}
