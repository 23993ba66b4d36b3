"""The serve check: its verdicts with a pretended engine, and, under the mark `vllm`, the real one."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from algorithm_tools import tiny_draft, tiny_target

from deepspec.decoding.loop import generate
from deepspec.decoding.records import DecodeRequest, DecodeSettings, Generation, Round
from deepspec.demos import subjects
from deepspec.demos.subjects import TABLE, check_engines, quickstart_subject, random_target
from deepspec.drafts import load_draft, save_draft
from deepspec.errors import DeepSpecError, DraftError
from deepspec.export.convert import ExportOptions, export_draft
from deepspec.http import NoReply, request
from deepspec.serving.check import CheckRow, Kind, ServeCheck, Subject, compare, kinds_of, table
from deepspec.serving.process import run, serve
from deepspec.serving.vllm import VLLMServer, server_arguments
from deepspec.targets.served import server_layers
from deepspec.testing.tiny import tiny_folder

ROOT = Path(__file__).resolve().parents[2]


def generation(*accepted: int) -> Generation:
    return Generation(
        DecodeRequest((1,), 0), rounds=[Round((), 7, count, count + 1, count + 1, ()) for count in accepted]
    )


def engine_row(tokens: list[int], *accepted: int) -> dict[str, Any]:
    return {"tokens": tokens, "rounds": [[7, count] for count in accepted]}


def verdict(ours: list[Generation], engine: list[dict[str, Any]], baseline: list[list[int]]) -> CheckRow:
    row = CheckRow("quickstart", "dspark", "vllm", "refused")
    compare(row, ours, engine, baseline)
    return row


def test_equal_tokens_and_rounds_are_equal() -> None:
    row = verdict([generation(3, 2, 6)], [engine_row([5, 6], 3, 2, 0)], [[5, 6]])
    assert (row.status, row.lossless, row.ours, row.engine) == ("equal", "1/1", 3.5, 3.5)  # the last round is cut
    assert (row.same_rounds, row.difference) == ("2/2", 0.0)


def test_other_tokens_fail_whatever_was_accepted() -> None:
    row = verdict([generation(3, 2, 6)], [engine_row([5, 7], 3, 2, 6)], [[5, 6]])
    assert row.status == "FAILED"
    assert "not those of the engine" in row.note


@pytest.mark.parametrize(
    ("theirs", "status"), [((100, 100, 0), "equal"), ((100, 98, 0), "equal"), ((98, 98, 0), "FAILED")]
)
def test_one_per_cent_is_allowed(theirs: tuple[int, ...], status: str) -> None:
    row = verdict([generation(100, 100, 3)], [engine_row([5], *theirs)], [[5]])
    assert row.status == status


def test_as_many_rounds_are_compared_as_both_sides_have() -> None:
    ours = [generation(3, 2, 6, 1, 2, 0)]
    row = verdict(ours, [engine_row([5], 3, 2, 6, 1, 1)], [[5]])  # the limit cut its fifth, that with us was whole
    assert (row.status, row.ours, row.engine, row.same_rounds) == ("equal", 4.0, 4.0, "4/4")
    row = verdict(ours, [engine_row([5], 3, 2, 6)], [[5]])
    assert row.status == "FAILED"
    assert "2 rounds there, 5 here" in row.note


def test_no_round_at_all_is_a_failure() -> None:
    assert verdict([generation(3)], [engine_row([5], 3)], [[5]]).status == "FAILED"


def pretended(folder: Path, script: str) -> Path:
    """An engine environment whose python runs ``script``."""
    (folder / "bin").mkdir(parents=True)
    (folder / ".ready").touch()
    python = folder / "bin" / "python"
    python.write_text(f"#!{sys.executable}\n{script}")
    python.chmod(python.stat().st_mode | stat.S_IEXEC)
    return folder


ECHO = """
import json, os, sys
job = json.load(open(sys.argv[3]))
assert sys.argv[2] == "deepspec.serving.vllm_run"
if job["speculative_config"] and os.environ.get("FAIL"):
    sys.exit("ValueError: no such method")
tokens = json.load(open(os.environ["ANSWERS"]))
rows = [{"tokens": t, "rounds": r if job["speculative_config"] else []} for t, r in tokens]
json.dump({"version": "0", "rows": rows}, open(sys.argv[4], "w"))
"""


class Bytes:
    """A tokenizer for :class:`Renderer`'s place: a byte is a token."""

    stop_token_ids = (2,)

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        return [3 + byte % 90 for byte in messages[0]["content"].encode()]


@pytest.fixture
def quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the quickstart leaves it, of a tiny target and an untrained Eagle3."""
    root = tmp_path / "quickstart"
    target = tiny_target("qwen3", head_dim=32)
    target.model.save_pretrained(root / "target")
    (root / "prompts").mkdir()
    lines = [json.dumps({"turns": [text]}) for text in ("one", "another", "third")]
    (root / "prompts" / "held_out.jsonl").write_text("\n".join(lines) + "\n")
    model = tiny_draft("eagle3", target, target_layers=[0, 1, 3])
    config = model.algorithm.config_json(model.config, target.spec)
    save_draft(root / "eagle3-draft", model.state_dict(), config, {})
    monkeypatch.setattr(subjects, "load_tokenizer", lambda path: None)
    monkeypatch.setattr(subjects, "Renderer", lambda *_: Bytes())
    return root


def check(quickstart: Path, script: str = ECHO, **options: Any) -> ServeCheck:
    work = quickstart.parent / "work"
    engine = pretended(quickstart.parent / "engine", script)
    return ServeCheck(quickstart_subject(quickstart, 2, 12), VLLMServer(work, engine, **options), ("eagle3",))


def test_a_run_with_an_engine_that_answers_as_we_do(quickstart: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.json"
    one = check(quickstart, environment={"ANSWERS": str(answers)})
    folder, kind = tmp_path / "exported", Kind("eagle3", "vllm", "eagle3")
    draft = export_draft(quickstart / "eagle3-draft", folder, ExportOptions("vllm", target=str(quickstart / "target")))
    ours = one.ours(kind, draft, folder)
    answers.write_text(json.dumps([[g.output_ids, [[r.length, r.accepted] for r in g.rounds]] for g in ours]))
    (row,) = one.run()
    assert (row.status, row.lossless) == ("equal", "2/2")
    assert "| vllm | quickstart | eagle3 | vllm | equal | 2/2 |" in table([row])
    job = json.loads((tmp_path / "work" / "eagle3.job.json").read_text())
    assert job["speculative_config"]["method"] == "eagle3"
    assert job["speculative_config"]["num_speculative_tokens"] == 3


def test_what_the_engine_answered_is_told(quickstart: Path, tmp_path: Path) -> None:
    (tmp_path / "answers.json").write_text("[[[1], []], [[1], []]]")
    environment = {"ANSWERS": str(tmp_path / "answers.json"), "FAIL": "1"}
    one = check(quickstart, environment=environment)
    (row,) = one.run()
    assert row.status == "FAILED"
    assert "ValueError: no such method" in row.note
    row = one.check(Kind("eagle3", "vllm", "dspark"))
    assert row.status == "not run"
    assert "needs the CPU shim" in row.note
    assert "no such method" in row.note
    refused = one.check(Kind("eagle3", "sglang", "eagle3"))
    assert refused.status == "refused"
    assert one.check_hidden_states().status == "not run"


def test_bad_surroundings_are_named(quickstart: Path, tmp_path: Path) -> None:
    with pytest.raises(DraftError, match=r"no target to serve.*deepspec quickstart"):
        quickstart_subject(tmp_path / "none", 2, 12)
    tiny_target("qwen3").model.save_pretrained(quickstart / "target")
    subject = quickstart_subject(quickstart, 2, 12)
    with pytest.raises(DraftError, match="refuse this head size; found 8"):
        ServeCheck(subject, VLLMServer(tmp_path, tmp_path))
    (row,) = check_engines({"vllm": lambda work: VLLMServer(work, tmp_path)}, subject, ["quickstart"], tmp_path)
    assert (row.status, row.server, row.target) == ("refused", "vllm", "quickstart")
    with pytest.raises(DraftError, match="--target: no such target; found 'mamba'"):
        check_engines({}, subject, ["mamba"], tmp_path)


def test_an_environment_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = pretended(tmp_path / "engine", "print('ERROR: no matching distribution')\nraise SystemExit(1)")
    (pip / ".ready").unlink()
    monkeypatch.setattr("deepspec.serving.vllm.sys.executable", "true")  # makes no environment
    with pytest.raises(DeepSpecError, match="no matching distribution"):
        VLLMServer(tmp_path, pip).prepare()


def test_a_program_that_fails_or_never_ends_is_named_with_its_last_error(tmp_path: Path) -> None:
    failing = "print('ValueError: no such method'); print('bye'); raise SystemExit(3)"
    with pytest.raises(DeepSpecError, match=r"run\.log: .*exit code 3; found 'ValueError: no such method'"):
        run([sys.executable, "-c", failing], tmp_path / "run.log")
    with pytest.raises(DeepSpecError, match="did not end"):
        run([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "run.log", timeout=0.2)


def test_a_server_runs_while_the_block_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspec.serving.process.POLL", 0.02)
    (tmp_path / "health").touch()
    monkeypatch.chdir(tmp_path)
    script = (
        "import sys, http.server as h\n"
        "h.HTTPServer((sys.argv[2], int(sys.argv[4])), h.SimpleHTTPRequestHandler).serve_forever()"
    )
    with serve([sys.executable, "-c", script], tmp_path / "log", {}, 30) as url:
        assert request("GET", f"{url}/health", 5).status == 200
    with pytest.raises(NoReply):
        request("GET", f"{url}/health", 5)
    ended = "print('error: no room'); raise SystemExit(2)"
    with (
        pytest.raises(DeepSpecError, match=r"the server ended with code 2; found 'error: no room'"),
        serve([sys.executable, "-c", ended], tmp_path / "log", {}, 30),
    ):
        pass


def test_the_kinds_are_those_of_the_engines_tables() -> None:
    kinds = {kind.name: kind for kind in kinds_of(VLLMServer.formats, TABLE["quickstart"])}
    assert set(kinds) == {
        *(f"{kind}{end}" for end in ("", " speculators") for kind in
          ("eagle3", "eagle3 +fc_norm +norm_output", "p_eagle", "dflash", "dflash K-1", "dflash K-1 +causal",
           "dflash2 K-1", "dspark", "dspark K-1")),
        *(f"{kind} reduced vocabulary" for kind in ("eagle3", "dflash", "dspark")),
    }  # fmt: skip
    assert kinds["dflash"].form == "dspark"
    assert kinds["dflash2 K-1"].form == kinds["dflash2 K-1 speculators"].form == "dflash2"  # a runner of its own
    assert kinds["dflash K-1"].form == "dflash"
    with_ends = [kind.embeddings for name, kind in kinds.items() if name.startswith("dspark K-1")]
    assert sorted(with_ends) == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TABLE["random"])
def test_a_draft_of_a_random_target_has_learnt_some_answers(model_type: str, tmp_path: Path) -> None:
    """Rounds that accept nothing would be equal in every engine, whatever it does with a draft."""
    target = tiny_target("qwen3", vocab_size=1536)
    folder = tiny_folder(target, tmp_path / "like")
    settings = DecodeSettings(0.0, 24, (2,))
    prompts = [[5, 9, 12, 40], [70, 3], [33, 41, 50]]
    like = Subject("like", folder, target, prompts, settings, (), lambda kind, work: work)
    subject = random_target(model_type, like, tmp_path)
    for kind in subject.kinds:
        model = load_draft(subject.draft(kind, tmp_path / "work"), subject.target)
        drafter = model.algorithm.drafter(model, 4, subject.longest)
        rounds = [one for row in generate(subject.target, drafter, prompts, settings, 4) for one in row.rounds[:-1]]
        assert sum(one.accepted for one in rounds) > 0.4 * len(rounds), kind


def test_arguments_of_a_server_that_hands_out_hidden_states() -> None:
    spec = tiny_target("qwen3").spec
    arguments = server_arguments("T", server_layers([-1, 1], spec), "/s")
    speculative = json.loads(arguments[arguments.index("--speculative-config") + 1])
    assert speculative["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 2, 4]
    transfer = json.loads(arguments[arguments.index("--kv-transfer-config") + 1])
    assert transfer["kv_connector"] == "CPUHiddenStatesConnector"
    assert transfer["kv_connector_extra_config"] == {"shared_storage_path": "/s"}


@pytest.mark.vllm
def test_the_real_engine_serves_every_kind(tmp_path: Path) -> None:
    """``make serve-check`` on four prompts; DEEPSPEC_VLLM names the engine's environment where it is elsewhere."""
    quickstart = ROOT / "build" / "quickstart"
    if not (quickstart / "results.json").exists():
        pytest.skip("no finished quickstart in build/quickstart (make quickstart)")
    engine = Path(os.environ.get("DEEPSPEC_VLLM", ROOT / ".venv-vllm"))
    command = [sys.executable, "tools/serve_check.py", "--server", "vllm", "--engine", str(engine)]
    command += ["--prompts", "4", "--max-tokens", "32"]
    command += ["--work", str(tmp_path / "work"), "--json", str(tmp_path / "result.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = [row["status"] for row in json.loads((tmp_path / "result.json").read_text())["rows"]]
    assert set(found) <= ({"equal"} if VLLMServer.find_shim(None) else {"equal", "not run"})
    assert "equal" in found
