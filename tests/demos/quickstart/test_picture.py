"""The README's picture says what was measured, and fits its frame."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from deepspec.demos.quickstart import picture
from deepspec.files import write_json

NAME = "{http://www.w3.org/2000/svg}"
WORDS = ["Tom", " has", " <3>", " apples", " and", " finds", " 14", " more", ".\n\nSo", " 17", "."] * 4
ROUNDS = [[4, 3, " two"], [7, 6, None], [1, 0, "x"], [31, 31, None]]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished quickstart with made-up numbers."""
    speeds = {"one": 2.5, "two": 1.5}
    same = {"temperature": 0.0, "task": "t", "accepted_length": 5.81, "interval": [5.1, 6.2]}
    summaries = {name: same | {"speed_up": value} for name, value in speeds.items()}
    write_json(tmp_path / "results.json", {"algorithms": {n: {"summaries": [one]} for n, one in summaries.items()}})
    turn = {"asked": "How many?", "pieces": WORDS, "rounds": ROUNDS}
    row = {
        "task": "t",
        "index": 0,
        "temperature": 0.0,
        "output_tokens": 44,
        "turns": [turn],
        "committed": [4, 7, 1, 31],
    }
    (tmp_path / "one").mkdir()
    write_json(tmp_path / "one" / "results.json", {})
    (tmp_path / "one" / "results.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setattr(picture, "ROOT", tmp_path)
    monkeypatch.setattr(picture, "results_folder", lambda name: tmp_path / name)
    monkeypatch.setattr(picture, "PICTURE", tmp_path / "x.svg")
    return tmp_path


def test_the_picture_shows_the_answer_and_the_figures(root: Path) -> None:
    assert picture.write_picture() == (root / "x.svg",)
    tree = ElementTree.parse(root / "x.svg").getroot()
    texts = [one.text or "" for one in tree.iter(f"{NAME}text")]
    assert texts[0].startswith("one: 10.75 tokens a round")
    tokens = [one.text or "" for one in tree.iter(f"{NAME}text") if "textLength" in one.attrib]
    assert "".join(tokens) == "".join(WORDS).replace("\n", "")
    assert texts[-1] == "5.81 (5.10-6.20), 1.50x"
    width, height = map(float, tree.attrib["viewBox"].split()[2:])
    boxes = [{key: float(one.attrib[key]) for key in ("x", "y", "width", "height")} for one in tree.iter(f"{NAME}rect")]
    assert all(box["x"] + box["width"] <= width and box["y"] + box["height"] <= height for box in boxes)
    kinds = [one.attrib["class"] for one in tree.iter(f"{NAME}rect")][3:]
    assert kinds.count("corrected") == 2
    assert kinds.count("bonus") == 1


def test_without_a_quickstart_there_is_no_picture(root: Path) -> None:
    (root / "results.json").unlink()
    assert picture.write_picture() == ()
    assert not (root / "x.svg").exists()
