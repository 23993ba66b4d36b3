"""The evaluator on a tiny target: measures, reports, refusal of another run, independence of the batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from evaluate_tools import Folders, make_folders, rows_of, untimed, write_task

from deepspec.drafts import load_draft, save_draft
from deepspec.errors import EvaluationError
from deepspec.evaluate.results import Results, published
from deepspec.evaluate.run import Evaluation
from deepspec.targets import load_target


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("evaluate"))


def test_the_command_measures_and_reports(folders: Folders, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, *folders.command(output, "--batch-size", "2")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = Results.load(output)
    rows = {row.task: row for row in results.summaries}
    assert set(rows) == {"short", "talk", "macro"}
    assert rows["short"].equal_to_plain == rows["talk"].equal_to_plain == 1.0
    assert rows["macro"].accepted_length == (rows["short"].accepted_length + rows["talk"].accepted_length) / 2
    for row in rows.values():
        assert row.accepted_length >= 1.0
        assert len(row.conditional) == len(row.prefix) == 4
        assert row.speed_up is not None
        assert set(row.milliseconds_per_step) == {"draft", "verify", "head", "other", "total"}
        assert row.task == "macro" or row.speed_up_interval is not None
    written = json.loads((output / "results.json").read_text())
    assert written == json.loads(json.dumps(results.to_row()))  # nothing is lost between the class and the file
    for title in ("Accepted length and speed", "Acceptance by position", "Where a round's time goes"):
        assert title in done.stdout
    provenance = results.provenance
    assert provenance.tasks.keys() == provenance.sources.keys() == {"short", "talk"}
    assert provenance.counts["prompts"] == 4
    assert provenance.settings["seed"] == 980406
    page = (output / "report.html").read_text()
    assert page.count("data:image/png") == 3
    assert "http" not in page
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
            {"batch_size": 2, "tasks": (str(alone),)},
            {"batch_size": 4, "tasks": (str(alone),), "samples": 4},
        )
    ):
        output = tmp_path / str(number)
        folders.run(output, temperatures=(1.0,), plain=False, **more)
        runs.append({(row["task"], row["index"]): (row["output_sha"], row["accepted"]) for row in rows_of(output)})
    assert runs[0] == runs[1]
    for other in runs[2:]:
        shared = runs[2].keys() & other.keys()
        assert len(shared) >= 3
        assert all(runs[2][key] == other[key] for key in shared)
    assert all(runs[0][key] == runs[2][key] for key in runs[0] if key[0] == "short")
    assert len({sha for sha, _ in runs[2].values()}) > 5  # the prompts' random numbers differ


def test_live_weights_measure_like_the_folder(folders: Folders, tmp_path: Path) -> None:
    """A draft in memory and the folder it is saved to have the same accepted length."""
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


def test_published_figures_stand_only_beside_the_same_setting() -> None:
    assert published("Qwen/Qwen3-4B", "dspark", 7, "gsm8k", 1.0) == 6.11
    assert published("/models/gemma-4-12B-it", "eagle3", 7, "arena-hard-v2", 1.0) == 2.72
    for changed in (
        ("Qwen/Qwen3-1.7B", "dspark", 7, "gsm8k", 1.0),
        ("Qwen/Qwen3-4B", "other", 7, "gsm8k", 1.0),
        ("Qwen/Qwen3-4B", "dspark", 15, "gsm8k", 1.0),
        ("Qwen/Qwen3-4B", "dspark", 7, "held_out", 1.0),
        ("Qwen/Qwen3-4B", "dspark", 7, "gsm8k", 0.0),
    ):
        assert published(*changed) is None


def test_results_of_another_format_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"format": "deepspec.results/1"}))
    with pytest.raises(EvaluationError, match="another format"):
        Results.load(tmp_path)
    with pytest.raises(EvaluationError, match="finished evaluation"):
        Results.load(tmp_path / "nowhere")
