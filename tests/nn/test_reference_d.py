"""The losses of four projects on given logits: rows, gradients, D-PACE, end-to-end TV."""

from __future__ import annotations

from pathlib import Path

import pytest
import reference_d

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden_new"
CASES = sorted(GOLDEN.glob("D_*"))


@pytest.mark.skipif(not CASES, reason="no reference data in ../shared/golden_new")
@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_every_source_computed_what_we_do(case: Path) -> None:
    for source in reference_d.check(case):
        assert source.holds, source
