"""What a target wrote, as the message to train on: no half characters, no half calls, reasoning apart."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

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
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    if any(mark in whole and mark not in text for mark in OPENINGS):
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
