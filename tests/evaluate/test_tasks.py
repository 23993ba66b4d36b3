"""Tasks: files, folders that lack some, choice of prompts, and templates that give the published task files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from evaluate_tools import write_task

from deepspec.errors import EvaluationError
from deepspec.evaluate.tasks import bare_prompts, load_tasks, missing_tasks, registered_tasks, turns_of

NOT_SHARED = {"alpaca", "aime24", "lbpp", "swe-bench"}  # no published file of theirs lies in shared/
EVAL = Path(__file__).parents[2].parent / "shared" / "eval"
KNOWN = registered_tasks()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty file"),
        ('{"turns": ["a"]}\n{"turn": 1}\n', "line 2"),
        ("not json\n", "line 1"),
        ('{"turns": []}', "line 1"),
    ],
)
def test_a_bad_task_file_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(EvaluationError, match=message):
        load_tasks([str(tmp_path / "x.jsonl")], None, 0)


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(EvaluationError, match="did you mean 'gsm8k'"):
        load_tasks(["gsm8"], None, 0)
    with pytest.raises(EvaluationError, match="no such file"):
        load_tasks(["nowhere.jsonl"], None, 0)


def test_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    files = [str(write_task(tmp_path / folder / "t.jsonl", [["a"]])) for folder in ("one", "two")]
    with pytest.raises(EvaluationError, match="two tasks of one name"):
        load_tasks(files, None, 0)


def test_samples_are_drawn_by_seed_and_keep_their_places(tmp_path: Path) -> None:
    write_task(tmp_path / "t.jsonl", [[str(n)] for n in range(50)])
    first, again, other = (load_tasks([str(tmp_path)], 10, seed)[0] for seed in (1, 1, 2))
    assert first == again
    assert first.prompts != other.prompts
    assert list(first.prompts) == sorted(first.prompts)
    assert all(turns == (str(place),) for place, turns in first.prompts.items())
    assert first.digest != other.digest


def test_a_folder_of_benchmarks_says_what_it_lacks(tmp_path: Path) -> None:
    write_task(tmp_path / "gsm8k.jsonl", [["a"]])
    lacking = missing_tasks([str(tmp_path)])
    assert set(lacking) == set(KNOWN) - {"gsm8k"}
    assert "alpaca" not in missing_tasks([str(tmp_path), "alpaca"])  # given beside the folder
    write_task(tmp_path / "own" / "mine.jsonl", [["a"]])
    assert missing_tasks([str(tmp_path / "own")]) == {}


@pytest.mark.skipif(not EVAL.exists(), reason="the published task files are not there")
def test_the_shared_folder_says_what_it_lacks() -> None:
    assert set(missing_tasks([str(EVAL)])) == NOT_SHARED
    sizes = {task.name: len(task.prompts) for task in load_tasks([str(EVAL)], None, 0)}
    assert sizes == {name: row["samples"] for name, row in KNOWN.items() if name not in NOT_SHARED}


@pytest.mark.skipif(not EVAL.exists(), reason="the published task files are not there")
@pytest.mark.parametrize("name", sorted(set(KNOWN) - NOT_SHARED))
def test_templates_give_the_published_files(name: str) -> None:
    """Every line of a published file comes out of the template again, from the columns read off it."""
    row = KNOWN[name]
    for line in (EVAL / f"{name}.jsonl").read_text(encoding="utf-8").split("\n"):
        if not line:
            continue
        turns = json.loads(line)["turns"]
        if "turns" in row:
            item = {row["turns"]: turns if len(turns) > 1 else turns[0]}
        else:
            endings = [row["ending"]["filled"], row["ending"]["empty"]] if "ending" in row else [""]
            item = next(found for ending in endings if (found := columns(row["text"] + ending, turns[0])) is not None)
            if "ending" in row:
                item.setdefault(row["ending"]["column"], "")
        assert list(turns_of(row, item)) == turns


@pytest.mark.parametrize(
    ("name", "item", "turn"),
    [
        (
            "aime24",
            {"problem": "1+1?"},
            "1+1?\nPlease reason step by step, and put your final answer within \\boxed{}.",
        ),
        ("lbpp", {"instruction": "Sort {x}."}, "Sort {x}."),
        (
            "swe-bench",
            {"problem_statement": "It fails."},
            "Problem Statement:\nIt fails.\nPlease fix the issue described above.",
        ),
    ],
)
def test_the_tasks_without_a_shared_file(name: str, item: dict[str, str], turn: str) -> None:
    assert turns_of(KNOWN[name], item) == (turn,)


def test_a_parquet_file_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are read from the file that the row names, without a script."""
    path = tmp_path / "test.parquet"
    datasets.Dataset.from_list([{"instruction": "a"}, {"instruction": "b"}]).to_parquet(path)
    asked: list[tuple[str, str, str]] = []

    def download(repo: str, file: str, repo_type: str) -> str:
        asked.append((repo, file, repo_type))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    task = load_tasks(["lbpp"], None, 0)[0]
    assert task.prompts == {0: ("a",), 1: ("b",)}
    assert asked == [("CohereLabs/lbpp", "python/test.parquet", "dataset")]


def columns(template: str, text: str) -> dict[str, str] | None:
    """What stood for each {column} of ``template``; None where the text has another form."""
    parts = re.split(r"(?<!\{)\{(\w+)\}(?!\})", template)
    pattern = "".join(
        f"(?P<{part}>.*)" if number % 2 else re.escape(part.replace("{{", "{").replace("}}", "}"))
        for number, part in enumerate(parts)
    )
    found = re.fullmatch(pattern, text, re.DOTALL)
    return found.groupdict() if found else None


def test_an_ending_follows_its_column() -> None:
    row = {"text": "{q}\n\n", "ending": {"column": "code", "filled": "Use {code}", "empty": "Write"}}
    assert turns_of(row, {"q": "a", "code": "f()"}) == ("a\n\nUse f()",)
    assert turns_of(row, {"q": "a", "code": ""}) == ("a\n\nWrite",)


def test_bare_prompts_are_all_rows_without_the_tasks_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        "gsm8k": [{"question": f"q {number}", "answer": "no"} for number in range(600)],
        "alpaca": [{"instruction": "a {b}", "input": "c", "output": "no"}],
        "mt-bench": [{"prompt": ["one", "two"]}],
    }
    monkeypatch.setattr("deepspec.evaluate.tasks._hub_rows", lambda row: rows[next(n for n in rows if KNOWN[n] == row)])
    assert bare_prompts("gsm8k") == [f"q {number}" for number in range(600)]
    assert bare_prompts("alpaca") == ["a {b}\nc"]
    assert bare_prompts("mt-bench") == ["one", "two"]


def test_a_hub_that_does_not_answer_leaves_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(row: Any) -> Any:
        raise ConnectionError("offline")

    monkeypatch.setattr("deepspec.evaluate.tasks._hub_rows", offline)
    with pytest.raises(EvaluationError, match=r"gsm8k: cannot load the task \(offline\).*with --exclude"):
        bare_prompts("gsm8k")
