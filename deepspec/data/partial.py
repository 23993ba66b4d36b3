"""The rows of an unfinished job: append-only, readable after a kill at any point."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspec.data.conversations import dump_row
from deepspec.errors import DataError

FORMAT = "deepspec.regeneration/1"


class Partial:
    """The append-only file of finished rows. Its first line names what the rows were made with."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.places: dict[str, int] = {}  # id -> offset of its line
        header = dump_row({"format": FORMAT, "settings": settings})
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = open(path, "a+b")  # noqa: SIM115 (closed by close)
        self._lock()
        self._synced = time.monotonic()
        end = self._read(json.loads(header)["settings"])
        self._handle.truncate(end)  # a line that a kill cut short
        if end == 0:
            self._handle.write(header)
            self._handle.flush()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError("another process is writing this output", file=self.path) from None

    def _read(self, settings: Mapping[str, Any]) -> int:
        """Collect the rows that are there; returns where the last whole line ends."""
        self._handle.seek(0)
        end = 0
        for line in self._handle:
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
            except ValueError:
                problem = "a line is broken (power cut?); delete from it to the file's end and start again"
                raise DataError(problem, file=self.path, key=f"byte {end}") from None
            if end == 0:
                self._check_settings(row, settings)
            else:
                self.places[row["id"]] = end
            end += len(line)
        return end

    def _check_settings(self, header: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        found = header.get("settings", {})
        for key in sorted(settings.keys() | found.keys()):
            if found.get(key) != settings.get(key):
                raise DataError(
                    "an unfinished regeneration with other settings",
                    file=self.path,
                    key=key,
                    found=found.get(key),
                    wanted=settings.get(key),
                    remedy="finish it with its own settings, name another output, or delete this file",
                )

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a finished row; the kernel has it when this returns, the disk within some seconds."""
        self.places[row["id"]] = self._handle.seek(0, os.SEEK_END)
        self._handle.write(dump_row(row))
        self._handle.flush()
        if time.monotonic() - self._synced > 5:
            os.fsync(self._handle.fileno())
            self._synced = time.monotonic()

    def row(self, sample: str) -> dict[str, Any]:
        """The finished row of that id."""
        self._handle.seek(self.places[sample])
        row: dict[str, Any] = json.loads(self._handle.readline())
        return row

    def close(self) -> None:
        """Flush to disk and close."""
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self._handle.close()
