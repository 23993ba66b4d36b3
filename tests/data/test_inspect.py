"""What inspect_data shows is the mask."""

from __future__ import annotations

from pathlib import Path

import data_tools as tools

from deepspec.data.chat import Renderer
from deepspec.data.inspect import inspect


def test_supervised_text_is_coloured_and_counted(tmp_path: Path) -> None:
    case = tools.small_case("chatml")
    rows = [
        {"id": "one", "messages": [{"role": "user", "content": "a <b>"}, {"role": "assistant", "content": "c & d"}]},
        {"id": "none", "messages": [{"role": "user", "content": "a"}]},
    ]
    page, picture = tmp_path / "x.html", tmp_path / "x.png"
    text = inspect(Renderer(case.tokenizer, case.family), rows, 1, 3, str(page), str(picture))
    assert "\x1b[32mc & d<|im_end|>\x1b[90m\n" in text
    assert "1 conversations" in text
    assert "dropped, no supervised token: 1 (first: none)" in text
    assert "<b>c &amp; d&lt;|im_end|&gt;</b>" in page.read_text()
    assert "a &lt;b&gt;" in page.read_text()
    assert picture.stat().st_size > 1000


def test_nothing_to_show_says_so() -> None:
    case = tools.small_case("chatml")
    rows = [{"id": "none", "messages": [{"role": "user", "content": "a"}]}]
    assert "0 conversations" in inspect(Renderer(case.tokenizer, case.family), rows, 1, 3)
