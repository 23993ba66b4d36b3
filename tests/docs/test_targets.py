"""The table of model types on the page of targets is what the suite runs on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from model_types import IMAGE_TEXT, TYPES, table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "targets.md"
ROWS = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if re.match(r"\| `\w+`( \(text| \|)", line)]
NAMES = sorted({*TYPES, *IMAGE_TEXT})


def test_every_type_of_the_suite_has_its_row() -> None:
    named = [line.split("`")[1] for line in ROWS]
    assert sorted(named) == NAMES, "python tests/helpers/model_types.py prints the table"
    assert len(named) == len(set(named))


@pytest.mark.parametrize(
    "names", [["mistral", "lfm2"], pytest.param(NAMES, marks=pytest.mark.slow)], ids=["some", "every"]
)
def test_the_table_says_how_a_type_is_decoded(names: list[str]) -> None:
    rows = {line.split("`")[1]: line for line in ROWS}
    assert table(names) == [rows[name] for name in names]
