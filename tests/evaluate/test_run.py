"""The evaluator on a tiny target: measures, reports, refusal of another run, independence of the batch."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import fork_server
import pytest
from evaluate_tools import Folders, make_folders, rows_of, untimed, write_task

from deepspec.decoding.loop import generate
from deepspec.decoding.records import DecodeSettings
from deepspec.drafts import load_draft, save_draft
from deepspec.errors import EvaluationError
from deepspec.evaluate.report import markdown, write_report
from deepspec.evaluate.results import Results, paper_value
from deepspec.evaluate.run import Evaluation
from deepspec.files import read_json
from deepspec.recipe import load_recipe
from deepspec.targets import Target, load_target

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("evaluate"))


def test_the_command_measures_and_reports(folders: Folders, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, *folders.command(output, "--batch-size", "2")]
    done = fork_server.run(command)
    assert done.returncode == 0, done.stderr
    assert "decoding path: packed (its layers are a family's own)" in done.stdout
    results = Results.load(output)
    rows = {row.task: row for row in results.summaries}
    assert set(rows) == {"short", "talk", "macro"}
    assert rows["short"].equal_to_baseline == rows["talk"].equal_to_baseline == 1.0
    assert rows["macro"].acceptance_length == (rows["short"].acceptance_length + rows["talk"].acceptance_length) / 2
    for row in rows.values():
        assert row.acceptance_length >= 1.0
        assert len(row.conditional) == len(row.prefix) == 4
        assert row.speed_up is not None
        assert set(row.milliseconds_per_step) == {"draft", "verify", "head", "other", "total"}
        assert (row.speed_up_interval is not None) == (row.task == "short")  # the other task has one prompt
    written = read_json(output / "results.json")
    assert sorted(written.pop("sha256")) == ["plain.jsonl", "results.jsonl"]
    assert written == json.loads(json.dumps(results.to_row()))  # nothing is lost between the class and the file
    for title in ("Acceptance length and speed", "Acceptance by position", "Where a round's time goes"):
        assert title in done.stdout
    provenance = results.provenance
    assert provenance.tasks.keys() == provenance.sources.keys() == {"short", "talk"}
    assert provenance.counts["prompts"] == 4
    assert provenance.settings["seed"] == 980406
    page = (output / "report.html").read_text()
    assert page.count("</svg>") == 3
    assert not re.search(r'(src|href)="(?!#)', page)  # everything is inside
    assert [(row["task"], row["index"]) for row in rows_of(output)] == [("short", n) for n in range(3)] + [("talk", 0)]
    with pytest.raises(EvaluationError, match=r"holds another run: seed: run \d+, now \d+"):
        folders.run(output, batch_size=2, seed=1)


def test_outputs_do_not_depend_on_what_else_runs(folders: Folders, tmp_path: Path) -> None:
    """The batch, other tasks and other prompts change no sampled output."""
    alone = write_task(tmp_path / "some" / "short.jsonl", [[f"What is {n}?"] for n in range(9)])
    runs: list[dict[tuple[str, int], tuple[str, list[int]]]] = []
    for number, more in enumerate(
        (
            {"batch_size": 1},
            {"batch_size": 3},
            {"batch_size": 10**9, "tasks": (str(alone),)},  # no more rows than prompts are made
            {"batch_size": 4, "tasks": (str(alone),), "samples": 4},
        )
    ):
        output = tmp_path / str(number)
        folders.run(output, temperatures=(1.0,), baseline=False, **more)
        runs.append({(row["task"], row["index"]): (row["output_sha"], row["accepted"]) for row in rows_of(output)})
    assert runs[0] == runs[1]
    for other in runs[2:]:
        shared = runs[2].keys() & other.keys()
        assert len(shared) >= 3
        assert all(runs[2][key] == other[key] for key in shared)
    assert all(runs[0][key] == runs[2][key] for key in runs[0] if key[0] == "short")
    assert len({sha for sha, _ in runs[2].values()}) > 5  # the prompts' random numbers differ


def test_live_weights_measure_like_the_folder(folders: Folders, tmp_path: Path) -> None:
    """A draft in memory and the folder it is saved to have the same acceptance length."""
    target = load_target(folders.target)
    live = load_draft(folders.draft, target)
    algorithm = live.algorithm
    for number, tensor in enumerate(live.parameters()):
        tensor.data.mul_(1 + 0.1 * (number % 3))  # the weights of now, not of the folder
    measured = Evaluation(folders.options(tmp_path / "live"), target=target, draft=live).run()
    save_draft(tmp_path / "draft", live.state_dict(), algorithm.config_json(live.config, target.spec), {})
    saved = Folders(folders.target, tmp_path / "draft", folders.tasks).run(tmp_path / "saved")
    assert measured is not None
    assert untimed(measured) == untimed(saved)
    folders.run(tmp_path / "before")
    said = [[row["confidence"] for row in rows_of(tmp_path / name)] for name in ("live", "saved", "before")]
    assert said[0] == said[1] != said[2]


def test_the_first_turn_alone(folders: Folders, tmp_path: Path) -> None:
    both, first = folders.run(tmp_path / "both"), folders.run(tmp_path / "first", first_turn=True)
    tokens = [{row.task: row.output_tokens for row in run.summaries} for run in (both, first)]
    assert tokens[0]["short"] == tokens[1]["short"]
    assert tokens[0]["talk"] > tokens[1]["talk"]


def test_figures_of_the_paper_stand_only_beside_a_result_measured_like_them() -> None:
    settings = {
        "temperature": 1.0, "max_new_tokens": 2048, "turns": 1, "thinking": False, "system_prompt": None,
        "confidence_threshold": 0.0, "tree": [],
    }  # fmt: skip
    drafts = {
        name: load_recipe(ROOT / "recipes" / f"{name}_qwen3_4b.yaml").draft for name in ("dspark", "dflash", "eagle3")
    }
    dspark = drafts["dspark"]
    assert paper_value("Qwen/Qwen3-4B", dspark, "gsm8k", 500, settings) == (6.11, [])
    assert paper_value("/models/gemma-4-12B-it", drafts["eagle3"], "arena-hard-v2", 500, settings) == (2.72, [])
    assert paper_value("Qwen/Qwen3-8B", drafts["dflash"], "aime25", 30, settings) == (4.07, [])
    for target, task in (("Qwen/Qwen3-1.7B", "gsm8k"), ("Qwen/Qwen3-4B", "held_out")):  # there is none
        assert paper_value(target, dspark, task, 500, settings) == (None, [])
    other: list[tuple[Any, int, dict[str, Any], str]] = [
        (dspark, 8, {}, "prompts 8, paper 500"),
        (dspark, 500, {"temperature": 0.0}, "temperature 0.0, paper 1.0"),
        (dspark, 500, {"max_new_tokens": 256}, "max_new_tokens 256, paper 2048"),
        (dspark, 500, {"turns": 2}, "turns 2, paper 1"),
        (dspark, 500, {"thinking": True}, "thinking True, paper False"),
        (dspark, 500, {"tree": [2]}, "tree [2], paper []"),
        (replace(dspark, block_size=15), 500, {}, "max_draft 15, paper 7"),
        (replace(dspark, num_layers=3), 500, {}, "num_layers 3, paper 5"),
        (replace(dspark, markov_head="gated"), 500, {}, "markov_head gated, paper vanilla"),
        (replace(drafts["eagle3"], draft_vocab_size=32000), 500, {}, "draft_vocab_size 32000, paper None"),
    ]
    for draft, prompts, changed, reason in other:
        assert paper_value("Qwen/Qwen3-4B", draft, "gsm8k", prompts, settings | changed) == (None, [reason])


def test_a_figure_of_the_paper_that_is_not_comparable_is_left_out_and_why(folders: Folders, tmp_path: Path) -> None:
    target, named = load_target(folders.target), tmp_path / "Qwen3-4B"
    named.symlink_to(folders.target)
    task = write_task(tmp_path / "tasks" / "gsm8k.jsonl", [["What is 1?"], ["What is 2?"]])
    options = replace(folders.options(tmp_path / "out", tasks=(str(task),), baseline=False), target=str(named))
    results = Evaluation(options, target=target).run()
    assert results is not None
    (row,) = results.summaries
    assert row.paper_value is None
    assert "prompts 2, paper 500" in row.paper_differs
    assert "temperature 0.0, paper 1.0" in row.paper_differs
    text = markdown(results.to_row())
    assert "paper |" not in text
    assert "the paper reports a figure, which is not comparable" in text


def test_an_answer_of_one_token_has_no_acceptance_length(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither at the limit of one new token, nor where the first token is a stop token."""
    results = folders.run(tmp_path / "one", max_new_tokens=1)
    assert {row.task: (row.acceptance_length, row.interval, row.rounds) for row in results.summaries} == dict.fromkeys(
        ("short", "talk", "macro"), (None, None, 0)
    )
    assert json.loads((tmp_path / "one" / "results.json").read_text())["summaries"][0]["accepted_length"] is None
    write_report(results.to_row(), tmp_path / "one")
    assert "| none |" in (tmp_path / "one" / "results.md").read_text()
    stopping = Evaluation(folders.options(tmp_path / "stop", baseline=False))
    prompt = stopping._request(stopping.tasks[0], 0, []).prompt_ids
    first = generate(stopping.target, None, [prompt], DecodeSettings(max_new_tokens=1))[0].output_ids
    settings = replace(stopping._settings(0.0), stop_token_ids=tuple(first))
    monkeypatch.setattr(stopping, "_settings", lambda temperature: settings)
    stopped = stopping.run()
    assert stopped is not None
    assert stopped.summaries[0].without_rounds >= 1
    rows = [row["committed"] for row in rows_of(tmp_path / "stop") if row["task"] == "short" and row["committed"]]
    tokens, rounds = sum(map(sum, rows)), sum(map(len, rows))
    assert stopped.summaries[0].acceptance_length == (tokens / rounds if rounds else None)


def with_positions(folders: Folders, count: int) -> Target:
    """The target, made for so many positions."""
    target = load_target(folders.target)
    target.spec = replace(target.spec, config={**target.spec.config, "max_position_embeddings": count})
    return target


def test_prompts_beyond_the_targets_positions_are_left_out_and_counted(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = folders.options(tmp_path / "probe")
    probe = Evaluation(options)
    sizes = {task.name: len(probe._request(task, 0, []).prompt_ids) for task in probe.tasks}
    long = write_task(tmp_path / "tasks" / "short.jsonl", [["What is 1?"], ["word " * 40], ["What is 2?"]])
    positions = sizes["short"] + 12 + 4
    options = replace(options, tasks=(str(long),), output=str(tmp_path / "out"))
    results = Evaluation(options, target=with_positions(folders, positions)).run()
    assert results is not None
    assert (results.summaries[0].prompts, results.summaries[0].too_long) == (2, 1)
    assert {row["index"] for row in rows_of(tmp_path / "out")} == {0, 2}
    assert "left out: 1 prompts of short" in capsys.readouterr().out
    assert "1 prompts are left out" in markdown(results.to_row())
    with pytest.raises(EvaluationError, match=r"short: no prompt fits.*lower --max-new-tokens"):
        Evaluation(replace(options, max_new_tokens=positions), target=with_positions(folders, positions))


def test_a_conversation_ends_before_a_turn_that_does_not_fit(folders: Folders, tmp_path: Path) -> None:
    options = replace(folders.options(tmp_path / "out"), tasks=(str(folders.tasks / "talk.jsonl"),))
    probe = Evaluation(replace(options, output=str(tmp_path / "probe")))
    first = len(probe._request(probe.tasks[0], 0, []).prompt_ids)
    results = Evaluation(options, target=with_positions(folders, first + 12)).run()
    assert results is not None
    (summary,) = results.summaries
    (row,) = rows_of(tmp_path / "out")
    assert (row["finish"], row["output_tokens"], summary.cut_short) == ("positions", 12, 1)
    assert summary.equal_to_baseline == 1.0
    assert "1 of 1 prompts ended before a turn" in markdown(results.to_row())


def test_a_threshold_without_a_confidence_head_is_refused_before_anything_is_decoded(
    folders: Folders, tmp_path: Path
) -> None:
    target = load_target(folders.target)
    draft = load_draft(folders.draft, target)
    draft.config = dataclasses.replace(draft.config, confidence_head=False, confidence_with_markov=False)
    options = folders.options(tmp_path / "out", confidence_threshold=0.5)
    with pytest.raises(EvaluationError, match=r"confidence_threshold: .*needs a draft with a confidence head"):
        Evaluation(options, target=target, draft=draft)
    assert not (tmp_path / "out").exists()


def test_a_run_continues_by_the_draft_s_folder_however_its_path_is_written(folders: Folders, tmp_path: Path) -> None:
    first = folders.run(tmp_path / "out", baseline=False)
    relative = dataclasses.replace(
        folders.options(tmp_path / "out", baseline=False), draft=os.path.relpath(folders.draft)
    )  # fmt: skip
    again = Evaluation(relative).run()
    assert again is not None
    assert again.summaries == first.summaries
    copy = Path(shutil.copytree(folders.draft, tmp_path / "copy"))
    with pytest.raises(EvaluationError, match="holds another run: draft: "):
        Evaluation(dataclasses.replace(relative, draft=str(copy))).run()


def test_results_of_another_format_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"format": "deepspec.results/1"}))
    with pytest.raises(EvaluationError, match="another format"):
        Results.load(tmp_path)
    with pytest.raises(EvaluationError, match="finished evaluation"):
        Results.load(tmp_path / "nowhere")
