"""DFlash 2 and JetSpec against the reference numbers: states, losses, gradients, walks and greedy decodings."""

from __future__ import annotations

from pathlib import Path

import pytest
import reference_c
import reference_e
import reference_infer

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden_new"
READERS = {"C_": reference_c, "E_": reference_e, "infer_dflash2": reference_infer}
CASES = sorted((path, start) for start in READERS for path in GOLDEN.glob(f"{start}*"))


@pytest.mark.skipif(not CASES, reason="no reference data in ../shared/golden_new")
@pytest.mark.parametrize(("case", "start"), CASES, ids=lambda given: getattr(given, "name", ""))
def test_the_reference_is_equal(case: Path, start: str) -> None:
    found = READERS[start].check(case)
    assert found.holds, found
