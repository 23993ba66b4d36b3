"""The real run's prompts: what they are made of, what they must never hold, and the files they come to."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest

from deepspec.data.conversations import read_conversations
from deepspec.data.prepare import Contamination, user_text
from deepspec.demos.smollm2.prompts import write_domain, write_prompts
from deepspec.demos.smollm2.text import (
    DOMAIN,
    PASSAGE_WORDS,
    TEXTS,
    Texts,
    chat_prompts,
    function_prompts,
    passage_prompts,
)
from deepspec.errors import DataError

EVAL = Path(__file__).resolve().parents[3].parent / "shared" / "eval"


@pytest.mark.parametrize("texts", [TEXTS, DOMAIN], ids=["chat", "domain"])
def test_every_gap_has_a_table_and_every_table_a_gap(texts: Texts) -> None:
    asks, tables = texts["asks"], texts["tables"]
    used = {gap.split("}")[0] for ask in asks for gap in ask.split("{")[1:]}
    assert used == set(tables)
    assert len(set(asks)) == len(asks)
    assert all(len(set(table)) == len(table) for name, table in tables.items() if name != "language")
    assert all(isinstance(word, str) for table in tables.values() for word in table)


def test_prompts_are_many_whole_and_the_same_for_a_seed() -> None:
    first, again, other = (list(islice(chat_prompts(seed), 3000)) for seed in (1, 1, 2))
    assert first == again != other
    assert len(set(first)) > 1500
    assert not any("{" in prompt or "}" in prompt for prompt in first)
    assert function_prompts(1) == function_prompts(1) != function_prompts(2)


def test_the_domains_held_out_prompts_are_no_training_prompts(tmp_path: Path) -> None:
    write_domain(tmp_path, train=40, held_out=6)
    held_out = [json.loads(line)["turns"][0] for line in (tmp_path / "domain.jsonl").read_text().splitlines()]
    trained = [row["messages"][0]["content"] for row in read_conversations(tmp_path / "train.jsonl")]
    assert (len(held_out), len(trained), len({*held_out, *trained})) == (6, 40, 46)
    assert all('JSON object with the keys "name"' in prompt for prompt in (*held_out, *trained))


def test_the_library_gives_functions_and_prose() -> None:
    functions, passages = function_prompts(1), passage_prompts(1)
    assert len(functions) > 500
    assert len(passages) > 200
    assert any("json.dumps" in prompt or "dumps" in prompt for prompt in functions)
    for prompt in passages:
        words = prompt.split("\n\n", 1)[1].split()
        assert PASSAGE_WORDS[0] <= len(words) <= PASSAGE_WORDS[1]


def test_files_of_shards_and_held_out_prompts_share_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write_prompts(Path("prompts"), shards=2, each=30, held_out=5, tasks=[])
    shards = [[row["messages"][0]["content"] for row in rows(tmp_path, i)] for i in range(2)]
    held_out = [json.loads(line)["turns"][0] for line in (tmp_path / "prompts/chat.jsonl").read_text().splitlines()]
    assert [len(set(shard)) for shard in shards] == [30, 30]
    assert len(set(held_out)) == 5
    assert len({*shards[0], *shards[1], *held_out}) == 65
    assert (tmp_path / "prompts" / "report.json").exists()
    assert {row["source"].rpartition("/")[2] for i in range(2) for row in rows(tmp_path, i)} >= {
        "chat.jsonl",
        "functions.jsonl",
    }


def rows(folder: Path, shard: int) -> list[dict]:
    """A shard's conversations."""
    return list(read_conversations(folder / "prompts" / f"train-{shard}.jsonl"))


def test_a_prompt_of_a_task_is_kept_out(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_prompts(Path("prompts"), shards=1, each=30, held_out=2, tasks=[])
    taken = rows(tmp_path, 0)[0]["messages"][0]["content"]
    (tmp_path / "task.jsonl").write_text(json.dumps({"turns": [taken]}) + "\n")
    write_prompts(Path("again/prompts"), shards=1, each=30, held_out=2, tasks=[tmp_path / "task.jsonl"])
    assert taken not in [row["messages"][0]["content"] for row in rows(tmp_path / "again", 0)]


def test_too_many_prompts_are_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("deepspec.demos.smollm2.prompts.DRAWN", 0)
    monkeypatch.setattr("deepspec.demos.smollm2.prompts.distinct", lambda seed, count: [])
    with pytest.raises(DataError, match="too few different prompts"):
        write_prompts(Path("prompts"), shards=1, each=4000, held_out=2, tasks=[])


@pytest.mark.skipif(not EVAL.exists(), reason="no ../shared/eval beside the checkout")
def test_no_generator_writes_an_evaluation_prompt() -> None:
    tasks = Contamination()
    for path in sorted(EVAL.glob("*.jsonl")):
        tasks.add_file(path)
    prompts = [*islice(chat_prompts(1), 3000), *function_prompts(1), *passage_prompts(1)]
    found = [prompt for prompt in prompts if tasks.overlap(user_text([{"role": "user", "content": prompt}]))]
    assert not found
