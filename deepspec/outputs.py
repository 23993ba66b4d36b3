"""An output folder that is complete or absent: written inside it under another name, moved up at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepspec.errors import DeepSpecError
from deepspec.files import read_json, remove, sync, write_json
from deepspec.locks import is_free, one_writer

PARTIAL = ".deepspec.partial"  # in the output folder: what is being written, until it moves up
MOVING = ".moving.json"  # in it: the names that move up
MANIFESTS = ("provenance.json", "manifest.json")  # they move last: they say that the folder is complete


@contextmanager
def whole_folder(folder: str | Path, work: str, error: type[DeepSpecError] = DeepSpecError) -> Iterator[Path]:
    """Hold an empty folder for the block; see :func:`deepspec.locks.one_writer`.

    Yields:
        A folder inside it to write to. All in it is moved up when the block ends well, else it goes. What a killed job
        left is removed by the next: its own files, by their names, and nothing else.

    Raises:
        error: the folder is not empty, or another process works there.
    """
    folder = Path(folder)
    with one_writer(folder, work, error):
        _undo(folder)
        if not is_free(folder):
            raise error("is not empty", file=folder, remedy="name another folder, or remove this one")
        inside = folder / PARTIAL
        try:
            inside.mkdir()
            yield inside
            names = sorted(os.listdir(inside), key=lambda name: (name in MANIFESTS, name))
            write_json(inside / MOVING, names)
            for name in names:
                os.rename(inside / name, folder / name)
            sync(folder)
            (inside / MOVING).unlink()
        finally:
            _undo(folder)


def _undo(folder: Path) -> None:
    """Remove what was not moved up in order, and of a move that was cut what it had moved."""
    inside = folder / PARTIAL
    if (inside / MOVING).is_file():
        moved = read_json(inside / MOVING)
        for name in os.listdir(folder):  # names that are there, so that none leads out of the folder
            if name != PARTIAL and name in moved:
                remove(folder / name)
    if inside.is_dir():
        remove(inside)
