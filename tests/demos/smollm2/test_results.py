"""docs/results.md: what is on disk comes into the table, what is not says so, and nothing known is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from deepspec.demos.smollm2 import ablation, finetune, results
from deepspec.demos.smollm2.plan import SCALES
from deepspec.errors import DeepSpecError
from deepspec.evaluate.measure import PromptResult, summarise
from deepspec.files import write_json


@pytest.fixture
def _folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()


def evaluation(folder: Path, temperatures: tuple[float, ...], tokens: int, task: str = "t") -> None:
    """A finished evaluation in which every round commits ``tokens``."""
    rows = []
    for temperature in temperatures:
        prompts = [
            PromptResult(task, i, temperature, 2 * tokens, [tokens] * 2, [7] * 2, [tokens - 1] * 2) for i in (0, 1)
        ]
        row = summarise(task, temperature, prompts).to_row()
        rows.append(row | {"speed_up": 1.25, "seconds": 2.0, "equal_to_plain": 1.0})
    about: dict[str, Any] = {"command": ["x/__main__.py", "--target", "T"], "versions": {"torch": "2"}, "seed": 5}
    write_json(folder / "results.json", {"summaries": rows, "provenance": about | {"finished": "2026-11-24T18:00:00Z"}})


@pytest.mark.usefixtures("_folder")
def test_where_nothing_has_run_every_table_says_so() -> None:
    with pytest.raises(DeepSpecError, match=r"nothing was measured in this folder.*docs/results\.json.*build/real"):
        results.write_results()
    assert list(Path("docs").iterdir()) == []
    write_json(results.MEASURED, {})
    results.write_results()
    text = Path("docs/results.md").read_text()
    assert text.count(results.NOT_RUN) > 20
    assert not any(character.isdigit() for line in text.split("\n") if "held-out chat |" in line for character in line)


@pytest.mark.usefixtures("_folder")
def test_measured_figures_stand_in_their_cells_and_in_the_json() -> None:
    root = SCALES["full"].root
    evaluation(root / "dspark-chat", (0.0, 1.0), 3)
    evaluation(root / "dspark-speed", (0.0, 1.0), 3)
    evaluation(root / "dspark-tasks", (0.0, 1.0), 2, "gsm8k")
    evaluation(ablation.ROOT / "layers-1" / "results", (0.0,), 4)
    part = {"parts": [{"tokens": 10}], "coded_bytes": 670, "raw_bytes": 1000}
    write_json(ablation.ROOT / "cache-raw" / "manifest.json", part)
    results.write_results()
    text = Path("docs/results.md").read_text()
    assert "| held-out chat | not run | not run | 3.00 (3.00-3.00) |" in text
    assert "| gsm8k | not run | not run | 2.00 (2.00-2.00) |" in text
    assert "| 1 layer | 4.00 (4.00-4.00) |" in text
    assert "| raw | 67 |" in text
    assert "| dspark | 0 | 1.25x | 6.0 | 3.00 (3.00-3.00) | 100% of 2 |" in text
    assert "`python -m deepspec.evaluate --target T`" in text
    kept = json.loads(Path("docs/results.json").read_text())
    assert kept["real"]["chat"]["dspark"]["provenance"]["seed"] == 5


BEGIN, END = "<!-- results: written by make results -->", "<!-- end of results -->"


@pytest.mark.usefixtures("_folder")
def test_the_fine_tuning_has_its_table_and_its_gains() -> None:
    Path("README.md").write_text(f"# A\n\n{BEGIN}\n{END}\n")
    lengths = {"general": (2, 4), "tuned": (5, 3), "target": (4, 1)}
    for start, (domain, chat) in lengths.items():
        evaluation(finetune.results_of("full", "dspark", start), (0.0, 1.0), domain, "domain")
        path = finetune.results_of("full", "dspark", start) / "results.json"
        first = json.loads(path.read_text())
        evaluation(path.parent, (0.0, 1.0), chat, "chat")
        both = json.loads(path.read_text())
        write_json(path, both | {"summaries": first["summaries"] + both["summaries"]})
    results.write_results()
    text = Path("docs/results.md").read_text()
    row = "| dspark, fine-tuned | 5.00 (5.00-5.00) | 5.00 (5.00-5.00) | 3.00 (3.00-3.00) | 3.00 (3.00-3.00) |"
    assert row in text
    assert row in Path("README.md").read_text()
    assert "2.50x (the general draft), 1.25x (from the target's layers); on chat -25.0%" in text  # one has not run
    shutil.copytree(path.parent, finetune.results_of("full", "dspark", "random"))
    results.write_results()
    text = Path("docs/results.md").read_text()
    gains = "2.50x (the general draft), 1.25x (from the target's layers), 1.25x (from random weights); on chat -25.0%"
    assert gains in text


@pytest.mark.usefixtures("_folder")
def test_what_was_gathered_before_outlives_its_folder() -> None:
    place = SCALES["full"].root / "dspark-chat"
    evaluation(place, (0.0, 1.0), 3)
    results.write_results()
    before = Path("docs/results.md").read_text()
    (place / "results.json").unlink()
    evaluation(SCALES["full"].root / "dflash-chat", (0.0, 1.0), 2)
    results.write_results()
    after = Path("docs/results.md").read_text()
    assert "3.00 (3.00-3.00)" in before
    assert "| held-out chat | not run | 2.00 (2.00-2.00) | 3.00 (3.00-3.00) |" in after


@pytest.mark.usefixtures("_folder")
def test_the_readme_gets_its_table_and_keeps_the_rest() -> None:
    before = f"# A\n\n{BEGIN}\nold\n{END}\n\n## B\n"
    Path("README.md").write_text(before)
    evaluation(SCALES["full"].root / "dspark-chat", (0.0, 1.0), 3)
    results.write_results()
    once = Path("README.md").read_text()
    assert "| held-out chat | not run | not run | 3.00 (3.00-3.00) |" in once
    assert once.startswith("# A\n")
    assert once.endswith(f"{END}\n\n## B\n")
    assert "old" not in once
    results.write_results()
    assert Path("README.md").read_text() == once
    Path("README.md").write_text("# A\n")
    with pytest.raises(DeepSpecError, match="no place for the results"):
        results.write_results()


def test_the_committed_readme_shows_the_committed_results() -> None:
    root = Path(__file__).parents[3]
    measured = json.loads((root / results.MEASURED).read_text())
    readme = (root / results.README).read_text()
    assert results.with_results(readme, measured) == readme
