"""Tables of results: one list of rows, shown as Markdown, as HTML or as text in columns."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

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

    def html(self, meanings: Mapping[str, str] = MappingProxyType({})) -> str:
        """As a ``<table>`` that scrolls where it is wide; ``meanings``: what columns hold, shown on hover."""
        head, *rows = self._cells()
        titles = [f' title="{html.escape(meanings[cell])}"' if cell in meanings else "" for cell in head]
        top = "".join(f"<th{title}>{html.escape(cell)}</th>" for cell, title in zip(head, titles, strict=True))
        lines = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'

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
