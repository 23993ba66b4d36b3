"""Reports as one self-contained HTML file: readable on a phone, light and dark; plots are inline SVG in its colours."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

Draw = Callable[[Any], object]  # draws onto matplotlib's axes


def page(title: str, parts: Sequence[str], *scripts: str) -> str:
    """An HTML page from its parts; ``scripts`` run at its end."""
    head = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
    head += f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{shipped("page.css")}</style>'
    programs = "".join(f"<script>{script}</script>" for script in scripts)
    return f"{head}</head><body><h1>{html.escape(title)}</h1>{''.join(parts)}{programs}</body></html>\n"


@cache
def shipped(name: str) -> str:
    """A file of deepspec/assets."""
    return Path(__file__).with_name("assets").joinpath(name).read_text(encoding="utf-8")


def colours() -> tuple[dict[str, str], dict[str, str]]:
    """The named colours of a page, by light and by dark."""
    light, dark = re.findall(r":root\{(.*?)\}", shipped("page.css"), re.DOTALL)
    return tuple(dict(re.findall(r"--(\w+):(#\w+)", scheme)) for scheme in (light, dark))  # type: ignore[return-value]


def data_block(name: str, value: Any) -> str:
    """A value for a page's scripts, as JSON in an element of that id."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    text = text.encode("utf-8", "replace").decode()  # a lone surrogate is no UTF-8
    return f'<script type="application/json" id="{name}">{text.replace("<", chr(92) + "u003c")}</script>'


def figure(draw: Draw, size: tuple[float, float] = (6.4, 3.4), label: str = "plot") -> str:
    """A <figure> with the plot that ``draw(axes)`` draws; ``label`` says to a screen reader what it shows."""
    text = saved(draw, size, "svg").decode()
    text = text[text.index("<svg") :].replace("#000000", "currentColor")
    text = re.sub("<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return f'<figure role="img" aria-label="{html.escape(label)}">{text}</figure>'


def saved(draw: Draw, size: tuple[float, float], form: str) -> bytes:
    """The plot that ``draw(axes)`` draws, as a file of that form (png, svg, pdf): the same bytes for the same plot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    own: dict[str, Any] = {}
    if form == "svg":  # text stays text: the reader's fonts have every glyph
        own = {"transparent": True, "metadata": {"Date": None}}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "deepspec", "legend.framealpha": 0}):
        picture, axes = pyplot.subplots(figsize=size, layout="constrained")
        draw(axes)
        data = io.BytesIO()
        picture.savefig(data, format=form, dpi=110, **own)
        pyplot.close(picture)
    return data.getvalue()
