"""Decodes one job when told to, with the ``deepspec`` of its ``PYTHONPATH``: what bench_decode.py pairs checkouts by.

Standard input has the job in the first line, then one batch size a line; standard output answers each with
``{"tokens", "cpu_seconds", "outputs"}``, ``outputs`` a digest of all token ids. It calls only what every version has.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from deepspec.decoding.loop import generate
from deepspec.decoding.records import DecodeSettings
from deepspec.drafts import load_draft
from deepspec.targets import load_target


def prepare(job: dict[str, Any]) -> Callable[[int], dict[str, Any]]:
    """The decoding of ``job``: "target", "draft" (null: none), "prompts", "settings" and "threads"."""
    torch.set_num_threads(job["threads"])
    target = load_target(Path(job["target"]))
    draft = None if job["draft"] is None else load_draft(Path(job["draft"]), target)
    settings = DecodeSettings(**{**job["settings"], "stop_token_ids": tuple(job["settings"]["stop_token_ids"])})
    longest = max(map(len, job["prompts"])) + settings.max_new_tokens

    def decode(batch_size: int) -> dict[str, Any]:
        start = time.process_time()
        room = longest + draft.config.max_draft + 2 if draft else 0
        drafter = draft.algorithm.drafter(draft, batch_size, room) if draft else None
        ids = [one.output_ids for one in generate(target, drafter, job["prompts"], settings, batch_size)]
        seconds = time.process_time() - start
        digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
        return {"tokens": sum(map(len, ids)), "cpu_seconds": seconds, "outputs": digest}

    return decode


def serve(orders: TextIO, answers: TextIO) -> None:
    """Prepare the job, say ``ready``, then decode once an order."""
    decode = prepare(json.loads(orders.readline()))
    print(json.dumps("ready"), file=answers, flush=True)
    for order in orders:
        print(json.dumps(decode(json.loads(order))), file=answers, flush=True)


if __name__ == "__main__":
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    serve(sys.stdin, pipe)
