"""See what a target will be trained on: samples with the supervised tokens coloured, lengths, a histogram."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from deepspec.data.chat import RenderCounts, Rendered, Renderer, render_rows
from deepspec.errors import printable
from deepspec.files import write_bytes, write_text
from deepspec.pages import Draw, figure, page, saved

_GREEN, _GREY, _PLAIN = "\x1b[32m", "\x1b[90m", "\x1b[0m"


def stretches(renderer: Renderer, rendered: Rendered) -> Iterator[tuple[bool, str]]:
    """(supervised, text) of every run of tokens alike."""
    pairs = zip(rendered.input_ids, rendered.loss_mask, strict=True)
    for on, run in groupby(pairs, key=lambda pair: pair[1]):
        ids = [token for token, _ in run]
        yield bool(on), renderer.tokenizer.decode(ids, skip_special_tokens=False)


def terminal(renderer: Renderer, sample: str, rendered: Rendered, colour: bool) -> str:
    """A sample for the terminal: supervised text green and the rest grey, or in double brackets."""
    marks = ((_GREY, _PLAIN), (_GREEN, _PLAIN)) if colour else (("", ""), ("[[", "]]"))
    text = "".join(f"{marks[on][0]}{printable(part)}{marks[on][1]}" for on, part in stretches(renderer, rendered))
    return f"{printable(sample)}: {len(rendered.input_ids)} tokens, {rendered.supervised} supervised\n{text}\n"


def page_parts(renderer: Renderer, samples: Iterable[tuple[str, Rendered]]) -> list[str]:
    """Samples as parts of an HTML page."""
    parts = ['<h2>Samples</h2><p class="legend"><span class="supervised">supervised</span>what the draft learns</p>']
    for sample, rendered in samples:
        marks = "".join(
            f'<span class="supervised">{html.escape(text)}</span>' if on else html.escape(text)
            for on, text in stretches(renderer, rendered)
        )
        head = f"{html.escape(sample)}: {len(rendered.input_ids)} tokens, {rendered.supervised} supervised"
        parts.append(f"<h3>{head}</h3>\n<pre>{marks}</pre>")
    return parts


def statistics(lengths: np.ndarray, supervised: np.ndarray, counts: RenderCounts) -> str:
    """Lengths and masks in a few lines; what was dropped and why."""
    lines = [f"{counts.rendered} conversations, {counts.tokens:,} tokens, {counts.supervised:,} supervised"]
    for name, values in (("tokens", lengths), ("supervised", supervised)):
        if len(values):
            quantiles = ", ".join(f"{q}%: {np.percentile(values, q):.0f}" for q in (1, 25, 50, 75, 99))
            lines.append(f"{name} a conversation: mean {values.mean():.1f}, {quantiles}, most {values.max()}")
    return printable("\n".join([*lines, *counts.lines()]))


def histogram(lengths: np.ndarray, supervised: np.ndarray) -> Draw:
    """Draws the lengths and supervised tokens of all conversations."""

    def draw(axes: Any) -> None:
        bins = np.linspace(0, max(1, int(lengths.max())), 60).tolist()
        axes.hist(lengths, bins, alpha=0.6, label="tokens")
        axes.hist(supervised, bins, alpha=0.6, label="supervised tokens")
        axes.set(xlabel="tokens a conversation", ylabel="conversations")
        axes.legend()

    return draw


def inspect(
    renderer: Renderer,
    rows: Iterable[Mapping[str, Any]],
    min_supervised: int,
    show: int,
    page_path: str | None = None,
    histogram_path: str | None = None,
    colour: bool = False,
) -> str:
    """Render all rows; returns the samples and statistics for the terminal, and writes the page and the picture."""
    counts, sizes = RenderCounts(), list[tuple[int, int]]()
    kept: list[tuple[str, Rendered]] = []
    for row, rendered in render_rows(renderer, rows, min_supervised, counts):
        sizes.append((len(rendered.input_ids), rendered.supervised))
        if len(kept) < show:
            kept.append((str(row["id"]), rendered))
    lengths, supervised = np.array(sizes, dtype=np.int64).reshape(-1, 2).T
    measured, draw = statistics(lengths, supervised, counts), histogram(lengths, supervised)
    if page_path:
        plot = [figure(draw, (8, 4), "lengths of the conversations")] if len(lengths) else []
        parts = [f"<pre>{html.escape(measured)}</pre>", *plot, *page_parts(renderer, kept)]
        write_text(page_path, page("Supervised tokens", parts))
    if histogram_path and len(lengths):
        write_bytes(histogram_path, saved(draw, (8, 4), Path(histogram_path).suffix[1:] or "png"))
    return "\n".join([*(terminal(renderer, *sample, colour) for sample in kept), measured])
