"""Regeneration end to end: answers that were cut, that think, that call tools; failures and cuts said on screen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import data_tools as tools
import pytest
from server_tools import FaultyServer, renderer, server_engine
from transformers import PretrainedConfig

from deepspec.data.chat import Renderer
from deepspec.data.conversations import read_conversations, write_conversations
from deepspec.data.dialogue import Outcome, answer_text
from deepspec.data.local import Generated, LocalEngine
from deepspec.data.messages import Unusable
from deepspec.data.regenerate import RegenerationSummary, regenerate
from deepspec.errors import DataError
from deepspec.recipe import RegenerateSection

SECTION = RegenerateSection(max_tokens=24)
CALL = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}


class Scripted(FaultyServer):
    """Answers every question with the message and finish reason that a table has for it."""

    def __init__(self, answers: dict[str, tuple[dict[str, Any], str]]) -> None:
        self.answers = answers
        super().__init__([])

    def act(self, handler: Any, body: dict[str, Any], fault: str, strict: bool) -> None:
        message, reason = self.answers[body["messages"][-1]["content"]]
        self.send(handler, 200, {"choices": [{"message": message, "finish_reason": reason}]})


def prompts(folder: Path, questions: list[str], turns: int = 2, **more: Any) -> Path:
    """A file with a conversation for each question, a second question behind it."""
    rows = [
        {"id": f"p{i}", "messages": [{"role": "user", "content": text} for text in (question, "and?")[:turns]], **more}
        for i, question in enumerate(questions)
    ]
    for row in rows:
        row["messages"].insert(1, {"role": "assistant", "content": "old"})
    write_conversations(folder / "p.jsonl", rows, {})
    return folder / "p.jsonl"


ANSWERS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "half": ({"content": "four \ufffd"}, "length", {"content": "four "}),
    "call": ({"content": None, "tool_calls": [CALL]}, "stop", {"content": "", "tool_calls": [{"Oslo": "city"}]}),
    "cut thought": ({"content": "<think>\nwhy"}, "length", {"content": "", "reasoning_content": "why"}),
    "thought apart": (
        {"content": None, "reasoning_content": "why"},
        "length",
        {"content": "", "reasoning_content": "why"},
    ),
}


def test_a_cut_or_calling_turn_ends_the_conversation_and_holds_what_is_whole(tmp_path: Path) -> None:
    server = Scripted({question: (message, reason) for question, (message, reason, _) in ANSWERS.items()})
    regenerate(prompts(tmp_path, list(ANSWERS)), tmp_path / "o.jsonl", server_engine(server.url), {})
    server.stop()
    for row, (_, reason, wanted) in zip(read_conversations(tmp_path / "o.jsonl"), ANSWERS.values(), strict=True):
        _, answer = row["messages"]
        assert (answer["content"], answer["finish_reason"]) == (wanted["content"], reason)
        assert answer.get("reasoning_content") == wanted.get("reasoning_content")
        calls = [call["function"]["arguments"] for call in answer.get("tool_calls", [])]
        assert calls == ([{"city": "Oslo"}] if "tool_calls" in wanted else [])
    assert b"\xef\xbf\xbd" not in (tmp_path / "o.jsonl").read_bytes()


def test_calls_of_the_source_are_sent_as_text_and_kept_as_objects(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "rain"},
    ]
    write_conversations(tmp_path / "p.jsonl", [{"id": "a", "messages": messages}], {})
    case, server = tools.small_case("reasoning"), Scripted({"rain": ({"content": "Rain."}, "stop")})
    engine = server_engine(server.url)
    engine.renderer = Renderer(case.tokenizer, case.family)
    regenerate(tmp_path / "p.jsonl", tmp_path / "o.jsonl", engine, {})
    server.stop()
    assert server.bodies[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"city": "Oslo"}'
    (row,) = read_conversations(tmp_path / "o.jsonl")
    assert row["messages"][1]["tool_calls"] == [call]


def test_thoughts_move_out_of_the_text_and_the_conversation_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thinks = ({"content": "<think>\nwhy\n</think>\n\nso"}, "stop")
    server = Scripted({"q": thinks, "and?": thinks})
    regenerate(prompts(tmp_path, ["q"]), tmp_path / "o.jsonl", server_engine(server.url), {"thinking": False})
    server.stop()
    (row,) = read_conversations(tmp_path / "o.jsonl")
    answers = row["messages"][1::2]
    assert [(one["content"], one["reasoning_content"]) for one in answers] == [("so", "why")] * 2
    assert "2 of 2 answers hold reasoning, and data.thinking is false" in capsys.readouterr().err


def test_an_end_with_most_answers_cut_says_so_and_says_it_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = [f"q{i}" for i in range(4)]
    server = Scripted({q: ({"content": "x"}, "length" if q != "q0" else "stop") for q in questions})
    path, settings = prompts(tmp_path, questions, turns=1), {"max_tokens": 24}
    for _ in range(2):
        regenerate(path, tmp_path / "o.jsonl", server_engine(server.url), settings)
        told = capsys.readouterr().err
        assert "3 of 4 answers (75%) were cut at regenerate.max_tokens (24): raise it" in told
    server.stop()
    assert RegenerationSummary(4, 0, 0, 0.0, {"length": 2, "stop": 2}).warnings(settings) == []


def test_the_first_failure_is_on_the_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = Scripted({"q0": ({"content": ""}, "stop"), "q1": ({"content": "fine"}, "stop")})
    asked = prompts(tmp_path, ["q0", "q1"], turns=1)
    with pytest.raises(DataError, match="1 of 2 conversations failed; the first, p0: the target answered nothing"):
        regenerate(asked, tmp_path / "o.jsonl", server_engine(server.url), {})
    with pytest.raises(DataError, match=r"fails on them again, or take those out$"):  # a training has no --max-failed
        regenerate(asked, tmp_path / "o.jsonl", server_engine(server.url), {}, without="take those out")
    server.stop()
    assert "a failure, p0: the target answered nothing" in capsys.readouterr().err


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LocalEngine]:
    """Makes an engine whose model writes the given ids."""

    def make(made: Renderer, ids: list[int], reason: str) -> LocalEngine:
        monkeypatch.setattr("deepspec.data.local.LocalSampler", lambda *args: Writer(ids, reason))
        return LocalEngine(Positionless(), made, SECTION, 0, 8)

    return make


class Positionless:
    """A model of which only the config is asked: it states no positions."""

    config = PretrainedConfig()


class Writer:
    def __init__(self, ids: list[int], reason: str) -> None:
        self.ids, self.reason, self.sampling = ids, reason, SECTION

    def answer(self, requests: Any) -> Any:
        return [Generated(request, self.ids, self.reason) for request in requests]


def test_a_local_answer_cut_inside_a_character_loses_its_half(
    local: Callable[..., LocalEngine], tmp_path: Path
) -> None:
    made = renderer()
    ids = made.tokenizer("so 你", add_special_tokens=False)["input_ids"]
    whole = made.tokenizer.decode(ids)
    while not made.tokenizer.decode(ids).endswith("\ufffd"):
        ids = ids[:-1]
    assert whole == "so 你"
    regenerate(prompts(tmp_path, ["q"]), tmp_path / "o.jsonl", local(made, ids, "length"), {})
    (row,) = read_conversations(tmp_path / "o.jsonl")
    assert row["messages"][1:] == [{"role": "assistant", "content": "so ", "finish_reason": "length"}]


@pytest.mark.parametrize("name", ["reasoning", "channel"])
def test_a_local_answer_that_calls_a_tool_ends_its_conversation(
    name: str, local: Callable[..., LocalEngine], tmp_path: Path
) -> None:
    case = tools.small_case(name)
    made = Renderer(case.tokenizer, case.family)
    text = '<call>{"name": "weather", "arguments": {}}</call>'
    ids = made.tokenizer(text, add_special_tokens=False)["input_ids"]
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    regenerate(prompts(tmp_path, ["q"], tools=[tool]), tmp_path / "o.jsonl", local(made, ids, "stop"), {})
    (row,) = read_conversations(tmp_path / "o.jsonl")
    assert row["messages"][1:] == [{"role": "assistant", "content": text, "finish_reason": "tool_calls"}]


def test_a_call_written_in_special_tokens_is_a_failure_that_says_so(
    local: Callable[..., LocalEngine], tmp_path: Path
) -> None:
    template = tools.REASONING.replace("'<call>'", "'<|head|>'")
    made = Renderer(tools.with_template(tools.small_tokenizer(), template), "qwen3")
    ids = made.tokenizer('<|head|>{"name": "f"}', add_special_tokens=False)["input_ids"]
    tool = json.dumps([{"name": "f", "parameters": {"type": "object"}}])
    with pytest.raises(DataError, match="only --engine server can read"):
        regenerate(prompts(tmp_path, ["q"], tools=tool), tmp_path / "o.jsonl", local(made, ids, "stop"), {})


def test_local_thoughts_between_special_tokens_stay_apart(local: Callable[..., LocalEngine], tmp_path: Path) -> None:
    case = tools.small_case("reasoning")  # its <think> is a special token, which decoding leaves out
    made = Renderer(case.tokenizer, case.family, thinking=True)
    ids = made.tokenizer("<think>\nwhy\n</think>\n\nso", add_special_tokens=False)["input_ids"]
    regenerate(prompts(tmp_path, ["q"], turns=1), tmp_path / "o.jsonl", local(made, ids, "stop"), {})
    (row,) = read_conversations(tmp_path / "o.jsonl")
    assert (row["messages"][1]["content"], row["messages"][1]["reasoning_content"]) == ("so", "why")


def test_a_local_thought_that_decoding_would_mix_into_the_answer_is_a_failure() -> None:
    def decode(ids: list[int], skip_special_tokens: bool) -> str:
        return "thought\nwhyso" if skip_special_tokens else "<|channel>thought\nwhy<channel|>so"

    with pytest.raises(Unusable, match="marked its reasoning by special tokens"):
        answer_text(SimpleNamespace(added_tokens_decoder={}, decode=decode), [1, 2])


@pytest.mark.parametrize(
    ("again", "said"),
    [
        ((False, False), "fix their cause: the same command fails on them again, or continue without them"),
        ((True, False), "run the same command again: 1 of them may get an answer, or fix the cause of the other 1"),
        ((True, True), "run the same command again: 2 of them may get an answer, or continue without them"),
    ],
)
def test_the_remedy_of_failures_says_whether_another_start_helps(
    again: tuple[bool, ...], said: str, tmp_path: Path
) -> None:
    class Engine:
        def run(self, dialogues: Any) -> Any:
            for one, fate in zip(dialogues, (*again, None), strict=True):
                if fate is None:
                    one.answer({"content": "fine"}, "stop", 1)
                yield Outcome(one) if fate is None else Outcome(one, "no", fate)

    path = prompts(tmp_path, ["q0", "q1", "q2"], turns=1)
    with pytest.raises(DataError, match=said):
        regenerate(path, tmp_path / "o.jsonl", Engine(), {})
