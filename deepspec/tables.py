"""Tables of results: one list of rows, shown as Markdown, as HTML or as text in columns."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deepspec.errors import DeepSpecError, printable


@dataclass(frozen=True)
class Table:
    """A header and rows of cells; a cell is shown by ``str``, None as nothing."""

    header: Sequence[object]
    rows: Sequence[Sequence[object]]

    def markdown(self) -> str:
        """As a Markdown table."""
        lines = [f"| {' | '.join(cells)} |" for cells in self._cells()]
        return "\n".join([lines[0], "|---" * len(self.header) + "|", *lines[1:]])

    def html(self) -> str:
        """As a ``<table>``."""
        head, *rows = self._cells()
        return f"<table>{_html_row('th', head)}{''.join(_html_row('td', row) for row in rows)}</table>"

    def text(self) -> str:
        """In columns of equal width, the first one to the left and numbers to the right."""
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if number else cell.ljust(width)
                for number, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        )

    def _cells(self) -> list[list[str]]:
        return [["" if cell is None else printable(str(cell)) for cell in row] for row in (self.header, *self.rows)]


def fill_page(text: str, name: str, inside: str) -> str:
    """A Markdown page with ``inside`` between the comments ``<!-- NAME: ... -->`` and ``<!-- end of NAME -->``.

    Raises:
        DeepSpecError: it has no such marks.
    """
    pattern = rf"(<!-- {name}: [^\n]* -->)\n.*(<!-- end of {name} -->)"
    filled, number = re.subn(pattern, lambda found: f"{found[1]}\n\n{inside}\n\n{found[2]}", text, flags=re.DOTALL)
    if number != 1:
        raise DeepSpecError(f"no place for the {name}", wanted=f"<!-- {name}: ... --> ... <!-- end of {name} --> once")
    return filled


def _html_row(kind: str, cells: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<{kind}>{html.escape(cell)}</{kind}>' for cell in cells)}</tr>"
