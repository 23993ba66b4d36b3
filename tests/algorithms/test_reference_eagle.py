"""EAGLE-3.1 and P-EAGLE against the reference numbers: forward, losses and gradients, variant by variant."""

from __future__ import annotations

from pathlib import Path

import pytest
import reference_a
import reference_b

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden_new"
CASES = sorted(path for letter in "AB" for path in GOLDEN.glob(f"{letter}_*"))


@pytest.mark.skipif(not CASES, reason="no reference data in ../shared/golden_new")
@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_the_reference_is_equal(case: Path) -> None:
    found = reference_a.check(case) if case.name.startswith("A_") else [reference_b.check(case)]
    assert all(one.holds for one in found), found
