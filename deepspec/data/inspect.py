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
from deepspec.files import temporary_file, write_text

_GREEN, _GREY, _PLAIN = "\x1b[32m", "\x1b[90m", "\x1b[0m"


def stretches(renderer: Renderer, rendered: Rendered) -> Iterator[tuple[bool, str]]:
    """(supervised, text) of every run of tokens alike."""
    pairs = zip(rendered.input_ids, rendered.loss_mask, strict=True)
    for on, run in groupby(pairs, key=lambda pair: pair[1]):
        ids = [token for token, _ in run]
        yield bool(on), renderer.tokenizer.decode(ids, skip_special_tokens=False)


def terminal(renderer: Renderer, sample: str, rendered: Rendered) -> str:
    """A sample for the terminal: supervised text green, the rest grey."""
    text = "".join((_GREEN if on else _GREY) + printable(part) for on, part in stretches(renderer, rendered))
    return f"{printable(sample)}: {len(rendered.input_ids)} tokens, {rendered.supervised} supervised\n{text}{_PLAIN}\n"


def page(renderer: Renderer, samples: Iterable[tuple[str, Rendered]]) -> str:
    """Samples as an HTML page."""
    parts = []
    for sample, rendered in samples:
        marks = "".join(
            f"<b>{html.escape(text)}</b>" if on else html.escape(text) for on, text in stretches(renderer, rendered)
        )
        head = f"{html.escape(sample)}: {len(rendered.input_ids)} tokens, {rendered.supervised} supervised"
        parts.append(f"<h2>{head}</h2>\n<pre>{marks}</pre>")
    style = "pre{white-space:pre-wrap;color:#777}b{font-weight:normal;color:#075;background:#e6f6ec}h2{font-size:1em}"
    return (
        f'<!doctype html><meta charset="utf-8"><title>Supervised tokens</title><style>{style}</style>\n'
        + "\n".join(parts)
        + "\n"
    )


def statistics(lengths: np.ndarray, supervised: np.ndarray, counts: RenderCounts) -> str:
    """Lengths and masks in a few lines; what was dropped and why."""
    lines = [f"{counts.rendered} conversations, {counts.tokens:,} tokens, {counts.supervised:,} supervised"]
    for name, values in (("tokens", lengths), ("supervised", supervised)):
        if len(values):
            quantiles = ", ".join(f"{q}%: {np.percentile(values, q):.0f}" for q in (1, 25, 50, 75, 99))
            lines.append(f"{name} a conversation: mean {values.mean():.1f}, {quantiles}, most {values.max()}")
    return printable("\n".join([*lines, *counts.lines()]))


def histogram(lengths: np.ndarray, supervised: np.ndarray, path: str | Path) -> None:
    """Lengths and supervised tokens of all conversations, as a picture (PNG, SVG or PDF by the name)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4))
    bins = np.linspace(0, max(1, int(lengths.max())), 60).tolist()
    axes.hist(lengths, bins, alpha=0.6, label="tokens")
    axes.hist(supervised, bins, alpha=0.6, label="supervised tokens")
    axes.set(xlabel="tokens a conversation", ylabel="conversations")
    axes.legend()
    figure.tight_layout()
    with temporary_file(Path(path)) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:] or "png")
    pyplot.close(figure)


def inspect(
    renderer: Renderer,
    rows: Iterable[Mapping[str, Any]],
    min_supervised: int,
    show: int,
    page_path: str | None = None,
    histogram_path: str | None = None,
) -> str:
    """Render all rows; returns the samples and statistics for the terminal, and writes the page and the picture."""
    counts, sizes = RenderCounts(), list[tuple[int, int]]()
    kept: list[tuple[str, Rendered]] = []
    for row, rendered in render_rows(renderer, rows, min_supervised, counts):
        sizes.append((len(rendered.input_ids), rendered.supervised))
        if len(kept) < show:
            kept.append((str(row["id"]), rendered))
    lengths, supervised = np.array(sizes, dtype=np.int64).reshape(-1, 2).T
    if page_path:
        write_text(page_path, page(renderer, kept))
    if histogram_path and len(lengths):
        histogram(lengths, supervised, histogram_path)
    shown = [terminal(renderer, sample, rendered) for sample, rendered in kept]
    return "\n".join([*shown, statistics(lengths, supervised, counts)])
