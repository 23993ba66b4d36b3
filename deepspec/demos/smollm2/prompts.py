"""The real run's prompts on disk: shards to train on, and the held-out ones in the form of an evaluation task."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from deepspec.data.conversations import read_conversations, write_conversations
from deepspec.data.prepare import PrepareOptions, prepare
from deepspec.demos.quickstart.text import distinct
from deepspec.demos.smollm2.text import DOMAIN, chat_prompts, function_prompts, passage_prompts
from deepspec.errors import DataError
from deepspec.files import write_text

log = logging.getLogger(__name__)

WEIGHTS = {"chat": 6.0, "functions": 2.0, "passages": 1.0, "problems": 1.0}  # of the mix, by source
HELD_OUT = 0.05  # share of the prompts
DRAWN = 20  # chat prompts drawn for each one that is wanted: most repeat an earlier one
TASK = "chat"  # name of the held-out prompts as an evaluation task
DONE = "report.json"  # written last


def write_prompts(folder: Path, shards: int, each: int, held_out: int, tasks: Sequence[Path], seed: int = 1) -> None:
    """Write ``train-0.jsonl`` ... of ``each`` prompts and ``chat.jsonl`` of ``held_out`` prompts.

    Every prompt is there once; none is in ``tasks`` (files of evaluation prompts) or shares 13 words in a row with one.

    Raises:
        DataError: the sources hold too few different prompts.
    """
    wanted = shards * each
    sources = _write_sources(folder / "sources", wanted, seed)
    limit = int(max(1.1 * wanted / (1 - HELD_OUT), 2 * held_out / HELD_OUT))  # the split is by hash: some to spare
    excluded = tuple(map(str, tasks))
    report = prepare(PrepareOptions(sources, HELD_OUT, excluded, limit, seed=seed), folder / "all")
    for name, found, least in (("train", report.train, wanted), ("held_out", report.held_out, held_out)):
        if found < least:
            raise DataError(
                "too few different prompts", file=folder / "all" / f"{name}.jsonl", found=found, wanted=least
            )
    rows = read_conversations(folder / "all" / "held_out.jsonl")
    tests = ({"id": row["id"], "turns": [row["messages"][0]["content"]]} for row in islice(rows, held_out))
    write_text(folder / f"{TASK}.jsonl", "".join(json.dumps(test) + "\n" for test in tests))
    about = {"made_by": "deepspec.demos.smollm2", "seed": seed, "python": platform.python_version()}
    for shard in range(shards):
        rows = islice(read_conversations(folder / "all" / "train.jsonl"), shard, wanted, shards)
        write_conversations(folder / f"train-{shard}.jsonl", rows, about | {"shard": shard, "shards": shards})
    log.info("\n".join(report.lines()))
    (folder / "all" / DONE).replace(folder / DONE)


def write_domain(folder: Path, train: int, held_out: int, seed: int = 1) -> None:
    """Write ``domain.jsonl`` of ``held_out`` prompts of the fine-tuning's domain, then ``train.jsonl`` of others."""
    found: dict[str, None] = {}
    for prompt in chat_prompts(seed, DOMAIN):
        found.setdefault(prompt)
        if len(found) == train + held_out:
            break
    rows = [{"id": f"domain-{number}", "turns": [prompt]} for number, prompt in enumerate(found)]
    write_text(folder / "domain.jsonl", "".join(json.dumps(row) + "\n" for row in rows[:held_out]))
    trained = ({"id": row["id"], "messages": [{"role": "user", "content": row["turns"][0]}]} for row in rows[held_out:])
    write_conversations(folder / "train.jsonl", trained, {"made_by": "deepspec.demos.smollm2", "seed": seed})


def _write_sources(folder: Path, wanted: int, seed: int) -> dict[str, float]:
    """A JSONL file of every source; (file -> weight in the mix)."""
    texts: dict[str, Iterable[str]] = {
        "chat": islice(chat_prompts(seed), DRAWN * wanted),
        "functions": function_prompts(seed),
        "passages": passage_prompts(seed),
        "problems": (row.question for row in distinct(seed, wanted)),
    }
    weights = {}
    for name, prompts in texts.items():
        path = folder / f"{name}.jsonl"
        write_text(path, "".join(_lines(prompts)))
        weights[str(path)] = WEIGHTS[name]
    return weights


def _lines(prompts: Iterable[str]) -> Iterator[str]:
    return (json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in dict.fromkeys(prompts))
