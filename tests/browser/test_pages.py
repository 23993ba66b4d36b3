"""The HTML pages in a real browser: elements, numbers, an empty console; screenshots lie in build/screenshots."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data_tools import small_case
from evaluate_tools import Folders, make_folders, rows_of

from deepspec.data.chat import Renderer
from deepspec.data.inspect import inspect
from deepspec.evaluate.report import write_report

pytestmark = [pytest.mark.browser, pytest.mark.slow]
api = pytest.importorskip("playwright.sync_api", reason="the extra `browser` is not installed")
SHOTS = Path(os.environ.get("DEEPSPEC_SCREENSHOTS", "build/screenshots"))
IMAGES, LARGEST = (
    os.environ.get("DEEPSPEC_IMAGES") or None,
    150_000,
)  # for the documentation
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
SIZES = {"wide": (1200, 900), "phone": (390, 844), "picture": (1000, 640)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("no Chromium on this machine")
    with api.sync_playwright() as play:
        started = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def output(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages") / "out"
    write_report(folders.run(folder).to_row(), folder)
    return folder


def opened(browser: Any, path: Path, size: str = "wide", scheme: str = "light") -> Any:
    """The page in a tab whose console must stay empty."""
    width, height = SIZES[size]
    tab = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme).new_page()
    tab.problems = []
    tab.on("console", lambda message: tab.problems.append(message.text))
    tab.on("pageerror", lambda problem: tab.problems.append(str(problem)))
    tab.on("request", lambda request: request.url.startswith("file:") or tab.problems.append(request.url))
    tab.goto(path.resolve().as_uri())
    return tab


def finish(tab: Any, name: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=SHOTS / f"{name}.png", full_page=True)
    assert tab.problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["wide", "phone"])
def test_the_report_is_readable(browser: Any, output: Path, size: str, scheme: str) -> None:
    tab = opened(browser, output / "report.html", size, scheme)
    assert tab.locator("figure svg").count() == 3
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing is wider than the screen
    ink, paper = (tab.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    light = [sum(map(int, re.findall(r"\d+", value)[:3])) for value in (ink, paper)]
    assert (light[0] > light[1]) == (scheme == "dark")
    label = tab.locator("figure svg text").first
    assert label.evaluate("one => getComputedStyle(one).fill") == ink  # the plots change with the page
    finish(tab, f"report-{size}-{scheme}")


def test_the_numbers_of_the_page_are_those_of_the_results(browser: Any, output: Path) -> None:
    results = json.loads((output / "results.json").read_text())
    tab = opened(browser, output / "report.html")
    table = tab.locator("table").first
    heads = table.locator("th").all_inner_texts()
    assert all(table.locator("th").nth(n).get_attribute("title") for n in range(len(heads)))
    for number, row in enumerate(results["summaries"]):
        cells = dict(zip(heads, table.locator("tbody tr").nth(number).locator("td").all_inner_texts(), strict=True))
        assert cells["task"] == row["task"]
        assert cells["acceptance length (95 %)"].split()[0] == f"{row['accepted_length']:.2f}"
        assert cells["prompts"] == str(row["prompts"])
        assert cells["tokens/s"] == f"{row['tokens_per_second']:,.0f}"
    finish(tab, "report-numbers")


def test_answers_are_coloured_searched_and_explained(browser: Any, output: Path) -> None:
    tab = opened(browser, output / "report.html")
    rows = {f"{row['task']} {row['index']}": row for row in rows_of(output)}
    assert tab.locator(".answer").count() == len(rows)
    lengths = [float(text.split()[0]) for text in tab.locator(".answer summary").all_inner_texts()]
    assert lengths == sorted(lengths, reverse=True)
    tab.select_option("#order", "worst")
    assert [float(text.split()[0]) for text in tab.locator(".answer summary").all_inner_texts()] == sorted(lengths)
    tab.fill("#find", "name another")
    assert tab.locator(".answer").count() == 1
    row, answer = rows["talk 0"], tab.locator(".answer").first
    texts = [answer.locator(".tokens").nth(turn).text_content() for turn in range(2)]
    assert texts == ["".join(turn["pieces"]) for turn in row["turns"]]
    for kind, count in (
        ("first", 2),
        ("accepted", sum(taken for turn in row["turns"] for _, taken, _ in turn["rounds"])),
    ):
        assert answer.locator(f".tokens .{kind}").count() == count
    assert answer.locator(".rounds i").count() == sum(len(turn["rounds"]) for turn in row["turns"])
    one = answer.locator(".corrected, .bonus").first
    one.click()
    assert re.match(r"round 1, position \d+: (corrected|bonus)", tab.locator("#told").inner_text())
    number = one.get_attribute("data-round")
    assert answer.locator(".tokens").first.locator(".lit").count() == row["turns"][0]["rounds"][int(number)][0]
    answer.locator(".rounds").nth(1).locator("i").first.hover()
    assert tab.locator("#told").inner_text().startswith("round 1: ")
    assert answer.locator(".tokens").nth(1).locator(".lit").count() == row["turns"][1]["rounds"][0][0]
    tab.fill("#find", "no such words")
    assert tab.locator(".answer").count() == 0
    finish(tab, "report-search")


def test_the_page_of_inspect(browser: Any, tmp_path: Path) -> None:
    case = small_case("chatml")
    talk = [{"role": "user", "content": "a <b>"}, {"role": "assistant", "content": "c & d \u4f60"}]
    inspect(Renderer(case.tokenizer, case.family), [{"id": "one", "messages": talk}], 1, 3, str(tmp_path / "x.html"))
    tab = opened(browser, tmp_path / "x.html")
    assert tab.title() == tab.locator("h1").inner_text() == "Supervised tokens"
    assert tab.locator(".legend .supervised").count() == 1
    assert "1 conversations" in tab.locator("pre").first.inner_text()
    assert tab.locator("figure svg").count() == 1
    assert tab.locator("pre .supervised").text_content() == "c & d \u4f60<|im_end|>"
    finish(tab, "inspect")


def test_the_pages_of_a_finished_quickstart(browser: Any) -> None:
    root = Path("build/quickstart")
    if not (root / "report.html").exists():
        pytest.skip("make quickstart has not run in this folder")
    results = json.loads((root / "results.json").read_text())
    tab = opened(browser, root / "report.html")
    lines = [row.split("\t") for row in tab.locator("table").first.locator("tr").all_inner_texts()[1:]]
    measured = [row for one in results["algorithms"].values() for row in one["summaries"]]
    assert [line[2].split()[0] for line in lines] == [f"{row['accepted_length']:.2f}" for row in measured]
    finish(tab, "quickstart")
    for name in results["algorithms"]:
        tab.get_by_role("link", name=name).click()
        assert tab.locator(".answer").count() > 0
        assert tab.locator(".tokens .accepted").count() > 0
        finish(tab, f"quickstart-{name}")
        tab.go_back()


@pytest.mark.skipif(IMAGES is None, reason="DEEPSPEC_IMAGES names no folder for the documentation's pictures")
def test_the_pictures_of_the_documentation(browser: Any) -> None:
    root = Path("build/quickstart")
    assert (root / "report.html").exists(), "run `make quickstart` first"
    name = list(json.loads((root / "results.json").read_text())["algorithms"])[-1]
    shown = {
        "quickstart": opened(browser, root / "report.html", "picture"),
        "answers": opened(browser, root / f"{name}-results" / "report.html", "picture"),
        "answers-phone": opened(browser, root / f"{name}-results" / "report.html", "phone", "dark"),
    }
    for picture, tab in shown.items():
        if "answers" in picture:
            tab.select_option("#order", "worst")  # it has tokens of every kind
            tab.evaluate("document.querySelector('.legend').previousElementSibling.scrollIntoView()")
            tab.locator(".answer .corrected").first.hover()
        path = Path(str(IMAGES)) / f"{picture}.png"
        tab.screenshot(path=path)
        assert path.stat().st_size < LARGEST
        assert tab.problems == []
