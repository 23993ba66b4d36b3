"""Regeneration: sampling, resume, and a scripted server that does everything wrong."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import data_tools as tools
import fork_server
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_types import config_of
from server_tools import SECTION, FaultyServer, renderer, server_engine

from deepspec.data.chat import Renderer
from deepspec.data.conversations import read_conversations, write_conversations
from deepspec.data.dialogue import Dialogue, split_turns
from deepspec.data.local import LocalEngine, LocalSampler, SamplingRequest, sample, uniforms
from deepspec.data.regenerate import failures_path, regenerate
from deepspec.errors import DataError
from deepspec.recipe import RegenerateSection
from deepspec.targets.adaptor import auto_class

ROOT = Path(__file__).parents[2]


def plain_sample(logits: np.ndarray, section: RegenerateSection, uniform: float) -> int:
    """One row by the definition: sort, filter token by token, walk until the mass is reached."""
    probs = np.exp(logits.astype(np.float64) / section.temperature)
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    if section.top_k == 0 and section.top_p == 1:
        order = np.arange(len(probs))
    kept = [i for i in order[: section.top_k or None] if probs[i] >= section.min_p * probs.max()]
    total, before, nucleus = probs[kept].sum(), 0.0, []
    for i in kept:
        if section.top_p == 1 or before < section.top_p * total:
            nucleus.append(i)
        before += probs[i]
    point, mass = uniform * probs[nucleus].sum(), 0.0
    for i in nucleus:
        mass += probs[i]
        if mass > point:
            return int(i)
    return int(nucleus[-1])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**31),
    st.sampled_from([0.3, 1.0, 1.7]),
    st.sampled_from([0, 1, 3, 20]),
    st.sampled_from([1.0, 0.8, 0.3]),
    st.sampled_from([0.0, 0.1, 0.5]),
)
def test_sampler_equals_its_plain_twin(seed: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    section = RegenerateSection(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    rng = np.random.default_rng(seed)
    logits, uniform = rng.normal(size=(16, 50)) * 3, rng.random(16)
    found = sample(torch.tensor(logits), section, torch.tensor(uniform))
    wanted = [plain_sample(row, section, point) for row, point in zip(logits, uniform, strict=True)]
    assert sum(a != b for a, b in zip(found.tolist(), wanted, strict=True)) <= 1  # one may lie on a rounding border


def test_sampler_draws_the_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20000, 4)
    uniform = torch.from_numpy(np.random.default_rng(0).random(20000))
    counts = torch.bincount(
        sample(logits, RegenerateSection(temperature=1.0, top_p=1.0, top_k=0), uniform), minlength=4
    )
    assert (counts / 20000 - torch.softmax(logits[0], -1)).abs().max() < 0.015
    assert sample(logits, RegenerateSection(temperature=0.0), uniform).eq(0).all()


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen3Config(vocab_size=512, num_key_value_heads=1, head_dim=16, max_position_embeddings=512, **sizes)
    network = Qwen3ForCausalLM(config).eval()
    network.lm_head.weight.data *= 8  # a peaked distribution, so that rounding does not decide
    return network


def test_an_answer_does_not_depend_on_its_batch(model: Any) -> None:
    rng = random.Random(1)
    requests = [SamplingRequest(f"s{i}", [rng.randrange(500) for _ in range(rng.randint(1, 30))]) for i in range(20)]

    def answers(batch_size: int) -> dict[str, tuple[list[int], str]]:
        sampler = LocalSampler(model, range(40), SECTION, 7, batch_size)
        return {one.request.key: (one.token_ids, one.finish_reason) for one in sampler.answer(requests)}

    alone, together = answers(1), answers(64)
    assert alone == together
    assert {reason for _, reason in alone.values()} == {"stop", "length"}
    assert all(len(ids) == 24 for ids, reason in alone.values() if reason == "length")


def test_batched_sampling_equals_a_loop_without_cache(model: Any) -> None:
    prompt = [5, 6, 7, 8]
    (found,) = LocalSampler(model, [0], SECTION, 3, 4).answer([SamplingRequest("x", prompt)])
    ids, numbers = list(prompt), uniforms(3, "x", 24)
    with torch.no_grad():
        for step in range(24):
            logits = model(torch.tensor([ids])).logits[:, -1]
            token = int(sample(logits, SECTION, torch.tensor(numbers[step : step + 1])))
            if token == 0:
                break
            ids.append(token)
    assert found.token_ids == ids[len(prompt) :]


@pytest.mark.parametrize(
    ("model_type", "cached"),
    [("gpt_oss", True), ("lfm2", True), ("qwen3_next", True), ("falcon_h1", True), ("minimax", False)],
)
def test_a_model_of_any_kind_answers_a_batch_as_each_prompt_alone(model_type: str, cached: bool) -> None:
    """With a cache where one of transformers continues its text, else over the complete text; rows that end leave."""
    config = config_of(model_type)
    torch.manual_seed(0)
    network = auto_class(config, model_type).from_config(config).float().eval()
    prompts = [[5, 9, 40, 3, 3, 8], [7], [11, 80, 2, 6, 31, 17, 4, 4, 90]]
    wanted = {}
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(8):
            with torch.no_grad():
                ids.append(int(network(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        wanted[str(prompt)] = ids[len(prompt) :]
    stop = wanted[str(prompts[0])][2]  # the first row leaves after at most two tokens
    sampler = LocalSampler(network, [stop], RegenerateSection(temperature=0.0, max_tokens=8), 0, len(prompts))
    assert sampler.keeps_cache == cached
    found = {one.request.key: one.token_ids for one in sampler.answer([SamplingRequest(str(p), p) for p in prompts])}
    assert found == {key: ids[: ids.index(stop)] if stop in ids else ids for key, ids in wanted.items()}
    assert len({len(ids) for ids in found.values()}) > 1


def test_turns_keep_tool_calls_as_context() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    user, old, tool = (
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "old"},
        {"role": "tool", "content": "r"},
    )
    assert split_turns([user, old, user, call, tool, old]) == [[user], [user, {**call, "weight": 0}, tool]]
    assert split_turns([old, user]) == [[{**old, "weight": 0}, user]]
    assert split_turns([user, old, user]) == [[user], [user]]
    dialogue = Dialogue({"id": "a", "messages": [user, old, user, old]})
    dialogue.answer({"content": "cut"}, "length", 3)
    assert not dialogue.open
    assert dialogue.result()["messages"] == [user, {"role": "assistant", "content": "cut", "finish_reason": "length"}]


def write_prompts(path: Path, count: int, turns: int = 1) -> None:
    rows = [
        {"id": f"p{i}", "messages": [{"role": "user", "content": f"{i} word {j}"} for j in range(1)]}
        for i in range(count)
    ]
    for row in rows:
        for j in range(1, turns):
            row["messages"] += [{"role": "assistant", "content": "old"}, {"role": "user", "content": f"again {j}"}]
    write_conversations(path, rows, {})


def test_local_engine_answers_nothing_beyond_the_models_positions(model: Any, tmp_path: Path) -> None:
    config, prompts = model.config.get_text_config(), tmp_path / "p.jsonl"
    write_prompts(prompts, 2)
    row = {"id": "long", "messages": [{"role": "user", "content": "word " * config.max_position_embeddings}]}
    write_conversations(prompts, [*read_conversations(prompts), row], {})
    summary = regenerate(
        prompts, tmp_path / "out.jsonl", LocalEngine(model, renderer(), SECTION, 0, 8), {"seed": 0}, 1.0
    )
    assert summary.rows + summary.failed == 3
    failures = failures_path(tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in failures if "longer than the target's positions" in line] == ["long"]


def test_local_engine_resumes_and_changes_nothing(model: Any, tmp_path: Path) -> None:
    prompts, whole, resumed = tmp_path / "p.jsonl", tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    write_prompts(prompts, 20, turns=2)
    summary = regenerate(prompts, whole, LocalEngine(model, renderer(), SECTION, 0, 8), {"seed": 0}, 0.5)
    assert summary.rows + summary.failed == 20

    class Stopped(Exception):
        pass

    class Half(LocalEngine):
        def run(self, dialogues: Any) -> Any:
            for i, outcome in enumerate(super().run(dialogues)):
                if i == 9:
                    raise Stopped
                yield outcome

    with pytest.raises(Stopped):
        regenerate(prompts, resumed, Half(model, renderer(), SECTION, 0, 8), {"seed": 0}, 0.5)
    assert not resumed.exists()
    with open(tmp_path / "resumed.jsonl.partial", "ab") as handle:
        handle.write(b'{"id":"p19","mess')  # what a kill leaves
    with pytest.raises(DataError, match="other settings: seed: then 0, now 1"):
        regenerate(prompts, resumed, LocalEngine(model, renderer(), SECTION, 1, 8), {"seed": 1}, 0.5)
    again = regenerate(prompts, resumed, LocalEngine(model, renderer(), SECTION, 0, 8), {"seed": 0}, 0.5)
    assert again.rows == summary.rows
    assert resumed.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "resumed.jsonl.partial").exists()
    assert regenerate(prompts, resumed, LocalEngine(model, renderer(), SECTION, 0, 8), {"seed": 0}, 0.5).tokens == 0
    with pytest.raises(DataError, match="made with other settings"):
        regenerate(prompts, resumed, LocalEngine(model, renderer(), SECTION, 1, 8), {"seed": 1}, 0.5)


FAULTS = ["500", "json", "close", "early", "429", "shape", "503", "slow"]


@pytest.fixture(autouse=True)
def short_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspec.data import server

    monkeypatch.setattr(server, "FIRST_REST", 0.02)
    monkeypatch.setattr(server, "LONGEST_REST", 0.2)


def test_faulty_servers_answer_every_prompt_once(tmp_path: Path) -> None:
    prompts, output = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    write_prompts(prompts, 60, turns=2)
    servers = [FaultyServer(FAULTS), FaultyServer(FAULTS, every=4, strict=True)]
    summary = regenerate(prompts, output, server_engine(*[one.url for one in servers]), {})
    assert (summary.rows, summary.failed) == (60, 0)
    assert summary.finish_reasons == {"stop": 120}
    rows = list(read_conversations(output))
    assert [row["id"] for row in rows] == [f"p{i}" for i in range(60)]
    for i, row in enumerate(rows):
        assert [m["content"] for m in row["messages"]] == [f"{i} word 0", f"echo {i} word 0", "again 1", "echo again 1"]
    assert min(sum(one.answered.values()) for one in servers) > 5
    plain = [body for body in servers[1].bodies if "generation_config" in body]
    assert plain
    assert json.loads(plain[0]["generation_config"])["top_k"] == 0
    assert not failures_path(output).exists()
    [one.stop() for one in servers]


def test_server_killed_and_restarted(tmp_path: Path) -> None:
    prompts, output = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    write_prompts(prompts, 150)
    stays, dies = FaultyServer([]), FaultyServer([])
    port, revived = dies.http.server_port, []

    def kill_and_restart() -> None:
        while sum(dies.answered.values()) < 20:
            time.sleep(0.005)
        dies.stop()
        time.sleep(0.1)
        revived.append(FaultyServer([], port=port))

    killer = threading.Thread(target=kill_and_restart)
    killer.start()
    summary = regenerate(prompts, output, server_engine(stays.url, dies.url, concurrency=2), {})
    killer.join()
    assert (summary.rows, summary.failed) == (150, 0)
    assert len({row["id"] for row in read_conversations(output)}) == 150
    stays.stop()
    revived[0].stop()


def test_failures_have_their_own_file_and_are_tried_again(tmp_path: Path) -> None:
    prompts, output = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    rows = [
        {"id": f"p{i}", "messages": [{"role": "user", "content": f"q{i}" + " too long" * (i == 3)}]} for i in range(10)
    ]
    write_conversations(prompts, rows, {})
    server = FaultyServer([])
    with pytest.raises(DataError, match="1 of 10 conversations failed"):
        regenerate(prompts, output, server_engine(server.url), {})
    (failure,) = [json.loads(line) for line in failures_path(output).read_text().splitlines()]
    assert failure["id"] == "p3"
    assert "context length exceeded" in failure["error"]
    before = server.requests
    summary = regenerate(prompts, output, server_engine(server.url), {}, max_failed=0.1)
    assert server.requests == before + 1  # only the failed one was asked again
    assert (summary.rows, summary.failed) == (9, 1)
    server.stop()


def test_a_server_with_another_template_stops_the_job(tmp_path: Path) -> None:
    prompts, output = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    write_prompts(prompts, 4)
    server = FaultyServer([])
    engine = server_engine(server.url)
    engine.renderer = Renderer(tools.small_case("headers").tokenizer, "llama")
    with pytest.raises(DataError, match="renders the prompt otherwise"):
        regenerate(prompts, output, engine, {})
    server.stop()


def test_no_server_stops_the_job_after_its_patience(tmp_path: Path) -> None:
    prompts, output = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    write_prompts(prompts, 4)
    with pytest.raises(DataError, match="no server has answered"):
        regenerate(prompts, output, server_engine("http://127.0.0.1:9", patience=0.3), {})


CLIENT = """
import sys; sys.path[:0] = [{tests!r}]
from server_tools import server_engine
from deepspec.data.regenerate import regenerate
print(regenerate({prompts!r}, {output!r}, server_engine({url!r}, concurrency=2), {{}}))
"""


def test_client_killed_and_restarted(tmp_path: Path) -> None:
    prompts, output = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    write_prompts(prompts, 80)
    server = FaultyServer(["500"], every=5)
    code = CLIENT.format(
        tests=str(ROOT / "tests" / "helpers"), prompts=str(prompts), output=str(output), url=server.url
    )
    client = fork_server.start([sys.executable, "-c", code], subprocess.DEVNULL, subprocess.DEVNULL)
    while sum(server.answered.values()) < 30:
        assert client.poll() is None
        time.sleep(0.01)
    client.send_signal(signal.SIGKILL)
    client.wait()
    assert not output.exists()
    summary = regenerate(prompts, output, server_engine(server.url), {})
    assert summary.rows == 80
    assert [row["id"] for row in read_conversations(output)] == [f"p{i}" for i in range(80)]
    twice = sum(count - 1 for count in server.answered.values())
    assert twice <= 2  # what was in flight: two requests
    server.stop()
