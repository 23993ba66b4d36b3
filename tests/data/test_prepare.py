"""Preparing prompts: forms, cleaning, duplicates, split, contamination, mixing, files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import fork_server
import pytest

from deepspec.cli.data import prepare as prepare_verb
from deepspec.data.conversations import manifest_path, read_conversations, write_conversations
from deepspec.data.prepare import Contamination, PrepareOptions, mix, normal, prepare
from deepspec.data.sources import Unusable, to_messages
from deepspec.errors import DataError

ROOT = Path(__file__).parents[2]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"messages": [user(" a "), answer("\nb")]}, [user("a"), answer("b")]),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, [user("a"), answer("b")]),
        ({"conversations": [{"from": "gpt", "value": "hi"}, {"from": "human", "value": "a"}]}, [user("a")]),
        ({"instruction": "a", "input": "b", "output": "c"}, [user("a\n\nb")]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, [user("a")]),
    ],
)
def test_forms(row: dict[str, Any], wanted: list[dict[str, str]]) -> None:
    assert to_messages(row) == wanted


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (None, "not a JSON object"),
        ({"text": "a"}, "no messages"),
        ({"messages": [answer("a")]}, "no user turn"),
        ({"messages": [user("a"), user("b")]}, "two turns of one role"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "unknown role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a message with an image: targets"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "content other than text"),
        ({"messages": [user("  ")]}, "an empty user turn"),
        ({"messages": [user("a"), answer(" ")]}, "an empty answer"),
        ({"messages": ["a"]}, "not an object"),
    ],
)
def test_unusable_rows_have_a_reason(row: dict[str, Any] | None, reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        to_messages(row)


TASK = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many?"


def test_contamination_finds_exact_and_long_overlaps_only() -> None:
    tasks = Contamination()
    tasks.add(TASK)
    tasks.add("Short task prompt")
    assert tasks.overlap([normal(TASK.upper().replace(",", " !"))]) == "exact"
    assert tasks.overlap([normal("short task prompt")]) == "exact"
    assert tasks.overlap([normal("Please: " + TASK[:90] + " and so on")]) == "n-gram"
    assert tasks.overlap([normal("Natalia sold clips to her friends")]) is None
    assert tasks.overlap([normal("a short task prompt")]) is None


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def test_prepare_drops_and_splits_without_a_leak(tmp_path: Path) -> None:
    rows: list[Any] = [{"messages": [user(f"question {i}"), answer("x"), user(f"more {i % 7}")]} for i in range(400)]
    rows += [{"messages": [user(f"question {i}"), answer("other"), user("another end")]} for i in range(400)]
    rows += [rows[3], {"messages": [user("Question   3!"), answer("y"), user("more 3")]}, "{broken", {"messages": []}]
    rows += [{"messages": [user(TASK)]}]
    write_lines(tmp_path / "in.jsonl", rows)
    write_lines(tmp_path / "task.jsonl", [{"question": TASK, "answer": "72"}])
    options = PrepareOptions({str(tmp_path / "in.jsonl"): 1.0}, 0.2, (str(tmp_path / "task.jsonl"),))
    report = prepare(options, tmp_path / "out")
    train = list(read_conversations(tmp_path / "out" / "train.jsonl"))
    held = list(read_conversations(tmp_path / "out" / "held_out.jsonl"))
    assert (len(train), len(held)) == (report.train, report.held_out)
    assert len(train) + len(held) == 800
    assert 0.1 < len(held) / 800 < 0.3
    first = [{row["messages"][0]["content"] for row in side} for side in (train, held)]
    assert not first[0] & first[1]
    assert report.dropped == {
        "a duplicate": 2,
        "not a JSON object": 1,
        "no messages": 1,
        "in an evaluation task (exact)": 1,
    }
    again = prepare(options, tmp_path / "again")
    assert again == report
    for name in ("train.jsonl", "held_out.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    prepare(PrepareOptions(options.sources, 0.0), tmp_path / "again")
    assert not list((tmp_path / "again").glob("held_out*")), "an earlier run's held-out rows are training rows now"


def test_a_run_that_keeps_nothing_says_why_and_leaves_no_file(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", [{"text": "a"}, "{broken"])
    with pytest.raises(DataError, match=r"nothing is left to train on.*no messages: 1 \(first: .*in.jsonl: row 1\)"):
        prepare(PrepareOptions({str(tmp_path / "in.jsonl"): 1.0}, 0.0), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mixing_follows_the_weights_until_a_source_ends() -> None:
    from itertools import islice

    drawn = [name for name, _ in islice(mix({"a": range(9999), "b": range(9999)}, {"a": 3.0, "b": 1.0}, 0), 4000)]
    assert 0.72 < drawn.count("a") / 4000 < 0.78
    everything = [row for _, row in mix({"a": [1, 2], "b": [3]}, {"a": 1.0, "b": 1.0}, 0)]
    assert sorted(everything) == [1, 2, 3]


def test_parquet_and_command_line(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"conversations": [[{"from": "human", "value": f"q {i}"}] for i in range(50)]})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    command = [sys.executable, "tools/prepare_data.py", "--source", f"{tmp_path / 'in.parquet'}=2", "--limit", "20"]
    done = fork_server.run([*command, "--output", str(tmp_path / "out")])
    assert done.returncode == 0, done.stderr
    assert "conversations to train on" in done.stdout
    assert sum(1 for _ in read_conversations(tmp_path / "out" / "train.jsonl")) <= 20
    wrong = fork_server.run([*command[:3], "no.jsonl", "--quiet", "--output", str(tmp_path)])
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)
    assert wrong.stderr.startswith("error: no.jsonl: no such file")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no conversation in the file"),
        ('{"id": "a", "messages": [{"role": "user", "content": "x"}]}\n{"id": 3}\n', "line 2"),
        ("nonsense\n", "line 1.*not JSON"),
        ('{"id": "a", "messages": []}\n', "non-empty list"),
        ('{"id": "a", "messages": [{"role": "user", "content": 3}]}\n', "content.*found 3"),
        ('{"id": "a", "messages": [{"role": "user", "content": "x"}]}\n' * 2, "line 2.*same id twice"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(DataError, match=words):
        list(read_conversations(tmp_path / "x.jsonl"))
    with pytest.raises(DataError, match=r"none\.jsonl: No such file"):
        list(read_conversations(tmp_path / "none.jsonl"))


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path, row = tmp_path / "x.jsonl", {"id": "a", "messages": [user("x")]}
    write_conversations(path, [row], {"by": "me"})
    assert json.loads(manifest_path(path).read_text())["rows"] == 1

    def failing() -> Any:
        yield {"id": "b", "messages": [user("y")]}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_conversations(path, failing(), {})
    assert [one["id"] for one in read_conversations(path)] == ["a"]
    assert len(list(tmp_path.iterdir())) == 2
    path.write_text(path.read_text() + json.dumps(row | {"id": "c"}) + "\n")
    with pytest.raises(DataError, match="not the one its manifest describes"):
        list(read_conversations(path))


def test_an_evaluation_task_is_excluded_by_its_name(tmp_path: Path, monkeypatch) -> None:
    question = "How many apples does Ann have?"
    rows = [{"question": question}, {"question": " ".join(map(str, range(20)))}]
    monkeypatch.setattr("deepspec.evaluate.tasks._hub_rows", lambda row: rows)
    monkeypatch.chdir(tmp_path)
    texts = [question, "Say 1 2 3 4 5 6 7 8 9 10 11 12 13 14", "Please reason step by step, and put your final answer"]
    lines = [json.dumps({"id": str(n), "messages": [user(text)]}) for n, text in enumerate(texts)]
    Path("in.jsonl").write_text("\n".join(lines) + "\n")
    words = ["--source", "in.jsonl", "--held-out", "0", "--output", "out", "--exclude"]
    monkeypatch.setattr(sys, "argv", ["deepspec prepare", *words, "gsm8k"])
    prepare_verb()
    kept = list(read_conversations("out/train.jsonl"))
    assert [row["messages"][0]["content"] for row in kept] == texts[2:]
    assert json.loads(manifest_path("out/train.jsonl").read_text())["provenance"]["exclude"] == ["gsm8k"]
    monkeypatch.setattr(sys, "argv", ["deepspec prepare", *words, "gsm8"])
    with pytest.raises(DataError, match=r"--exclude: no such file or task; found 'gsm8'.*did you mean 'gsm8k'"):
        prepare_verb()
