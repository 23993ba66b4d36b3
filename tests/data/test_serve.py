"""Regeneration against real servers: two of ``transformers serve``, one killed half-way and restarted, the client too.

    DEEPSPEC_SERVE=/path/to/venv/bin/transformers python -m pytest -m slow tests/data/test_serve.py

where the venv was made with ``pip install torch==2.13.0 'transformers[serving]==5.23.0' accelerate``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import data_tools as tools
import pytest
import torch
import yaml

from deepspec.data.conversations import read_conversations, write_conversations
from deepspec.distributed import free_port

SERVE = os.environ.get("DEEPSPEC_SERVE")
ROOT = Path(__file__).parents[2]
PROMPTS = 200
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SERVE is None, reason="DEEPSPEC_SERVE names no `transformers` command with the serving extra"),
]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("target")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen3Config(vocab_size=520, num_key_value_heads=1, head_dim=32, max_position_embeddings=512, **sizes)
    tokenizer = tools.small_case("chatml").tokenizer
    config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Served:
    """One server process."""

    def __init__(self, target: Path, port: int) -> None:
        command = [SERVE or "", "serve", str(target), "--host", "127.0.0.1", "--port", str(port)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [*command, "--device", "cpu", "--dtype", "float32"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def wait(self) -> Served:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=2).read()
                return self
            except OSError:
                assert self.process.poll() is None, "the server ended"
                time.sleep(0.2)
        raise AssertionError("the server did not come up")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def servers(target: Path) -> Iterator[list[Served]]:
    running = [Served(target, free_port()) for _ in range(2)]
    try:
        yield [one.wait() for one in running]
    finally:
        [one.kill() for one in running]


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(path: Path, count: int, client: subprocess.Popen[Any]) -> None:
    while lines(path) < count:
        assert client.poll() is None, "the client ended"
        time.sleep(0.05)


def test_every_prompt_once_with_a_server_and_the_client_killed(
    target: Path, servers: list[Served], tmp_path: Path
) -> None:
    prompts, output, recipe = tmp_path / "p.jsonl", tmp_path / "o.jsonl", tmp_path / "r.yaml"
    rows = [{"id": f"p{i}", "messages": [{"role": "user", "content": f"word {i} of the text"}]} for i in range(PROMPTS)]
    write_conversations(prompts, rows, {})
    values = {
        "name": "serve",
        "algorithm": "eagle3",
        "target": {"path": str(target), "layers": [0], "dtype": "float32"},
        "regenerate": {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "max_tokens": 32},
    }
    recipe.write_text(yaml.safe_dump(values))
    command = [sys.executable, "tools/regenerate.py", "--recipe", str(recipe), "--prompts", str(prompts)]
    command += ["--output", str(output), "--concurrency", "4", "--max-failed", "0.05"]
    for server in servers:
        command += ["--server", server.url]

    partial = tmp_path / "o.jsonl.partial"
    client = subprocess.Popen(command, cwd=ROOT)
    wait_for(partial, 40, client)
    servers[1].kill()
    wait_for(partial, 80, client)
    client.kill()
    client.wait()
    kept = lines(partial) - 1
    again = subprocess.Popen(command, cwd=ROOT)
    wait_for(partial, 100, again)
    servers[1] = Served(target, int(servers[1].url.rsplit(":", 1)[1]))
    try:
        assert again.wait(timeout=400) == 0
    finally:
        servers[1].kill()
    assert 78 <= kept < PROMPTS
    answers = list(read_conversations(output))
    failures = output.with_name("o.jsonl.failures.jsonl")
    failed = [json.loads(line) for line in failures.read_text().splitlines()] if failures.exists() else []
    assert {one["error"] for one in failed} <= {"the target answered nothing"}  # an untrained target may do that
    unanswered = {one["id"] for one in failed}
    assert [row["id"] for row in answers] == [row["id"] for row in rows if row["id"] not in unanswered]
    reasons = {row["messages"][-1]["finish_reason"] for row in answers}
    assert reasons <= {"stop", "length"}
    provenance = json.loads(Path(f"{output}.manifest.json").read_text())["provenance"]
    assert (provenance["engine"], provenance["failed"]) == ("server", len(failed))
