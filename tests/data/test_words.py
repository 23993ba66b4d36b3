"""Words: scripts without spaces, signs and marks, in duplicates and in overlaps with evaluation tasks."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec.data.conversations import read_conversations
from deepspec.data.prepare import Contamination, PrepareOptions, prepare
from deepspec.data.words import any_words, normal, words_of

SAME = [
    ("Question   3!", "question 3"),
    ("caf\u00e9", "cafe\u0301"),
    ("3 + 4 =", "3+4="),
    ("３＋４", "3+4"),
    ("5 − 3", "5 - 3"),
    ("“Hello,” she said…", "hello she said"),
    ("一列火车，三小时？", "一列火车三小时"),
    ("\u304b\u3099", "\u304c"),
    ("C++?", "c++"),
]
APART = [
    ("3+4", "3*4"),
    ("3-4", "3/4"),
    ("3-4", "3 4"),
    ("-3", "3"),
    ("3.5", "35"),
    ("1,5", "1.5"),
    (".5", "5"),
    ("12:30", "1230"),
    ("(3+4)*5", "3+(4*5)"),
    ("x^2", "x2"),
    ("x\u00b2", "x2"),
    ("5! / 3", "5 / 3"),
    ("a != b", "a = b"),
    ("a < b", "a > b"),
    ("f'(2)", "f(2)"),
    ("5%", "5"),
    ("$5", "€5"),
    ("C", "C++"),
    ("C", "C#"),
    ("C#", "C++"),
    ("\u00e9", "e"),
    ("e\u0301", "e\u0300"),
    ("\u0915\u093f", "\u0915\u0940"),  # Hindi ki, short and long
    ("\u0e1b\u0e32", "\u0e1b\u0e49\u0e32"),  # Thai, without and with a tone
    ("か", "が"),
    ("👍", "👎"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_white_space_case_and_the_punctuation_of_sentences_do_not_count(one: str, other: str) -> None:
    assert normal(one) == normal(other) != ""


@pytest.mark.parametrize(("one", "other"), APART)
def test_signs_and_marks_keep_texts_apart(one: str, other: str) -> None:
    assert normal(one) != normal(other)
    assert normal(one) == normal(unicodedata.normalize("NFD", one))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(st.sampled_from("aB1_0 .,:;!?'\"`()[]{}+-*/=^<>|~#%&@$\\\n"), max_size=30))
def test_plain_text_has_the_words_of_the_general_way(text: str) -> None:
    assert words_of(text) == any_words(text)


LONG = {
    "chinese": "一列火车每小时行驶八十公里，三小时行驶多少公里？",
    "japanese": "りんごを三つ買い、一つ食べました。残りはいくつですか。",
    "thai": "ฉันมีแอปเปิ้ลสามผลและกินไปหนึ่งผลเหลือกี่ผล",
    "korean": "기차가 한 시간에 팔십 킬로미터를 가면 세 시간 동안 모두 몇 킬로미터를 갈 수 있는지 말해 주세요",
    "english": "A train runs eighty kilometres an hour; how far does it get in three hours?",
}
SHORT = {"sum": "3+4", "name": "C++", "chinese": "三加四", "thai": "แมว"}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_a_prompt_inside_a_longer_one_is_found_in_every_script(text: str) -> None:
    tasks = Contamination()
    tasks.add(text)
    assert tasks.overlap([normal(text)]) == "exact"
    assert tasks.overlap([normal(f"請 Please: {text} 谢谢。")]) == "n-gram"
    assert tasks.overlap([normal(text[: len(text) // 3])]) is None


def test_a_long_sum_with_other_signs_is_no_overlap() -> None:
    tasks = Contamination()
    tasks.add("1+2+3+4+5+6+7+8+9+10+11+12+13+14")
    assert tasks.overlap([normal("1-2*3+4-5*6+7-8*9+10-11*12+13-14")]) is None
    assert tasks.overlap([normal("What is 1+2+3+4+5+6+7+8+9+10+11+12+13 then")]) == "n-gram"


@pytest.mark.parametrize("column", ["question", "turns", "messages", "text"])
def test_prepare_drops_evaluation_prompts_in_every_script_and_keeps_their_neighbours(
    column: str, tmp_path: Path
) -> None:
    prompts = [*LONG.values(), *(SHORT.values() if column != "text" else ())]
    forms = {"turns": lambda p: [p], "messages": lambda p: [{"role": "user", "content": p}]}
    exam = [{column: forms.get(column, str)(prompt), "id": "q1 of 9"} for prompt in prompts]
    neighbours = ["3*4", "C", "C#", "三加五", "แมวสองตัว", "q1 of 9 has no answer"]
    rows = [{"prompt": prompt} for prompt in [*prompts, *neighbours]]
    for name, content in (("exam", exam), ("train", rows)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    options = PrepareOptions({str(tmp_path / "train.jsonl"): 1.0}, 0.0, (str(tmp_path / "exam.jsonl"),))
    report = prepare(options, tmp_path / "out")
    assert report.dropped == {"in an evaluation task (exact)": len(prompts)}
    kept = read_conversations(tmp_path / "out" / "train.jsonl")
    assert [row["messages"][0]["content"] for row in kept] == neighbours
