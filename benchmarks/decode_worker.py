"""Decoding in another process, with the ``deepspec`` of any checkout: how bench_decode.py pairs two of them.

As a script it reads a job (JSON) from the first line of standard input, then a batch size a line, and answers each with
``{"tokens", "cpu_seconds", "outputs"}``; ``outputs`` is a digest of all token ids. It calls only what both versions
have, from a06a0c0 on.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from deepspec.decoding.loop import generate
from deepspec.decoding.records import DecodeSettings
from deepspec.drafts import load_draft
from deepspec.targets import load_target


class Worker:
    """The script in a process of its own.

    Args:
        checkout: the folder whose ``deepspec`` decodes.
        job: "target" and "draft" (folders), "prompts" (token ids), "max_new_tokens", "stops", "threads".
    """

    def __init__(self, checkout: Path, job: Mapping[str, Any]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
        command = [sys.executable, str(Path(__file__).resolve())]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
        self._ask(job)

    def decode(self, batch_size: int) -> dict[str, Any]:
        """All prompts of the job, once."""
        answer: dict[str, Any] = self._ask(batch_size)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _ask(self, order: object) -> Any:
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("a worker without pipes")
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@dataclass(frozen=True)
class Pairs:
    """Two checkouts side by side at one batch size; medians over the pairs."""

    batch_size: int
    baseline: float  # tokens a CPU second
    now: float
    ratio: float
    lowest: float  # ratio of any pair
    highest: float
    equal: bool  # the outputs, token for token


def compare(baseline: Path, job: Mapping[str, Any], batch_sizes: Sequence[int], pairs: int) -> list[Pairs]:
    """This checkout against ``baseline``, in turn: who begins a pair changes from pair to pair."""
    workers = {"baseline": Worker(baseline, job), "now": Worker(Path(__file__).parents[1], job)}
    results = []
    for size in batch_sizes:
        rounds: list[dict[str, dict[str, Any]]] = []
        for number in range(pairs + 1):
            order = sorted(workers, reverse=bool(number % 2))
            rounds.append({name: workers[name].decode(size) for name in order})
        measured = rounds[1:]  # the first pair warms up
        rates = [{name: one["tokens"] / one["cpu_seconds"] for name, one in pair.items()} for pair in measured]
        ratios = [one["now"] / one["baseline"] for one in rates]
        middle = {name: median(one[name] for one in rates) for name in workers}
        equal = all(pair["now"]["outputs"] == pair["baseline"]["outputs"] for pair in measured)
        result = Pairs(size, middle["baseline"], middle["now"], median(ratios), min(ratios), max(ratios), equal)
        results.append(result)
    for worker in workers.values():
        worker.close()
    return results


def prepare(job: Mapping[str, Any]) -> Callable[[int], dict[str, Any]]:
    """The decoding of a job, by batch size."""
    torch.set_num_threads(job["threads"])
    target = load_target(Path(job["target"]))
    draft = load_draft(Path(job["draft"]), target)
    settings = DecodeSettings(max_new_tokens=job["max_new_tokens"], stop_token_ids=tuple(job["stops"]))
    room = max(map(len, job["prompts"])) + settings.max_new_tokens + draft.config.max_draft + 2

    def decode(batch_size: int) -> dict[str, Any]:
        start = time.process_time()
        drafter = draft.algorithm.drafter(draft, batch_size, room)
        ids = [one.output_ids for one in generate(target, drafter, job["prompts"], settings, batch_size)]
        seconds = time.process_time() - start
        digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
        return {"tokens": sum(map(len, ids)), "cpu_seconds": seconds, "outputs": digest}

    return decode


def main() -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    decode = prepare(json.loads(sys.stdin.readline()))
    print(json.dumps("ready"), file=answers, flush=True)
    for order in sys.stdin:
        print(json.dumps(decode(json.loads(order))), file=answers, flush=True)


if __name__ == "__main__":
    main()
