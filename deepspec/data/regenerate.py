"""Regeneration: the target's own answers to the prompts, written so that a kill loses only what was in flight.

Finished rows are appended to ``<output>.partial`` as they come. A second start reads what is there and asks only for
the rest; when nothing is left, the rows are written in the prompts' order, the manifest last. What failed for good
stands in ``<output>.failures.jsonl``.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from deepspec.data.answer import answer_text, call_mark, read_answer
from deepspec.data.chat import Renderer
from deepspec.data.conversations import manifest_path, read_conversations, write_conversations
from deepspec.data.dialogue import Dialogue
from deepspec.data.local import Generated, LocalSampler, Request, Sampling
from deepspec.data.messages import THINK, Unusable, opens_reasoning
from deepspec.data.outcome import Outcome
from deepspec.data.server import ServerEngine, ServerOptions
from deepspec.distributed import pick_device
from deepspec.errors import DataError
from deepspec.files import named, read_json, refuse_special, sha256_file
from deepspec.identity import differences, identity_of, shown
from deepspec.locks import lock_file
from deepspec.progress import Progress
from deepspec.recipe import Recipe, RegenerateSection
from deepspec.rows import RowLog, dump_row
from deepspec.targets.positions import check_room

PARTIAL_FORMAT = "deepspec.regeneration/1"
SYNC_SECONDS = 5.0  # a power cut costs the answers of as long
_REASONED = "with reasoning"  # counted beside the finish reasons


class Engine(Protocol):
    """Something that answers conversations."""

    def run(self, dialogues: Iterable[Dialogue]) -> Iterator[Outcome]:
        """Every dialogue's outcome, in any order, taking dialogues as it has room for them."""


class LocalEngine:
    """The target in this process, turn by turn over chunks of conversations."""

    def __init__(self, model: Any, renderer: Renderer, sampling: Sampling, seed: int, batch_size: int) -> None:
        self.renderer, self.config = renderer, model.config.get_text_config().to_dict()
        self.most_new_tokens = sampling.max_tokens
        self.sampler = LocalSampler(model, renderer.stop_token_ids, sampling, seed, batch_size)
        self.chunk = 8 * batch_size  # enough that prompts of like length find each other

    def run(self, dialogues: Iterable[Dialogue]) -> Iterator[Outcome]:
        """See :class:`Engine`."""
        chunk: list[Dialogue] = []
        for dialogue in dialogues:
            chunk.append(dialogue)
            if len(chunk) == self.chunk:
                yield from self._chunk(chunk)
                chunk = []
        yield from self._chunk(chunk)

    def _chunk(self, waiting: list[Dialogue]) -> Iterator[Outcome]:
        while waiting:
            requests, by_key = [], dict[str, tuple[Dialogue, bool]]()  # the answer begins inside its reasoning
            for dialogue in waiting:
                try:
                    text = self.renderer.prompt_text(dialogue.messages, dialogue.tools)
                    ids = self.renderer.prompt_ids(text)
                    check_room(self.config, len(ids), self.most_new_tokens, dialogue.key)
                except DataError as problem:
                    yield Outcome(dialogue, str(problem))
                    continue
                by_key[dialogue.key] = (dialogue, opens_reasoning(text) == THINK)
                requests.append(Request(dialogue.key, ids))
            waiting = []
            for generated in self.sampler.answer(requests):
                dialogue, opened = by_key[generated.request.key]
                try:
                    self._add(dialogue, generated, opened)
                except Unusable as problem:
                    yield Outcome(dialogue, str(problem))
                    continue
                if dialogue.open:
                    waiting.append(dialogue)
                else:
                    yield Outcome(dialogue)

    def _add(self, dialogue: Dialogue, generated: Generated, opened: bool) -> None:
        """Give a dialogue its answer.

        Raises:
            Unusable: there is nothing to train on.
        """
        decode = self.renderer.tokenizer.decode
        ids, reason = generated.token_ids, generated.finish_reason
        text = answer_text(self.renderer.tokenizer, ids)
        mark = call_mark(self.renderer, dialogue.tools) if dialogue.tools else None
        if mark and mark in decode(ids, skip_special_tokens=False):
            if mark not in text:  # its marks are special tokens, which no text holds
                raise Unusable("the target called a tool, which only --engine server can read")
            reason = "tool_calls" if reason == "stop" else reason  # the call stays text, which renders to the same
        dialogue.answer(*read_answer(text, None, None, reason, opened), len(ids) + 1)


@dataclass(frozen=True)
class Summary:
    """What a regeneration ended with."""

    rows: int
    failed: int
    tokens: int  # of the answers of this start
    seconds: float  # of this start
    finish_reasons: Mapping[str, int]
    reasoned: int = 0  # answers with reasoning

    def lines(self, settings: Mapping[str, Any]) -> list[str]:
        """What the user should know beside the numbers."""
        lines, answers = [], sum(self.finish_reasons.values())
        cut = self.finish_reasons.get("length", 0)
        if 2 * cut > answers:
            lines.append(
                f"warning: {cut} of {answers} answers ({cut / answers:.0%}) were cut at regenerate.max_tokens "
                f"({settings.get('max_tokens', 'not said')}): raise it, or the draft hardly learns how answers end"
            )
        if self.reasoned and settings.get("thinking") is False:
            lines.append(
                f"warning: {self.reasoned} of {answers} answers hold reasoning, and data.thinking is false, which "
                "leaves it out of training: set data.thinking: true, or serve the target without reasoning"
            )
        return lines


def regenerate(
    prompts: str | Path,
    output: str | Path,
    engine: Engine,
    settings: Mapping[str, Any],
    max_failed: float = 0.02,
) -> Summary:
    """Answer every prompt of a file once, resuming what an earlier start left.

    Args:
        prompts: conversations whose user turns are to be answered.
        output: conversations with the answers.
        engine: who answers.
        settings: what the answers depend on (target, sampling, seed, ...); a resume must have the same.
        max_failed: share of the prompts that may fail for good.

    Raises:
        DataError: unusable prompts, an output of other settings or at which another process works, or too many failures
            (the message says how many of them another start may answer).
    """
    output = Path(output)
    _readable(prompts)
    refuse_special(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with lock_file(output.with_name(f".{output.name}.lock"), output, "regeneration", DataError):
        return _regenerate(prompts, output, engine, settings, max_failed)


def _regenerate(
    prompts: str | Path, output: Path, engine: Engine, settings: Mapping[str, Any], max_failed: float
) -> Summary:
    settings = {"prompts_sha256": sha256_file(prompts), **settings}
    partial_path = output.with_name(output.name + ".partial")
    if manifest_path(output).exists():
        partial_path.unlink(missing_ok=True)  # a kill between the manifest and the end of the job left it
        return _told(_finished(output, settings), settings)
    total = sum(1 for _ in read_conversations(prompts))
    partial = _partial(partial_path, settings)
    try:
        tokens, seconds, failures = _answer_rest(prompts, output, engine, partial, total)
        failed = failures.count
        if failed > max_failed * total or not partial:
            raise DataError(
                f"{failed} of {total} conversations failed; the first, {failures.first}",
                file=failures_path(output),
                wanted=f"at most {max_failed:.1%}",
                remedy=failures.remedy(bool(partial)),
            )
        ends = Counter[str]()
        rows = _counted(_in_order(prompts, partial), ends)
        count = write_conversations(output, rows, {"made_by": "regenerate", "failed": failed, **settings})
    finally:
        partial.close()
    partial.path.unlink()
    return _told(_summary(count, failed, tokens, seconds, ends), settings)


def _partial(path: Path, settings: Mapping[str, Any]) -> RowLog[str]:
    """The finished rows of an earlier start.

    Raises:
        DataError: they were made with other settings.
    """

    def check(header: dict[str, Any]) -> None:
        found = header.get("settings", {})
        lines = setting_differences(found, settings, path)
        lines += [f"{key}: then {shown(found[key])}, now nothing" for key in sorted(found.keys() - settings.keys())]
        if lines:
            remedy = "finish it with its own settings, name another output, or delete this file"
            problem = f"an unfinished regeneration with other settings: {'; '.join(lines)}"
            raise DataError(problem, file=path, remedy=remedy)

    header = {"format": PARTIAL_FORMAT, "settings": settings}
    return RowLog(path, lambda row: str(row["id"]), DataError, header, check, sync_seconds=SYNC_SECONDS)


def setting_differences(found: Mapping[str, Any], settings: Mapping[str, Any], file: Path) -> list[str]:
    """A line for each of ``settings`` that an earlier start had otherwise.

    One without an identity is of an earlier version: only its settings are compared, and a warning says so.
    """
    now: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    before, wanted = found.get("identity"), now.pop("identity", None)
    lines = [f"{key}: then {shown(found.get(key))}, now {shown(now[key])}" for key in now if found.get(key) != now[key]]
    if before is None and wanted is not None:
        note = "weights, config, tokenizer, template and stop tokens are not compared"
        print(f"note: {file} is of an earlier version; the target's {note}", file=sys.stderr, flush=True)
    if before is None or wanted is None:
        return lines
    return lines + differences(before, wanted, ("then", "now"))


def _told(summary: Summary, settings: Mapping[str, Any]) -> Summary:
    """The summary, its warnings said on screen."""
    for line in summary.lines(settings):
        print(line, file=sys.stderr, flush=True)
    return summary


def _summary(rows: int, failed: int, tokens: int, seconds: float, ends: Counter[str]) -> Summary:
    reasoned = ends.pop(_REASONED, 0)
    return Summary(rows, failed, tokens, seconds, dict(ends), reasoned)


def failures_path(output: Path) -> Path:
    """``<output>.failures.jsonl``: a line ``{"id", "error"}`` for each conversation that failed for good."""
    return output.with_name(output.name + ".failures.jsonl")


@dataclass
class _Failures:
    """The conversations of a start that failed."""

    count: int = 0
    again: int = 0  # of them, those that another start may answer
    first: str = ""

    def add(self, outcome: Outcome) -> None:
        """Count one; the first is said on screen."""
        self.count += 1
        self.again += outcome.again
        if self.count == 1:
            self.first = f"{outcome.dialogue.id}: {outcome.error}"
            print(f"regenerate: a failure, {self.first}", file=sys.stderr, flush=True)

    def remedy(self, some: bool) -> str:
        """What to do about them; ``some``: there are answers to go on with."""
        ways = [f"run the same command again: {self.again} of them may get an answer"] * bool(self.again)
        if self.again < self.count:
            ways.append(f"mend the cause of the other {self.count - self.again}" if self.again else
                        "mend their cause: the same command fails on them again")  # fmt: skip
        return ", or ".join([*ways, *["go on without them with a larger --max-failed"] * some])


def _readable(path: str | Path) -> None:
    if Path(path).is_dir():
        raise DataError("this is a folder", file=path, wanted="a file of conversations (JSONL)")
    if not Path(path).is_file():
        raise DataError("no such prompts file", file=path, remedy="make it with tools/prepare_data.py")


def _answer_rest(
    prompts: str | Path, output: Path, engine: Engine, partial: RowLog[str], total: int
) -> tuple[int, float, _Failures]:
    """Run the engine over what is not done; returns tokens, seconds and what failed."""
    done, tokens, failed = len(partial), 0, _Failures()
    if done:
        print(f"resuming: {done} of {total} conversations are there")
    progress = Progress("regenerate", total - done)
    rows = (row for row in read_conversations(prompts) if row["id"] not in partial)
    with open(failures_path(output), "wb") as failures:
        for outcome in engine.run(_open_dialogues(rows)):
            if outcome.error is None and not outcome.dialogue.turn:
                outcome = Outcome(outcome.dialogue, "no user turn to answer")
            if outcome.error is None:
                partial.append(outcome.dialogue.result())
            else:
                failed.add(outcome)
                with named(failures.name):
                    failures.write(dump_row({"id": outcome.dialogue.id, "error": outcome.error}))
                    failures.flush()
            tokens += outcome.dialogue.tokens
            progress.add(1, outcome.dialogue.tokens)
    progress.finish()
    if not failed.count:
        failures_path(output).unlink()
    return tokens, progress.seconds, failed


def _open_dialogues(rows: Iterable[Mapping[str, Any]]) -> Iterator[Dialogue]:
    return (Dialogue(row) for row in rows)


def _in_order(prompts: str | Path, partial: RowLog[str]) -> Iterator[dict[str, Any]]:
    """The finished rows in the order of the prompts."""
    return (partial[prompt["id"]] for prompt in read_conversations(prompts) if prompt["id"] in partial)


def _counted(rows: Iterable[dict[str, Any]], ends: Counter[str]) -> Iterator[dict[str, Any]]:
    """The rows; counts how the target's answers ended, and those with reasoning, on the way."""
    for row in rows:
        for message in row["messages"]:
            if message["role"] == "assistant" and "weight" not in message and "finish_reason" in message:
                ends[message["finish_reason"]] += 1
                ends[_REASONED] += bool(message.get("reasoning_content"))
        yield row


def _finished(output: Path, settings: Mapping[str, Any]) -> Summary:
    """The summary of an output that is whole already.

    Raises:
        DataError: it was made with other settings.
    """
    provenance = read_json(manifest_path(output), DataError).get("provenance", {})
    if lines := setting_differences(provenance, settings, output):
        remedy = "name another output, or delete it and its manifest"
        raise DataError(
            f"the output exists and was made with other settings: {'; '.join(lines)}", file=output, remedy=remedy
        )
    ends = Counter[str]()
    rows = sum(1 for _ in _counted(read_conversations(output), ends))
    print(f"{output}: already whole, {rows} conversations")
    return _summary(rows, int(provenance.get("failed", 0)), 0, 0.0, ends)


@dataclass(frozen=True)
class Plan:
    """Who answers, and how: what the answers depend on."""

    target: str
    revision: str | None = None
    dtype: str = "bfloat16"
    seed: int = 42
    thinking: bool = False
    system_prompt: str | None = None
    sampling: RegenerateSection = field(default_factory=RegenerateSection)

    @classmethod
    def of_recipe(cls, recipe: Recipe, target: str | None = None) -> Plan:
        """The plan that a recipe states, for another copy of its target where one is named."""
        return cls(
            target or recipe.target.path,
            recipe.target.revision,
            recipe.target.dtype,
            recipe.seed,
            recipe.data.thinking,
            recipe.data.system_prompt,
            recipe.regenerate,
        )

    def settings(self, served: bool = False) -> dict[str, Any]:
        """As plain values, without those that only change the speed; with the identity of what answers.

        Args:
            served: by servers; the target's weights need not be on this machine.
        """
        from deepspec.targets.load import load_spec

        values = asdict(self)
        sampling = values.pop("sampling")
        sampling.pop("batch_size")
        renderer, spec = self.renderer(), load_spec(self.target, self.revision)
        identity = identity_of(spec, renderer.tokenizer, renderer.stop_token_ids, served)
        return values | sampling | {"identity": identity}

    def renderer(self) -> Renderer:
        """The target's renderer.

        Raises:
            TargetError: no tokenizer or config there.
        """
        from deepspec.targets.load import load_spec, load_tokenizer

        spec = load_spec(self.target, self.revision)
        return Renderer(load_tokenizer(self.target, self.revision), spec, self.system_prompt, self.thinking)

    def local_engine(self) -> LocalEngine:
        """The target loaded into this process.

        Raises:
            TargetError: a target that cannot be loaded.
        """
        import torch

        from deepspec.targets.load import load_target

        model = load_target(self.target, getattr(torch, self.dtype), pick_device(), self.revision).model
        return LocalEngine(model, self.renderer(), self.sampling, self.seed, self.sampling.batch_size)

    def server_engine(self, options: ServerOptions) -> ServerEngine:
        """The target behind servers.

        Raises:
            TargetError: no tokenizer or config of the target here (prompts are rendered and compared).
        """
        return ServerEngine(options, self.renderer(), self.sampling, self.seed)
