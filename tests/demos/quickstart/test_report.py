"""The quickstart's table and page from files of the form that the stages leave."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from deepspec.demos.quickstart import report
from deepspec.evaluate.measure import PromptResult, summarise
from deepspec.files import write_json
from deepspec.registry import ALGORITHMS


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A finished quickstart with made-up numbers."""
    names = {name: tmp_path / name for name in ALGORITHMS}
    for number, folder in enumerate(names.values()):
        summaries = [measured(temperature, number) for temperature in (0.0, 1.0)]
        write_json(tmp_path / f"{folder.name}-results" / "results.json", {"summaries": summaries})
        rows = [{"kind": "train", "step": step, "tau": 1 + step / 10} for step in (10, 20)]
        folder.mkdir()
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = [{"tokens": 600}, {"tokens": 400}]
    write_json(tmp_path / "cache" / "manifest.json", {"parts": parts, "coded_bytes": 680_000, "raw_bytes": 1_000_000})
    write_json(tmp_path / "target" / "target.json", {"held_out_top1": 0.94})
    write_json(tmp_path / "logs" / "seconds.json", {"cache": 7.0, **{f"train {name}": 50.0 for name in names}})
    return tmp_path


def measured(temperature: float, bonus: int) -> dict[str, Any]:
    """A summary as the evaluator writes it."""
    equal = True if temperature == 0 else None
    prompts = [
        PromptResult("t", i, temperature, 6, [2 + bonus, 4 + bonus], [7, 7], [1 + bonus, 3 + bonus], [], equal)
        for i in range(4)
    ]
    found = summarise("t", temperature, prompts)
    return {**found.to_row(), "interval": list(found.interval), "speed_up": 1.5, "tokens_per_second": 9.0}


def test_the_table_holds_what_was_measured(root: Path) -> None:
    text = report.write_report(root)
    assert "dflash" in text
    assert "3.00 (3.00-3.00)" in text  # 2 and 4 tokens a round
    assert "5.00 (5.00-5.00)" in text
    assert "cache: 680 bytes a token, 68% of raw (1,000), 1,000 tokens" in text
    results = json.loads((root / "results.json").read_text())
    assert set(results["algorithms"]) == set(ALGORITHMS)
    assert results["seconds"]["cache"] == 7.0


def test_the_page_has_its_plots_inside(root: Path) -> None:
    report.write_report(root)
    page = (root / "report.html").read_text()
    assert page.count("</svg>") == 3
    assert not re.search(r'(src|href)="(?!#|[\w-]+/report\.html")', page)
