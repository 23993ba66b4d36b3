"""A vLLM server that hands out hidden states, and the check that they are the target's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import torch

from deepspec.distributed import free_port
from deepspec.errors import DeepSpecError
from deepspec.targets import Target
from deepspec.targets.served import ServedTarget

CONNECTORS = {  # where the engine runs -> its own connector, or the CPU shim's
    "cuda": {"kv_connector": "ExampleHiddenStatesConnector"},
    "cpu": {"kv_connector": "CPUHiddenStatesConnector", "kv_connector_module_path": "tricpu.hs_connector"},
}


def server_arguments(target: str, layers: Sequence[int], storage: str, device: str) -> list[str]:
    """Arguments of vLLM's server for hidden states of the engine's layer ids ``layers``.

    Args:
        target: folder or hub id.
        layers: what :func:`deepspec.targets.served.server_layers` gives.
        storage: folder that server and reader share.
        device: ``cuda`` or ``cpu``.
    """
    speculative = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(layers)}},
    }
    transfer = {
        **CONNECTORS[device],
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": storage},
    }
    return [
        *("--model", target, "--no-enable-prefix-caching"),
        *("--speculative-config", json.dumps(speculative)),
        *("--kv-transfer-config", json.dumps(transfer)),
    ]


@contextmanager
def serve(
    python: Path, arguments: Sequence[str], log: Path, environment: Mapping[str, str], timeout: float
) -> Iterator[str]:
    """The URL of a server that runs until the block ends.

    Raises:
        DeepSpecError: it ended, or was not ready in ``timeout`` seconds.
    """
    port = free_port()
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    with open(log, "wb") as stream:
        process = subprocess.Popen([*command, *arguments], stdout=stream, stderr=subprocess.STDOUT,
                                   env=os.environ | dict(environment), start_new_session=True)  # fmt: skip
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + timeout
    try:
        while not _healthy(url):
            if process.poll() is not None or time.monotonic() > end:
                state = "did not become ready" if process.poll() is None else f"ended with code {process.returncode}"
                raise DeepSpecError(f"the server {state}", file=log)
            time.sleep(1.0)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _healthy(url: str) -> bool:
    try:
        with urlopen(f"{url}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (URLError, OSError):
        return False


def largest_difference(url: str, target: Target, layers: Sequence[int], prompts: Sequence[Sequence[int]]) -> float:
    """Of hidden states from the server and from ``target`` in this process, over all prompts, features and last state.

    Raises:
        TargetError: the server hands out none.
    """
    remote = ServedTarget(url, target.spec.path, layers, target.dtype, concurrency=4)
    worst = 0.0
    for number, prompt in enumerate(prompts):
        print(f"hidden states: prompt {number + 1}/{len(prompts)}", file=sys.stderr, flush=True)
        ids = torch.tensor([list(prompt)])
        there, here = remote.forward(ids, layers), target.forward(ids, layers)
        for name in ("features", "last_hidden"):
            worst = max(worst, float((getattr(there, name) - getattr(here, name)).abs().max()))
    return worst
