"""The README's picture from a finished quickstart: an answer as it was drafted, accepted lengths and speed-ups."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepspec.demos.measured import length, pick
from deepspec.demos.quickstart.plan import ROOT, results_folder
from deepspec.evaluate.results import open_rows
from deepspec.evaluate.transcript import KINDS, length_of, tokens_of
from deepspec.files import read_json, write_text
from deepspec.pages import colours

PICTURE = Path("docs/drafting.svg")
COLUMNS, ADVANCE, LINE = 76, 9.0, 26.0  # characters of a line, and pixels of a character and of a line
TOKENS = range(40, 110)  # of the answer that is shown
LEGEND = {"accepted": "drafted and accepted", "corrected": "corrected by the target", "bonus": "bonus token"}
FILLED = {"text": "ink", ".small": "faint"} | {f".{kind}": kind for kind in KINDS}  # selector -> colour of the pages


def write_picture() -> tuple[Path, ...]:
    """Write PICTURE where the quickstart has finished in this folder; return what was written."""
    if not (ROOT / "results.json").exists():
        return ()
    measured: Mapping[str, Any] = read_json(ROOT / "results.json")["algorithms"]
    greedy = {name: row for name, one in measured.items() if (row := pick(one, 0.0)) is not None}
    best = max(greedy, key=lambda name: greedy[name]["speed_up"] or 0.0)
    rows = [row for row in open_rows(results_folder(best), "results").values() if row["temperature"] == 0]
    shown = sorted(
        (row for row in rows if row["output_tokens"] in TOKENS and row["turns"]), key=lambda row: length_of(row) or 0.0
    )
    if not shown:
        return ()
    answer = shown[len(shown) // 2]
    head = f"{best}: {length_of(answer):.2f} tokens a round on this answer of the quickstart's target"
    lines, height = _answer(answer["turns"][0], 56.0)
    write_text(PICTURE, _svg([_text(8, 22, head), *_legend(40.0), *lines, *_bars(greedy, height + 30)], height, greedy))
    return (PICTURE,)


def style() -> str:
    """The picture's style, in the colours of the pages."""
    light, dark = ("".join(f"{one}{{fill:{scheme[name]}}}" for one, name in FILLED.items()) for scheme in colours())
    fonts = "text{font:15px ui-monospace,Menlo,Consolas,monospace}.small{font-size:13px}.bar{fill:#4c8bf5}"
    return f"{fonts}{light}@media(prefers-color-scheme:dark){{{dark}}}"


def _svg(parts: Sequence[str], height: float, greedy: Mapping[str, Any]) -> str:
    width, total = COLUMNS * ADVANCE + 16, height + 50 + LINE * len(greedy)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {total:.0f}" role="img"'
    return f'{head} aria-label="an answer as it was drafted"><style>{style()}</style>{"".join(parts)}</svg>\n'


def _text(x: float, y: float, text: str, more: str = 'class="small"') -> str:
    return f'<text x="{x:g}" y="{y:g}" {more} xml:space="preserve">{html.escape(text)}</text>'


def _legend(y: float) -> list[str]:
    parts, x = list[str](), 8.0
    for kind, text in LEGEND.items():
        parts += [
            f'<rect class="{kind}" x="{x:g}" y="{y - 11:g}" width="14" height="14" rx="3"/>',
            _text(x + 19, y, text),
        ]
        x += 19 + 8.6 * (len(text) + 2)
    return parts


def _answer(turn: Mapping[str, Any], top: float) -> tuple[list[str], float]:
    """The tokens of an answer on their colours, and where the next thing goes."""
    parts, column, line = list[str](), 0, 0
    for token in tokens_of(turn):
        for number, piece in enumerate(token.text.split("\n")):
            if number or column + len(piece) > COLUMNS:
                column, line = 0, line + 1
            x, y, width = 8 + column * ADVANCE, top + line * LINE, len(piece) * ADVANCE
            if piece:
                box = f'x="{x:g}" y="{y:g}" width="{width - 1:g}" height="{LINE - 4:g}" rx="3"'
                parts += [f'<rect class="{token.kind}" {box}/>', _text(x, y + 16, piece, f'textLength="{width:g}"')]
            column += len(piece)
    return parts, top + (line + 1) * LINE


def _bars(greedy: Mapping[str, Any], top: float) -> list[str]:
    """A bar a draft: its accepted length, and in words the speed-up."""
    longest = max(row["accepted_length"] for row in greedy.values())
    parts = [_text(8, top, "tokens a round at T=0 (95 % interval), speed-up against plain decoding, on a CPU")]
    for number, (name, row) in enumerate(greedy.items()):
        y, width = top + 12 + number * LINE, 230 * row["accepted_length"] / longest
        faster = "" if row["speed_up"] is None else f", {row['speed_up']:.2f}x"
        parts += [_text(8, y + 15, name), f'<rect class="bar" x="90" y="{y:g}" width="{width:g}" height="20" rx="3"/>']
        parts.append(_text(98 + width, y + 15, length(row) + faster))
    return parts
