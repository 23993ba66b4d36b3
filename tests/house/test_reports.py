"""What commands report: logging, progress lines, tables."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from deepspec.arguments import Parser
from deepspec.log import start_logging
from deepspec.progress import Progress, clock
from deepspec.tables import Table

log = logging.getLogger("deepspec.tests")


def test_reports_are_bare_text_on_stdout_and_warnings_are_marked_on_stderr(capsys: Any) -> None:
    log.info("done %d of %d", 1, 2)
    log.warning("the disk is nearly full")
    log.debug("not shown")
    assert tuple(capsys.readouterr()) == ("done 1 of 2\n", "warning: the disk is nearly full\n")


def test_a_second_start_shows_no_line_twice(capsys: Any) -> None:
    start_logging()
    log.info("once")
    assert capsys.readouterr().out == "once\n"


def test_only_rank_0_reports_and_every_rank_warns(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    log.info("of rank 0 alone")
    Progress("job").finish()
    log.warning("of any rank")
    assert tuple(capsys.readouterr()) == ("", "warning: of any rank\n")


@pytest.mark.parametrize(
    ("words", "out"),
    [([], "info\n"), (["--quiet"], ""), (["--log-level", "debug"], "debug\ninfo\n"), (["--log-level", "error"], "")],
)
def test_every_parser_takes_the_level_and_keeps_it_from_the_command(words: list[str], out: str, capsys: Any) -> None:
    parser = Parser()
    parser.add_subparsers(required=True).add_parser("verb").add_argument("--flag")
    assert vars(parser.parse_args(["verb", *words, "--flag", "1"])) == {"flag": "1"}
    log.debug("debug")
    log.info("info")
    assert capsys.readouterr().out == out


def test_quiet_silences_progress(capsys: Any) -> None:
    start_logging(quiet=True)
    Progress("job").finish()
    assert not capsys.readouterr().err


def test_progress_says_how_far_how_fast_and_how_long_still(capsys: Any) -> None:
    progress = Progress("build", 4, noun="parts", expected=1000, more=lambda: "1 GB written", every=0.0)
    progress._start -= 10
    progress.add(1, 500)
    progress.add(3, 500)
    progress.finish()
    assert capsys.readouterr().err.splitlines() == [
        "build: 1/4 parts, 50 tokens/s, 0:00:10 left, 1 GB written",
        "build: 4/4 parts, 100 tokens/s, 1 GB written",
        "build: 4 parts in 0:00:10, 1,000 tokens, 100 tokens/s, 1 GB written",
    ]
    assert clock(3723.4) == "1:02:03"


def test_progress_prints_no_oftener_than_asked(capsys: Any) -> None:
    progress = Progress("prepare", None, every=3600.0)
    for _ in range(100):
        progress.add()
    assert not capsys.readouterr().err
    assert progress.line() == "prepare: 100, 0 tokens/s"


def test_a_table_is_markdown_html_or_text() -> None:
    table = Table(["task", "speed-up"], [["a < b", 1.5], ["c", None]])
    assert table.markdown() == "| task | speed-up |\n|---|---|\n| a < b | 1.5 |\n| c |  |"
    assert table.html({"task": 'share of <"x">'}) == (
        '<div class="wide"><table><thead><tr><th title="share of &lt;&quot;x&quot;&gt;">task</th>'
        "<th>speed-up</th></tr></thead>"
        "<tbody><tr><td>a &lt; b</td><td>1.5</td></tr><tr><td>c</td><td></td></tr></tbody></table></div>"
    )
    assert table.text() == "task   speed-up\na < b       1.5\nc"
