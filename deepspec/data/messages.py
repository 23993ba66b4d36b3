"""One form for what data sets and servers write in many: tools, tool calls, reasoning, system columns.

Every reader of rows makes this normal form once (:func:`normal_row`), so that a template is given the same values
whoever wrote the file. The second half is what the renderer makes of such messages before a template sees them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deepspec.data.lines import NotJSON, parse_json, value_problem
from deepspec.data.refusals import CUT_CALL, REPLACED
from deepspec.errors import DataError

Message = dict[str, Any]
THINK, UNTHINK = "<think>", "</think>"  # how Qwen3, DeepSeek-R1 and their like mark reasoning inside an answer
OPENINGS = (THINK, "<thinking>", "<|channel>thought", "[THINK]", "<seed:think>")  # how templates open reasoning
SYSTEM_COLUMNS = ("system", "system_prompt")
MEDIA = {  # types of content parts that are no text
    **dict.fromkeys(("image", "image_url", "input_image"), "an image"),
    **dict.fromkeys(("video", "video_url"), "a video"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "sound"),
}
_STAY = ("properties", "parameters", "arguments")  # objects that may be empty, and mean something then
_NO_CHARACTER = "\ufffd"  # what bytes that are no character are decoded to
_NOT_THE_TEMPLATES = ("weight", "finish_reason")  # fields of a message that only deepspec reads


class Unusable(Exception):
    """A row that cannot be used; the text is the reason it is counted under, ``where`` the line of its file."""

    def __init__(self, reason: str, where: str | None = None) -> None:
        super().__init__(reason)
        self.where = where


def without_nulls(value: Any) -> Any:
    """A value without the nulls of its objects; None for an object that held nothing else.

    Arrow gives every object of a column the fields of all its rows, null where a row had none; a null that was written
    on purpose looks the same. Nulls in lists (an ``enum``) stay: Arrow adds none there.
    """
    if isinstance(value, Mapping):
        pruned = {key: without_nulls(one) for key, one in value.items()}
        for key in _STAY:
            if pruned.get(key) is None and isinstance(value.get(key), Mapping):
                pruned[key] = {}
        kept = {key: one for key, one in pruned.items() if one is not None}
        return kept if kept or not value else None
    if isinstance(value, list):
        return [({} if one is not None and new is None else new) for one, new in ((v, without_nulls(v)) for v in value)]
    return value


def _parsed(value: Any, what: str) -> Any:
    """JSON text as its value, exactly; anything else without Arrow's nulls."""
    if isinstance(value, str):
        try:
            return parse_json(value)
        except NotJSON:
            raise Unusable(f"{what} that are not JSON") from None
    problem = value_problem(value)
    if problem is not None:
        raise Unusable(f"{what} with {problem}")
    return without_nulls(value)


def _list_of(given: Any, what: str) -> list[Any]:
    values = _parsed(given, what)
    values = [values] if isinstance(values, Mapping) else values or []
    if not isinstance(values, list):
        raise Unusable(f"{what} that are no list")
    return values


def normal_tools(given: Any) -> list[dict[str, Any]]:
    """Tools in OpenAI's form, from such, from bare functions, and from either as JSON text (the list or each tool).

    Raises:
        Unusable: they cannot be read.
    """
    if given is None or (isinstance(given, str) and not given.strip()):
        return []
    return [_tool(_parsed(one, "tools") if isinstance(one, str) else one) for one in _list_of(given, "tools")]


def _tool(tool: Any) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise Unusable("a tool that is no object")
    if "function" not in tool and "name" in tool and tool.get("type", "function") == "function":
        tool = {"type": "function", "function": {key: one for key, one in tool.items() if key != "type"}}
    function = tool.get("function")
    function = _parsed(function, "tools") if isinstance(function, str) else function
    if function is None:
        return dict(tool)  # a tool of another type, which is the template's affair
    if not isinstance(function, Mapping):
        raise Unusable("a tool that is no object")
    function = dict(function)
    if isinstance(function.get("parameters"), str):
        function["parameters"] = _parsed(function["parameters"], "tools")
    return {**tool, "function": function}


def normal_calls(given: Any) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form with their arguments as objects; arguments that are not JSON stay text.

    Raises:
        Unusable: they cannot be read.
    """
    return [_call(one) for one in _list_of(given, "tool calls")] if given else []


def _call(call: Any) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise Unusable("a tool call that is no object")
    if "function" not in call and "name" in call:
        call = {"type": "function", "function": dict(call)}
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Unusable("a tool call without a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments) if arguments.strip() else {}
        except NotJSON:
            return {**call, "function": dict(function)}
    return {**call, "function": {**function, "arguments": {} if arguments is None else arguments}}


def arguments_are_objects(calls: Iterable[Mapping[str, Any]]) -> bool:
    """Whether every call's arguments are an object, as chat templates expect them."""
    return all(isinstance(call["function"].get("arguments"), Mapping) for call in calls)


def normal_message(message: Mapping[str, Any]) -> Message:
    """A message without Arrow's nulls, its calls in one form, its reasoning under ``reasoning_content``.

    Raises:
        Unusable: its tool calls cannot be read.
    """
    new = {"role": message["role"], "content": ""} | {key: one for key, one in message.items() if one is not None}
    legacy = new.pop("function_call", None)
    calls = normal_calls(new.pop("tool_calls", None) or legacy)
    reasoning = new.pop("reasoning", None)
    if isinstance(reasoning, str) and reasoning and not new.get("reasoning_content"):
        new["reasoning_content"] = reasoning
    if isinstance(reasoning := new.get("reasoning_content"), str) and reasoning.lstrip().startswith(THINK):
        inside, _, after = reasoning.lstrip().removeprefix(THINK).partition(UNTHINK)
        new["reasoning_content"] = inside.strip("\n") if not after.strip() else reasoning
    return new | ({"tool_calls": calls} if calls else {})


def with_system_columns(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """The messages, the text of the row's ``system`` or ``system_prompt`` column in front as their system message.

    Raises:
        Unusable: a column holds no text, or the columns and the messages name different ones.
    """
    given = [row[key] for key in SYSTEM_COLUMNS if row.get(key)]
    if not given:
        return messages
    if any(not isinstance(one, str) for one in given):
        raise Unusable("a system column other than text")
    texts = {one.strip() for one in given} - {""}
    own = messages[0]["content"] if messages and messages[0].get("role") in ("system", "developer") else None
    if isinstance(own, str):
        texts.discard(own.strip())
        if texts:
            raise Unusable("two different system messages")
        return messages
    if len(texts) > 1:
        raise Unusable("two different system messages")
    return [*({"role": "system", "content": text} for text in texts), *messages]


def normal_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a conversations file as every stage is given it.

    Raises:
        Unusable: its tools, calls or system columns cannot be read.
    """
    new = {**row, "messages": with_system_columns(row, [normal_message(one) for one in row["messages"]])}
    tools = normal_tools(new.pop("tools", None))
    return new | ({"tools": tools} if tools else {})


def opens_reasoning(prompt: str) -> str | None:
    """The one of OPENINGS that a rendered prompt ends with: the answer begins inside the reasoning; else None."""
    return next((mark for mark in OPENINGS if prompt.rstrip().endswith(mark)), None)


def opened_again(prompt: str, answer: str) -> int:
    """Characters at the beginning of a rendered answer that open the reasoning which ``prompt`` has opened."""
    text, mark = answer.lstrip(), opens_reasoning(prompt)
    if mark is None or not text.startswith(mark):
        return 0
    text = text.removeprefix(mark).removeprefix(prompt[len(prompt.rstrip()) :])
    return len(answer) - len(text)


def split_reasoning(message: Message, opened: bool = False) -> Message:
    """An answer with the ``<think>...</think>`` of its text moved to ``reasoning_content``.

    An answer that ends inside its reasoning gets ``content`` "" and ``finish_reason`` "length": there is no answer yet,
    and no end of turn to learn. A ``</think>`` without its beginning counts where the prompt opened the reasoning, or
    alone on its line.

    Args:
        message: an assistant's, ``content`` a string.
        opened: the prompt ends with ``<think>``, so that the text begins inside the reasoning.

    Raises:
        Unusable: the message has other reasoning already.
    """
    head, end, rest = message["content"].partition(UNTHINK)
    given = message.get("reasoning_content")
    if head.lstrip().startswith(THINK):
        head = head.lstrip().removeprefix(THINK)
    elif THINK in head or (end and not opened and not _alone(head, rest)) or (not end and (given or not opened)):
        return message
    reasoning = head.strip("\n") if end else head.lstrip("\n")
    if given and reasoning.strip() and reasoning.strip() != str(given).strip():
        raise Unusable("reasoning twice, and not the same")
    new = message | {"content": rest.lstrip(), "reasoning_content": reasoning if reasoning.strip() else given}
    if not new["reasoning_content"]:
        del new["reasoning_content"]
    return new if end else new | {"finish_reason": "length"}


def _alone(before: str, after: str) -> bool:
    """Whether the text between has a line of its own."""
    return (not before or before.endswith("\n")) and (not after or after.startswith("\n"))


# -- as a template is shown them ---------------------------------------------------------------------------------------


def read_message(message: Message, opened: bool) -> Message:
    """A message with an answer's ``<think>`` in ``reasoning_content``, and with complete characters only.

    An answer that was cut inside its reasoning has ``content`` "" then, one that was cut inside a character ends before
    it, both with ``finish_reason`` "length".

    Args:
        message: in normal form.
        opened: an answer begins inside its reasoning, because the prompt has opened it.

    Raises:
        DataError: an answer from whose text the target's own cannot be recovered.
    """
    message = message | {"content": message.get("content") or ""}
    if message["role"] != "assistant":
        return message
    try:
        message = split_reasoning(message, opened and message.get("finish_reason") == "length")
    except Unusable as problem:
        raise DataError(str(problem), key="messages") from None
    calls = message.get("tool_calls") or []
    if message.get("finish_reason") == "length" and not arguments_are_objects(calls):
        raise DataError(CUT_CALL, key="messages")
    regenerated = "finish_reason" in message and message.get("weight", 1) != 0
    part = "content" if message["content"] else "reasoning_content"
    text = str(message.get(part) or "")
    if text.endswith(_NO_CHARACTER) and not calls:
        message = message | {part: text.rstrip(_NO_CHARACTER).rstrip(), "finish_reason": "length"}
    texts = (message["content"], message.get("reasoning_content") or "", str(calls))
    if regenerated and any(_NO_CHARACTER in one for one in texts):
        raise DataError(REPLACED, key="messages", remedy="let the target answer this prompt again")
    return message


def medium_in(content: Any) -> str | None:
    """The first part of a message's content that is an image, a video or sound; None: there is none."""
    if isinstance(content, str):
        return None  # as most are
    parts = content if isinstance(content, list) else [content]
    kinds = (part.get("type") for part in parts if isinstance(part, Mapping))
    return next((MEDIA[kind] for kind in kinds if isinstance(kind, str) and kind in MEDIA), None)


def characters(value: Any) -> int:
    """Characters of all text in a value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(characters(key) + characters(one) for key, one in value.items())
    return sum(map(characters, value)) if isinstance(value, list | tuple) else 0


def for_template(message: Message, thinking: bool) -> Message:
    """A message without what does not concern the template, and without reasoning unless the target thinks."""
    hidden = _NOT_THE_TEMPLATES if thinking else (*_NOT_THE_TEMPLATES, "reasoning_content")
    return {key: value for key, value in message.items() if key not in hidden}


def developer_as_system(messages: Sequence[Message]) -> list[Message]:
    """For templates without a developer role: those at the beginning join the system message, others are renamed."""
    head = next((i for i, one in enumerate(messages) if one["role"] not in ("system", "developer")), len(messages))
    rest = [one | {"role": "system"} if one["role"] == "developer" else one for one in messages[head:]]
    text = "\n\n".join(one["content"] for one in messages[:head])
    return [*([{"role": "system", "content": text}] if head else []), *rest]


def stops_in_reasoning(message: Message) -> bool:
    """Whether there is reasoning and nothing after it: the target was cut before it answered."""
    return bool(message.get("reasoning_content")) and not message["content"].strip() and not message.get("tool_calls")
