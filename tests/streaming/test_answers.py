"""Answers that feature servers sample with their hidden states, and trainings on them."""

from __future__ import annotations

import http.server
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import training_tools as tools
import yaml
from cache_tools import LAYERS, conversation_rows
from feature_server import RunningServer
from safetensors.torch import load_file, save_file

from deepspec.cache.build import build_cache
from deepspec.cache.reader import TargetCache
from deepspec.data.conversations import read_conversations, write_conversations
from deepspec.data.dialogue import Dialogue
from deepspec.data.local import LocalSampler, SamplingRequest
from deepspec.data.regenerate import RegenerationPlan, regenerate
from deepspec.distributed import World, free_port
from deepspec.errors import DeepSpecError, SourceLost, TargetError
from deepspec.http import request
from deepspec.identity import target_fields
from deepspec.recipe import RegenerateSection, load_recipe
from deepspec.sources import answered
from deepspec.sources.base import source_class
from deepspec.sources.served import ServedSource
from deepspec.streaming.batcher import Limits
from deepspec.streaming.client import Answered, AnswerRequest, FeatureRequest, StreamClient, Wanted
from deepspec.streaming.sampling import Answering
from deepspec.targets import Target, load_target
from deepspec.targets.load import load_tokenizer
from deepspec.training import run

pytest_plugins = ["training_fixtures"]
SAMPLING = RegenerateSection(temperature=1.0, top_p=0.95, top_k=50, max_tokens=24, batch_size=8)
HOW = Answering(SAMPLING, 5, tuple(range(200)), (7, 11), 40, ())
PROMPTS = [[5 + number, *range(20, 23 + number % 5)] for number in range(12)]
KEYS = [f"p{number}#0" for number in range(12)]


@dataclass(frozen=True)
class Project:
    """A target and prompts."""

    folder: Path
    target: Path

    def recipe(self, name: str, data: dict[str, Any], **train: Any) -> Path:
        given = {"max_length": 96, "min_supervised": 4, **data}
        path = tools.write_recipe(self.folder / name, self.target, data=given, **train)
        path.write_text(path.read_text() + "regenerate: {max_tokens: 32, batch_size: 5, temperature: 1.0}\n")
        return path

    def answering(self, name: str, *urls: str, **train: Any) -> Path:
        data = {
            "source": "served", "servers": list(urls), "prompts": str(self.folder / "prompts.jsonl"),
            "answers": str(self.folder / name / "answers.jsonl"), "write_cache": str(self.folder / name / "cache"),
        }  # fmt: skip
        return self.recipe(name, data, **train)

    def of_cache(self, name: str, answers: Path, **train: Any) -> Path:
        path = self.recipe(name, {"cache": [str(self.folder / name / "cache")], "conversations": str(answers)}, **train)
        build_cache(load_recipe(path), answers, self.folder / name / "cache")
        return path


def make_speaking_target(folder: Path) -> Path:
    """A target that answers with words and digits; those that begin with a word's space are tokenised otherwise."""
    tools.make_talking_target(folder)
    tokenizer, path = load_tokenizer(folder), folder / "model.safetensors"
    weights = load_file(path)
    for token in range(len(weights["model.embed_tokens.weight"])):
        text = tokenizer.decode([token])
        scale = 1.5 if text.isdigit() and len(text) == 1 else 1.0 if re.fullmatch(" [a-z]{3,}", text) else 0.02
        weights["model.embed_tokens.weight"][token] *= scale
    stop, nine = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.convert_tokens_to_ids("9")
    weights["model.embed_tokens.weight"][stop] = 0.95 * weights["model.embed_tokens.weight"][nine]  # drawn now and then
    save_file(weights, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("answers")
    made = Project(folder, make_speaking_target(folder / "target"))
    rows = conversation_rows(48)
    for number, row in enumerate(rows):
        row["messages"][0]["content"] += f" {number * 7919}"
    write_conversations(folder / "all.jsonl", rows, {"made by": "a test"})
    engine = RegenerationPlan.of_recipe(load_recipe(made.recipe("probe", {}))).local_engine()
    outcomes = engine.run(map(Dialogue, read_conversations(folder / "all.jsonl")))
    answered = {one.dialogue.id for one in outcomes if one.error is None}  # the others begin with the end of turn
    rows = [row for row in rows if row["id"] in answered][:24]
    assert len(rows) == 24
    write_conversations(folder / "prompts.jsonl", rows, {"made by": "a test"})
    return made


@pytest.fixture(scope="module")
def target(project: Project) -> Target:
    return load_target(project.target, torch.float32)


@pytest.fixture
def server(target: Target) -> Iterator[RunningServer]:
    running = RunningServer(target)
    yield running
    running.stop()


def client(server: RunningServer, target: Target, **changes: Any) -> StreamClient:
    made = StreamClient(server.url, Wanted(target, target_fields(target.spec), tuple(LAYERS), **changes))
    made.check()
    return made


def ask(asked: StreamClient, numbers: Sequence[int]) -> dict[str, Answered]:
    keys = tuple(KEYS[number] for number in numbers)
    found = asked.answer(AnswerRequest(-1, tuple(PROMPTS[number] for number in numbers), keys))
    return dict(zip(keys, found, strict=True))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_the_states_of_an_answer_are_those_of_a_prefill_of_its_tokens(server: RunningServer, target: Target) -> None:
    asked, worst, reasons = client(server, target, answering=HOW), 0.0, set()
    for one in ask(asked, range(12)).values():
        mask = torch.ones(len(one.tokens), dtype=torch.bool).numpy()
        wanted = asked.fetch(FeatureRequest(0, one.tokens, mask))
        assert one.last_hidden is not None
        assert wanted.last_hidden is not None
        worst = max(worst, relative(one.features, wanted.features), relative(one.last_hidden, wanted.last_hidden))
        reasons.add(one.sampled.finish_reason)
        assert one.tokens[-2:].tolist() == [7, 11]
    assert worst < 1e-5
    assert reasons == {"stop", "length"}


def test_an_answer_is_that_of_regeneration_whoever_shares_its_batch_or_serves_it(target: Target) -> None:
    sampler = LocalSampler(target.model, HOW.stop, SAMPLING, HOW.seed, 8)
    requests = [SamplingRequest(key, prompt) for key, prompt in zip(KEYS, PROMPTS, strict=True)]
    wanted = {one.request.key: one.token_ids for one in sampler.answer(requests)}
    for batches in ([range(12)], [range(0, 12, 2), range(1, 12, 2)], [[number] for number in range(12)]):
        running = RunningServer(target)
        found = {}
        for batch in batches:
            found |= ask(client(running, target, answering=HOW), batch)
        running.stop()
        assert {key: one.sampled.token_ids for key, one in found.items()} == wanted


def test_only_the_states_that_fit_a_conversation_are_sent(server: RunningServer, target: Target) -> None:
    found = ask(client(server, target, answering=replace(HOW, most=9), last_hidden=False), range(12))
    assert max(len(one.tokens) for one in found.values()) == 9
    assert all(len(one.features) == len(one.tokens) for one in found.values())
    assert {one.last_hidden for one in found.values()} == {None}
    assert max(len(one.sampled.token_ids) for one in found.values()) > 9


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"keys": ["a", "a"]}, "not a request"),
        ({"keys": ["a"]}, "not a request"),
        ({"sampling": {"heat": 1}}, "sampling.heat: unknown key"),
        ({"sampling": {"temperature": -1}}, "sampling.temperature"),
        ({"stop": [5000]}, "outside the vocabulary"),
        ({"tail": ["x"]}, "not a request"),
        ({"most": 1000}, "states of 1000 tokens; this server sends those of 1 to 256"),
        ({"sampling": {"max_tokens": 100_000}}, "tokens; this server takes"),
        ({"lengths": [3]}, "not a request"),
        ({"lengths": [2, 2]}, "lengths of 4 tokens in all, and 3 tokens"),
        ({"tokens": list(range(33)), "lengths": [1] * 33, "keys": list(map(str, range(33)))}, "answers 32 at a time"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_with_the_reason(
    server: RunningServer, changes: dict[str, Any], told: str
) -> None:
    body = {"tokens": [5, 6, 7], "lengths": [2, 1], "keys": ["a", "b"], "layers": [0], "last_hidden": True}
    body |= {"level": "raw", "sampling": {}, "seed": 1, "stop": [2], "tail": [7], "most": 9}
    body["sampling"] = {"max_tokens": 4}
    reply = request("POST", f"{server.url}/v1/answers", 10, body | changes)
    assert reply.status == 400
    assert told in reply.body.decode()
    assert server.server.batcher.alive


def begin(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    source_class(loaded).begin(loaded)


def train(recipe: Path, world: World) -> list[float]:
    """From the newest checkpoint on; the losses of the run's log."""
    prepared = run.prepare(load_recipe(recipe), world, False)
    trainer = run.assemble(prepared, world, False)
    try:
        assert trainer.run(prepared.start.step)
        prepared.source.finish()
    finally:
        trainer.engine.close()
        prepared.source.close()
    return losses_of(recipe)


def losses_of(recipe: Path) -> list[float]:
    return [row["loss"] for row in tools.log_of(recipe.parent / "run")]


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Conversations that a server computes once more."""
    names: list[str] = []
    made = ServedSource._served_block

    def noted(self: ServedSource, rows: Any) -> object:
        names.extend(name for _, name, _ in rows)
        return made(self, rows)

    monkeypatch.setattr(ServedSource, "_served_block", noted)
    return names


def test_a_run_on_sampled_answers_has_the_losses_of_a_cache_of_them_and_asks_for_no_second_pass(
    project: Project, target: Target, world: World, caplog: pytest.LogCaptureFixture, passed: list[str]
) -> None:
    servers = [RunningServer(one) for one in (target, load_target(project.target, torch.float32))]
    recipe = project.answering("two", *(one.url for one in servers), max_steps=12)
    with caplog.at_level("INFO"):
        begin(recipe)
    assert min(one.server.batcher.counts.answers for one in servers) > 0
    kept = int(re.search(r"hidden states of (\d+) of 24 answers", caplog.text).group(1))  # type: ignore[union-attr]
    answers = project.folder / "two" / "answers.jsonl"
    reasons = {row["messages"][-1]["finish_reason"] for row in read_conversations(answers)}
    assert reasons == {"stop", "length"}
    found = train(recipe, world)
    for one in servers:
        one.stop()
    cache = project.of_cache("two-cache", answers, max_steps=12)
    assert found == pytest.approx(train(cache, world), abs=1e-5)
    usable = len(TargetCache.open(project.folder / "two" / "cache"))
    assert min(kept, len(passed)) > 0
    assert len(passed) == usable - kept  # those alone whose text has other tokens than were sampled
    assert not (project.folder / "two" / "cache" / "spool").exists()
    plan, alone = RegenerationPlan.of_recipe(load_recipe(recipe)), project.folder / "alone.jsonl"
    regenerate(project.folder / "prompts.jsonl", alone, plan.local_engine(), plan.settings() | {"engine": "local"})
    assert answers.read_bytes() == alone.read_bytes()


def test_what_a_run_has_answered_before_its_servers_went_is_not_asked_again(
    project: Project, target: Target, world: World, monkeypatch: pytest.MonkeyPatch, passed: list[str]
) -> None:
    monkeypatch.setattr(answered, "KEPT_BYTES", 1)
    server = RunningServer(target)
    recipe = project.answering("lost", server.url, max_steps=8)
    recipe.write_text(recipe.read_text().replace("  servers:", "  server_patience: 0.2\n  servers:"))
    asked, answer = list[str](), StreamClient.answer

    def noted(self: StreamClient, request: AnswerRequest) -> list[Answered]:
        found = answer(self, request)
        asked.extend(request.keys)
        if len(asked) == 10:
            server.stop()
        return found

    monkeypatch.setattr(StreamClient, "answer", noted)
    with pytest.raises(SourceLost, match="no server is left"):
        begin(recipe)
    assert len(asked) >= 10
    again = RunningServer(target, server.port)
    begin(recipe)
    assert len(asked) - len(set(asked)) <= 5  # a batch that was under way
    found = train(recipe, world)
    again.stop()
    monkeypatch.undo()
    cache = project.of_cache("lost-cache", project.folder / "lost" / "answers.jsonl", max_steps=8)
    assert found == pytest.approx(train(cache, world), abs=1e-5)


@pytest.mark.slow
def test_a_run_that_is_killed_while_prompts_are_answered_and_once_more_later_ends_as_one_that_is_not(
    project: Project, world: World
) -> None:
    port, log = free_port(), project.folder / "processes.log"
    recipe = project.answering("killed", f"http://127.0.0.1:{port}", max_steps=30, save_every=5)
    recipe.write_text(recipe.read_text().replace("batch_size: 5", "batch_size: 1"))
    partial = project.folder / "killed" / "answers.jsonl.partial"

    def start(*words: str, code: str = "from deepspec.cli import run; run()") -> subprocess.Popen[bytes]:
        with open(log, "ab") as file:
            command = [sys.executable, "-c", f"import deepspec.sources.answered as a; a.KEPT_BYTES = 1; {code}", *words]
            return subprocess.Popen(command, cwd=tools.ROOT, env=tools.own_environment(), stdout=file, stderr=file)

    def wait_for(path: Path, lines: int, process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + 300
        while not path.exists() or path.read_bytes().count(b"\n") < lines:
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < end, log.read_text()[-2000:]
            time.sleep(0.005)

    server = start("serve-features", "--recipe", str(recipe), "--port", str(port))
    try:
        while "serves hidden states" not in log.read_text():
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        first = start("train", "--recipe", str(recipe))
        wait_for(partial, 5, first)
        first.kill()
        first.wait()
        rows = partial.read_bytes()
        second = start("train", "--recipe", str(recipe))
        wait_for(project.folder / "killed" / "run" / "log.jsonl", 12, second)
        second.kill()
        second.wait()
        assert start("train", "--recipe", str(recipe)).wait() == 0, log.read_text()[-3000:]
        counters = request("GET", f"http://127.0.0.1:{port}/metrics", 10).body.decode()
    finally:
        server.kill()
        server.wait()
    asked = int(re.search(r"deepspec_answers_total (\d+)", counters).group(1))  # type: ignore[union-attr]
    recorded = {json.loads(line)["id"] for line in rows.splitlines()[1:]}
    assert 4 <= len(recorded) < 24
    turns = {
        row["id"]: sum(message["role"] == "assistant" for message in row["messages"])
        for row in read_conversations(project.folder / "killed" / "answers.jsonl")
    }
    total = sum(turns.values())
    begun = sum(count - 1 for name, count in turns.items() if name not in recorded)  # turns before the last one
    assert total <= asked <= total + begun + 4  # besides what was under way: two batches, and one for the disk
    cache = project.of_cache("killed-cache", project.folder / "killed" / "answers.jsonl", max_steps=30)
    assert losses_of(recipe) == pytest.approx(train(cache, world), abs=1e-5)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"conversations": "x.jsonl"}, "data.answers: the conversations are given, or sampled by the run: not both"),
        ({"prompts": None}, "data.prompts: data.answers needs it"),
        ({"write_cache": None}, "data.write_cache: data.answers needs it"),
        ({"source": "online"}, "data.answers: data.source online has no prompts answered"),
        ({"prompts": "some/hub-id"}, "no such prompts file"),
    ],
)
def test_a_recipe_whose_prompts_cannot_be_answered_is_refused(
    project: Project, data: dict[str, Any], told: str
) -> None:
    path = project.answering("refused", "http://127.0.0.1:9")
    values = yaml.safe_load(path.read_text())
    values["data"] |= data
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(DeepSpecError, match=re.escape(told)):
        begin(path)


class Engine(http.server.BaseHTTPRequestHandler):
    """A serving engine as far as it names itself."""

    def do_GET(self) -> None:
        found = self.path == "/v1/models"
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "m", "owned_by": "vllm"}]}' if found else b"{}")

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_an_engine_that_gives_no_hidden_states_of_answers_is_refused_by_its_name(project: Project) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Engine) as engine:
        threading.Thread(target=engine.serve_forever, daemon=True).start()
        path = project.answering("engine", f"http://127.0.0.1:{engine.server_port}")
        values = yaml.safe_load(path.read_text())
        values["data"]["server_storage"] = str(project.folder)
        path.write_text(yaml.safe_dump(values))
        with pytest.raises(TargetError, match=r"a server of vllm gives no .* of answers.*deepspec regenerate"):
            begin(path)
        engine.shutdown()


def test_a_server_that_answers_fewer_prompts_at_a_time_than_the_recipe_is_refused(
    project: Project, target: Target
) -> None:
    running = RunningServer(target, limits=Limits(answers=2))
    with pytest.raises(TargetError, match=r"answers 2 prompts at a time, the recipe 5 \(regenerate.batch_size"):
        begin(project.answering("few", running.url))
    running.stop()
