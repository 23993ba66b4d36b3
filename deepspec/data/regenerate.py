"""Regeneration: the target's own answers to the prompts, written so that a kill loses only what was in flight.

Finished rows are appended to ``<output>.partial`` as they come. A second start reads what is there and asks only for
the rest; when nothing is left, the rows are written in the prompts' order, the manifest last. What failed for good
stands in ``<output>.failures.jsonl``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from deepspec.data.chat import Renderer
from deepspec.data.conversations import dump_row, manifest_path, read_conversations, write_conversations
from deepspec.data.dialogue import Dialogue
from deepspec.data.local import LocalSampler, Request, Sampling
from deepspec.data.outcome import Outcome
from deepspec.data.partial import Partial
from deepspec.data.progress import Progress
from deepspec.data.server import ServerEngine, ServerOptions
from deepspec.distributed import pick_device
from deepspec.errors import DataError
from deepspec.files import read_json, sha256_file
from deepspec.recipe import Recipe, RegenerateSection
from deepspec.targets.positions import check_room


class Engine(Protocol):
    """Something that answers conversations."""

    def run(self, dialogues: Iterable[Dialogue]) -> Iterator[Outcome]:
        """Every dialogue's outcome, in any order, taking dialogues as it has room for them."""


class LocalEngine:
    """The target in this process, turn by turn over chunks of conversations."""

    def __init__(self, model: Any, renderer: Renderer, sampling: Sampling, seed: int, batch_size: int) -> None:
        self.renderer, self.config = renderer, model.config.get_text_config().to_dict()
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
            requests, by_key = [], {}
            for dialogue in waiting:
                try:
                    ids = self.renderer.prompt(dialogue.messages, dialogue.tools)
                    check_room(self.config, len(ids), self.sampler.sampling.max_tokens, dialogue.key)
                except DataError as problem:
                    yield Outcome(dialogue, str(problem))
                    continue
                by_key[dialogue.key] = dialogue
                requests.append(Request(dialogue.key, ids))
            waiting = []
            for generated in self.sampler.answer(requests):
                dialogue = by_key[generated.request.key]
                message = self._message(generated.token_ids)
                if not message["content"]:
                    yield Outcome(dialogue, "the target answered nothing")
                    continue
                dialogue.answer(message, generated.finish_reason, len(generated.token_ids) + 1)
                if dialogue.open:
                    waiting.append(dialogue)
                else:
                    yield Outcome(dialogue)

    def _message(self, token_ids: list[int]) -> dict[str, str]:
        text = self.renderer.tokenizer.decode(token_ids, skip_special_tokens=True)
        return {"content": text.lstrip()}


@dataclass(frozen=True)
class Summary:
    """What a regeneration ended with."""

    rows: int
    failed: int
    tokens: int  # of the answers of this start
    seconds: float  # of this start
    finish_reasons: Mapping[str, int]


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
        DataError: unusable prompts, an output of other settings, or too many failures (run again to retry those).
    """
    output = Path(output)
    settings = {"prompts_sha256": sha256_file(_readable(prompts)), **settings}
    partial_path = output.with_name(output.name + ".partial")
    if manifest_path(output).exists():
        partial_path.unlink(missing_ok=True)  # a kill between the manifest and the end of the job left it
        return _finished(output, settings)
    total = sum(1 for _ in read_conversations(prompts))
    partial = Partial(partial_path, settings)
    try:
        tokens, seconds, failed = _answer_rest(prompts, output, engine, partial, total)
        if failed > max_failed * total or not partial.places:
            raise DataError(
                f"{failed} of {total} conversations failed",
                file=failures_path(output),
                wanted=f"at most {max_failed:.1%}",
                remedy="run the same command again to retry them, or allow more with --max-failed",
            )
        reasons: dict[str, int] = {}
        rows = _in_order(prompts, partial, reasons)
        count = write_conversations(output, rows, {"made_by": "regenerate", "failed": failed, **settings})
    finally:
        partial.close()
    partial.path.unlink()
    return Summary(count, failed, tokens, seconds, reasons)


def failures_path(output: Path) -> Path:
    """``<output>.failures.jsonl``: a line ``{"id", "error"}`` for each conversation that failed for good."""
    return output.with_name(output.name + ".failures.jsonl")


def _readable(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise DataError("no such prompts file", file=path, remedy="make it with tools/prepare_data.py")
    return Path(path)


def _answer_rest(
    prompts: str | Path, output: Path, engine: Engine, partial: Partial, total: int
) -> tuple[int, float, int]:
    """Run the engine over what is not done; returns tokens, seconds and failures."""
    done, failed, tokens = len(partial.places), 0, 0
    if done:
        print(f"resuming: {done} of {total} conversations are there")
    progress = Progress("regenerate", total - done)
    rows = (row for row in read_conversations(prompts) if row["id"] not in partial.places)
    with open(failures_path(output), "wb") as failures:
        for outcome in engine.run(_open_dialogues(rows)):
            if outcome.error is None and not outcome.dialogue.turn:
                outcome = Outcome(outcome.dialogue, "no user turn to answer")
            if outcome.error is None:
                partial.append(outcome.dialogue.result())
            else:
                failed += 1
                failures.write(dump_row({"id": outcome.dialogue.id, "error": outcome.error}))
                failures.flush()
            tokens += outcome.dialogue.tokens
            progress.add(1, outcome.dialogue.tokens)
    progress.finish()
    if not failed:
        failures_path(output).unlink()
    return tokens, progress.seconds, failed


def _open_dialogues(rows: Iterable[Mapping[str, Any]]) -> Iterator[Dialogue]:
    return (Dialogue(row) for row in rows)


def _in_order(prompts: str | Path, partial: Partial, reasons: dict[str, int]) -> Iterator[dict[str, Any]]:
    """The finished rows in the order of the prompts; counts finish reasons on the way."""
    for prompt in read_conversations(prompts):
        if prompt["id"] not in partial.places:
            continue
        row = partial.row(prompt["id"])
        for message in row["messages"]:
            if "finish_reason" in message:
                reasons[message["finish_reason"]] = reasons.get(message["finish_reason"], 0) + 1
        yield row


def _finished(output: Path, settings: Mapping[str, Any]) -> Summary:
    """The summary of an output that is whole already.

    Raises:
        DataError: it was made with other settings.
    """
    provenance = read_json(manifest_path(output), DataError).get("provenance", {})
    for key, value in json.loads(json.dumps(settings)).items():
        if provenance.get(key) != value:
            raise DataError(
                "the output exists and was made with other settings",
                file=output,
                key=key,
                found=provenance.get(key),
                wanted=value,
                remedy="name another output, or delete it and its manifest",
            )
    rows = sum(1 for _ in read_conversations(output))
    print(f"{output}: already whole, {rows} conversations")
    return Summary(rows, int(provenance.get("failed", 0)), 0, 0.0, {})


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

    def settings(self) -> dict[str, Any]:
        """As plain values, without those that only change the speed."""
        values = asdict(self)
        sampling = values.pop("sampling")
        sampling.pop("batch_size")
        return values | sampling

    def renderer(self) -> Renderer:
        """The target's renderer.

        Raises:
            TargetError: no tokenizer or config there.
        """
        from deepspec.targets.load import load_spec, load_tokenizer

        family = load_spec(self.target, self.revision).family
        return Renderer(load_tokenizer(self.target, self.revision), family, self.system_prompt, self.thinking)

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
