"""Run tasks through the draft-verify loop: a row of results.jsonl per prompt, results.json last.

A run that was killed goes on where it stopped: prompts whose row is on disk are not decoded again.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
import zlib
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO, cast

import torch

from deepspec.algorithms.base import DraftModel
from deepspec.data.chat import Renderer
from deepspec.decoding.loop import Decoder
from deepspec.decoding.records import DecodeSettings, Generation, Request
from deepspec.drafts import load_draft
from deepspec.errors import EvaluationError
from deepspec.evaluate.calibration import load_sts
from deepspec.evaluate.measure import PromptResult, Summary, summarise
from deepspec.evaluate.tasks import Task, load_tasks
from deepspec.files import read_json, sha256_file, sha256_json, write_json
from deepspec.targets import Target, load_target, load_tokenizer

FORMAT = "deepspec.results/1"


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    target: str
    draft: str
    output: str
    tasks: tuple[str, ...] = ()
    temperatures: tuple[float, ...] = (1.0,)
    batch_size: int = 1
    max_new_tokens: int = 2048
    samples: int | None = None
    seed: int = 980406
    thinking: bool = False
    system_prompt: str | None = None
    confidence_threshold: float = 0.0
    plain: bool = True  # also decode without the draft: speed-up and equality of greedy outputs
    dtype: str = "auto"
    device: str = "cpu"


class Evaluation:
    """One target, one draft, some tasks.

    Args:
        options: the settings of the run.

    Raises:
        DeepSpecError: a target, draft or task that cannot be loaded, or an output folder of another run.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.tasks = load_tasks(options.tasks, options.samples, options.seed)
        dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
        self.target: Target = load_target(options.target, dtype, options.device)
        self.draft: DraftModel = load_draft(options.draft, self.target)
        tokenizer = load_tokenizer(options.target)
        self.renderer = Renderer(tokenizer, self.target.spec.family, options.system_prompt, options.thinking)
        self.tokenizer = tokenizer
        self.sts = load_sts(Path(options.draft))
        self.output = Path(options.output)
        self.identity = self._identity()

    def _identity(self) -> dict[str, Any]:
        """What makes two runs the same run."""
        settings = {key: value for key, value in asdict(self.options).items() if key not in ("output", "device")}
        if self.sts is not None and self.options.confidence_threshold > 0:  # without one nothing depends on them
            settings["confidence_temperatures"] = self.sts
        return settings | {
            "tasks": {task.name: task.digest for task in self.tasks},
            "draft_sha256": sha256_file(Path(self.options.draft) / "model.safetensors"),
            "target_digest": self.target.weights_digest(),
        }

    def run(self) -> dict[str, Any]:
        """Decode what is missing and return the content of results.json.

        Raises:
            EvaluationError: the output folder holds another run.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        self._claim()
        summaries: list[Summary] = []
        with open(self.output / "results.jsonl", "a", encoding="utf-8") as stream:
            stream.write("\n")  # a killed run may have left half a row; rows never go on behind it
            for temperature in self.options.temperatures:
                for task in self.tasks:
                    summaries.append(self._run_task(task, temperature, stream))
        results = {
            "format": FORMAT,
            "algorithm": self.draft.algorithm.name,
            "max_draft": self.draft.config.max_draft,
            "summaries": [summary.to_row() for summary in summaries + self._macro(summaries)],
            "provenance": self._provenance(),
        }
        write_json(self.output / "results.json", results)
        return results

    def _claim(self) -> None:
        path, digest = self.output / "run.json", sha256_json(self.identity)
        if path.exists():
            known = read_json(path, EvaluationError)
            if known["digest"] != digest:
                changed = [k for k, v in self.identity.items() if known["identity"].get(k) != _plain(v)]
                raise EvaluationError(
                    "holds another run", file=self.output, key=", ".join(changed), remedy="name another --output"
                )
        else:
            write_json(path, {"digest": digest, "identity": self.identity})

    def _known(self, task: str, temperature: float) -> dict[int, PromptResult]:
        found: dict[int, PromptResult] = {}
        for line in (self.output / "results.jsonl").read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of a killed run
            if row.get("task") == task and row.get("temperature") == temperature:
                found[row["index"]] = PromptResult(**row)
        return found

    def _run_task(self, task: Task, temperature: float, stream: TextIO) -> Summary:
        known = self._known(task.name, temperature)
        missing = [i for i in range(len(task.prompts)) if i not in known]
        timing_path = self.output / f"timing-{task.name}-{temperature:g}.json"
        timing: dict[str, Any] = read_json(timing_path) if timing_path.exists() else defaultdict(float)
        if missing:
            drafted, clock, seconds = self._decode(task, missing, temperature, with_draft=True)
            plain: dict[int, list[Generation]] = {}
            timing["seconds"] = timing.get("seconds", 0.0) + seconds
            for phase, spent in clock.items():
                timing[phase] = timing.get(phase, 0.0) + spent
            if self.options.plain:
                plain, _, seconds = self._decode(task, missing, temperature, with_draft=False)
                timing["plain_seconds"] = timing.get("plain_seconds", 0.0) + seconds
            for index in missing:
                known[index] = self._result(task, index, temperature, drafted[index], plain.get(index))
                stream.write(json.dumps(known[index].to_row(), ensure_ascii=False) + "\n")
            stream.flush()
            write_json(timing_path, dict(timing))
        summary = summarise(task.name, temperature, [known[i] for i in sorted(known)], self.options.seed)
        summary.seconds, summary.plain_seconds = timing.get("seconds", 0.0), timing.get("plain_seconds")
        summary.phases = {k: v for k, v in timing.items() if k not in ("seconds", "plain_seconds")}
        return summary

    def _decode(
        self, task: Task, indices: list[int], temperature: float, with_draft: bool
    ) -> tuple[dict[int, list[Generation]], dict[str, float], float]:
        """All turns of the prompts ``indices``; (generations per prompt, seconds per phase, wall seconds)."""
        options = self.options
        settings = DecodeSettings(
            temperature,
            options.max_new_tokens,
            self.renderer.stop_token_ids,
            options.seed,
            options.confidence_threshold,
            self.sts,
        )
        first = {i: self.renderer.prompt([{"role": "user", "content": task.prompts[i][0]}]) for i in indices}
        drafter = None
        if with_draft:
            turns = max(len(task.prompts[i]) for i in indices)
            longest = max(map(len, first.values())) + turns * (options.max_new_tokens + 512)
            drafter = self.draft.algorithm.drafter(self.draft, options.batch_size, longest)
        decoder = Decoder(self.target, drafter, settings, options.batch_size)
        requests = deque(Request(tuple(ids), sample_id(task, i, 0), tag=(i, 0)) for i, ids in first.items())
        done: dict[int, list[Generation]] = defaultdict(list)
        start, shown = time.perf_counter(), 0.0
        for generation in decoder.stream(requests):
            index, turn = cast(tuple[int, int], generation.request.tag)
            done[index].append(generation)
            if turn + 1 < len(task.prompts[index]):
                requests.append(self._next_turn(task, index, done[index]))
            shown = self._progress(task, temperature, with_draft, done, len(indices), start, shown)
        return dict(done), decoder.clock.seconds(), time.perf_counter() - start

    def _next_turn(self, task: Task, index: int, so_far: list[Generation]) -> Request:
        messages: list[dict[str, Any]] = []
        for turn, generation in zip(task.prompts[index], so_far, strict=False):
            answer = self.tokenizer.decode(generation.output_ids, skip_special_tokens=True)
            messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": task.prompts[index][len(so_far)]})
        number = sample_id(task, index, len(so_far))
        return Request(tuple(self.renderer.prompt(messages)), number, tag=(index, len(so_far)))

    def _progress(
        self, task: Task, temperature: float, with_draft: bool, done: dict[int, list[Generation]], total: int,
        start: float, shown: float,
    ) -> float:  # fmt: skip
        now = time.perf_counter()
        if now - shown < 1.0 and len(done) < total:
            return shown
        tokens = sum(len(g.output_ids) for generations in done.values() for g in generations)
        rate, left = tokens / max(1e-9, now - start), (total - len(done)) * (now - start) / len(done)
        kind = "drafted" if with_draft else "plain"
        state = f"{len(done)}/{total} prompts, {rate:,.0f} tokens/s, {left:.0f} s left"
        print(f"{task.name} T={temperature:g} {kind}: {state}", file=sys.stderr, flush=True)
        return now

    def _result(
        self, task: Task, index: int, temperature: float, drafted: list[Generation], plain: list[Generation] | None
    ) -> PromptResult:
        rounds = [one for generation in drafted for one in generation.rounds]
        equal = None
        if plain is not None and temperature == 0:
            equal = [g.output_ids for g in drafted] == [g.output_ids for g in plain]
        return PromptResult(
            task=task.name,
            index=index,
            temperature=temperature,
            output_tokens=sum(len(generation.output_ids) for generation in drafted),
            committed=[one.committed for one in rounds],
            proposed=[one.length for one in rounds],
            accepted=[one.accepted for one in rounds],
            confidence=[[round(x, 4) for x in one.confidence] for one in rounds],
            equal_to_plain=equal,
            text=self.tokenizer.decode(drafted[-1].output_ids, skip_special_tokens=True),
        )

    def _macro(self, summaries: list[Summary]) -> list[Summary]:
        """Where there are several tasks: the mean over tasks at each temperature."""
        return list(macro_averages(summaries)) if len(self.tasks) > 1 else []

    def _provenance(self) -> dict[str, Any]:
        versions = {name: importlib.metadata.version(name) for name in ("deepspec", "torch", "transformers")}
        device = torch.cuda.get_device_name() if self.target.device.type == "cuda" else "cpu"
        return {
            **self.identity,
            "versions": versions,
            "device": device,
            "threads": torch.get_num_threads(),
            "target_dtype": str(self.target.dtype),
            "command": sys.argv,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }


def macro_averages(summaries: list[Summary]) -> Iterator[Summary]:
    """One summary ``macro`` per temperature: accepted lengths averaged over tasks, everything else pooled."""
    for temperature in dict.fromkeys(summary.temperature for summary in summaries):
        group = [summary for summary in summaries if summary.temperature == temperature]
        mean = sum(summary.accepted_length for summary in group) / len(group)
        low, high = (sum(summary.interval[side] for summary in group) / len(group) for side in (0, 1))
        equal = [summary.equal_to_plain for summary in group if summary.equal_to_plain is not None]
        plain = [summary.plain_seconds for summary in group if summary.plain_seconds is not None]
        yield Summary(
            task="macro",
            temperature=temperature,
            prompts=sum(summary.prompts for summary in group),
            rounds=sum(summary.rounds for summary in group),
            output_tokens=sum(summary.output_tokens for summary in group),
            accepted_length=mean,
            interval=(low, high),
            conditional=[],
            prefix=[],
            verify_rate=sum(summary.verify_rate for summary in group) / len(group),
            equal_to_plain=sum(equal) / len(equal) if equal else None,
            seconds=sum(summary.seconds for summary in group),
            plain_seconds=sum(plain) if plain else None,
        )


def sample_id(task: Task, index: int, turn: int) -> int:
    """The key of one turn's random numbers: its task's name, its prompt, its turn; never the batch."""
    return (zlib.crc32(task.name.encode()) << 28) + index * 64 + turn


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
