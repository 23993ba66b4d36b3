"""The generated conversations and the tokenizer that is learnt from them."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspec.data.chat import Renderer
from deepspec.data.conversations import read_conversations
from deepspec.demos.quickstart.text import HELD_OUT, TASKS, TRAIN, conversations, distinct, is_held_out, write_prompts
from deepspec.demos.quickstart.tokenizer import END, MASK_TOKEN_ID, VOCAB_SIZE, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    rows = islice(conversations(0), 1000)
    return train_tokenizer(text for row in rows for text in (row.question, row.answer))


def test_the_same_seed_gives_the_same_text_and_another_seed_another() -> None:
    first, again, other = (list(islice(conversations(seed), 50)) for seed in (3, 3, 4))
    assert first == again != other


def test_no_held_out_prompt_is_met_in_training() -> None:
    trained = {row.question for row in islice(conversations(0), 5000)} | {row.question for row in distinct(1, 2000)}
    held_out = {row.question for row in distinct(1, 200, held_out=True)}
    assert len(held_out) == 200
    assert not trained & held_out
    assert all(is_held_out(prompt) for prompt in held_out)


def test_every_task_comes_equally_often() -> None:
    rows = list(islice(conversations(0), 10 * len(TASKS)))
    assert {name: sum(row.task == name for row in rows) for name in TASKS} == dict.fromkeys(TASKS, 10)


def test_the_worked_steps_are_right() -> None:
    step = re.compile(r"(-?\d+) ([*+/-]) (\d+) = (\d+)")
    checked = 0
    for row in islice(conversations(0), 2000):
        for left, sign, right, result in step.findall(row.answer):
            value = {"*": int(left) * int(right), "+": int(left) + int(right), "-": int(left) - int(right)}
            value["/"] = int(left) // int(right)
            assert value[sign] == int(result), row
            checked += 1
    assert checked > 1000


def test_the_functions_that_the_answers_write_do_what_was_asked() -> None:
    values, seen = [3, 8, 5, 2], set()
    wanted = {"total": 18, "product": 240, "largest": 8, "smallest": 2, "count_even": 2, "count_odd": 2}
    for row in islice(conversations(0), 1000):
        if row.task == "fold":
            space: dict = {}
            exec(row.answer.split("```")[1].removeprefix("python\n"), space)
            name = next(name for name in wanted if name in space)
            assert space[name](values) == wanted[name]
            seen.add(name)
    assert seen == set(wanted)


def test_prompt_files(tmp_path: Path) -> None:
    write_prompts(tmp_path, train=40, held_out=10)
    rows = list(read_conversations(tmp_path / TRAIN))
    tests = [json.loads(line) for line in (tmp_path / HELD_OUT).read_text().splitlines()]
    assert len(rows) == 40
    assert len(tests) == 10
    assert all([message["role"] for message in row["messages"]] == ["user"] for row in rows)
    assert not {row["messages"][0]["content"] for row in rows} & {test["turns"][0] for test in tests}


@given(st.text())
def test_the_tokenizer_loses_no_text(tokenizer, text: str) -> None:
    import unicodedata

    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    clean = not any(marker in text for marker in tokenizer.all_special_tokens)
    assert not clean or tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    assert max(ids, default=0) < MASK_TOKEN_ID < VOCAB_SIZE


def test_digits_stand_alone(tokenizer) -> None:
    assert len(tokenizer("12345", add_special_tokens=False)["input_ids"]) == 5


def test_the_chat_template_renders_prompt_and_answer_as_the_pipeline_needs_it(tokenizer) -> None:
    row = next(conversations(0))
    renderer = Renderer(tokenizer, "qwen3")
    whole = renderer.conversation(row.messages())
    prompt = renderer.prompt(row.messages()[:1])
    supervised = [token for token, mask in zip(whole.input_ids, whole.loss_mask, strict=True) if mask]
    assert whole.input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(supervised) == row.answer + END
