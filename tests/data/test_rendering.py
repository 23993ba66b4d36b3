"""What a template leaves out, what an answer that was cut teaches, and what a rendering costs."""

from __future__ import annotations

import json
import random
from typing import Any

import data_tools as tools
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepspec.data.answer_spans import AnswerSpan, SpanFinder, spans_from_prefixes
from deepspec.data.chat import Renderer, render_row, render_rows
from deepspec.data.messages import normal_row
from deepspec.data.refusals import NoSupervision, RenderCounts, refusal_lines
from deepspec.errors import DataError

# As Qwen3: knows no developer
ROLES = """
{%- for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

NO_SYSTEM = ROLES.replace("'system', ", "")

# As Gemma: refuses what it does not know
STRICT = "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}{{ raise_exception('Unknown role') }}"
STRICT += "{% endif %}{% endfor %}" + ROLES

# As DeepSeek-R1's distillations: the prompt opens the reasoning, a finished answer has none
THINKER = """
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{{- m.content.split('</think>')[-1].lstrip() }}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"""

# As Qwen3's thinking-only models: the prompt opens the reasoning, the last answer has it
ALWAYS_THINKS = """
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if loop.last and m.role == 'assistant' %}
{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}
{{- m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"""

# As Mistral: the system message stands before the last user's text, and only there
LATE_SYSTEM = """
{%- for m in messages %}{% if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if loop.last and m.role == 'user' and messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
{{- m.content + '<|im_end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Calls with braces of its own, as Gemma4
BRACES = """
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}
{%- for c in m.tool_calls or [] %}{{ c.function.name + '{' }}
{%- if c.function.arguments is mapping %}{% for k, v in c.function.arguments|items %}{{ k ~ ':' ~ v }}{% endfor %}
{%- else %}{{ c.function.arguments }}{% endif %}{{ '}' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

NAME_ALONE = BRACES.replace("{{ k ~ ':' ~ v }}", "")
WEATHER = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(arguments: Any, name: str = "weather") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def renderer(template: str, family: str = "llama", **more: Any) -> Renderer:
    return Renderer(tools.with_template(tools.small_tokenizer(), template), family, **more)


def shown(one: Renderer, messages: tools.Messages, use: Any = None) -> tuple[str, str]:
    """(the whole text, the supervised text) of a row that a reader has read"""
    row = normal_row({"messages": messages, "tools": use})
    rendered = one.conversation(row["messages"], row.get("tools"))
    pairs = zip(rendered.input_ids, rendered.loss_mask, strict=True)
    return one.tokenizer.decode(rendered.input_ids), one.tokenizer.decode([token for token, on in pairs if on])


def reason(one: Renderer, messages: tools.Messages, use: Any = None) -> str:
    found = render_row(one, normal_row({"id": "x", "messages": messages} | ({"tools": use} if use else {})), 1)
    assert isinstance(found, str), one.tokenizer.decode(found.input_ids)
    return found


# -- what a template leaves out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("system_prompt", [None, "Be brief."])
def test_a_developer_unknown_to_the_template_becomes_the_system_message(system_prompt: str | None) -> None:
    one = renderer(ROLES, system_prompt=system_prompt)
    messages = [{"role": "developer", "content": "In French."}, user("Hi"), answer("Salut")]
    text, supervised = shown(one, messages)
    system = "In French." if system_prompt is None else "Be brief.\n\nIn French."
    assert text.startswith(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi")
    assert supervised == "Salut<|im_end|>"
    assert one.prompt(messages[:2]) == one.conversation(messages).input_ids[: len(one.prompt(messages[:2]))]


def test_a_developer_in_the_middle_becomes_a_system_message_in_its_place() -> None:
    one = renderer(ROLES)
    text, _ = shown(one, [user("a"), answer("b"), {"role": "developer", "content": "mind"}, user("c"), answer("d")])
    assert "b<|im_end|>\n<|im_start|>system\nmind<|im_end|>\n<|im_start|>user\nc" in text


def test_a_developer_known_to_the_template_stays_beside_the_system_prompt() -> None:
    text, _ = shown(
        renderer(tools.CHATML, system_prompt="Be brief."),
        [{"role": "developer", "content": "In French."}, user("Hi"), answer("Salut")],
    )
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>developer\nIn French.<|im_end|>\n")


@pytest.mark.parametrize(
    ("template", "messages", "use", "wanted"),
    [
        (tools.CHATML, [user("a"), answer("b", tool_calls=[call({"city": "Oslo"})])], None, "tool calls"),
        (tools.CHATML, [user("a"), answer("", tool_calls=[call({})])], None, "tool calls"),
        (NAME_ALONE, [user("a"), answer("", tool_calls=[call({"city": "Oslo"})])], None, "tool calls"),
        (tools.CHATML, [user("a"), answer("b")], WEATHER, "the tools"),
        (ROLES, [user("a"), answer("b"), {"role": "tool", "content": "5"}, answer("c")], None, "a tool's result"),
        (NO_SYSTEM, [{"role": "system", "content": "s"}, user("a"), answer("b")], None, "a system message"),
    ],
)
def test_what_the_text_lacks_is_refused_by_name(template: str, messages: Any, use: Any, wanted: str) -> None:
    one = renderer(template)
    assert reason(one, messages, use) == f"the chat template leaves out {wanted}"
    prompt = messages[:1] if use else [message for message in messages if message["role"] != "assistant"]
    if use or wanted == "a system message":
        with pytest.raises(DataError, match="leaves out"):
            one.prompt(prompt, use)


def test_the_system_prompt_of_the_recipe_must_be_in_the_text() -> None:
    one = renderer(NO_SYSTEM, system_prompt="Be brief.")
    assert reason(one, [user("a"), answer("b")]) == "the chat template leaves out a system message"


def test_a_text_that_stands_elsewhere_does_not_hide_one_that_is_left_out() -> None:
    one = renderer(NO_SYSTEM)
    messages = [{"role": "system", "content": "a"}, user("a"), answer("a")]
    assert reason(one, messages) == "the chat template leaves out a system message"


def test_a_system_message_that_the_prompt_alone_shows_counts() -> None:
    messages = [{"role": "system", "content": "Be brief."}, user("a"), answer("b"), user("c"), answer("d")]
    text, supervised = shown(renderer(LATE_SYSTEM), messages)
    assert text == (
        "<|im_start|>user\na<|im_end|><|im_start|>assistant\nb<|im_end|>"
        "<|im_start|>user\nBe brief.\n\nc<|im_end|><|im_start|>assistant\nd<|im_end|>"
    )
    assert supervised == "b<|im_end|>d<|im_end|>"


def test_a_template_that_refuses_gives_its_own_words_and_no_text_of_the_row() -> None:
    messages = [{"role": "tool", "content": "secret"}, user("a"), answer("b")]
    assert reason(renderer(STRICT), messages) == "the chat template refuses the messages (Unknown role)"
    needs = "{{ messages[0].tool_call_id + 1 }}" + tools.CHATML
    broken = renderer("{% if messages|length > 2 %}" + needs + "{% else %}" + tools.CHATML + "{% endif %}")
    assert reason(broken, messages) == "the chat template refuses the messages"


def test_marks_that_stand_in_the_texts_themselves_do_no_harm() -> None:
    one = renderer(tools.CHATML)
    messages = [user("Qj7vo0x a Qj7vc0x"), answer("Qj7vo1x b"), user("c"), answer("d Qj7vc3x")]
    assert shown(one, messages)[1] == "Qj7vo1x b<|im_end|>d Qj7vc3x<|im_end|>"


TEMPLATES = {
    "roles": ROLES,
    "no system": NO_SYSTEM,
    "strict": STRICT,
    "late system": LATE_SYSTEM,
    "braces": BRACES,
    "chatml": tools.CHATML,
    "marked": tools.MARKED,
    "reasoning": tools.REASONING,
    "channel": tools.CHANNEL,
    "headers": tools.HEADERS,
}
HEADS: tuple[tuple[str, ...], ...] = ((), ("system",), ("developer",), ("system", "developer"))


@st.composite
def any_messages(draw: Any) -> tools.Messages:
    """All roles, every text of its own."""
    messages = [{"role": role, "content": f"{role} 0"} for role in draw(st.sampled_from(HEADS))]
    for turn in range(draw(st.integers(1, 3))):
        messages.append(user(f"user {turn}"))
        if draw(st.booleans()):
            text = draw(st.sampled_from(("", f"calling {turn}")))
            messages.append(answer(text, tool_calls=[call({"a": f"arg {turn}"})]))
            messages.append({"role": "tool", "content": f"tool {turn}"})
        messages.append(answer(f"answer {turn}"))
    return messages


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(TEMPLATES)), any_messages(), st.sampled_from([None, "recipe 0"]))
def test_a_row_is_whole_in_the_text_or_refused(name: str, messages: tools.Messages, system_prompt: str | None) -> None:
    """Every text once, the answers and only they supervised, whatever the template."""
    one = renderer(TEMPLATES[name], system_prompt=system_prompt)
    found = render_row(one, {"id": "x", "messages": messages}, 1)
    plain = {message["role"] for message in messages} == {"user", "assistant"}
    if isinstance(found, str):
        assert found.startswith("the chat template")
        assert not plain or name in ("no system", "strict")
        return
    text, supervised = shown(one, messages)
    own = any(message["role"] == "system" for message in messages)
    texts = [message["content"] for message in messages] + ([system_prompt] if system_prompt and not own else [])
    texts += [f"arg {turn}" for turn in range(3) if f'"arg {turn}"' in json.dumps(messages)]
    assert all(text.count(one) == 1 for one in texts if one)
    assert all(message["content"] in supervised for message in messages if message["role"] == "assistant")
    assert not any(word in supervised for word in ("user", "system", "developer", "tool ", "recipe"))


# -- reasoning --------------------------------------------------------------------------------------------------------

THOUGHT = "Two and two make four."


@pytest.mark.parametrize("last", [answer(f"{THOUGHT}\n</think>\n\n4"), answer("4", reasoning_content=THOUGHT)])
def test_an_answer_behind_an_open_thought_or_without_its_own_is_refused(last: dict[str, Any]) -> None:
    messages = [user("2+2?"), last]
    opens = "the chat template opens the reasoning before an answer without reasoning"
    assert reason(renderer(THINKER, "qwen3"), messages) == opens
    lacks = "the chat template leaves out the reasoning of an answer"
    assert reason(renderer(THINKER, "qwen3", thinking=True), messages) == lacks
    assert reason(renderer(tools.CHATML, thinking=True), [user("a"), answer("4", reasoning_content=THOUGHT)]) == lacks
    assert reason(renderer(THINKER, "qwen3", thinking=True), [user("2+2?"), answer("4")]) == opens
    assert reason(renderer(THINKER, "qwen3", thinking=True), [user("2+2?"), answer("<think>Two and")]) == lacks


def test_a_last_answer_that_is_context_may_lack_its_reasoning() -> None:
    messages = [user("a"), answer("b"), user("2+2?"), answer("4", reasoning_content=THOUGHT, weight=0)]
    assert shown(renderer(tools.CHATML, thinking=True), messages)[1] == "b<|im_end|>"


def test_an_open_thought_before_an_answer_with_reasoning_is_supervised_from_there() -> None:
    one = renderer(ALWAYS_THINKS, "qwen3", thinking=True)
    messages = [user("1+1?"), answer("2"), user("2+2?"), answer("4", reasoning_content=THOUGHT)]
    assert shown(one, messages)[1] == f"{THOUGHT}\n</think>\n\n4<|im_end|>"
    cut = [*messages[:3], answer("Two and", finish_reason="length")]  # no tag: the prompt has opened the thought
    assert shown(one, cut)[1] == "Two and"
    assert shown(one, cut)[0].endswith("<think>\nTwo and")


def test_earlier_answers_whose_reasoning_is_stripped_are_not_supervised() -> None:
    case = tools.small_case("reasoning")
    one = Renderer(case.tokenizer, case.family, thinking=True)
    messages = [
        user("1+1?"),
        answer("2", reasoning_content="One."),
        user("2+2?"),
        answer("4", reasoning_content="Two."),
    ]
    text, supervised = shown(one, messages)
    assert "<|im_start|>assistant\n2<|im_end|>" in text
    assert supervised == "<think>\nTwo.\n</think>\n\n4<|im_end|>"
    assert "2<|im_end|>" in shown(Renderer(case.tokenizer, case.family), messages)[1]


@pytest.mark.parametrize(
    "last",
    [
        answer("", reasoning_content="Two and", finish_reason="length"),
        answer("", reasoning_content="Two and"),
        answer("", reasoning="Two and", finish_reason="stop"),
        answer("<think>\nTwo and", finish_reason="length"),
        answer("<think>\nTwo and"),
        answer("<think>Two and\ufffd", finish_reason="length"),
    ],
)
def test_an_answer_cut_inside_its_reasoning_ends_there(last: dict[str, Any]) -> None:
    case = tools.small_case("reasoning")
    messages = [user("2+2?"), last]
    text, supervised = shown(Renderer(case.tokenizer, case.family, thinking=True), messages)
    assert supervised == "<think>\nTwo and"
    assert text.endswith(supervised)
    without = Renderer(case.tokenizer, case.family)  # nothing of an answer is there
    with pytest.raises(NoSupervision):
        without.conversation(messages)
    more = [*messages, user("1+1?"), answer("2", reasoning_content="One.")]
    thinking = Renderer(case.tokenizer, case.family, thinking=True)
    assert shown(thinking, more)[1] == "<think>\nOne.\n</think>\n\n2<|im_end|>"


@pytest.mark.parametrize("thinking", [False, True])
def test_reasoning_inside_the_content_is_read_as_reasoning(thinking: bool) -> None:
    case = tools.small_case("reasoning")
    one = Renderer(case.tokenizer, case.family, thinking=thinking)
    apart = one.conversation([user("2+2?"), answer("4", reasoning_content=THOUGHT)])
    for inside in (f"<think>\n{THOUGHT}\n</think>\n\n4", f"<think>{THOUGHT}</think>4", f"{THOUGHT}\n</think>\n\n4"):
        assert one.conversation([user("2+2?"), answer(inside)]) == apart


# -- answers that were cut, and calls ---------------------------------------------------------------------------------


def test_an_answer_cut_inside_a_character_ends_before_it() -> None:
    one = renderer(tools.CHATML)
    for text in ("one \u4f60\ufffd", "one \u4f60\ufffd\ufffd", "one \u4f60 \ufffd"):
        for more in ({"finish_reason": "length"}, {"finish_reason": "stop"}, {}):
            assert shown(one, [user("a"), answer(text, **more)])[1] == "one \u4f60"
    middle = [user("a"), answer("one \ufffd two", finish_reason="stop")]
    assert reason(one, middle).startswith("an answer with U+FFFD")
    assert reason(one, [user("a"), answer("\ufffd", finish_reason="length")]) == "no supervised token"
    assert shown(one, [user("a \ufffd b"), answer("c")])[1] == "c<|im_end|>"  # a user may write it


@pytest.mark.parametrize("finish_reason", ["stop", "tool_calls", "length", None])
def test_a_turn_with_calls_ends_there_whatever_the_finish_reason_says(finish_reason: str | None) -> None:
    more = {} if finish_reason is None else {"finish_reason": finish_reason}
    messages = [user("a"), answer("b ", tool_calls=[call({"city": "Oslo"})], **more)]
    assert shown(renderer(BRACES), messages)[1] == "b weather{city:Oslo}<|im_end|>"


def test_a_call_cut_inside_its_arguments_is_refused() -> None:
    messages = [user("a"), answer("", tool_calls=[call('{"city": "Os')], finish_reason="length")]
    assert reason(renderer(BRACES), messages) == "an answer cut inside a tool call"


def test_arguments_are_objects_without_nulls_when_the_template_sees_them() -> None:
    one = renderer(BRACES)
    texts = set()
    for arguments in ({"city": "Oslo"}, '{"city": "Oslo"}', {"city": "Oslo", "when": None}):
        messages = [user("a"), answer("", tool_calls=[call(arguments)]), {"role": "tool", "content": "5"}, answer("b")]
        texts.add(shown(one, messages))
    assert {supervised for _, supervised in texts} == {"weather{city:Oslo}<|im_end|>b<|im_end|>"}
    schema = {"type": "object", "properties": {"city": {"type": "string", "enum": None}}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    text, _ = shown(renderer("{{ tools | tojson if tools }}" + tools.CHATML), [user("a"), answer("b")], [tool])
    assert "null" not in text
    assert '"city": {"type": "string"}' in text


# -- the cost ---------------------------------------------------------------------------------------------------------


def long_conversation(case: tools.Case, turns: int) -> tools.Messages:
    """Every second turn calls a tool where the template knows any."""
    messages: tools.Messages = []
    for turn in range(turns):
        messages.append(user(f"Question {turn} of some length, as people ask them."))
        if case.tools and turn % 2:
            messages += [answer("", tool_calls=[call({"city": f"Oslo {turn}"})]), {"role": "tool", "content": "5"}]
        messages.append(answer(f"Answer {turn}, of some words."))
    return messages


@pytest.mark.parametrize("name", tools.SMALL)
def test_the_cost_of_a_rendering_grows_with_its_length(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters rendered and tokenised, and the number of renderings, for 20 and 80 turns."""
    case, characters, renderings = tools.small_case(name), 0, 0
    original = Renderer._render

    def counted(self: Renderer, *given: Any, **more: Any) -> str:
        nonlocal characters, renderings
        text = original(self, *given, **more)
        characters, renderings = characters + len(text), renderings + 1
        return text

    monkeypatch.setattr(Renderer, "_render", counted)
    one = Renderer(case.tokenizer, case.family)
    use = WEATHER if case.tools else None
    one.conversation(long_conversation(case, 2), use)  # the template is asked once what stands between two messages
    for turns in (20, 80):
        characters = renderings = 0
        length = len(case.tokenizer.decode(one.conversation(long_conversation(case, turns), use).input_ids))
        assert renderings <= 5
        assert characters <= 6 * length


def test_prefixes_are_tokenised_once() -> None:
    case, tokenised = tools.small_case("chatml"), 0

    def encode(text: str) -> list[int]:
        nonlocal tokenised
        tokenised += len(text)
        return list(case.tokenizer(text, add_special_tokens=False)["input_ids"])

    text = "".join(f"<|im_start|>user\nq {n}<|im_end|>\n<|im_start|>assistant\na {n}<|im_end|>\n" for n in range(50))
    places = [text.index(f"a {n}<") for n in range(50)]
    answers = [AnswerSpan(start, text.index(">", start) + 1, True) for start in places]
    ids = encode(text)
    tokenised = 0
    bounds = spans_from_prefixes(encode, text, ids, answers)
    assert tokenised <= len(text)
    assert [case.tokenizer.decode(ids[a:b]) for a, b in bounds] == [f"a {n}<|im_end|>" for n in range(50)]


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("name", [name for name in tools.SMALL if "marked" not in name])
def test_marks_tell_the_places_that_comparing_tells(name: str, thinking: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case, seen = tools.small_case(name), 0

    def both(self: SpanFinder, messages: Any, use: Any, full: str, reading: Any) -> Any:
        nonlocal seen
        plain = self.by_comparing(messages, use, full)
        assert self.by_marks(messages, use, full, reading) == plain
        seen += 1
        return plain

    monkeypatch.setattr(SpanFinder, "find", both)
    one = Renderer(case.tokenizer, case.family, thinking=thinking)
    rng = random.Random(f"places {name} {thinking}")
    for _ in range(25):
        messages = tools.make_conversation(rng, case, thinking)
        render_row(one, {"id": "x", "messages": messages} | ({"tools": WEATHER} if case.tools else {}), 1)
    assert seen == 25


def test_reasons_are_counted_most_frequent_first_with_the_first_row() -> None:
    rows = [{"id": f"calls {n}", "messages": [user("a"), answer("b", tool_calls=[call({})])]} for n in range(2)]
    rows += [{"id": "none", "messages": [user("a")]}, {"id": "good", "messages": [user("a"), answer("b")]}]
    counts = RenderCounts()
    kept = [row["id"] for row, _ in render_rows(renderer(tools.CHATML), rows, 1, counts)]
    assert kept == ["good"]
    assert counts.lines() == [
        "dropped, the chat template leaves out tool calls: 2 (first: calls 0)",
        "dropped, no supervised token: 1 (first: none)",
    ]
    assert refusal_lines({"a": 1, "b": 2}) == ["dropped, b: 2", "dropped, a: 1"]


def test_reasoning_that_prompt_and_finished_answer_open_otherwise_is_opened_once() -> None:
    template = tools.CHATML.replace(
        "m.content", "('<think>' + m.reasoning_content + '</think>' if m.reasoning_content else '') + m.content"
    )
    template = template.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif")
    text, learned = shown(renderer(template, thinking=True), [user("q"), answer("so", reasoning_content="why")])
    assert text.count("<think>") == 1
    assert learned == "why</think>so<|im_end|>"
