"""Exported drafts served by a real engine and compared with our own decoding, kind by kind.

Of every kind: greedy tokens equal to the engine's own without a draft, and the engine's acceptance length within
``TOLERANCE`` of ours on the same prompts, both in fp32. What we decode with is the export read back, the very weights
that the engine has. Rounds that the output limit or a stop token cut are counted differently everywhere: of each prompt
we compare as many rounds as both sides have, without each side's last.

An engine whose server does not run here loads the exports with its own code; what that drafts is compared with ours.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from deepspec import registry
from deepspec.decoding.loop import generate
from deepspec.decoding.records import DecodeSettings, Generation
from deepspec.drafts import load_draft
from deepspec.errors import DeepSpecError, DraftError
from deepspec.export.convert import ExportOptions, export_draft, import_draft
from deepspec.export.parts import DraftCheckpoint, ImportHints
from deepspec.progress import Progress
from deepspec.tables import Table
from deepspec.targets import Target
from deepspec.targets.served import ServedTarget

log = logging.getLogger(__name__)
TOLERANCE = 0.01
LEAST_SHARE = 0.8  # of our rounds must be there too, or another text was decoded
HIDDEN_STATES, HIDDEN_TOLERANCE = "hidden states", 1e-4  # the name of the check, and the largest difference it allows


@dataclass(frozen=True)
class Subject:
    """A target, its prompts, and its drafts."""

    name: str
    folder: Path  # of the target
    target: Target  # the same in this process, fp32
    prompts: Sequence[Sequence[int]]
    settings: DecodeSettings
    kinds: tuple[str, ...]  # of the drafts, as engines' tables call them, perhaps with a suffix
    draft: Callable[[str, Path], Path]  # the folder of a kind, made in the second argument where it is missing
    states: bool = False  # hidden states out of the served target are compared too

    @property
    def longest(self) -> int:
        """Positions that the longest prompt and its answer take."""
        return max(map(len, self.prompts)) + self.settings.max_new_tokens


@dataclass(frozen=True)
class Kind:
    """One kind of draft in one format."""

    source: str  # a kind of the subject's
    format: str
    form: str  # what the engine calls it
    embeddings: bool = True  # the export carries the target's embedding and head
    first: bool = True  # in the engine's first format, which its name does not show

    @property
    def name(self) -> str:
        """What the report calls it."""
        text = self.source.replace("-reduced", " reduced vocabulary").replace("-k-1", " K-1").replace("+", " +")
        return text if self.first else f"{text} {self.format}"


def kinds_of(formats: Sequence[str], sources: Sequence[str]) -> list[Kind]:
    """Those of ``sources`` that the tables of ``formats`` have a form for; every second without frozen weights.

    A source is a kind as the tables call it, ``-reduced`` (a vocabulary of its own) and ``+key`` (a key of its draft
    section that is true) after it.
    """
    rows = []
    for name in formats:
        forms = registry.engine(name).forms
        for source in sources:
            kind, reduced = source.partition("+")[0], source.endswith("-reduced")
            form = forms.get(kind.removesuffix("-reduced"))
            if form is not None and (name == formats[0] or not reduced):
                rows.append((source, name, form.name))
    return [Kind(*row, embeddings=number % 2 == 0, first=row[1] == formats[0]) for number, row in enumerate(rows)]


@dataclass
class CheckRow:
    """What came out for a kind."""

    target: str
    kind: str
    format: str
    status: str  # "equal", "loads" (an engine that only loads drafts), "FAILED", "not run", "refused"
    lossless: str = ""  # prompts whose tokens equal the engine's own
    ours: float | None = None  # acceptance length
    engine: float | None = None
    same_rounds: str = ""  # rounds that accept as many tokens as ours
    note: str = ""
    server: str = ""  # the engine and its version

    @property
    def difference(self) -> float | None:
        """Relative difference of the acceptance lengths."""
        return None if self.ours is None or self.engine is None else self.engine / self.ours - 1


class ServeCheck:
    """The check of one subject in one engine.

    Args:
        subject: what is served.
        server: the engine, of a row of ``registry.SERVERS``, with a folder of this subject's own.
        kinds: names; empty: all.

    Raises:
        DraftError: a target that the engine refuses.
    """

    def __init__(self, subject: Subject, server: Any, kinds: Sequence[str] = ()) -> None:
        self.subject, self.server, self.wanted = subject, server, kinds
        server.check_target(subject.target.spec)

    def run(self) -> list[CheckRow]:
        """Check every kind, with a line of progress each."""
        kinds = kinds_of(self.server.formats, self.subject.kinds)
        chosen = [kind for kind in kinds if not self.wanted or kind.name in self.wanted]
        rows = []
        try:
            self.server.prepare()
        except DeepSpecError as problem:
            if not self.server.loads_only:
                raise
            note = f"its environment was not made: {problem.problem}: {problem.found}"
            return [CheckRow(self.subject.name, "", "", "not run", note=note, server=self.server.version)]
        for number, kind in enumerate(chosen, 1):
            log.info("[%d/%d] %s: %s (%s)", number, len(chosen), self.subject.name, kind.name, kind.format)
            rows.append(self.check(kind))
            log.info("%s %s", rows[-1].status, rows[-1].note)
        if self.subject.states and self.server.hands_out_states and (not self.wanted or HIDDEN_STATES in self.wanted):
            rows.append(self.check_hidden_states())
        return [replace(row, server=self.server.version) for row in rows]

    def check(self, kind: Kind) -> CheckRow:
        """Export, serve, compare one kind."""
        row = CheckRow(self.subject.name, kind.name, kind.format, "refused")
        folder = self.server.work / "exports" / kind.name.replace(" ", "-")
        try:
            source = self.subject.draft(kind.source, self.server.work)
            shutil.rmtree(folder, ignore_errors=True)
            draft = export_draft(source, folder, ExportOptions(kind.format, kind.embeddings, str(self.subject.folder)))
        except DraftError as refusal:
            row.note = str(refusal)
            return row
        if self.server.loads_only:
            return self.load(row, kind, draft, folder)
        lacks_shim = self.server.lacks_shim(kind.form)
        try:
            baseline = self.baseline
            answer = self.generate(kind.name, self.server.speculative(kind.format, draft, folder), kind.form)
        except DeepSpecError as problem:
            row.status, row.note = "FAILED", f"{problem.problem}: {problem.found}"
            if lacks_shim:
                note = f"needs the CPU shim (--shim); the engine as it is answered: {problem.found}"
                row.status, row.note = "not run", note
            return row
        compare(row, self.ours(kind, draft, folder), answer["rows"], baseline)
        if lacks_shim and row.status == "FAILED" and row.lossless.split("/")[0] != "0":
            row.status, row.note = "not run", f"acceptance needs the CPU shim (--shim); without: {row.note}"
        return row

    def load(self, row: CheckRow, kind: Kind, draft: DraftCheckpoint, folder: Path) -> CheckRow:
        """Write into the row what an engine that only loads drafts makes of an export."""
        ours, name = self.ours(kind, draft, folder), kind.name.replace(" ", "-")
        try:
            verdict = self.server.load(name, draft, folder, self.subject.folder, self.subject.target, ours)
        except DeepSpecError as problem:
            verdict = "FAILED", "", f"{problem.problem}: {problem.found}"
        row.status, row.same_rounds, row.note = verdict
        return row

    def check_hidden_states(self) -> CheckRow:
        """Hidden states out of the served target, compared with those of the same target in this process."""
        target, prompts = self.subject.target, self.subject.prompts
        row = CheckRow(self.subject.name, HIDDEN_STATES, "extraction", "equal")
        if self.server.shim is None:
            row.status, row.note = "not run", "needs the CPU shim's connector (--shim)"
            return row
        layers = list(range(0, target.spec.num_layers - 1, 2))
        storage = self.server.work / "hidden-states"
        try:
            with self.server.hidden_states(target.spec, layers, storage) as url:
                worst = largest_difference(url, storage, target, layers, prompts)
        except DeepSpecError as problem:
            row.status, row.note = "FAILED", str(problem)
            return row
        row.note = f"largest difference {worst:.1e} over {len(prompts)} prompts, layers {layers} and the last"
        if not worst < HIDDEN_TOLERANCE:
            row.status = "FAILED"
        return row

    @cached_property
    def baseline(self) -> list[list[int]]:
        """The engine's own greedy tokens, without a draft."""
        return [row["tokens"] for row in self.generate("plain", None, "")["rows"]]

    def generate(self, name: str, speculative: Mapping[str, Any] | None, form: str) -> dict[str, Any]:
        """One run of the engine over the prompts.

        Raises:
            DeepSpecError: it failed; ``found`` is the last error in its log.
        """
        subject = self.subject
        job = {
            "target": str(subject.folder.resolve()),
            "speculative_config": speculative,
            "prompts": [list(prompt) for prompt in subject.prompts],
            "max_tokens": subject.settings.max_new_tokens,
            "stop_token_ids": list(subject.settings.stop_token_ids),
            "max_model_len": -(-(subject.longest + 16) // 128) * 128,
        }
        return dict(self.server.generate(name.replace(" ", "-"), job, form))

    def ours(self, kind: Kind, draft: DraftCheckpoint, exported: Path) -> list[Generation]:
        """Our own decoding of the same prompts with the export of ``draft``, read back."""
        target, folder = self.subject.target, self.server.work / "imports" / kind.name.replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        hints = ImportHints(target.spec, max_draft=draft.parsed.max_draft)
        import_draft(exported, folder, kind.format, hints)
        model = load_draft(folder, target)
        drafter = model.algorithm.drafter(model, 4, self.subject.longest)
        return generate(target, drafter, self.subject.prompts, self.subject.settings, 4)


def largest_difference(
    url: str, storage: Path, target: Target, layers: Sequence[int], prompts: Sequence[Sequence[int]]
) -> float:
    """Of hidden states from a server and from ``target`` in this process, over all prompts, features and last state.

    Raises:
        TargetError: the server returns none.
    """
    remote = ServedTarget(url, target.spec.path, layers, target.dtype, concurrency=4, storage=storage)
    worst, progress = 0.0, Progress("hidden states", len(prompts), noun="prompts")
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        there, here = remote.forward(ids, layers), target.forward(ids, layers)
        for name in ("features", "last_hidden"):
            worst = max(worst, float((getattr(there, name) - getattr(here, name)).abs().max()))
        progress.add(1, len(prompt))
    progress.finish()
    return worst


def compare(
    row: CheckRow, ours: Sequence[Generation], engine: Sequence[Mapping[str, Any]], baseline: list[list[int]]
) -> None:
    """Write the verdict on one kind into its row: of every prompt our generation, the engine's tokens and (drafted,
    accepted) of every round, and its own tokens without a draft.
    """
    equal = sum(row["tokens"] == tokens for row, tokens in zip(engine, baseline, strict=True))
    own = [[one.accepted for one in generation.rounds[:-1]] for generation in ours]
    theirs = [[accepted for _, accepted in row["rounds"][:-1]] for row in engine]
    pairs = [pair for mine, their in zip(own, theirs, strict=True) for pair in zip(mine, their, strict=False)]
    row.lossless, row.ours, row.engine = f"{equal}/{len(baseline)}", _length(pairs, 0), _length(pairs, 1)
    row.same_rounds = f"{sum(mine == their for mine, their in pairs)}/{len(pairs)}"
    reasons = []
    if equal != len(baseline):
        reasons.append("the tokens are not those of the engine without a draft")
    if row.difference is None:
        reasons.append("no rounds to compare: every answer ended in its first")
    elif len(pairs) < LEAST_SHARE * sum(map(len, own)):
        reasons.append(f"{len(pairs)} rounds there, {sum(map(len, own))} here: its answers ended early")
    elif abs(row.difference) > TOLERANCE:
        reasons.append(f"acceptance length differs by more than {TOLERANCE:.0%}")
    row.status, row.note = ("FAILED" if reasons else "equal"), "; ".join(reasons)


def _length(pairs: Sequence[tuple[int, int]], side: int) -> float | None:
    """Acceptance length: mean tokens a round, its bonus token included."""
    return sum(pair[side] + 1 for pair in pairs) / len(pairs) if pairs else None


def table(rows: Sequence[CheckRow]) -> str:
    """The rows as a Markdown table."""
    header = ("engine", "target", "draft", "format", "verdict", "lossless", "ours", "there", "difference",
              "rounds equal", "note")  # fmt: skip
    cells = []
    for row in rows:
        ours, there = ("" if value is None else f"{value:.3f}" for value in (row.ours, row.engine))
        difference = "" if row.difference is None else f"{row.difference:+.2%}"
        names = (row.server, row.target, row.kind, row.format)
        cells.append((*names, row.status, row.lossless, ours, there, difference, row.same_rounds, row.note))
    return f"CPU, fp32, greedy\n\n{Table(header, cells).markdown()}"


def to_json(rows: Sequence[CheckRow]) -> list[dict[str, Any]]:
    """The rows as a JSON value."""
    return [asdict(row) | {"difference": row.difference} for row in rows]
