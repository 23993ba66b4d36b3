"""Atomic writes (temporary name, fsync, rename), digests of files, and JSON files that hold their own digest."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from deepspec.errors import DeepSpecError, as_os_error
from deepspec.processes import temporary_name

SEAL = "seal_sha256"  # key of a JSON file's own digest
RESTORE = "put it back from a copy, or make it again"


def sync(path: Path) -> None:
    """Make what was written to a file, or renamed inside a folder, survive a power cut (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def named(path: str | Path) -> Iterator[None]:
    """An error of the system inside the block becomes an OSError that names a file: ``path`` where it names none.

    A write and a sync name none, and libraries in Rust (safetensors, tokenizers) raise errors of their own.
    """
    try:
        yield
    except Exception as problem:
        known = as_os_error(problem)
        if known is None or known.errno is None or known.filename is not None:
            raise
        raise OSError(known.errno, known.strerror, str(path)) from None


def refuse_special(path: Path) -> None:
    """Refuse to write over what is no file: a rename would replace a device such as /dev/full.

    Raises:
        OSError: there is a folder, a device or a pipe.
    """
    if path.exists() and not path.is_file():
        number = errno.EISDIR if path.is_dir() else errno.EINVAL
        raise OSError(number, os.strerror(number), str(path))


def refuse_same(output: str | Path, inputs: Iterable[str | Path], error: type[DeepSpecError]) -> None:
    """Refuse an output that is one of the inputs, by whatever name: it would be replaced while it is read.

    Raises:
        error: it is.
    """
    for one in inputs:
        if os.path.realpath(one) == os.path.realpath(output) or (os.path.exists(output) and os.path.exists(one)
                                                                 and os.path.samefile(output, one)):  # fmt: skip
            raise error("the output is an input", file=output, remedy="name another output")


@contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to; it is synced and renamed when the block ends well, else removed.

    Raises:
        OSError: it cannot be written; it names ``path``, and nothing is left of it.
    """
    refuse_special(path)
    temporary = temporary_name(path)
    try:
        with named(path):
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(stat.S_IMODE(mode))  # the umask's: safetensors' writer makes a file for its owner alone
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def undone_on_error(folder: Path) -> Iterator[None]:
    """When the block raises, remove what it put into ``folder``, and the folder itself where it was not there."""
    before = set(os.listdir(folder)) if folder.is_dir() else None
    try:
        yield
    except BaseException:
        if folder.is_dir():
            for name in set(os.listdir(folder)) - (before or set()):
                remove(folder / name)
            if before is None:
                with suppress(OSError):
                    folder.rmdir()
        raise


def remove(path: Path) -> None:
    """Remove a file or a folder with all in it, as far as the system allows."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write ``data`` completely or not at all: temporary name in the same folder, fsync, rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8, completely or not at all."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, completely or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def check_readable(path: str | Path, error: type[DeepSpecError]) -> None:
    """Refuse what has no end or no content of its own: reading a pipe or a device may never return.

    Raises:
        error: the path is neither a file nor a folder.
    """
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise error("not a regular file", file=path, found="a pipe or a device", wanted="a file")


def read_json(path: str | Path, error: type[DeepSpecError] = DeepSpecError, remedy: str | None = None) -> Any:
    """Read a JSON file; of a sealed one (:func:`sealed`) the content without the seal.

    Raises:
        error: the file is missing or not JSON, or a sealed one has changed.
    """
    check_readable(path, error)
    try:
        return unsealed(json.loads(Path(path).read_text(encoding="utf-8")), path, error)
    except FileNotFoundError:
        raise error("no such file", file=path, remedy=remedy) from None
    except (ValueError, RecursionError) as problem:  # bad JSON, bad UTF-8, a number or a nesting beyond Python's limits
        raise error(f"not a JSON file ({problem})", file=path, remedy=remedy) from None


def safe_join(folder: str | Path, name: str, error: type[DeepSpecError], key: str) -> Path:
    """``folder / name`` for a name that a file states: it stays inside the folder, and no link leads out of it.

    A file of the hub's cache is a link into the cache's own ``blobs``; that one may be followed.

    Raises:
        error: another name, or there stands what is no regular file.
    """
    folder = Path(folder)
    path = folder / name
    parts = name.split("/")
    wanted = "the name of a file inside the folder"
    if "\\" in name or not name.isprintable() or any(part in ("", ".", "..") for part in parts):
        raise error("a name that leads out of its folder", file=folder, key=key, found=name, wanted=wanted)
    roots = [folder.resolve()]
    if folder.parent.name == "snapshots":
        roots.append(folder.resolve().parents[1] / "blobs")
    if not any(path.resolve().is_relative_to(root) for root in roots):
        raise error("a link that leads out of its folder", file=path, key=key, found=str(path.resolve()), wanted=wanted)
    if path.exists() and not path.is_file():
        raise error("not a regular file", file=path, key=key, remedy="fetch it again")
    return path


def read_index(path: str | Path, error: type[DeepSpecError] = DeepSpecError) -> list[str]:
    """The files beside an index of sharded weights that it names, each once.

    Raises:
        error: the index is missing or broken, or a name leads out of its folder.
    """
    values = read_json(path, error, remedy="fetch it again")
    names = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(one, str) for one in names.values()):
        wanted = "the file of each tensor, by name"
        raise error("not an index", file=path, key="weight_map", found=names, wanted=wanted, remedy="fetch it again")
    found = sorted(set(names.values()))
    for name in found:
        safe_join(Path(path).parent, name, error, "weight_map")
    return found


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its own digest, so that its readers notice a changed byte."""
    plain = json.loads(json.dumps(value))  # as it will be read: keys are strings, tuples are lists
    return {**plain, SEAL: sha256_json(plain)}


def unsealed(value: Any, file: str | Path, error: type[DeepSpecError]) -> Any:
    """What :func:`sealed` was given; a value without a seal (files of before have none) is taken as it is.

    Raises:
        error: the value has changed.
    """
    if isinstance(value, dict) and SEAL in value:
        value = dict(value)
        if value.pop(SEAL) != sha256_json(value):
            raise error("changed after it was written", file=file, key=SEAL, remedy=RESTORE)
    return value


def digests_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files of a folder by name."""
    names = sorted(names)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: sha256_file(folder / name), names), strict=True))


def check_digests(folder: Path, digests: Mapping[str, str], error: type[DeepSpecError], remedy: str) -> None:
    """Compare files of a folder with the digests that its manifest holds; a file that is not there is passed over.

    Raises:
        error: a file has changed.
    """
    there = [name for name in digests if safe_join(folder, name, error, "sha256").is_file()]
    for name, found in digests_of(folder, there).items():
        if found != digests[name]:
            problem = "the file has changed since its digest was taken"
            raise error(problem, file=folder / name, found=found, wanted=digests[name], remedy=remedy)
