"""Tools, calls, system columns and reasoning, in the many forms that data sets and servers write them in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deepspec.cache.plan import read_rows
from deepspec.data.conversations import read_conversations
from deepspec.data.dialogue import read_answer
from deepspec.data.messages import Unusable, normal_row, normal_tools, split_reasoning, without_nulls
from deepspec.data.prepare import PrepareOptions, prepare
from deepspec.data.sources import to_messages
from deepspec.errors import DataError

ASK = {"role": "user", "content": "Weather in Oslo?"}


def tool(name: str, *names: str) -> dict[str, Any]:
    properties = {one: {"type": "string", "enum": [None, "a"]} for one in names}
    parameters = {"type": "object", "properties": properties, "required": [*names]}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


WEATHER = tool("weather", "city")
FUNCTION = WEATHER["function"]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


@pytest.mark.parametrize(
    "given",
    [
        [WEATHER],
        WEATHER,
        [FUNCTION],
        json.dumps([WEATHER]),
        json.dumps(FUNCTION),
        [json.dumps(WEATHER)],
        [{"type": "function", "function": json.dumps(FUNCTION)}],
        [{"type": "function", "function": FUNCTION | {"parameters": json.dumps(FUNCTION["parameters"])}}],
        [WEATHER | {"extra": None, "other": {"a": None, "b": {"c": None}}}],
    ],
)
def test_tools_have_one_form(given: Any) -> None:
    assert normal_tools(given) == [WEATHER]


def test_tools_that_cannot_be_read_have_a_reason() -> None:
    for given, reason in ("[{", "not JSON"), ("3", "no list"), ([3], "no object"), ('["\\ud83d"]', "not JSON"):
        with pytest.raises(Unusable, match=reason):
            normal_tools(given)
    assert normal_tools(None) == normal_tools("  ") == normal_tools("null") == normal_tools([]) == []


def test_nulls_of_arrow_go_and_written_ones_in_text_and_lists_stay() -> None:
    filled = {"properties": {"city": {"type": "string", "x": None}, "unit": {"type": None}}, "enum": [None, 1]}
    assert without_nulls(filled) == {"properties": {"city": {"type": "string"}}, "enum": [None, 1]}
    assert without_nulls({"parameters": {"properties": {"a": None}}}) == {"parameters": {"properties": {}}}
    text = {"name": "f", "parameters": '{"properties": {"a": {"default": null}}}'}
    assert normal_tools([text])[0]["function"]["parameters"] == {"properties": {"a": {"default": None}}}


@pytest.mark.parametrize(
    "answer",
    [
        {"content": None, "tool_calls": [CALL]},
        {"content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Oslo", "x": None}}}]},
        {
            "content": None,
            "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}, "id": None}],
        },
        {"content": None, "tool_calls": json.dumps([CALL])},
        {"content": None, "tool_calls": [{"name": "weather", "arguments": {"city": "Oslo"}}]},
        {"content": None, "function_call": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
    ],
)
def test_calls_have_one_form_with_arguments_as_objects(answer: dict[str, Any]) -> None:
    message = to_messages({"messages": [ASK, {"role": None if "from" in answer else "assistant"} | answer]})[1]
    assert (message["role"], message["content"]) == ("assistant", "")
    assert [call["function"] for call in message["tool_calls"]] == [CALL["function"]]
    assert None not in message["tool_calls"][0].values()


def test_arguments_that_are_no_object_are_refused() -> None:
    for arguments in ("{broken", "[1]", '{"a": NaN}', [1]):
        call = {"function": {"name": "f", "arguments": arguments}}
        with pytest.raises(Unusable, match="arguments that are not a JSON object"):
            to_messages({"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [call]}]})


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_column_is_the_system_message_in_every_stage(column: str, tmp_path: Path) -> None:
    system = {"role": "system", "content": "Only French."}
    assert to_messages({column: " Only French. ", "prompt": ASK["content"]}) == [system, ASK]
    assert to_messages({column: "Only French.", "messages": [system, ASK]}) == [system, ASK]
    assert to_messages({column: None, "messages": [ASK]}) == [ASK]
    with pytest.raises(Unusable, match="two different system messages"):
        to_messages({column: "Only Dutch.", "messages": [system, ASK]})
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"id": "a", column: "Only French.", "tools": json.dumps([WEATHER]), "messages": [ASK]}))
    (read,), ((_, built),) = list(read_conversations(path)), list(read_rows(path, 0, 0, 1))
    assert read == built
    assert (read["messages"], read["tools"]) == ([system, ASK], [WEATHER])
    path.write_text(json.dumps({"id": "a", "tools": "[{", "messages": [ASK]}))
    with pytest.raises(DataError, match="line 1: tools that are not JSON"):
        list(read_conversations(path))
    assert [reason for _, reason in read_rows(path, 0, 0, 1)] == ["tools that are not JSON"]


def test_null_text_parts_and_unread_columns_are_counted(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": None}, {"type": "text", "text": "Hello you"}]
    notes: list[str] = []
    assert to_messages({"messages": [{"role": "user", "content": parts}]}, notes) == [
        {"role": "user", "content": "Hello you"}
    ]
    assert notes == ["a text part that is null"]
    with pytest.raises(Unusable, match="an empty user turn"):
        to_messages({"messages": [{"role": "user", "content": parts[:1]}]})
    rows = [{"messages": [{"role": "user", "content": parts}], "history": [["a", "b"]], "language": None}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = prepare(PrepareOptions({str(tmp_path / "x.jsonl"): 1.0}, 0.0), tmp_path / "out")
    assert (report.left_out, report.unread) == ({"a text part that is null": 1}, {"history": 1})
    assert "history (1 rows)" in "\n".join(report.lines())


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (assistant("<think>\nWhy.\n</think>\n\nSo."), assistant("So.", reasoning_content="Why.")),
        (assistant("Why.\n</think>\n\nSo."), assistant("So.", reasoning_content="Why.")),
        (assistant("<think>\n\n</think>\n\nSo."), assistant("So.")),
        (assistant("So.", reasoning="Why."), assistant("So.", reasoning_content="Why.")),
        (assistant("<think>Why."), assistant("", reasoning_content="Why.", finish_reason="length")),
        (assistant("The tag </think> ends it."), assistant("The tag </think> ends it.")),
        (assistant("See <think>x</think>."), assistant("See <think>x</think>.")),
        (assistant("cut", finish_reason="length"), assistant("cut", finish_reason="length")),
    ],
)
def test_prepared_answers_have_their_reasoning_apart(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert to_messages({"messages": [ASK, given]})[1] == wanted


def test_reasoning_that_stands_twice_is_refused_where_it_differs() -> None:
    twice = assistant("<think>Why.</think>So.", reasoning_content="Why.")
    assert split_reasoning(twice) == assistant("So.", reasoning_content="Why.")
    with pytest.raises(Unusable, match="reasoning twice"):
        split_reasoning(twice | {"reasoning_content": "Because."})


@pytest.mark.parametrize(
    ("content", "reasoning", "reason", "opened", "wanted"),
    [
        ("four \ufffd", None, "length", False, ({"content": "four "}, "length")),
        ("four \ufffd\ufffd", None, "length", False, ({"content": "four "}, "length")),
        ("four 4\ud83d", None, "length", False, ({"content": "four 4"}, "length")),
        ("a \ufffd b", None, "length", False, ({"content": "a \ufffd b"}, "length")),
        ("", "why \ufffd", "length", False, ({"content": "", "reasoning_content": "why "}, "length")),
        ("<think>\nwhy \ufffd", None, "length", False, ({"content": "", "reasoning_content": "why "}, "length")),
        ("<think>\nwhy", None, "stop", False, ({"content": "", "reasoning_content": "why"}, "length")),
        ("why", None, "length", True, ({"content": "", "reasoning_content": "why"}, "length")),
        ("why</think>\n\nso", None, "stop", True, ({"content": "so", "reasoning_content": "why"}, "stop")),
        ("\nso", "why", "stop", True, ({"content": "so", "reasoning_content": "why"}, "stop")),
    ],
)
def test_an_answer_of_the_target_keeps_only_what_it_wrote_whole(
    content: str, reasoning: str | None, reason: str, opened: bool, wanted: Any
) -> None:
    assert read_answer(content, reasoning, None, reason, opened) == wanted


def test_a_call_that_was_cut_goes_and_a_broken_one_is_refused() -> None:
    broken = {"function": {"name": "f", "arguments": '{"city": "Os'}}
    assert read_answer("I ask.", None, [broken], "length", False) == ({"content": "I ask."}, "length")
    assert read_answer("", None, [CALL, broken], "length", False)[0]["tool_calls"] == [CALL]
    for calls, reason, words in (
        ([broken], "stop", "not a JSON object"),
        ([broken], "length", "answered nothing"),
        (None, "stop", "answered nothing after its reasoning"),
    ):
        with pytest.raises(Unusable, match=words):
            read_answer("", None if calls else "why", calls, reason, False)


def test_reading_twice_changes_nothing() -> None:
    row = {"id": "a", "system": "Brief.", "tools": json.dumps([FUNCTION]), "messages": [ASK, assistant("x", name=None)]}
    once = normal_row(row)
    assert normal_row(once) == once


@pytest.mark.parametrize("given", [["be brief"], {"text": "be brief"}])
def test_a_system_column_other_than_text_is_a_reason(given: Any) -> None:
    row = {"id": "a", "messages": [{"role": "user", "content": "q"}], "system": given}
    with pytest.raises(Unusable, match="a system column other than text"):
        normal_row(row)


def test_marks_around_reasoning_that_stands_apart_go() -> None:
    (message,) = normal_row({"messages": [assistant("b", reasoning_content="<think>\nwhy\n</think>")]})["messages"]
    assert message == assistant("b", reasoning_content="why")
