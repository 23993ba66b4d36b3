"""The rows of an unfinished job: append-only, readable after a kill at any point."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspec.data.conversations import dump_row
from deepspec.errors import DataError
from deepspec.files import named
from deepspec.identity import differences, shown

FORMAT = "deepspec.regeneration/1"


def setting_differences(found: Mapping[str, Any], settings: Mapping[str, Any], file: Path) -> list[str]:
    """A line for each of ``settings`` that an earlier start had otherwise.

    One that has no identity is of an earlier version: it is compared by its settings alone, and one line says so.
    """
    now: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    before, wanted = found.get("identity"), now.pop("identity", None)
    lines = [f"{key}: then {shown(found.get(key))}, now {shown(now[key])}" for key in now if found.get(key) != now[key]]
    if before is None and wanted is not None:
        note = "weights, config, tokenizer, template and stop tokens are not compared"
        print(f"note: {file} is of an earlier version; the target's {note}", file=sys.stderr, flush=True)
    if before is None or wanted is None:
        return lines
    return lines + differences(before, wanted, ("then", "now"))


class Partial:
    """The append-only file of finished rows. Its first line names what the rows were made with."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.places: dict[str, int] = {}  # id -> offset of its line
        header = dump_row({"format": FORMAT, "settings": settings})
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = open(path, "a+b")  # noqa: SIM115 (closed by close)
        self._synced = time.monotonic()
        end = self._read(json.loads(header)["settings"])
        with named(path):
            self._handle.truncate(end)  # a line that a kill cut short
            if end == 0:
                self._handle.write(header)
                self._handle.flush()

    def _read(self, settings: Mapping[str, Any]) -> int:
        """Collect the rows that are there; returns where the last whole line ends."""
        self._handle.seek(0)
        end = 0
        for line in self._handle:
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                name = row["id"] if end else row["settings"]
            except (ValueError, KeyError, TypeError):
                problem = "a line is broken (power cut?); delete from it to the file's end and start again"
                raise DataError(problem, file=self.path, key=f"byte {end}") from None
            if end == 0:
                self._check_settings(row, settings)
            else:
                self.places[name] = end
            end += len(line)
        return end

    def _check_settings(self, header: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        found = header.get("settings", {})
        lines = setting_differences(found, settings, self.path)
        lines += [f"{key}: then {shown(found[key])}, now nothing" for key in sorted(found.keys() - settings.keys())]
        if lines:
            remedy = "finish it with its own settings, name another output, or delete this file"
            raise DataError(
                f"an unfinished regeneration with other settings: {'; '.join(lines)}", file=self.path, remedy=remedy
            )

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a finished row; the kernel has it when this returns, the disk within some seconds."""
        with named(self.path):
            place = self._handle.seek(0, os.SEEK_END)
            self._handle.write(dump_row(row))
            self._handle.flush()
            if time.monotonic() - self._synced > 5:
                os.fsync(self._handle.fileno())
                self._synced = time.monotonic()
        self.places[row["id"]] = place

    def row(self, sample: str) -> dict[str, Any]:
        """The finished row of that id."""
        self._handle.seek(self.places[sample])
        row: dict[str, Any] = json.loads(self._handle.readline())
        return row

    def close(self) -> None:
        """Flush to disk and close."""
        with named(self.path), self._handle:
            self._handle.flush()
            os.fsync(self._handle.fileno())
