"""A job that is killed is simply run again: it repairs what the kill left, and touches nothing else."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from cache_tools import make_cache
from kill_tools import exit_code, killed_before, start

from deepspec.cache.assemble import finish_cache
from deepspec.cache.plan import CachePlan
from deepspec.cache.raw_cache import RawCache, export_raw_cache
from deepspec.cache.store import SCRATCH, FolderStore, local_folder
from deepspec.data.conversations import manifest_path, read_conversations
from deepspec.data.prepare import PrepareOptions, prepare
from deepspec.drafts import save_draft
from deepspec.errors import DataError, DeepSpecError, DraftError
from deepspec.export.convert import ExportOptions, export_draft
from deepspec.locks import LOCK, one_writer
from deepspec.outputs import whole_folder
from deepspec.processes import host, sweep, temporary_name

ARTEFACTS = Path(__file__).parents[1] / "house" / "artefacts"


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def write_folder(folder: Path) -> None:
    with whole_folder(folder, "export", DraftError) as inside:
        for name in ("weights", "manifest.json", "config.json"):
            (inside / name).write_text(name)


def test_an_output_folder_that_a_kill_left_half_is_written_again(tmp_path: Path) -> None:
    for number in count(1):
        out = tmp_path / str(number)
        killed = killed_before(number, lambda out=out: write_folder(out))  # type: ignore[misc]
        if not killed:
            break
        if (out / "manifest.json").exists():  # it says that the folder is complete
            assert {"weights", "config.json"} <= set(names(out))
        with suppress(DraftError):  # not empty: it was complete already
            write_folder(out)
        assert [name for name in names(out) if name != LOCK] == ["config.json", "manifest.json", "weights"]
    assert number > 5


def test_a_folder_with_somebody_s_files_is_refused_and_kept(tmp_path: Path) -> None:
    assert killed_before(5, lambda: write_folder(tmp_path / "out"))
    (tmp_path / "out" / "mine").write_text("of a user")
    with pytest.raises(DraftError, match="is not empty"):
        write_folder(tmp_path / "out")
    assert names(tmp_path / "out") == ["mine"]


def test_names_of_a_cut_move_never_lead_out_of_the_folder(tmp_path: Path) -> None:
    folder, beside = tmp_path / "out", tmp_path / "mine"
    (folder / ".deepspec.partial").mkdir(parents=True)
    beside.write_text("mine")
    names = ["..", "", ".", "../mine", str(beside), "moved"]
    (folder / ".deepspec.partial" / ".moving.json").write_text(json.dumps(names))
    (folder / "moved").write_text("half")
    write_folder(folder)
    assert beside.read_text() == "mine"
    assert not (folder / "moved").exists()


def test_a_killed_export_of_a_draft_is_simply_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ARTEFACTS, tmp_path / "build" / "old")
    draft = Path("build/old/draft")
    options = ExportOptions("deepspec", embeddings=False)
    export_draft(draft, "whole", options)
    for number in (3, 6, 12):
        out = tmp_path / str(number)
        assert killed_before(number, lambda out=out: export_draft(draft, out, options))  # type: ignore[misc]
        export_draft(draft, out, options)
        assert names(out) == names(Path("whole"))


def test_a_killed_export_of_a_cache_is_simply_run_again(tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", samples=5)
    for number in (2, 4, 7):
        out = tmp_path / str(number)
        assert killed_before(number, lambda out=out: export_raw_cache(tmp_path / "cache", out))  # type: ignore[misc]
        export_raw_cache(tmp_path / "cache", out)
        assert len(RawCache(out)) == 5
        assert not [name for name in names(out) if name.startswith(".")]


def prompts_of(path: Path) -> set[str]:
    """The prompts of a file as a reader accepts it; none where it is refused."""
    try:
        return {row["messages"][0]["content"] for row in read_conversations(path)}
    except DataError:
        return set()


def test_no_prompt_is_on_both_sides_wherever_prepare_is_killed(tmp_path: Path) -> None:
    rows = [{"id": str(n), "messages": [{"role": "user", "content": f"What is {n} plus {n}?"}]} for n in range(60)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    many, few = (PrepareOptions({str(source): 1.0}, held_out=share) for share in (0.7, 0.3))
    prepare(many, tmp_path / "many")
    refused = 0
    for number in count(1):
        out = tmp_path / f"out{number}"
        shutil.copytree(tmp_path / "many", out)
        if not killed_before(number, lambda out=out: prepare(few, out)):  # type: ignore[misc]
            break
        train, held_out = prompts_of(out / "train.jsonl"), prompts_of(out / "held_out.jsonl")
        assert not train & held_out
        refused += not train
        prepare(few, out)
        assert len(prompts_of(out / "train.jsonl") | prompts_of(out / "held_out.jsonl")) == 60
        assert not [name for name in names(out) if name.startswith(".")]
    assert refused > 2


def test_a_file_of_an_unfinished_pair_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / ".unfinished.json").write_text('["train.jsonl"]')
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"train\.jsonl.*may not belong together.*run it again"):
        next(read_conversations(tmp_path / "train.jsonl"))
    assert not manifest_path(tmp_path / "train.jsonl").exists()


def test_what_dead_processes_of_this_host_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    dead = start(lambda: None)
    exit_code(dead)
    mine = temporary_name(tmp_path / "a.json").name
    gone = mine.replace(f".{os.getpid()}-", f".{dead}-")
    kept = {mine, gone.replace(host(), "0" * 8), "a.json", f".{dead}.tmp", f"x.{dead}-{host()}.tmp"}
    for name in kept | {gone}:
        (tmp_path / name).touch()
    (tmp_path / f".part.{dead}-{host()}.tmp").mkdir()
    with one_writer(tmp_path, "training"):
        assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".deepspec")} == kept
    sweep(tmp_path / "missing")


def test_parts_of_a_killed_remote_build_go_from_the_folder_that_the_user_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SCRATCH, str(tmp_path / "big"))
    assert killed_before(99, lambda: (local_folder("cache-00001"), os.kill(os.getpid(), 9)))
    assert len(os.listdir(tmp_path / "big")) == 1
    mine = local_folder("cache-00001")
    assert local_folder("cache-00002").parent == tmp_path / "big"
    assert mine.exists()
    assert len(os.listdir(tmp_path / "big")) == 2


def test_a_kill_while_a_cache_is_finished_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts are there, so that the next run writes table and manifest alone."""
    monkeypatch.setenv(SCRATCH, str(tmp_path / "scratch"))
    make_cache(tmp_path / "whole")
    wanted, cut = names(tmp_path / "whole"), tmp_path / "cut"
    for number in count(1):
        shutil.copytree(tmp_path / "whole", cut)
        (cut / "manifest.json").unlink()
        shutil.rmtree(next(cut.glob("samples-*")))
        store = FolderStore(cut)
        killed = killed_before(number, partial(finish_cache, store, CachePlan.load(store)))
        with one_writer(cut, "build"):
            finish_cache(store, CachePlan.load(store))
        assert sorted({*names(cut)} - {LOCK}) == wanted, number
        assert os.listdir(tmp_path / "scratch") == []
        shutil.rmtree(cut)
        if not killed:
            break
    assert number > 6


def test_a_draft_has_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_draft(tmp_path / "draft", {"fc.weight": torch.zeros(2)}, {}, {})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "draft").iterdir()} == {0o640}
    assert (tmp_path / "draft").stat().st_mode & 0o777 == 0o750


def test_a_second_export_to_a_folder_under_way_is_refused(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "out", "export"), pytest.raises(DeepSpecError, match="another process works here"):
        write_folder(tmp_path / "out")
