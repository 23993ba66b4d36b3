"""The evaluator from its command line on a tiny target: measures, resume, refusal of another run, bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_tools import make_target
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec import registry
from deepspec.drafts import save_draft
from deepspec.errors import EvaluationError
from deepspec.evaluate.measure import PromptResult, bootstrap, by_position, summarise
from deepspec.evaluate.tasks import load_tasks
from deepspec.targets import load_spec


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(target, draft, tasks): a random target with a tokenizer, a random DSpark draft, two task files."""
    root = tmp_path_factory.mktemp("evaluate")
    target = make_target(root / "target", torch.float32)
    spec = load_spec(target)
    algorithm = registry.algorithm("dspark")
    section = {"target_layers": [0, 1], "num_layers": 1, "block_size": 4, "mask_token_id": 3, "markov_rank": 4}
    config = algorithm.parse(section, spec)
    model = algorithm.build(config, spec)
    save_draft(root / "draft", model.state_dict(), algorithm.config_json(config, spec), {})
    tasks = root / "tasks"
    tasks.mkdir()
    (tasks / "short.jsonl").write_text("".join(json.dumps({"turns": [f"What is {n}?"]}) + "\n" for n in range(3)))
    (tasks / "talk.jsonl").write_text(json.dumps({"turns": ["Name one.", "Name another."]}) + "\n")
    return target, root / "draft", tasks


def run(folders: tuple[Path, Path, Path], output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    target, draft, tasks = folders
    command = [
        sys.executable,
        "-m",
        "deepspec.evaluate",
        "--target",
        str(target),
        "--draft",
        str(draft),
        "--tasks",
        str(tasks),
    ]
    command += ["--temperature", "0", "1", "--max-new-tokens", "12", "--output", str(output), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_run_measures_reports_and_resumes(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    done = run(folders, tmp_path / "out", "--batch-size", "2")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {(row["task"], row["temperature"]): row for row in results["summaries"]}
    assert set(rows) == {(task, t) for task in ("short", "talk", "macro") for t in (0.0, 1.0)}
    assert rows["short", 0.0]["equal_to_plain"] == rows["talk", 0.0]["equal_to_plain"] == 1.0
    assert all(row["accepted_length"] >= 1.0 for row in rows.values())
    assert rows["macro", 1.0]["accepted_length"] == pytest.approx(
        (rows["short", 1.0]["accepted_length"] + rows["talk", 1.0]["accepted_length"]) / 2
    )
    assert results["provenance"]["tasks"].keys() == {"short", "talk"}
    assert "data:image/png" in (tmp_path / "out" / "report.html").read_text()
    lines = [line for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines() if line]
    assert len(lines) == 8
    # killed after three prompts, in the middle of the fourth row
    (tmp_path / "out" / "results.json").unlink()
    (tmp_path / "out" / "results.jsonl").write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])
    again = run(folders, tmp_path / "out", "--batch-size", "2")
    assert again.returncode == 0, again.stderr
    repeated = json.loads((tmp_path / "out" / "results.json").read_text())
    for one, other in zip(results["summaries"], repeated["summaries"], strict=True):
        assert all(one[key] == other[key] for key in ("task", "accepted_length", "prefix", "equal_to_plain"))
    other = run(folders, tmp_path / "out", "--batch-size", "2", "--seed", "1")
    assert other.returncode == 1
    assert "Traceback" not in other.stderr
    last = other.stderr.splitlines()[-1]
    assert "holds another run" in last
    assert "seed" in last


def test_results_do_not_depend_on_the_batch(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    texts = []
    for size in ("1", "3"):
        assert run(folders, tmp_path / size, "--batch-size", size, "--no-plain").returncode == 0
        lines = (tmp_path / size / "results.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines if line]
        texts.append(
            sorted((row["task"], row["temperature"], row["index"], row["text"], tuple(row["accepted"])) for row in rows)
        )
    assert texts[0] == texts[1]


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


def test_samples_are_drawn_by_seed_and_kept_in_order(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"turns": [str(n)]}) + "\n" for n in range(50)))
    first, again, other = (load_tasks([str(tmp_path)], 10, seed)[0] for seed in (1, 1, 2))
    assert first == again
    assert first.prompts != other.prompts
    numbers = [int(turns[0]) for turns in first.prompts]
    assert numbers == sorted(set(numbers))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=30))
@settings(max_examples=50, deadline=None)
def test_acceptance_by_position_is_the_definition(pairs: list[tuple[int, int]]) -> None:
    pairs = [(max(a, b), min(a, b)) for a, b in pairs]
    conditional, prefix = by_position([p for p, _ in pairs], [a for _, a in pairs])
    product = 1.0
    full = [pair for pair in pairs if pair[0] == 5]
    for slot in range(1, len(prefix) + 1):
        verified = [a for p, a in pairs if p >= slot]
        assert prefix[slot - 1] == pytest.approx(sum(a >= slot for a in verified) / len(verified))
    if len(full) == len(pairs) and pairs:  # all rounds verify every slot: prefixes are products of conditionals
        for slot, one in enumerate(conditional):
            product *= one
            assert prefix[slot] == pytest.approx(product)


def test_interval_covers_the_mean_and_shrinks() -> None:
    random = np.random.default_rng(0)
    widths = []
    for count in (20, 2000):
        rounds = random.integers(5, 15, count).astype(float)
        low, high = bootstrap(rounds * random.normal(3.0, 0.5, count), rounds, 0)
        assert low < 3.0 < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 4


def test_accepted_length_pools_rounds() -> None:
    results = [
        PromptResult("t", 0, 0.0, 9, [3, 3, 3], [4, 4, 4], [2, 2, 2], equal_to_plain=True),
        PromptResult("t", 1, 0.0, 1, [1], [4], [0], equal_to_plain=False),
    ]
    summary = summarise("t", 0.0, results)
    assert summary.accepted_length == 2.5
    assert summary.verify_rate == 6 / 16
    assert summary.equal_to_plain == 0.5
    assert summary.prefix == [0.75, 0.75, 0.0, 0.0]
