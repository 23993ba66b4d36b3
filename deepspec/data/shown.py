"""Messages as a chat template is shown them: in one form, reasoning apart from answers, developer as system."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepspec.data.conversations import Message
from deepspec.data.messages import Unusable, arguments_are_objects, normal_message, normal_tools, split_reasoning
from deepspec.data.refusals import CUT_CALL, REPLACED
from deepspec.errors import DataError

_NO_CHARACTER = "\ufffd"  # what bytes that are no character are decoded to
_OURS = ("weight", "finish_reason")  # of a message: not the template's affair


def read_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Tools in OpenAI's form, or None.

    Raises:
        DataError: they cannot be read.
    """
    try:
        return normal_tools(tools) or None
    except Unusable as problem:
        raise DataError(str(problem), key="tools") from None


def read_message(message: Message, opened: bool) -> Message:
    """A message in one form: calls with objects as arguments, ``<think>`` in ``reasoning_content``, whole characters.

    An answer that was cut inside its reasoning has ``content`` "" then, one that was cut inside a character ends before
    it, both with ``finish_reason`` "length".

    Args:
        message: of a conversations file.
        opened: an answer begins inside its reasoning, because the prompt has opened it.

    Raises:
        DataError: calls that cannot be read, or an answer whose text does not tell what the target wrote.
    """
    try:
        message = normal_message(message)
        message["content"] = message.get("content") or ""
        if message["role"] != "assistant":
            return message
        message = split_reasoning(message, opened and message.get("finish_reason") == "length")
    except Unusable as problem:
        raise DataError(str(problem), key="messages") from None
    return _uncut(message)


def _uncut(message: Message) -> Message:
    """The answer up to its last whole character."""
    calls = message.get("tool_calls") or []
    if message.get("finish_reason") == "length" and not arguments_are_objects(calls):
        raise DataError(CUT_CALL, key="messages")
    regenerated = "finish_reason" in message and message.get("weight", 1) != 0
    part = "content" if message["content"] else "reasoning_content"
    text = str(message.get(part) or "")
    if text.endswith(_NO_CHARACTER) and not calls:
        message = message | {part: text.rstrip(_NO_CHARACTER).rstrip(), "finish_reason": "length"}
    words = (message["content"], message.get("reasoning_content") or "", str(calls))
    if regenerated and any(_NO_CHARACTER in one for one in words):
        raise DataError(REPLACED, key="messages", remedy="let the target answer this prompt again")
    return message


def for_template(message: Message, thinking: bool) -> Message:
    """A message without what is not the template's affair, and without reasoning unless the target thinks."""
    hidden = _OURS if thinking else (*_OURS, "reasoning_content")
    return {key: value for key, value in message.items() if key not in hidden}


def developer_as_system(messages: Sequence[Message]) -> list[Message]:
    """For templates that know no developer: those at the beginning are put to the system message, others renamed."""
    head = next((i for i, one in enumerate(messages) if one["role"] not in ("system", "developer")), len(messages))
    rest = [one | {"role": "system"} if one["role"] == "developer" else one for one in messages[head:]]
    text = "\n\n".join(one["content"] for one in messages[:head])
    return [*([{"role": "system", "content": text}] if head else []), *rest]


def stops_in_reasoning(message: Message) -> bool:
    """Whether there is reasoning and nothing after it: the target was cut before it answered."""
    return bool(message.get("reasoning_content")) and not message["content"].strip() and not message.get("tool_calls")
