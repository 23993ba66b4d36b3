"""What became of every drafted token: in the rows, on the page, in the terminal and in a conversation."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from data_tools import small_tokenizer
from evaluate_tools import Folders, make_folders, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec.decoding.loop import generate
from deepspec.decoding.records import DecodeRequest, DecodeSettings, Generation, Round
from deepspec.drafts import load_draft
from deepspec.errors import DeepSpecError
from deepspec.evaluate import transcript
from deepspec.evaluate.__main__ import main
from deepspec.evaluate.chat import Chat
from deepspec.evaluate.report import COLUMNS, meanings, sections, write_report
from deepspec.evaluate.results import Results
from deepspec.evaluate.run import Models
from deepspec.evaluate.transcript import KINDS, Pieces, Token, show, terminal, tokens_of
from deepspec.targets import load_target

TURN = {
    "asked": "Where?",
    "pieces": ["The", " cat", " sat", " on", " the", " mat"],
    "rounds": [[3, 2, " in"], [2, 1, None]],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("evaluate"))


def test_the_tokens_of_a_turn() -> None:
    assert list(tokens_of(TURN)) == [
        Token("first", "The", 0, None),
        Token("accepted", " cat", 1, None),
        Token("accepted", " sat", 1, None),
        Token("corrected", " on", 1, " in"),
        Token("accepted", " the", 2, None),
        Token("bonus", " mat", 2, None),
    ]
    assert terminal(tokens_of(TURN), colour=False) == "The[ cat sat| on][ the| mat]"
    coloured = terminal(tokens_of(TURN), colour=True)
    assert re.sub(r"\x1b\[\d+m", "", coloured) == "The cat sat on the mat"
    assert "\x1b[31m on\x1b[0m" in coloured


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_pieces_are_the_text_however_the_rounds_come(data: st.DataObject) -> None:
    """Characters of several tokens too, and whatever was seen in between."""
    tokenizer = small_tokenizer()
    text = data.draw(st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=30))
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces, generation, found, rounds = Pieces(tokenizer), Generation(DecodeRequest((1,), 0)), [], []
    at = 0
    while at < len(ids):
        new = ids[at : at + data.draw(st.integers(1, 4))]
        count = len(new)
        generation.output_ids += new
        if at:
            length = data.draw(st.integers(count - 1, 5))
            sent = (*new[: count - 1], *[7] * (length - count + 1))
            generation.rounds.append(Round(sent, length, count - 1, count, len(new), ()))
        if data.draw(st.booleans()) or at + count >= len(ids):
            part = pieces.transcript(generation)
            found += part["pieces"]
            rounds += part["rounds"]
        at += count
    assert "".join(found) == tokenizer.decode(ids)
    assert [count for count, _, _ in rounds] == [one.emitted for one in generation.rounds]
    for (count, accepted, refused), one in zip(rounds, generation.rounds, strict=True):
        assert accepted == min(one.accepted, count)
        assert refused == (tokenizer.decode([7]) if one.accepted < one.length else None)


def test_rows_hold_what_the_rounds_say(folders: Folders, tmp_path: Path) -> None:
    folders.run(tmp_path / "one")
    folders.run(tmp_path / "two", batch_size=2)
    rows = rows_of(tmp_path / "one")
    assert [row["turns"] for row in rows] == [row["turns"] for row in rows_of(tmp_path / "two")]
    for row in rows:
        rounds = [one for turn in row["turns"] for one in turn["rounds"]]
        assert sum(len(turn["pieces"]) for turn in row["turns"]) == row["output_tokens"]
        assert len(rounds) == len(row["committed"])
        for (emitted, taken, refused), committed, accepted, verified in zip(
            rounds, row["committed"], row["accepted"], row["proposed"], strict=True
        ):
            assert emitted <= committed
            assert taken == min(accepted, emitted)
            assert (refused is None) == (accepted == verified or committed == accepted)
    assert [len(row["turns"]) for row in rows] == [1, 1, 1, 2]
    assert rows[3]["turns"][1]["asked"] == "Name another."


def test_the_page_holds_every_answer_and_the_figures_of_the_results(folders: Folders, tmp_path: Path) -> None:
    results = folders.run(tmp_path / "out")
    write_report(results.to_row(), tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    (block,) = re.findall(r'<script type="application/json" id="transcripts">(.*?)</script>', page, re.DOTALL)
    shown = {one["name"]: one for one in json.loads(block)}
    for row in rows_of(tmp_path / "out"):
        one = shown[f"{row['task']} {row['index']}, T={row['temperature']:g}"]
        for turn, known in zip(one["turns"], row["turns"], strict=True):
            assert (turn["asked"], turn["pieces"]) == (known["asked"], known["pieces"])
            assert "".join(turn["kinds"]) == "".join(token.kind[0] for token in tokens_of(known))
            assert [len(kinds) for kinds in turn["kinds"][1:]] == [count for count, _, _ in known["rounds"]]
            assert turn["refused"] == [refused for _, _, refused in known["rounds"]]
        assert one["tau"] == round(sum(row["committed"]) / len(row["committed"]), 2)
    for row in results.summaries:
        assert f"{row.acceptance_length:.2f}" in page
    assert page.count("<svg") == 3
    for table in (table for _, table in sections(results.to_row())):
        for cell, meaning in meanings(table).items():
            assert cell in COLUMNS or cell.isdigit()
            assert f'title="{meaning}"' in page.replace("&quot;", '"').replace("&#x27;", "'")


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    turn = TURN | {"asked": "</script><script>alert(1)</script>\x1b[2J\ud800", "pieces": ["\x1b]0;x\x07", *["<b>"] * 5]}
    row = {"task": "t", "index": 0, "temperature": 0.0, "committed": [3, 2], "confidence": [], "turns": [turn]}
    page = "".join(transcript.section([row]))
    assert page.count("</script>") == 2
    page.encode()
    assert "\x1b" not in show([row], 1, colour=False)
    assert "\x1b]" not in show([row], 1, colour=True)


def test_a_page_shows_as_many_as_fit_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"task": "t", "index": n, "temperature": 0.0, "committed": [n + 1], "confidence": [[0.0]], "turns": [TURN]}
        for n in range(40)
    ]
    assert "results.jsonl" not in "".join(transcript.section(rows))
    monkeypatch.setattr(transcript, "PAGE_LIMIT", 10 * (6 + 22))
    page = "".join(transcript.section(rows))
    assert "10 of 40 answers; results.jsonl has all" in page
    assert '"t 39, T=0"' in page  # the best
    assert '"t 0, T=0"' in page  # the worst
    assert transcript.section([{**rows[0], "turns": []}]) == []
    text = show(rows, 3, colour=False)
    assert re.findall(r"t (\d+), T=0: ([\d.]+) tokens", text) == [("39", "40.00"), ("19", "20.00"), ("0", "1.00")]


def test_the_command_shows_answers(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = folders.command(tmp_path / "out", "--show", "2")
    monkeypatch.setattr("sys.argv", command[1:])
    main()
    shown = capsys.readouterr().out
    texts = {row["turns"][0]["asked"]: row for row in rows_of(tmp_path / "out")}
    assert sum(f"> {asked}\n" in shown for asked in texts) == 2
    assert transcript.legend(False) in shown
    main()  # a finished run is only shown
    assert transcript.legend(False) in capsys.readouterr().out
    assert Results.load(tmp_path / "out").summaries


def test_a_conversation_streams_what_plain_decoding_gives(folders: Folders) -> None:
    target = load_target(folders.target)
    draft = load_draft(folders.draft, target)
    renderer = Models(str(folders.target), str(folders.draft), "").renderer(target)
    limits = DecodeSettings(max_new_tokens=12, stop_token_ids=renderer.stop_token_ids)
    out = io.StringIO()
    chat = Chat(target, draft, renderer, limits, out.write, colour=False, compare=5)
    chat.run(["What is 1?\n", "\n", "And 2?\n", "/clear\n", "What is 1?\n", "/exit\n", "never\n"])
    said = re.findall(
        r"> (?:> )*(.*?)\n\((\d+) tokens, [\d.]+ tokens/s, [\d.]+ tokens a round; without", out.getvalue(), re.S
    )
    assert len(said) == 3
    assert said[0] == said[2]
    assert len(chat.messages) == 2  # since /clear
    prompt = renderer.prompt([{"role": "user", "content": "What is 1?"}])
    (alone,) = generate(target, None, [prompt], limits)
    assert re.sub(r"\]\[|[\[|\]]", "", said[0][0]) == renderer.tokenizer.decode(alone.output_ids)
    assert set(KINDS) == set(transcript.COLOURS)


def test_a_conversation_that_grew_too_long_says_so_and_goes_on(folders: Folders) -> None:
    target = load_target(folders.target)
    draft = load_draft(folders.draft, target)
    renderer = Models(str(folders.target), str(folders.draft), "").renderer(target)
    out: list[str] = []
    chat: Any = Chat(target, draft, renderer, DecodeSettings(max_new_tokens=10**6), out.append, colour=False)
    with pytest.raises(DeepSpecError, match="positions"):
        chat.answer("What is 1?")
    chat.messages.clear()
    chat.run(["What is 1?\n"])
    assert chat.messages == []
    assert "positions" in "".join(out)


def test_ctrl_c_stops_an_answer_and_not_the_conversation(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    chat: Any = Chat.__new__(Chat)
    out: list[str] = []
    chat.messages, chat.write, chat.colour = [], out.append, False
    answers = iter([KeyboardInterrupt(), "said"])

    def answer(text: str) -> str:
        chat.messages.append({"role": "user", "content": text})
        found = next(answers)
        if isinstance(found, KeyboardInterrupt):
            raise found
        return found

    monkeypatch.setattr(chat, "answer", answer)
    chat.run(["one\n", "two\n"])
    assert "stopped" in "".join(out)
    assert "said" in "".join(out)
    assert [message["content"] for message in chat.messages] == ["two"]
