"""Regeneration: the target's own answers to the prompts, written so that a kill loses only unfinished conversations.

Finished rows are appended to ``<output>.partial`` as they come. A second start reads what is there and requests only
the rest; when nothing is left, the rows are written in the prompts' order, the manifest last. What failed finally
is in ``<output>.failures.jsonl``.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from deepspec.data.chat import Renderer
from deepspec.data.conversations import manifest_path, read_conversations, write_conversations
from deepspec.data.dialogue import AnswerEngine, Dialogue, Outcome
from deepspec.data.local import LocalEngine
from deepspec.data.server import ServerEngine, ServerOptions
from deepspec.distributed import pick_device
from deepspec.errors import DataError
from deepspec.files import named, read_json, refuse_same, refuse_special, sha256_file
from deepspec.identity import differences, identity_of, shown
from deepspec.locks import lock_file
from deepspec.progress import Progress
from deepspec.recipe import Recipe, RegenerateSection
from deepspec.rows import RowLog, dump_row
from deepspec.targets.load import load_spec, load_target, load_tokenizer

PARTIAL_FORMAT = "deepspec.regeneration/1"
SYNC_SECONDS = 5.0  # a power cut costs the answers of as long
_REASONED = "with reasoning"  # counted beside the finish reasons
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RegenerationSummary:
    """What a regeneration ended with."""

    rows: int
    failed: int
    tokens: int  # of the answers of this start
    seconds: float  # of this start
    finish_reasons: Mapping[str, int]
    reasoned: int = 0  # answers with reasoning

    def warnings(self, settings: Mapping[str, Any]) -> list[str]:
        """Warnings for the user beside the numbers."""
        lines, answers = [], sum(self.finish_reasons.values())
        cut = self.finish_reasons.get("length", 0)
        if 2 * cut > answers:
            lines.append(
                f"{cut} of {answers} answers ({cut / answers:.0%}) were cut at regenerate.max_tokens "
                f"({settings.get('max_tokens', 'not stated')}): raise it, or the draft hardly learns how answers end"
            )
        if self.reasoned and settings.get("thinking") is False:
            lines.append(
                f"{self.reasoned} of {answers} answers hold reasoning, and data.thinking is false, which "
                "leaves it out of training: set data.thinking: true, or serve the target without reasoning"
            )
        return lines


def regenerate(
    prompts: str | Path,
    output: str | Path,
    engine: AnswerEngine,
    settings: Mapping[str, Any],
    max_failed: float = 0.02,
    without: str = "continue without them with a larger --max-failed",
) -> RegenerationSummary:
    """Answer every prompt of a file once, resuming what an earlier start left.

    Args:
        prompts: conversations whose user turns are to be answered.
        output: conversations with the answers.
        engine: who answers.
        settings: what the answers depend on (target, sampling, seed, ...); a resume must have the same.
        max_failed: share of the prompts that may fail finally.
        without: where more fail, how a caller's user goes on without them.

    Raises:
        DataError: unusable prompts, an output of other settings or at which another process works, or too many failures
            (the message says how many of them another start may answer).
    """
    output = Path(output)
    if Path(prompts).is_dir():
        raise DataError("this is a folder", file=prompts, wanted="a file of conversations (JSONL)")
    if not Path(prompts).is_file():
        raise DataError("no such prompts file", file=prompts, remedy="make it with deepspec prepare")
    refuse_special(output)
    refuse_same(output, [prompts], DataError)
    output.parent.mkdir(parents=True, exist_ok=True)
    with lock_file(output.with_name(f".{output.name}.lock"), output, "regeneration", DataError):
        settings = {"prompts_sha256": sha256_file(prompts), **settings}
        partial_path = output.with_name(output.name + ".partial")
        if manifest_path(output).exists():
            partial_path.unlink(missing_ok=True)  # a kill between the manifest and the end of the job left it
            summary = _finished(output, settings)
        else:
            partial = _open_partial(partial_path, settings)
            try:
                summary = _answer_all(prompts, output, engine, partial, settings, max_failed, without)
            finally:
                partial.close()
            partial_path.unlink()
    for line in summary.warnings(settings):
        log.warning(line)
    return summary


def _answer_all(
    prompts: str | Path, output: Path, engine: AnswerEngine, partial: RowLog[str], settings: Mapping[str, Any],
    max_failed: float, without: str,
) -> RegenerationSummary:  # fmt: skip
    total = sum(1 for _ in read_conversations(prompts))
    tokens, seconds, failures = _answer_rest(prompts, output, engine, partial, total)
    if failures.count > max_failed * total or not partial:
        raise DataError(
            f"{failures.count} of {total} conversations failed; the first, {failures.first}",
            file=failures_path(output),
            wanted=f"at most {max_failed:.1%}",
            remedy=failures.remedy(without if partial else ""),
        )
    ends = Counter[str]()
    in_order = (partial[prompt["id"]] for prompt in read_conversations(prompts) if prompt["id"] in partial)
    provenance = {"made_by": "regenerate", "failed": failures.count, **settings}
    rows = write_conversations(output, _counted(in_order, ends), provenance)
    return RegenerationSummary(rows, failures.count, tokens, seconds, ends, ends.pop(_REASONED, 0))


def _open_partial(path: Path, settings: Mapping[str, Any]) -> RowLog[str]:
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
    name = "answers"  # whatever the user calls the file
    return RowLog(path, lambda row: str(row["id"]), DataError, header, check, sync_seconds=SYNC_SECONDS, name=name)


def setting_differences(found: Mapping[str, Any], settings: Mapping[str, Any], file: Path) -> list[str]:
    """A line for each of ``settings`` that differs from an earlier start.

    One without an identity is of an earlier version: only its settings are compared, and a warning says so.
    """
    now: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    before, wanted = found.get("identity"), now.pop("identity", None)
    lines = [f"{key}: then {shown(found.get(key))}, now {shown(now[key])}" for key in now if found.get(key) != now[key]]
    if before is not None and wanted is not None:
        return lines + differences(before, wanted, ("then", "now"))
    if wanted is not None:
        log.warning(
            "%s is of an earlier version; the target's weights, config, tokenizer, template and stop tokens are not "
            "compared", file,
        )  # fmt: skip
    return lines


def failures_path(output: Path) -> Path:
    """``<output>.failures.jsonl``: a line ``{"id", "error"}`` for each conversation that failed finally."""
    return output.with_name(output.name + ".failures.jsonl")


@dataclass
class _Failures:
    """The conversations of a start that failed."""

    count: int = 0
    again: int = 0  # of them, those that another start may answer
    first: str = ""

    def add(self, outcome: Outcome) -> None:
        """Count one; the first is shown at once."""
        self.count += 1
        self.again += outcome.again
        if self.count == 1:
            self.first = f"{outcome.dialogue.id}: {outcome.error}"
            log.warning("a failure, %s", self.first)

    def remedy(self, without: str) -> str:
        """What to do about them; ``without``: how to go on without them, where there are other answers."""
        ways = [f"run the same command again: {self.again} of them may get an answer"] * bool(self.again)
        if self.again < self.count:
            ways.append(f"fix the cause of the other {self.count - self.again}" if self.again else
                        "fix their cause: the same command fails on them again")  # fmt: skip
        return ", or ".join([*ways, *[without] * bool(without)])


def _answer_rest(
    prompts: str | Path, output: Path, engine: AnswerEngine, partial: RowLog[str], total: int
) -> tuple[int, float, _Failures]:
    """Run the engine over what is not done; returns tokens, seconds and what failed."""
    done, tokens, failed = len(partial), 0, _Failures()
    if done:
        log.info("resuming: %d of %d conversations are there", done, total)
    progress = Progress("regenerate", total - done)
    dialogues = (Dialogue(row) for row in read_conversations(prompts) if row["id"] not in partial)
    with open(failures_path(output), "wb") as failures:
        for outcome in engine.run(dialogues):
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


def _counted(rows: Iterable[dict[str, Any]], ends: Counter[str]) -> Iterator[dict[str, Any]]:
    """The rows; counts how the target's answers ended, and those with reasoning, on the way."""
    for row in rows:
        for message in row["messages"]:
            if message["role"] == "assistant" and "weight" not in message and "finish_reason" in message:
                ends[message["finish_reason"]] += 1
                ends[_REASONED] += bool(message.get("reasoning_content"))
        yield row


def _finished(output: Path, settings: Mapping[str, Any]) -> RegenerationSummary:
    """The summary of an output that is complete already.

    Raises:
        DataError: it was made with other settings.
    """
    provenance = read_json(manifest_path(output), DataError).get("provenance", {})
    if lines := setting_differences(provenance, settings, output):
        problem = f"the output exists and was made with other settings: {'; '.join(lines)}"
        raise DataError(problem, file=output, remedy="name another output, or delete it and its manifest")
    ends = Counter[str]()
    rows = sum(1 for _ in _counted(read_conversations(output), ends))
    log.info("%s: already complete, %d conversations", output, rows)
    return RegenerationSummary(rows, int(provenance.get("failed", 0)), 0, 0.0, ends, ends.pop(_REASONED, 0))


@dataclass(frozen=True)
class RegenerationPlan:
    """Who answers, and how: what the answers depend on."""

    target: str
    revision: str | None = None
    dtype: str = "bfloat16"
    seed: int = 42
    thinking: bool = False
    system_prompt: str | None = None
    sampling: RegenerateSection = field(default_factory=RegenerateSection)

    @classmethod
    def of_recipe(cls, recipe: Recipe, target: str | None = None) -> RegenerationPlan:
        """The plan that a recipe states, for another copy of its target where one is named."""
        stated, data = recipe.target, recipe.data
        how = (recipe.seed, data.thinking, data.system_prompt, recipe.regenerate)
        return cls(target or stated.path, stated.revision, stated.dtype, *how)

    def settings(self, served: bool = False) -> dict[str, Any]:
        """As JSON values, without those that only change the speed; with the identity of what answers.

        Args:
            served: by servers; the target's weights need not be on this machine.
        """
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
        spec = load_spec(self.target, self.revision)
        return Renderer(load_tokenizer(self.target, self.revision), spec, self.system_prompt, self.thinking)

    def local_engine(self) -> LocalEngine:
        """The target loaded into this process.

        Raises:
            TargetError: a target that cannot be loaded.
        """
        model = load_target(self.target, getattr(torch, self.dtype), pick_device(), self.revision).model
        return LocalEngine(model, self.renderer(), self.sampling, self.seed, self.sampling.batch_size)

    def server_engine(self, options: ServerOptions) -> ServerEngine:
        """The target on servers.

        Raises:
            TargetError: no tokenizer or config of the target here (prompts are rendered and compared).
        """
        return ServerEngine(options, self.renderer(), self.sampling, self.seed)
