"""The GPU check: all of it runs at tiny sizes on the CPU, what fails is listed, the page says what the file holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gpu_check
import pytest
import torch
from gpu_measures import PLAIN

from deepspec import registry
from deepspec.errors import DataError
from deepspec.tables import fill_page

DOCS = Path(gpu_check.__file__).parents[1] / "docs"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", *map(str, arguments)])
        return gpu_check.main()

    return call


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_dry_run_runs_everything(run: Any, tmp_path: Path) -> None:
    assert run("--dry-run", "--json", tmp_path / "gpu.json") == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["status"] == "dry run"
    assert found["missing"] == []
    names = {section: [row["row"] for row in rows] for section, rows in found["sections"].items()}
    assert set(names["training steps"]) == {*registry.ALGORITHMS, *(f"{name}, plain" for name in PLAIN)}
    assert {name.split(", ")[0] for name in names["decoding"]} == {"without a draft", *registry.ALGORITHMS}
    rounds = found["sections"]["decoding"]
    assert all(row["captured rounds"] > 0 and row["eager"] == "nothing" for row in rounds)
    assert all(row["tokens/s"] > 0 and row["captured, tokens/s"] > 0 for row in rounds)
    assert {"build, lossless", "read, 8 threads"} < set(names["cache"])
    assert len(found["bars"]) == len(names["twins"])
    assert all(row["of peak"] > 0 for row in found["sections"]["training steps"] if ", plain" not in row["row"])
    text = gpu_check.page({**found, "status": "run"})
    assert all(f"| {name} |" in text for rows in ("training steps", "cache", "decoding") for name in names[rows])


def test_a_row_that_fails_or_is_not_reached_is_written_down(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> dict[str, Any]:
        raise RuntimeError("out of memory\nand more")

    report = gpu_check.Report(1.0)
    assert report.row("cache", "build", broken) is None
    report.deadline = 0.0
    assert report.row("cache", "read", dict) is None
    assert report.missing == ["cache, build: RuntimeError: out of memory", "cache, read: not reached in the time"]
    assert "Traceback" in capsys.readouterr().err
    assert "- cache, read: not reached" in gpu_check.page(report.value({"device": "x"}, "run"))


def test_without_a_gpu_and_with_a_page_of_a_dry_run_one_line_says_so(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DataError, match=r"no GPU.*--dry-run"):
        run()
    with pytest.raises(DataError, match="--page: a dry run measures nothing"):
        run("--dry-run", "--page", tmp_path / "gpu.md")


def test_the_page_says_what_the_file_holds() -> None:
    text, value = (DOCS / "gpu.md").read_text(), json.loads((DOCS / "gpu.json").read_text())
    assert fill_page(text, "gpu", gpu_check.page(value)) == text
