"""The reference cases that come with the checkout, and that the checker of cases sees what differs."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import fork_server
import pytest
from make_reference import DRAFTS, FAMILY, REFERENCE, ROOT
from reference_cases import check_folder
from safetensors.torch import load_file, save_file

from deepspec.files import read_json, write_json


def test_our_own_cases_are_equal() -> None:
    results = {one.name: one for one in check_folder(REFERENCE)}
    assert set(results) == {f"{kind}{FAMILY}_{name}" for kind in ("", "infer_") for name in DRAFTS}
    assert [name for name, one in results.items() if not one.holds] == []


@pytest.mark.parametrize("name", DRAFTS)
def test_a_changed_number_is_seen(name: str, tmp_path: Path) -> None:
    case = shutil.copytree(REFERENCE / f"{FAMILY}_{name}", tmp_path / "case")
    weights = load_file(case / "model.safetensors")
    weights["norm.weight"][0] *= 1.001
    save_file(weights, case / "model.safetensors")
    (found,) = check_folder(tmp_path)
    assert not found.holds
    assert found.logits > 2e-5
    assert found.loss > 2e-6


def test_a_proposal_that_differs_is_seen(tmp_path: Path) -> None:
    shutil.copytree(REFERENCE / f"infer_target_{FAMILY}", tmp_path / f"infer_target_{FAMILY}")
    case = shutil.copytree(REFERENCE / f"infer_{FAMILY}_{DRAFTS[0]}", tmp_path / "infer_case")
    results = read_json(case / "results.json")
    results["runs"][1]["proposals"][0]["verify_input_ids"][1] += 1
    write_json(case / "results.json", results)
    (found,) = check_folder(tmp_path)
    assert (found.decoding, found.holds) == (1.0, False)


def test_the_cases_are_small_and_the_checker_needs_no_folder(tmp_path: Path) -> None:
    assert sum(path.stat().st_size for path in REFERENCE.rglob("*") if path.is_file()) < 700_000
    command = [sys.executable, ROOT / "tools" / "check_reference.py"]
    done = fork_server.run(command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" equal ") == 2 * len(DRAFTS)
    assert "given as DIR" in done.stdout
