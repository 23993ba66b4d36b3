"""The rendering and its loss mask: on small templates always, on real tokenizers where DEEPSPEC_TOKENIZERS says."""

from __future__ import annotations

import random
import unicodedata
from typing import Any

import data_tools as tools
import pytest
from data_tools import Case, Messages
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from deepspec.data import chat
from deepspec.data.chat import Renderer, render_rows
from deepspec.data.refusals import NoSupervision, RenderCounts
from deepspec.errors import DataError

WEATHER = [{"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}]


def runs(ids: list[int], mask: list[int]) -> list[list[int]]:
    """The ids of each supervised stretch."""
    out: list[list[int]] = []
    for i, (token, on) in enumerate(zip(ids, mask, strict=True)):
        if on:
            if i == 0 or not mask[i - 1]:
                out.append([])
            out[-1].append(token)
    return out


def fault(case: Case, messages: Messages, ids: list[int], mask: list[int], thinking: bool) -> str | None:
    """How the supervised text differs from what the answers are, or None."""
    normal = (lambda text: unicodedata.normalize("NFC", text)) if case.name == "qwen3" else str
    found = [case.tokenizer.decode(run, skip_special_tokens=False) for run in runs(ids, mask)]
    wanted = []
    last_user = max(i for i, message in enumerate(messages) if message["role"] == "user")
    for i, message in enumerate(messages):
        stripped = thinking and i < last_user and message.get("reasoning_content")  # not as the target wrote it
        if message["role"] == "assistant" and not stripped:
            ends = not (case.name == "channel" and message.get("tool_calls"))
            if case.name == "harmony" and i < len(messages) - 1:  # <|end|> of the history: the target wrote <|return|>
                ends = False
            wanted.append(normal(case.shown(messages, i, thinking)) + (case.ending if ends else ""))
    wanted = [one for one in wanted if one]
    return None if found == wanted else f"{found} != {wanted}"


def check(case: Case, renderer: Renderer, messages: Messages) -> bool:
    """Check one conversation whole; False where it is rightly refused: an answer begins with white space."""
    use = WEATHER if case.tools else None
    try:
        rendered = renderer.conversation(messages, use)
    except DataError as problem:
        if "half prompt" not in problem.problem:
            raise
        leading = [m["content"][:1].isspace() for m in messages if m["role"] == "assistant"]
        assert any(leading), messages
        assert not case.trims
        return False
    prompt = renderer.prompt(messages[:-1], use)
    assert rendered.input_ids[: len(prompt)] == prompt
    assert rendered.loss_mask[len(prompt)] == 1
    problem = fault(case, messages, rendered.input_ids, rendered.loss_mask, renderer.thinking)
    assert problem is None, problem
    for shifted in ([*rendered.loss_mask[1:], 0], [0, *rendered.loss_mask[:-1]]):
        assert fault(case, messages, rendered.input_ids, shifted, renderer.thinking) is not None
    return True


def check_many(case: Case, count: int, thinking: bool) -> None:
    renderer = Renderer(case.tokenizer, case.family, thinking=thinking)
    rng = random.Random(f"{case.name}{thinking}")
    rendered = sum(check(case, renderer, tools.make_conversation(rng, case, thinking)) for _ in range(count))
    assert rendered > 0.8 * count


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("name", tools.SMALL)
def test_supervised_text_is_the_answers(name: str, thinking: bool) -> None:
    check_many(tools.small_case(name), 100, thinking)


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("name", tools.REAL)
def test_supervised_text_is_the_answers_with_real_tokenizers(name: str, thinking: bool) -> None:
    check_many(tools.real_case(name), 500, thinking)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1, max_size=40).filter(
    str.strip
)


@st.composite
def conversations(draw: Any) -> Messages:
    messages: Messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(TEXT)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(TEXT)})
        messages.append({"role": "assistant", "content": draw(TEXT)})
    return messages


def keeps(case: Case, text: str) -> bool:
    """Whether the tokenizer has all of the text (SmolLM2's lacks some bytes and leaves those out)."""
    ids = case.tokenizer(text, add_special_tokens=False)["input_ids"]
    return bool(unicodedata.normalize("NFC", text) == unicodedata.normalize("NFC", case.tokenizer.decode(ids)))


def hypothesis_run(case: Case, examples: int) -> None:
    renderer = Renderer(case.tokenizer, case.family)

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(conversations())
    def one(messages: Messages) -> None:
        assume(all(keeps(case, message["content"]) for message in messages))
        check(case, renderer, messages)

    one()


@pytest.mark.parametrize("name", tools.SMALL)
def test_any_text_on_small_templates(name: str) -> None:
    hypothesis_run(tools.small_case(name), 40)


@pytest.mark.parametrize("name", tools.REAL)
def test_any_text_on_real_tokenizers(name: str) -> None:
    hypothesis_run(tools.real_case(name), 300)


@pytest.mark.parametrize("name", tools.SMALL)
def test_offsets_and_prefixes_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast way of finding the tokens of an answer equals its plain twin."""
    case = tools.small_case(name)
    renderer = Renderer(case.tokenizer, case.family)
    rng = random.Random(5)
    given_messages = [tools.make_conversation(rng, case) for _ in range(60)]

    def render_all() -> list[Any]:
        out: list[Any] = []
        for messages in given_messages:
            try:
                out.append(renderer.conversation(messages))
            except DataError as problem:
                out.append(problem.problem)
        return out

    fast = render_all()
    monkeypatch.setattr(chat, "spans_from_offsets", lambda *_: None)
    plain = render_all()
    if name == "headers-gpt2":  # its newlines split by what follows, so that no prefix of text is one of tokens
        assert all("half prompt" in one for one in plain)
    else:
        assert fast == plain


def test_newline_header_of_gpt2_regex_has_the_prompts_ids() -> None:
    """The prompt's two newlines are one token alone and two before a word: the conversation takes the prompt's."""
    case = tools.small_case("headers-gpt2")
    renderer = Renderer(case.tokenizer, case.family)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "word"}]
    prompt = renderer.prompt(messages[:1])
    whole = case.tokenizer(case.tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)
    assert whole["input_ids"][: len(prompt)] != prompt
    assert renderer.conversation(messages).input_ids[: len(prompt)] == prompt


def test_prompt_ids_are_the_same_wherever_a_prompt_is_made() -> None:
    """Thinking flag, system prompt and template act alike on prompts and conversations."""
    case = tools.small_case("reasoning")
    messages = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]
    seen = set()
    for system in (None, "Be brief."):
        for thinking in (False, True):
            renderer = Renderer(case.tokenizer, case.family, system, thinking)
            prompt = renderer.prompt(messages[:1])
            assert renderer.conversation(messages).input_ids[: len(prompt)] == prompt
            as_server = case.tokenizer.apply_chat_template(
                renderer.with_system(messages[:1]), add_generation_prompt=True, enable_thinking=thinking
            )["input_ids"]
            assert as_server == prompt
            seen.add(tuple(prompt))
    assert len(seen) == 4


def test_own_system_message_wins_over_the_system_prompt() -> None:
    case = tools.small_case("chatml")
    messages = [{"role": "system", "content": "mine"}, {"role": "user", "content": "a"}]
    assert Renderer(case.tokenizer, "llama", "other").prompt(messages) == Renderer(case.tokenizer, "llama").prompt(
        messages
    )


def test_cut_answers_have_no_end_of_turn_and_weight_0_is_context() -> None:
    case = tools.small_case("chatml")
    renderer = Renderer(case.tokenizer, case.family)
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "old", "weight": 0},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "new and cut", "finish_reason": "length"},
    ]
    rendered = renderer.conversation(messages)
    assert [case.tokenizer.decode(run) for run in runs(rendered.input_ids, rendered.loss_mask)] == ["new and cut"]


def test_truncation_cuts_the_end_and_refuses_what_has_no_answer_left() -> None:
    case = tools.small_case("chatml")
    messages = [{"role": "user", "content": "word " * 20}, {"role": "assistant", "content": "an answer of some words"}]
    whole = Renderer(case.tokenizer, case.family).conversation(messages)
    first = whole.loss_mask.index(1)
    cut = Renderer(case.tokenizer, case.family, max_length=first + 2).conversation(messages)
    assert cut.input_ids == whole.input_ids[: first + 2]
    assert cut.loss_mask == whole.loss_mask[: first + 2]
    assert cut.supervised == 2
    with pytest.raises(NoSupervision, match="within max_length"):
        Renderer(case.tokenizer, case.family, max_length=first).conversation(messages)


def test_messages_after_the_last_answer_change_nothing() -> None:
    case = tools.small_case("reasoning")
    renderer = Renderer(case.tokenizer, case.family)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert renderer.conversation([*messages, {"role": "user", "content": "c"}]) == renderer.conversation(messages)


def test_stop_tokens_hold_the_end_of_turn() -> None:
    for name in tools.SMALL:
        case = tools.small_case(name)
        ending = case.tokenizer.convert_tokens_to_ids(case.ending)
        assert Renderer(case.tokenizer, case.family).stop_token_ids == (ending,)


def test_rows_that_cannot_be_used_are_counted_by_reason() -> None:
    case = tools.small_case("chatml")
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c d e"}]
    rows = [
        {"id": "good", "messages": good},
        {"id": "no answer", "messages": good[:1]},
        {"id": "merged", "messages": [good[0], {"role": "assistant", "content": "\n\nx"}]},
        {"id": "short", "messages": [good[0], {"role": "assistant", "content": "x"}]},
    ]
    counts = RenderCounts()
    kept = [row["id"] for row, _ in render_rows(Renderer(case.tokenizer, "llama"), rows, 3, counts)]
    assert kept == ["good"]
    assert counts.rendered == 1
    assert sum(counts.dropped.values()) == 3
    assert set(counts.examples.values()) == {"no answer", "merged", "short"}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "no assistant message"),
        ([{"role": "assistant", "content": "x"}], "no assistant message"),
        ([{"role": "user", "content": "x"}], "no assistant message"),
    ],
)
def test_conversations_without_an_answer_are_refused(messages: Messages, words: str) -> None:
    case = tools.small_case("chatml")
    with pytest.raises(NoSupervision, match=words):
        Renderer(case.tokenizer, "llama").conversation(messages)


def test_errors_name_the_template() -> None:
    case = tools.small_case("chatml")
    with pytest.raises(DataError, match="no chat template"):
        Renderer(tools.with_template(case.tokenizer, ""), "llama")
    with pytest.raises(DataError, match="without a special token"):
        Renderer(tools.with_template(case.tokenizer, "{% for m in messages %}{{ m.content }}\n{% endfor %}"), "llama")
    strict = "{{ raise_exception('roles must alternate') if messages|length > 2 }}" + tools.CHATML
    renderer = Renderer(tools.with_template(case.tokenizer, strict), "llama")
    with pytest.raises(DataError, match=r"refuses.*alternate.*user, user, user"):
        renderer.prompt([{"role": "user", "content": "x"}] * 3)
    with pytest.raises(DataError, match="ends with a user or tool message"):
        renderer.prompt([{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}])
