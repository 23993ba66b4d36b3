"""The evaluator against running servers: the real llama.cpp, a stub of vLLM, and servers that reply badly."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fork_server
import pytest
import torch
from cache_tools import train_tokenizer
from evaluate_tools import make_folders, rows_of, write_task
from transformers import Qwen3Config, Qwen3ForCausalLM

from deepspec import registry
from deepspec.data.chat import Renderer
from deepspec.decoding.loop import generate
from deepspec.decoding.records import DecodeSettings
from deepspec.demos.subjects import batch_of, learn
from deepspec.drafts import save_draft
from deepspec.errors import EvaluationError
from deepspec.evaluate.__main__ import compare, parse
from deepspec.evaluate.results import Results
from deepspec.evaluate.run import Evaluation, Options
from deepspec.evaluate.server import ServerEvaluation, ServerEvaluationOptions, load_table
from deepspec.serving.base import Serving
from deepspec.serving.client import Answer, Counted, cut_at_stop
from deepspec.serving.llamacpp import LlamaCppServer
from deepspec.serving.started import ServedPair
from deepspec.targets import load_target, load_tokenizer
from deepspec.testing import tiny

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 40
WORDS = ["red", "green", "blue", "one", "two", "three", "four", "five", "six", "seven", "the", "of", "and"]


@dataclass(frozen=True)
class Served:
    """A target, its draft and the tasks in folders, and the URLs of two servers."""

    options: ServerEvaluationOptions
    root: Path

    def run(self, output: Path, **more: Any) -> dict[int, Results]:
        return ServerEvaluation(replace(self.options, output=str(output), **more)).run()


def teach(root: Path, prompts: list[list[int]], stops: tuple[int, ...]) -> None:
    """A draft that has learned most of what the target answers."""
    target = load_target(root / "target", torch.float32)
    made = generate(target, None, prompts, DecodeSettings(0.0, TOKENS, stops), 4)
    texts = [[*one.request.prompt_ids, *one.output_ids] for one in made]
    batch = batch_of(target, texts, (0, 1))
    owner = registry.algorithm("dspark")
    config = owner.parse(tiny.tiny_section("dspark", target_layers=[0, 1]), target.spec)
    model = owner.build(config, target.spec, 0)
    model.attach(target.embed_weight, target.head_weight)
    learn(model, batch, 60, 4e-3)
    save_draft(root / "draft", model.state_dict(), owner.config_json(config, target.spec), {})


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    pytest.importorskip("xllamacpp", reason="the extra `llamacpp`")
    root = tmp_path_factory.mktemp("served")
    tokenizer = train_tokenizer([" ".join(WORDS)] * 3)
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, initializer_range=0.15,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).float()
    model.generation_config.eos_token_id = sorted(set(tokenizer.all_special_ids))  # the engine ends at all of them
    model.save_pretrained(root / "target")
    tokenizer.save_pretrained(root / "target")
    write_task(root / "tasks" / "short.jsonl", [[f"{word} and two?"] for word in WORDS[:6]])
    write_task(root / "tasks" / "talk.jsonl", [["one", "two"]])
    target = load_target(root / "target", torch.float32)
    renderer = Renderer(load_tokenizer(root / "target"), target.spec)
    stops = tuple(renderer.stop_token_ids)
    teach(root, [renderer.prompt([{"role": "user", "content": f"{word} and two?"}]) for word in WORDS[:6]], stops)
    pair = ServedPair("llamacpp", str(root / "target"), root / "draft", root / "servers", Serving(4, "float32"))
    with pair.start() as (url, alone):
        options = ServerEvaluationOptions(
            str(root / "target"), str(root / "draft"), "", (str(root / "tasks"),), server=url, baseline_server=alone,
            temperatures=(0.0,), max_new_tokens=TOKENS, timeout=30.0,
        )  # fmt: skip
        yield Served(options, root)


def here(served: Served, output: Path) -> Results:
    """The same in this process."""
    one = served.options
    options = Options(one.target, one.draft, str(output), one.tasks, temperatures=(0.0,), max_new_tokens=TOKENS)
    results = Evaluation(options).run()
    assert results is not None
    return results


def test_the_server_accepts_as_the_evaluator_here_does(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = here(served, tmp_path / "here")
    theirs = served.run(tmp_path / "there", concurrency=(1, 3))
    for number, results in theirs.items():
        folder = tmp_path / "there" / f"concurrency-{number}"
        rows = {(row["task"], row["index"]): row for row in rows_of(folder)}
        mine = {(row["task"], row["index"]): row for row in rows_of(tmp_path / "here")}
        assert {key: row["output_sha"] for key, row in rows.items()} == {
            key: row["output_sha"] for key, row in mine.items()
        }
        assert {row["finish"] for row in rows.values()} == {"stop", "length"}
        for our, their in zip(ours.summaries, results.summaries, strict=True):
            assert our.acceptance_length is not None
            assert their.acceptance_length is not None
            if number == 1:
                assert their.acceptance_length == pytest.approx(our.acceptance_length, rel=0.01)  # .97 % was seen
                assert their.rounds == our.rounds
            else:  # the engine accepts less where requests share a batch, by how they meet: 2.8 to 6 % were seen
                assert their.acceptance_length < our.acceptance_length * 1.01
            assert their.acceptance_length > 1.05
            assert their.equal_to_baseline == 1.0
            assert their.tokens_per_second > 0
            assert their.speed_up is not None
        assert results.summaries[0].latency["first_ms"] > 0
        assert Results.load(folder) == results
    assert "at a time" in load_table(theirs)
    assert compare([str(tmp_path / "here"), str(tmp_path / "there" / "concurrency-3")]) == 0
    assert "other prompts" not in capsys.readouterr().out


def test_a_killed_run_goes_on_and_counts_each_prompt_once(served: Served, tmp_path: Path) -> None:
    whole = served.run(tmp_path / "whole")[1]
    cut = tmp_path / "cut"
    served.run(cut)
    folder = cut / "concurrency-1"
    for name in ("results.json", "plain.jsonl"):
        (folder / name).unlink()
    lines = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    (folder / "results.jsonl").write_text("".join(lines[:3]) + lines[3][:20])  # as a kill leaves it
    again = served.run(cut)[1]
    rows = rows_of(folder)
    assert [(row["task"], row["index"]) for row in rows] == [(row["task"], row["index"]) for row in rows_of(
        tmp_path / "whole" / "concurrency-1")]  # fmt: skip
    assert "".join(json.dumps(row, separators=(",", ":"), ensure_ascii=False) + "\n" for row in rows[:3]) == "".join(
        lines[:3]
    )
    assert [one.acceptance_length for one in again.summaries] == [one.acceptance_length for one in whole.summaries]


def test_a_run_that_is_killed_asks_each_prompt_once(served: Served, tmp_path: Path) -> None:
    """SIGKILL in the middle of a real run; the same command then makes what is missing and leaves the rest."""
    one, folder = served.options, tmp_path / "out" / "concurrency-1"
    command = [sys.executable, "-m", "deepspec.evaluate", "--server", one.server, "--target", one.target]
    command += ["--draft", one.draft, "--tasks", one.tasks[0], "--temperature", "0", "--output", str(tmp_path / "out")]
    command += ["--max-new-tokens", str(TOKENS)]
    job = fork_server.start(command, subprocess.DEVNULL, subprocess.DEVNULL)
    rows = folder / "results.jsonl"
    while not (rows.exists() and rows.read_bytes().count(b"\n") > 1):
        assert job.poll() is None
        time.sleep(0.002)
    job.kill()
    job.wait()
    kept = rows.read_text().rpartition("\n")[0].split("\n")
    assert not (folder / "results.json").exists()
    done = fork_server.run(command)
    assert done.returncode == 0, done.stderr
    found = rows_of(folder)
    assert sorted((row["task"], row["index"]) for row in found) == [("short", i) for i in range(6)] + [("talk", 0)]
    assert rows.read_text().split("\n")[: len(kept)] == kept
    whole = served.run(tmp_path / "whole")[1]
    assert [row.acceptance_length for row in Results.load(folder).summaries] == [
        row.acceptance_length for row in whole.summaries
    ]


@pytest.mark.slow
def test_the_command_starts_and_ends_both_servers(served: Served, tmp_path: Path) -> None:
    """As one command, twice: what is done stays done, what was exported stays."""
    one = served.options
    command = [sys.executable, "-m", "deepspec.evaluate", "--serve", "llamacpp", "--dtype", "float32"]
    command += ["--context", "256"]
    command += ["--target", one.target, "--draft", one.draft, "--tasks", one.tasks[0], "--temperature", "0"]
    command += ["--max-new-tokens", str(TOKENS), "--output", str(tmp_path)]
    done = fork_server.run(command)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "concurrency-1"
    found, wanted = Results.load(folder).summaries, served.run(tmp_path / "there")[1].summaries
    assert [(one.rounds, one.acceptance_length) for one in found] == [
        (one.rounds, one.acceptance_length) for one in wanted
    ]
    rows, files = (folder / "results.jsonl").read_bytes(), sorted((tmp_path / "servers").rglob("*.gguf"))
    assert len(files) == 2
    times = [path.stat().st_mtime_ns for path in files]
    assert fork_server.run(command).returncode == 0
    assert (folder / "results.jsonl").read_bytes() == rows
    assert [path.stat().st_mtime_ns for path in files] == times


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--serve", "llamacpp"], r"--serve: no draft named"),
        (
            ["--serve", "llamacpp", "--draft", "d", "--server", "http://h:1"],
            r"--server: names a server beside one to start",
        ),
        (["--context", "9", "--draft", "d"], r"--context: without a server to start"),
        (["--serve", "llamacpp", "--draft", "d", "--tree", "2,1"], r"--tree: not of a server"),
    ],
)
def test_what_does_not_go_with_a_server_to_start_is_refused(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", "--target", "t", *words])
    with pytest.raises(EvaluationError, match=message):
        parse()


def test_an_engine_whose_server_does_not_run_here_is_refused(served: Served, tmp_path: Path) -> None:
    pair = ServedPair("sglang", served.options.target, Path(served.options.draft), tmp_path, Serving(1))
    with pytest.raises(EvaluationError, match=r"--serve: is not started here; found 'sglang'"), pair.start():
        pass


def test_another_model_or_setting_is_refused(served: Served, tmp_path: Path) -> None:
    served.run(tmp_path, baseline_server=None)
    server = LlamaCppServer(tmp_path, tmp_path)
    message = r"holds another run.*server.context: run 512, now 256"
    with (
        server.serving("other", served.options.target, Serving(1, "float32", 256)) as url,
        pytest.raises(EvaluationError, match=message),
    ):
        served.run(tmp_path, server=url, baseline_server=None)
    with pytest.raises(EvaluationError, match=r"settings.started: run None, now llamacpp, float32"):
        served.run(tmp_path, baseline_server=None, started="llamacpp, float32")
    with pytest.raises(EvaluationError, match=r"settings.max_new_tokens: run 40, now 8"):
        served.run(tmp_path, baseline_server=None, max_new_tokens=8)


# -- stubs ------------------------------------------------------------------------------------------------------------

Answering = Callable[[BaseHTTPRequestHandler, bytes], None]


@contextmanager
def stub(answer: Answering) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self, b"")

        def do_POST(self) -> None:
            answer(self, self.rfile.read(int(self.headers["Content-Length"])))

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        http.server_close()


def send(handler: BaseHTTPRequestHandler, value: object, status: int = 200) -> None:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


class Counting:
    """What vLLM replies: rounds of three drafted tokens that accept 0, 2 and 3, and one more token at the end."""

    def __init__(self, told: dict[str, Any] | None = None) -> None:
        self.drafts, self.by_position = 7, [5, 4, 2]  # of earlier requests
        self.told = told  # of an answer's rounds at its end
        self.asked: list[dict[str, Any]] = []

    def __call__(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        if handler.path == "/version":
            send(handler, {"version": "0.33.0"})
        elif handler.path == "/v1/models":
            send(handler, {"data": [{"id": "tiny", "root": "/models/tiny", "max_model_len": 512}]})
        elif handler.path == "/metrics":
            send(handler, self.metrics().encode())
        elif handler.path == "/v1/completions":
            self.complete(handler, json.loads(body))
        else:
            send(handler, {"detail": "Not Found"}, 404)

    def metrics(self) -> str:
        name, label = "vllm:spec_decode_num", 'engine="0",model_name="tiny"'
        counts = {"drafts": self.drafts, "draft_tokens": 3 * self.drafts, "accepted_tokens": sum(self.by_position)}
        lines = [f"# TYPE {name}_drafts_total counter", f"{name}_drafts_created{{{label}}} 1.7e+09"]
        lines += [f"{name}_{key}_total{{{label}}} {float(value)}" for key, value in counts.items()]
        lines += [
            f'{name}_accepted_tokens_per_pos_total{{{label},position="{slot}"}} {float(value)}'
            for slot, value in enumerate(self.by_position)
        ]
        return "\n".join(lines) + "\n"

    def complete(self, handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        self.asked.append(asked)
        assert all(type(one) is int for one in asked["prompt"])
        assert asked["return_token_ids"]
        for accepted in (0, 2, 3):
            self.drafts += 1
            self.by_position = [count + (accepted > slot) for slot, count in enumerate(self.by_position)]
        parts: list[list[int]] = [[40], [41], [42, 43, 44], [45, 46, 47, 48]]
        events = [{"choices": [{"text": "x", "token_ids": part, "finish_reason": None}]} for part in parts]
        events[-1]["choices"][0]["finish_reason"] = "length"
        assert asked["stream_options"]["include_usage"]
        events.append(
            {"choices": [], "usage": {}} | ({"metrics": {"speculative_decoding": self.told}} if self.told else {})
        )
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        send(handler, text.encode())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> ServerEvaluationOptions:
    made = make_folders(tmp_path_factory.mktemp("folders"))
    return ServerEvaluationOptions(
        str(made.target), "", "", (str(made.tasks / "short.jsonl"),), temperatures=(0.0,), max_new_tokens=9,
        timeout=2.0,
    )  # fmt: skip


@pytest.mark.parametrize("together", [1, 3])
def test_counters_of_the_server_become_rounds(folders: ServerEvaluationOptions, tmp_path: Path, together: int) -> None:
    server = Counting()
    with stub(server) as url:
        options = replace(folders, server=f"{url}/v1", output=str(tmp_path), concurrency=(together,))
        evaluation = ServerEvaluation(options)
        summary = evaluation.run()[together].summaries[0]
    assert evaluation.engine == "vllm"
    assert (summary.rounds, summary.acceptance_length, summary.output_tokens) == (9, 8 / 3, 27)
    assert summary.prefix == pytest.approx([2 / 3, 2 / 3, 1 / 3])
    assert summary.verify_rate == pytest.approx(5 / 9)
    rows = rows_of(tmp_path / f"concurrency-{together}")
    if together == 1:
        assert [row["accepted"] for row in rows] == [[3, 2, 0]] * 3
    assert len(server.asked) == 4  # one to warm up


class Telling:
    """What SGLang replies, all tokens so far or the new ones in an event; its rounds accept 0, 2 and 3 of three."""

    def __init__(self, so_far: bool, told: dict[str, Any]) -> None:
        self.so_far, self.told = so_far, told

    def __call__(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        if handler.path == "/get_model_info":
            send(handler, {"model_path": "/models/tiny", "is_generation": True})
        elif handler.path == "/get_server_info":
            send(handler, {"version": "0.6", "context_length": 512})
        elif handler.path == "/generate":
            asked = json.loads(body)
            assert asked["sampling_params"]["max_new_tokens"] in (4, 9)
            events, tokens = [], list[int]()
            for part in ([40], [41], [42, 43, 44], [45, 46, 47, 48]):
                tokens += part
                about = {"completion_tokens": len(tokens), "finish_reason": None, **self.told}
                events.append({"text": "x", "output_ids": list(tokens) if self.so_far else part, "meta_info": about})
            events[-1]["meta_info"]["finish_reason"] = {"type": "length", "length": 9}
            text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
            send(handler, text.encode())
        else:
            send(handler, {"detail": "Not Found"}, 404)


@pytest.mark.parametrize(
    ("so_far", "told", "accepted"),
    [
        (
            True,
            {"spec_verify_ct": 3, "spec_correct_drafts_histogram": [1, 0, 1, 1], "spec_num_proposed_drafts": 9},
            [3, 2, 0],
        ),
        (False, {"spec_verify_ct": 3, "spec_accept_histogram": [1, 0, 1, 1], "spec_draft_token_num": 9}, [3, 2, 0]),
        (True, {"spec_verify_ct": 3, "spec_draft_token_num": 9}, [2, 2, 1]),
    ],
)
def test_what_an_answer_of_sglang_tells_becomes_rounds(
    folders: ServerEvaluationOptions, tmp_path: Path, so_far: bool, told: dict[str, Any], accepted: list[int]
) -> None:
    with stub(Telling(so_far, told)) as url:
        evaluation = ServerEvaluation(replace(folders, server=url, output=str(tmp_path), concurrency=(2,)))
        summary = evaluation.run()[2].summaries[0]
    assert evaluation.engine == "sglang"
    assert (summary.rounds, summary.acceptance_length, summary.output_tokens) == (9, 8 / 3, 27)
    assert summary.verify_rate == pytest.approx(5 / 9)
    assert [row["accepted"] for row in rows_of(tmp_path / "concurrency-2")] == [accepted] * 3


@pytest.mark.parametrize("told", [{"spec_verify_ct": "3"}, {"spec_verify_ct": 3, "spec_accept_histogram": 4}])
def test_rounds_of_sglang_in_another_form_are_named(
    folders: ServerEvaluationOptions, tmp_path: Path, told: Any
) -> None:
    with stub(Telling(True, told)) as url, pytest.raises(EvaluationError, match="rounds of another form"):
        ServerEvaluation(replace(folders, server=url, output=str(tmp_path), concurrency=(1,))).run()


TOLD = {"acceptance_histogram": [1, 0, 1, 1], "num_draft_tokens": 9}


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize(
    ("told", "accepted"),
    [(TOLD, [3, 2, 0]), ({**TOLD, "per_step_accepted": [0, 2, 3], "per_step_drafted": [3, 3, 3]}, [0, 2, 3])],
)
def test_rounds_that_an_answer_tells_are_its_own_however_many_run(
    folders: ServerEvaluationOptions, tmp_path: Path, together: int, told: dict[str, Any], accepted: list[int]
) -> None:
    with stub(Counting(told)) as url:
        options = replace(folders, server=url, output=str(tmp_path), concurrency=(together,))
        summary = ServerEvaluation(options).run()[together].summaries[0]
    assert (summary.rounds, summary.acceptance_length, summary.output_tokens) == (9, 8 / 3, 27)
    assert summary.verify_rate == pytest.approx(5 / 9)
    assert [row["accepted"] for row in rows_of(tmp_path / f"concurrency-{together}")] == [accepted] * 3


@pytest.mark.parametrize("told", [{"num_draft_tokens": 9}, {**TOLD, "per_step_accepted": [0, 2, "3"]}, [1]])
def test_rounds_of_another_form_are_named(folders: ServerEvaluationOptions, tmp_path: Path, told: Any) -> None:
    with stub(Counting(told)) as url, pytest.raises(EvaluationError, match=r"rounds of another form|no token ids"):
        ServerEvaluation(replace(folders, server=url, output=str(tmp_path), concurrency=(1,))).run()


def test_what_counters_count_behind_a_stop_token_is_left_out() -> None:
    """Seen with vLLM and the quickstart's Eagle3: 6.72 by its counters, 6.52 as in this process and so without it."""
    rounds = [Counted(7, 7, 8), Counted(7, 5, 6), Counted(7, 2, 3)]
    ended = Answer(list(range(16)), "stop", 1.0, 0.1)  # 15 tokens of rounds; 17 are counted
    assert cut_at_stop(rounds, ended) == [*rounds[:2], Counted(1, 1, 1)]
    assert cut_at_stop(rounds, replace(ended, finish="length")) == rounds  # this process counts those too
    assert cut_at_stop(rounds, replace(ended, tokens=list(range(18)))) == rounds
    assert cut_at_stop(rounds[:1], replace(ended, tokens=[1])) == rounds[:1]  # not of this answer alone


def llamacpp(reply: Answering) -> Answering:
    """Its server up to the first prompt, which ``reply`` answers."""

    def answer(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        if handler.path == "/props":
            settings = {"n_ctx": 512}
            send(handler, {"total_slots": 1, "model_path": "/m.gguf", "build_info": "b1",
                           "default_generation_settings": settings})  # fmt: skip
        elif handler.path == "/v1/models":
            send(handler, {"data": [{"meta": {"n_vocab": 1, "n_embd": 1, "n_params": 1, "size": 1}}]})
        elif json.loads(body)["prompt"] == [0]:
            send(handler, {"generation_settings": {"speculative.types": "draft-dspark"}})
        else:
            reply(handler, body)

    return answer


def endless(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    handler.send_response(200)
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b"x" * (1 << 20))
    except OSError:
        pass


def silent(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    threading.Event().wait(4)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (lambda handler, body: send(handler, {"error": "no slot"}, 500), "the server refuses.*500 .*no slot"),
        (lambda handler, body: send(handler, b'data: {"tokens": [1'), "a broken event in a stream"),
        (lambda handler, body: send(handler, b'data: {"tokens": [1], "timings": {}}\n\n'), "a stream without its end"),
        (lambda handler, body: send(handler, b'data: {"stop": true}\n\n'), "no timings in a reply"),
        (lambda handler, body: send(handler, b""), "a stream without its end"),
        (endless, "a reply of more than"),
        (silent, "no complete reply within 2 s"),
    ],
)
def test_a_bad_reply_is_one_line_that_names_the_server(
    folders: ServerEvaluationOptions, tmp_path: Path, reply: Answering, message: str
) -> None:
    with stub(llamacpp(reply)) as url, pytest.raises(EvaluationError, match=message) as caught:
        ServerEvaluation(replace(folders, server=url, output=str(tmp_path))).run()
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_that_is_none_is_refused(folders: ServerEvaluationOptions) -> None:
    message = "not a server of this engine"
    with stub(lambda handler, body: send(handler, {}, 404)) as url, pytest.raises(EvaluationError, match=message):
        ServerEvaluation(replace(folders, server=url, output="never"))
    with pytest.raises(EvaluationError, match="connection refused"):
        ServerEvaluation(replace(folders, server=url, output="never"))


@pytest.mark.parametrize(
    "flags", [["--tree", "2,1"], ["--confidence-threshold", "0.5"], ["--study", "scheduler"], ["--no-plain"]]
)
def test_what_the_server_decides_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    command = ["evaluate", "--target", "t", "--server", "http://127.0.0.1:1", "--output", "o", *flags]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(EvaluationError, match=flags[0]):
        parse()


def test_rounds_between_two_lines_of_a_stream() -> None:
    from deepspec.serving.llamacpp_client import TimingTotals, rounds_of

    whole = [TimingTotals(*line) for line in ((1, 0, 0), (2, 4, 2), (3, 4, 2), (4, 4, 2), (5, 8, 2), (6, 12, 6))]
    assert rounds_of(whole, stopped=False) == [Counted(4, 2, 3), Counted(4, 0, 1), Counted(4, 4, 5)]
    assert rounds_of(whole, stopped=True)[-1] == Counted(1, 1, 1)  # what follows a drafted stop token was not verified
    missing = [TimingTotals(1, 0, 0), TimingTotals(2, 4, 2), TimingTotals(10, 12, 6)]  # the second round has no line
    found = rounds_of(missing, stopped=False)
    assert (len(found), sum(one.accepted for one in found), sum(one.proposed for one in found)) == (3, 6, 12)
    assert rounds_of([TimingTotals(1, 0, 0), TimingTotals(2, 0, 0)], stopped=False) == [Counted(0, 0, 1)]
