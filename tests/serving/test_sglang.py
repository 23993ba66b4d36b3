"""The check of SGLang's draft classes: its verdicts with a pretended engine, and where DEEPSPEC_SGLANG is, the real."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from algorithm_tools import tiny_draft, tiny_target
from safetensors.torch import load_file

from deepspec.decoding.records import DecodeRequest, DecodeSettings, Generation, Round
from deepspec.drafts import save_draft
from deepspec.errors import DeepSpecError
from deepspec.export.convert import ExportOptions, export_draft
from deepspec.serving.check import CheckRow, Kind, ServeCheck, Subject
from deepspec.serving.sglang import SGLangServer, asked
from deepspec.testing.tiny import tiny_folder

ROOT = Path(__file__).resolve().parents[2]
ECHO = """
import os, shutil, sys
assert sys.argv[2] == "deepspec.serving.sglang_run"
shutil.copyfile(os.environ["ANSWER"], sys.argv[4])
"""


def checked(folder: Path, family: str, algorithm: str, script: str = ECHO) -> ServeCheck:
    """A check of a tiny untrained draft in an engine whose python runs ``script``."""
    target = tiny_target(family)
    model = tiny_draft(algorithm, target, target_layers=[0, 1, 2])
    save_draft(folder / "draft", model.state_dict(), model.algorithm.config_json(model.config, target.spec), {})
    python = folder / "engine" / "bin" / "python"
    python.parent.mkdir(parents=True)
    (folder / "engine" / ".ready").touch()
    python.write_text(f"#!{sys.executable}\n{script}")
    python.chmod(python.stat().st_mode | stat.S_IEXEC)
    served = tiny_folder(target, folder / "target")
    settings = DecodeSettings(0.0, 12, (2,))
    prompts = [[5, 9, 12, 40], [70, 3]]
    subject = Subject("tiny", served, target, prompts, settings, (algorithm,), lambda kind, work: folder / "draft")
    environment = {"ANSWER": str(folder / "answer.json")}
    return ServeCheck(subject, SGLangServer(folder / "work", folder / "engine", environment=environment))


def right(check: ServeCheck, folder: Path, algorithm: str) -> dict[str, Any]:
    """The answer of an engine that reads, loads and drafts as we do."""
    export = ExportOptions("sglang", target=str(check.subject.folder))
    draft = export_draft(folder / "draft", folder / "exported", export)
    ours = check.ours(Kind(algorithm, "sglang", algorithm), draft, folder / "exported")
    frozen = ["embed_tokens.weight", "lm_head.weight"]
    read = {"drafts": draft.parsed.max_draft, "target_layers": [0, 1, 2]}
    if algorithm != "eagle3":
        read["mask_token_id"] = draft.parsed.mask_token_id
    return {
        "class": "TheirDraft", "answer": "only CUDA", "read": read,
        "loaded": {"parameters": 3, "weights": 5, "unwritten": [], "twice": [], "unused": frozen, "shared": frozen,
                   "vocabulary": None},
        "rows": [[[list(one.sent), list(one.confidence)] for one in row.rounds] for row in ours],
    }  # fmt: skip


def row_of(check: ServeCheck, folder: Path, answer: dict[str, Any]) -> CheckRow:
    (folder / "answer.json").write_text(json.dumps(answer))
    (row,) = check.run()
    return row


def test_an_engine_that_drafts_as_we_do_loads_and_is_asked_before_every_round(tmp_path: Path) -> None:
    check = checked(tmp_path, "qwen3", "dspark")
    answer = right(check, tmp_path, "dspark")
    row = row_of(check, tmp_path, answer)
    drafted = sum(len(tokens) for rows in answer["rows"] for tokens, _ in rows)
    assert (row.status, row.server, row.engine) == ("loads", "sglang-0.5.23", None)
    assert f"drafted tokens equal {drafted}/{drafted}; its server was not run: only CUDA" in row.note
    job = json.loads((tmp_path / "work" / "dspark.job.json").read_text())
    assert job["arguments"][:2] == ["--model-path", str(tmp_path / "target")]
    assert job["verify_mode"] == "cap-accept"
    states = load_file(job["states"])
    for number, asked_row in enumerate(job["rows"]):
        prompt = check.subject.prompts[number]
        assert (asked_row["tokens"][: len(prompt)], asked_row["committed"][0]) == (prompt, len(prompt) + 1)
        assert states[f"features.{number}"].shape == (len(asked_row["tokens"]), 3 * 32)


FAULTS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "drafts read as 9": (("read", "drafts"), 9),
    r"target_layers read as \[1, 2, 3\]": (("read", "target_layers"), [1, 2, 3]),
    "mask_token_id read as 1": (("read", "mask_token_id"), 1),
    "never loaded: norm.weight": (("loaded", "unwritten"), ["norm.weight"]),
    "loaded twice: fc.weight": (("loaded", "twice"), ["fc.weight"]),
    "ignored: confidence_head.proj.weight": (("loaded", "unused"), ["confidence_head.proj.weight"]),
    "another vocabulary": (("loaded", "vocabulary"), [1, 2]),
    "drafts other tokens": (("rows", 0, 0, 0), [-1, -1, -1, -1]),
    "confidences differ": (("rows", 0, 0, 1), [50.0, 50.0, 50.0, 50.0]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_read_loaded_or_drafted_otherwise_is_named(fault: str, tmp_path: Path) -> None:
    check = checked(tmp_path, "qwen3", "dspark")
    answer = right(check, tmp_path, "dspark")
    (*path, last), value = FAULTS[fault]
    place: Any = answer
    for key in path:
        place = place[key]
    place[last] = value[: len(place[last])] if path[0] == "rows" else value
    row = row_of(check, tmp_path, answer)
    assert row.status == "FAILED"
    assert re.search(fault, row.note)


def test_the_embedding_of_an_eagle3_may_stay_unwritten_and_its_head_may_not(tmp_path: Path) -> None:
    check = checked(tmp_path, "llama", "eagle3")
    answer = right(check, tmp_path, "eagle3")
    answer["loaded"] |= {
        "shared": ["model.embed_tokens.weight"],
        "unused": [],
        "unwritten": ["model.embed_tokens.weight"],
    }
    assert row_of(check, tmp_path, answer).status == "loads"
    answer["loaded"]["unwritten"] += ["lm_head.weight"]
    assert "never loaded: lm_head.weight" in row_of(check, tmp_path, answer).note


def test_committed_tokens_are_counted_before_every_round() -> None:
    rounds = [Round((), 3, accepted, accepted + 1, accepted + 1, ()) for accepted in (2, 0, 3)]
    generation = Generation(DecodeRequest((7, 8), 0), [1, 2, 3, 4, 5, 6, 7, 8, 9], rounds)
    assert asked(generation) == {"tokens": [7, 8, *range(1, 10)], "committed": [3, 6, 7]}


def test_what_the_engine_answered_is_told_and_an_environment_that_cannot_be_made_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = checked(tmp_path, "qwen3", "dspark", "raise SystemExit('ValueError: no such class')")
    (row,) = check.run()
    assert (row.status, "ValueError: no such class" in row.note) == ("FAILED", True)
    (tmp_path / "engine" / ".ready").unlink()
    monkeypatch.setattr("deepspec.serving.sglang.sys.executable", "true")  # makes no environment
    (row,) = check.run()
    assert (row.status, "ValueError: no such class" in row.note) == ("not run", True)
    with pytest.raises(DeepSpecError, match="no such class"):
        check.server.prepare()


@pytest.mark.skipif("DEEPSPEC_SGLANG" not in os.environ, reason="DEEPSPEC_SGLANG names no environment of SGLang")
def test_the_real_engine_loads_every_kind(tmp_path: Path) -> None:
    quickstart = ROOT / "build" / "quickstart"
    if not (quickstart / "results.json").exists():
        pytest.skip("no finished quickstart in build/quickstart (make quickstart)")
    command = [sys.executable, "tools/serve_check.py", "--server", "sglang", "--prompts", "4", "--max-tokens", "24"]
    command += ["--target", "quickstart", "--target", "llama"]
    command += [part for kind in ("dflash", "dspark", "eagle3") for part in ("--kind", kind)]
    command += ["--work", str(tmp_path / "work"), "--json", str(tmp_path / "result.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    loaded = {(row["target"], row["kind"]) for row in rows if row["status"] == "loads"}
    assert {("quickstart", "dflash"), ("quickstart", "dspark"), ("llama", "eagle3")} <= loaded
