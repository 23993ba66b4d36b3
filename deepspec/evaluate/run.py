"""Decode every prompt of every task, with the draft and plainly; a row of results.jsonl as soon as a turn is done."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import deepspec
from deepspec.algorithms.base import DraftModel
from deepspec.data.chat import Renderer
from deepspec.data.progress import Progress
from deepspec.decoding.loop import Decoder
from deepspec.decoding.records import DecodeSettings, Generation, Request
from deepspec.errors import EvaluationError
from deepspec.evaluate.tasks import Task
from deepspec.files import read_json, sha256_file, sha256_json, write_json
from deepspec.targets import Target

MODES = ("draft", "plain")


@dataclass(frozen=True)
class RunSettings:
    """What decides a run's outputs; a resumed run must have the same."""

    temperatures: tuple[float, ...]
    max_new_tokens: int
    batch_size: int
    seed: int
    thinking: bool
    system_prompt: str | None
    all_turns: bool
    plain: bool  # also decode the target alone, for the speed-up


class ResultsLog:
    """results.jsonl: appended and synced row by row; a torn last line (a killed run) is dropped on opening."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, known = folder / "results.jsonl", folder / "run.json"
        if known.exists():
            before = read_json(known, EvaluationError)
            differing = sorted(key for key in {*before, *identity} if before.get(key) != identity.get(key))
            if differing:
                raise EvaluationError(
                    "the folder holds results of another run", file=folder, key=differing[0],
                    found=before.get(differing[0]), wanted=identity.get(differing[0]), remedy="name another --output",
                )  # fmt: skip
        else:
            write_json(known, identity)
        self.rows: dict[tuple[str, str, float, int, int], dict[str, Any]] = {}
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        for line in whole.splitlines():
            row = json.loads(line)
            self.rows[row_key(row)] = row
        self._handle = open(self.path, "r+b" if self.path.exists() else "w+b")  # noqa: SIM115
        self._handle.truncate(len(whole))
        self._handle.seek(len(whole))

    def add(self, row: dict[str, Any]) -> None:
        """Append a row and make it last."""
        self._handle.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self.rows[row_key(row)] = row

    def close(self) -> None:
        """Close the file."""
        self._handle.close()


def row_key(row: dict[str, Any]) -> tuple[str, str, float, int, int]:
    """(mode, task, temperature, place, turn): what makes a row one of a kind."""
    return row["mode"], row["task"], row["temperature"], row["place"], row["turn"]


def sample_id(task: str, place: int, turn: int) -> int:
    """63 bits from a turn's name: the key of its random numbers."""
    return int.from_bytes(hashlib.sha256(f"{task}\0{place}\0{turn}".encode()).digest()[:8], "big") >> 1


def identity_of(
    target: Target, draft: str | Path, model: DraftModel, tasks: Sequence[Task], settings: RunSettings
) -> dict[str, Any]:
    """Provenance: everything that the results depend on."""
    return {
        "target": target.spec.path,
        "target_digest": target.weights_digest(),
        "draft": str(draft),
        "draft_digest": sha256_file(Path(draft) / "model.safetensors"),
        "algorithm": model.algorithm.name,
        "slots": model.config.max_draft,
        "dtype": str(target.dtype),
        "device": str(target.device),
        "settings": json.loads(json.dumps(asdict(settings))),
        "tasks": {task.name: {"source": task.source, "digest": task.digest()} for task in tasks},
        "versions": {
            "deepspec": deepspec.__version__ if hasattr(deepspec, "__version__") else "0.1.0",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def run(
    target: Target, model: DraftModel, renderer: Renderer, tasks: Sequence[Task], settings: RunSettings, log: ResultsLog
) -> None:
    """Decode what the log does not hold yet."""
    for temperature in settings.temperatures:
        for mode in MODES if settings.plain else MODES[:1]:
            for task in tasks:
                _run_task(target, model if mode == "draft" else None, renderer, task, temperature, settings, log)


def _run_task(
    target: Target, model: DraftModel | None, renderer: Renderer, task: Task, temperature: float,
    settings: RunSettings, log: ResultsLog,
) -> None:  # fmt: skip
    mode = "plain" if model is None else "draft"
    history: dict[int, list[dict[str, Any]]] = {}
    waiting: deque[Request] = deque()
    for place, turns in task.turns.items():
        history[place] = []
        request = _advance(renderer, task, turns, place, history[place], mode, temperature, settings, log)
        if request is not None:
            waiting.append(request)
    if not waiting:
        return
    decode = DecodeSettings(temperature, settings.max_new_tokens, renderer.stop_token_ids, settings.seed)
    rows = min(settings.batch_size, len(waiting))
    room = max(len(one.prompt_ids) for one in waiting) + 1
    turns_left = max(map(len, task.turns.values())) if settings.all_turns else 1
    longest = (room + settings.max_new_tokens) * turns_left
    drafter = None if model is None else model.algorithm.drafter(model, rows, longest)
    decoder = Decoder(target, drafter, decode, rows)
    progress = Progress(f"{mode} {task.name} at temperature {temperature:g}", len(waiting))
    spent = decoder.clock.seconds()
    for one in decoder.stream(waiting):
        now = decoder.clock.seconds()
        seconds = {key: now[key] - spent[key] for key in now}
        spent = now
        place, turn = one.request.tag  # type: ignore[misc]
        text = renderer.tokenizer.decode(_without_stop(one, renderer), skip_special_tokens=False)
        log.add(_row(one, mode, task.name, temperature, place, turn, text, seconds))
        progress.add(1, len(one.output_ids))
        request = _advance(renderer, task, task.turns[place], place, history[place], mode, temperature, settings, log)
        if request is not None:
            waiting.append(request)
    progress.finish()


def _advance(
    renderer: Renderer, task: Task, turns: list[str], place: int, messages: list[dict[str, Any]], mode: str,
    temperature: float, settings: RunSettings, log: ResultsLog,
) -> Request | None:  # fmt: skip
    """The request of a sample's next turn, its earlier turns taken from the log; None when all are done."""
    for turn in range(len(messages) // 2, len(turns) if settings.all_turns else 1):
        if len(messages) == 2 * turn:
            messages.append({"role": "user", "content": turns[turn]})
        done = log.rows.get((mode, task.name, temperature, place, turn))
        if done is None:
            ids = tuple(renderer.prompt(messages))
            return Request(ids, sample_id(task.name, place, turn), (place, turn))
        messages.append({"role": "assistant", "content": done["text"]})
    return None


def _without_stop(one: Generation, renderer: Renderer) -> list[int]:
    return one.output_ids[:-1] if one.finish == "stop" else one.output_ids


def _row(
    one: Generation, mode: str, task: str, temperature: float, place: int, turn: int, text: str,
    seconds: dict[str, float],
) -> dict[str, Any]:  # fmt: skip
    return {
        "mode": mode,
        "task": task,
        "temperature": temperature,
        "place": place,
        "turn": turn,
        "prompt_tokens": len(one.request.prompt_ids),
        "new_tokens": len(one.output_ids),
        "output_sha": sha256_json(one.output_ids)[:16],
        "finish": one.finish,
        "rounds": [[len(r.sent), r.length, r.accepted, r.committed, r.emitted] for r in one.rounds],
        "confidence": [[round(x, 4) for x in r.confidence] for r in one.rounds if r.confidence],
        "seconds": seconds,  # of the whole batch since the row before: their sum is the run's
        "text": text,
    }
