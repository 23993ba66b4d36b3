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
    text = inspect(Renderer(case.tokenizer, case.family), rows, 1, 3, str(page), str(picture), colour=True)
    assert "\x1b[32mc & d<|im_end|>\x1b[0m\x1b[90m\n" in text
    piped = inspect(Renderer(case.tokenizer, case.family), rows, 1, 3)
    assert "[[c & d<|im_end|>]]\n" in piped
    assert "\x1b" not in piped
    assert "1 conversations" in text
    assert "dropped, no supervised token: 1 (first: none)" in text
    assert '<span class="supervised">c &amp; d&lt;|im_end|&gt;</span>' in page.read_text()
    assert "a &lt;b&gt;" in page.read_text()
    assert picture.stat().st_size > 1000
    assert "1 conversations" in page.read_text()
    assert page.read_text().count("</svg>") == 1


def test_nothing_to_show_says_so(tmp_path: Path) -> None:
    case = tools.small_case("chatml")
    rows = [{"id": "none", "messages": [{"role": "user", "content": "a"}]}]
    page = tmp_path / "x.html"
    assert "0 conversations" in inspect(Renderer(case.tokenizer, case.family), rows, 1, 3, str(page))
    assert "0 conversations" in page.read_text()
