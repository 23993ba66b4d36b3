"""What was tried and how it ended: a row for each kind and stage, the bars, the table of docs/trust.md."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bars import Bars, at_least, at_most

from deepspec.progress import clock
from deepspec.tables import Table, fill_page

WANTED = {"kill": 300, "flip": 1000, "hostile": 60, "disk": 18, "fuzz": 500}  # tried, at least
VERDICTS = ("right", "refused", "lost", "traceback", "hang", "left")
FAULTS = VERDICTS[2:]
SECONDS = 3600
EXAMPLES = 5  # of what went wrong, kept of each row


@dataclass
class Row:
    """Tries of one kind on one stage or artefact, and how they ended; one try may end in several faults."""

    kind: str
    stage: str
    tried: int = 0
    ends: Counter[str] = field(default_factory=Counter)  # of VERDICTS; `lost` is also wrong and unseen
    examples: list[str] = field(default_factory=list)
    skipped: str = ""  # why nothing was tried

    def add(self, verdicts: Mapping[str, str]) -> None:
        """Count one try: verdict -> what it was, in words (for the faults)."""
        self.tried += 1
        for verdict, note in verdicts.items():
            if verdict not in VERDICTS:
                raise ValueError(f"unknown verdict {verdict}")
            self.ends[verdict] += 1
            if verdict in FAULTS and len(self.examples) < EXAMPLES:
                self.examples.append(f"{verdict}: {note}")


class Counts:
    """All rows, and a line on stderr after each: what is done, how fast, what is left."""

    def __init__(self, share: float = 1.0) -> None:
        self.share, self.rows, self._begun = share, list[Row](), time.monotonic()
        self.wanted = sum(WANTED.values()) * share

    @property
    def seconds(self) -> float:
        """Since the first."""
        return time.monotonic() - self._begun

    def add(self, row: Row) -> None:
        """Add a finished row, and report it."""
        self.rows.append(row)
        tried = sum(one.tried for one in self.rows)
        left = max(0.0, self.wanted - tried) * self.seconds / max(tried, 1)
        ends = row.skipped or ", ".join(f"{row.ends[one]} {one}" for one in VERDICTS if row.ends[one])
        line = f"trust: {row.kind} {row.stage}: {row.tried} tried, {ends}; {tried} in {clock(self.seconds)}"
        print(f"{line}, about {clock(left)} left", file=sys.stderr, flush=True)
        for example in row.examples:
            print(f"    {example}", file=sys.stderr, flush=True)

    def total(self, verdict: str, kind: str | None = None) -> int:
        """Tries that ended so."""
        return sum(row.ends[verdict] for row in self.rows if kind in (None, row.kind))

    def bars(self) -> Bars:
        """The bars of the harness; of a share of the whole, that share."""
        bars: Bars = {}
        for kind, wanted in WANTED.items():
            tried = sum(row.tried for row in self.rows if row.kind == kind)
            bars[f"{kind}: tried"] = at_least(tried, int(wanted * self.share))
        names = {"lost": "lost or silent", "traceback": "tracebacks", "hang": "hangs", "left": "left behind"}
        bars |= {name: at_most(self.total(verdict), 0) for verdict, name in names.items()}
        return bars | {"seconds": at_most(self.seconds, SECONDS)}

    def to_json(self) -> dict[str, Any]:
        """The bars and the rows."""
        rows = [{**asdict(row), "ends": {one: row.ends[one] for one in VERDICTS}} for row in self.rows]
        return {"bars": self.bars(), "share": self.share, "rows": rows}


def table(value: Mapping[str, Any]) -> str:
    """The rows of :meth:`Counts.to_json` as a Markdown table, with a line of sums for each kind."""
    head = ["kind", "stage or artefact", "tried", *VERDICTS]
    lines: list[list[Any]] = []
    for kind in WANTED:
        rows = [row for row in value["rows"] if row["kind"] == kind]
        for row in rows:
            ends = [row["ends"][one] for one in VERDICTS] if not row["skipped"] else [row["skipped"], *[""] * 5]
            lines.append([kind, row["stage"], row["tried"], *ends])
        sums = [sum(row["ends"][one] for row in rows) for one in VERDICTS]
        lines.append([f"**{kind}**", "**all**", sum(row["tried"] for row in rows), *sums])
    return Table(head, lines).markdown()


def write_table(page: Path, value: Mapping[str, Any]) -> None:
    """Put the table into its place on a page, with the seconds it took."""
    seconds = clock(value["bars"]["seconds"]["value"])
    page.write_text(fill_page(page.read_text(), "counts", f"{table(value)}\n\nMeasured in {seconds}."))
