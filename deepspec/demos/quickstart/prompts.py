"""The quickstart's prompts on disk: those the target answers for training, and the held-out ones for evaluation."""

from __future__ import annotations

import json
from pathlib import Path

from deepspec.data.conversations import write_conversations
from deepspec.demos.quickstart.text import distinct
from deepspec.files import write_text

TRAIN, HELD_OUT = "train.jsonl", "held_out.jsonl"


def write_prompts(folder: Path, train: int, held_out: int, seed: int = 1) -> None:
    """Write ``train`` and ``held_out`` different prompts; the manifest of the training file is written last.

    ``held_out.jsonl`` has the form of an evaluation task: a row ``{"id", "turns": [prompt]}``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tests = [{"id": f"{row.task}-{i}", "turns": [row.question]} for i, row in enumerate(distinct(seed, held_out, True))]
    write_text(folder / HELD_OUT, "".join(json.dumps(test) + "\n" for test in tests))
    rows = ({"id": f"{row.task}-{i}", "messages": row.messages()[:1]} for i, row in enumerate(distinct(seed, train)))
    write_conversations(folder / TRAIN, rows, {"generator": "deepspec.demos.quickstart.text", "seed": seed})
    print(f"prompts: {train} to train on, {held_out} held out", flush=True)
