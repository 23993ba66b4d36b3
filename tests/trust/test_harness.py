"""The harness finds planted faults; and a few tries of each kind on the real stages (all of them: ``make trust``)."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import counts
import disks
import fuzz
import kills
import processes
import pytest
import servers
from flips import Artefact, artefacts, flip_every_kind
from stages import Place, Stage, make_place, stages

from deepspec.errors import DeepSpecError

FAULTS = counts.FAULTS


def faults(row: counts.Row) -> set[str]:
    """What went wrong in a row."""
    return {one for one in FAULTS if row.ends[one]}


def planted(name: str) -> Stage:
    return Stage(name, f"planted:{name}", lambda out: [out])


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("torn", {"lost"}),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in [("whole", set()), ("leaves", {"left"})]),
    ],
)
def test_a_kill_finds_what_a_stage_loses_or_leaves(tmp_path: Path, name: str, found: set[str]) -> None:
    row = kills.kill_anywhere(planted(name), 5, Place(tmp_path))
    assert row.tried == 5
    assert faults(row) == found, row.examples


def test_a_kill_finds_what_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = planted("deaf")
    stage.prepare(tmp_path / "w")
    running = stage.start(tmp_path / "w")
    while not (tmp_path / "w" / "out" / "deaf").exists():
        assert running.alive()
        time.sleep(0.01)
    running.signal(signal.SIGTERM, running.group())
    assert running.wait(0.3).hung
    assert not running.alive()


def test_ranks_that_outlive_their_launcher_are_found_and_ended(tmp_path: Path) -> None:
    rank = "import time; time.sleep(60)"
    launcher = (
        "import os, subprocess, sys, time\n"
        f"for n in '01': subprocess.Popen([sys.executable, '-S', '-c', {rank!r}], env={{**os.environ, 'RANK': n}},"
        " start_new_session=True)\ntime.sleep(60)"
    )
    running = processes.launch([sys.executable, "-S", "-c", launcher], tmp_path / "logs", tmp_path / "w" / "tmp")
    end = time.monotonic() + 30
    while len(running.ranks()) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    ranks = running.ranks()
    assert len(ranks) == 2
    running.signal(signal.SIGKILL, [running.pid])
    assert running.wait(0.5).hung
    assert not running.group()


def read_unchecked(folder: Path) -> str:
    return (folder / "data").read_text("latin-1")


def read_checked(folder: Path) -> str:
    data = (folder / "data").read_bytes()
    if hashlib.sha256(data).hexdigest() != (folder / "digest").read_text("latin-1"):
        raise DeepSpecError("another digest")
    return data.decode()


def read_carelessly(folder: Path) -> str:
    if (folder / "data").read_bytes() != b"x" * 99:
        raise KeyError("levels")
    return "x"


def read_fatally(folder: Path) -> str:
    if (folder / "data").read_bytes() != b"x" * 99:
        os.kill(os.getpid(), signal.SIGKILL)
    return "x"


@pytest.mark.parametrize(
    ("read", "found"),
    [
        (read_unchecked, {"lost"}),
        (read_checked, set()),
        (read_carelessly, {"traceback"}),
        (read_fatally, {"traceback"}),
    ],
)
def test_a_flip_finds_what_a_reader_does_not_see(tmp_path: Path, read: object, found: set[str]) -> None:
    folder = tmp_path / "artefact"
    folder.mkdir()
    (folder / "data").write_bytes(b"x" * 99)
    (folder / "digest").write_text(hashlib.sha256(b"x" * 99).hexdigest())
    row = flip_every_kind(Artefact("x", folder, ("*",), read, 0), 6, Place(tmp_path))  # type: ignore[arg-type]
    assert row.tried == 6
    assert faults(row) == found, row.examples
    assert (folder / "data").read_bytes() == b"x" * 99


def test_what_hangs_is_counted_and_the_rest_is_tried(tmp_path: Path) -> None:
    def work(number: int) -> dict[str, str]:
        if number == 1:
            time.sleep(60)
        return {"verdict": "right"}

    found = [one["verdict"] for one in processes.each(3, work, tmp_path, 0.5)]
    assert found == ["right", "hang", "right"]


def test_a_full_disk_finds_a_traceback(tmp_path: Path) -> None:
    row = disks.full_disk(planted("forgets"), Place(tmp_path))
    assert row.tried == len(disks.SHARES)
    assert faults(row) == {"lost"} or "traceback" in faults(row), row.examples


def test_fuzzing_finds_other_errors_and_control_characters() -> None:
    def careless() -> None:
        raise ValueError("x")

    def rude() -> None:
        error = DeepSpecError("x")
        error.args = ("\x1b[2J",)  # its own text would show it as an escape
        raise error

    assert [fuzz.judged(one, "x")["verdict"] for one in (careless, rude, dict)] == ["traceback", "lost", "right"]
    ended = processes.Ended(1, "", "Traceback (most recent call last):\n")
    assert fuzz.judged_end(ended, "x")["verdict"] == "lost"


def test_a_fork_does_not_wait_for_a_lock_of_bars_that_a_killed_one_held(tmp_path: Path) -> None:
    from tqdm.auto import tqdm

    with tqdm.get_lock():  # shared by all forks
        ended = processes.fork(lambda: print(*tqdm([1])), tmp_path / "logs", tmp_path / "tmp").wait(60)
    assert (ended.code, ended.hung) == (0, False)


def test_a_fault_breaks_a_bar_and_the_table_says_which(tmp_path: Path) -> None:
    found = counts.Counts(0.01)
    row = counts.Row("kill", "build")
    row.add({"right": ""})
    row.add({"lost": "a part", "left": "a file"})
    found.add(row)
    value = json.loads(json.dumps(found.to_json()))
    assert not value["bars"]["lost or silent"]["holds"]
    assert value["bars"]["hangs"]["holds"]
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- counts: by make trust -->\nold\n<!-- end of counts -->\nafter\n")
    counts.write_table(page, value)
    assert "| kill | build | 2 | 1 | 0 | 1 | 0 | 0 | 1 |" in page.read_text()
    assert page.read_text().startswith("before\n")
    assert "old" not in page.read_text()


# -- the quick slice ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("trust"), trained=False)


@pytest.mark.parametrize("name", ["prepare", "build", "recode"])
def test_a_killed_stage_is_run_again(place: Place, name: str) -> None:
    row = kills.kill_anywhere(stages(place)[name], 2, place)
    assert faults(row) == set(), row.examples


@pytest.mark.parametrize("name", ["cache, read", "conversations"])
def test_rot_is_seen_or_harmless(place: Place, name: str) -> None:
    (artefact,) = [one for one in artefacts(place) if one.name == name]
    row = flip_every_kind(artefact, 12, place)
    assert faults(row) == set(), row.examples


def test_an_odd_reply_costs_its_prompt(place: Place) -> None:
    row = servers.hostile_server("regenerate", place, share=0.12)
    assert row.tried > 5
    assert faults(row) == set(), row.examples


def test_a_full_and_a_read_only_disk_are_one_line(place: Place) -> None:
    for row in (disks.full_disk(stages(place)["prepare"], place), disks.read_only(stages(place)["recode"], place)):
        assert faults(row) == set(), row.examples


def test_spoilt_recipes_and_files_are_refused_in_one_line(place: Place) -> None:
    for row in (fuzz.fuzz_recipes(20, place), fuzz.fuzz_files(20, place)):
        assert faults(row) == set(), row.examples
