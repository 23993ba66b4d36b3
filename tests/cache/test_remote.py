"""Caches behind URLs: fsspec's memory file system, and an S3 server on the loopback interface where moto is there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from cache_tools import Setup, make_cache, make_setup

from deepspec.cache import remote_lock
from deepspec.cache.build import build_cache
from deepspec.cache.reader import TargetCache
from deepspec.cache.store import FolderStore, RemoteStore, build_lock, open_store
from deepspec.cache.verify import verify_cache
from deepspec.distributed import free_port
from deepspec.errors import CacheError
from deepspec.locks import LOCK


@pytest.fixture(scope="module")
def s3() -> Iterator[None]:
    """A moto server and the environment that points s3fs to it."""
    pytest.importorskip("moto", reason="pip install 'moto[server]' s3fs")
    pytest.importorskip("s3fs", reason="pip install 'moto[server]' s3fs")
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    settings = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    settings["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        files = fsspec.filesystem("s3")
        for attempt in range(100):
            try:
                files.mkdir("bucket")
                break
            except Exception:
                if attempt == 99:
                    raise
                time.sleep(0.2)
        yield
    finally:
        server.terminate()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "s3":
        request.getfixturevalue("s3")
    return f"{request.param}://bucket/{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return make_setup(tmp_path_factory.mktemp("cache"), samples=20)


def download(url: str, place: Path) -> dict[str, bytes]:
    files, root = fsspec.core.url_to_fs(url)
    files.get(f"{root}/", f"{place}/", recursive=True)
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_building_at_a_url_gives_the_local_bytes_and_goes_on(setup: Setup, tmp_path: Path, url: str) -> None:
    build_cache(setup.load(), setup.data, tmp_path / "local")
    build_cache(setup.load(), setup.data, url)
    wanted = {
        str(path.relative_to(tmp_path / "local")): path.read_bytes()
        for path in (tmp_path / "local").rglob("*")
        if path.is_file() and path.name != LOCK
    }
    assert download(url, tmp_path / "down") == wanted
    folder = open_store(url)
    folder.remove("manifest.json")
    folder.remove("parts/00001/part.json")
    folder.remove("parts/00002")
    with pytest.raises(CacheError, match="not finished"):
        TargetCache.open(url)
    build_cache(setup.load(), setup.data, url)
    assert download(url, tmp_path / "again") == wanted


def test_reading_and_verifying_at_a_url(tmp_path: Path, url: str) -> None:
    truth = make_cache(tmp_path / "c")
    files, root = fsspec.core.url_to_fs(url)
    files.put(f"{tmp_path / 'c'}/", f"{root}/", recursive=True)
    cache = TargetCache.open(url)
    for number, wanted in enumerate(truth):
        sample = cache.sample(number)
        assert torch.equal(sample.features, wanted.features)
        assert torch.equal(sample.last_hidden, wanted.last_hidden)
    assert verify_cache(url) == []
    folder = open_store(url)
    data = bytearray(folder.read("parts/00001/features/c/0/0"))
    data[50] ^= 1
    folder.write("parts/00001/features/c/0/0", bytes(data))
    folder.remove("parts/00002/last_hidden/c/0/0")
    problems = verify_cache(url)
    assert [problem.part for problem in problems] == ["00001", "00002"]
    assert "checksum" in problems[0].text
    assert "shard missing" in problems[1].text


def test_a_builder_at_a_url_follows_one_that_no_longer_renews_its_lock(
    setup: Setup, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_lock, "STALE", 0.5)
    folder = RemoteStore(url)
    folder.write(LOCK, b'{"holder": "process 1 on elsewhere", "time": 0}')  # as earlier versions wrote it
    with build_lock(folder):
        assert folder.names("") == [LOCK, f"{LOCK}.1"]
        with pytest.raises(CacheError, match=rf"another process works here.*process {os.getpid()} on "):
            build_cache(setup.load(), setup.data, url)
    build_cache(setup.load(), setup.data, url)
    assert folder.size(LOCK) is None


def test_a_url_that_cannot_be_opened_is_named() -> None:
    with pytest.raises(CacheError, match=r"nothing://x.*cannot open the URL"):
        TargetCache.open("nothing://x")


def test_local_and_remote_folders_behave_alike(tmp_path: Path, url: str) -> None:
    for folder in (FolderStore(tmp_path / "f"), RemoteStore(url)):
        assert folder.names("a") == []
        assert folder.size("a/b") is None
        folder.remove("a/b")
        folder.write("a/b", b"0123456789")
        folder.write("a/b", b"abcdefghij")
        assert folder.read("a/b") == b"abcdefghij"
        assert folder.size("a/b") == 10
        assert folder.names("a") == ["b"]
        first, second = bytearray(2), bytearray(3)
        folder.read_into("a/b", 4, [memoryview(first), memoryview(second)])
        assert (first, second) == (b"ef", b"ghi")
        with pytest.raises(CacheError, match="too short"):
            folder.read_into("a/b", 8, [memoryview(second)])
        with pytest.raises(CacheError, match="cannot read"):
            folder.read("a/c")
        local = tmp_path / f"local-{type(folder).__name__}"
        (local / "deep").mkdir(parents=True)
        (local / "deep/x").write_bytes(b"x")
        (local / "mark").write_bytes(b"m")
        folder.commit(local, "p/1", "mark")
        assert not local.exists()
        assert folder.names("p/1") == ["deep", "mark"]
        assert folder.read("p/1/deep/x") == b"x"
        folder.remove("p")
        assert folder.size("p/1/mark") is None
    shutil.rmtree(tmp_path / "f")
