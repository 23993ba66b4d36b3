"""Exported drafts served by a real engine and compared with our own decoding, kind by kind.

Of every kind: greedy tokens equal to the engine's own without a draft, and the engine's acceptance length within
``TOLERANCE`` of ours on the same prompts, both in fp32. A round that the output limit or a stop token cut is counted
differently everywhere, so each prompt's last round is left out on both sides.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from deepspec import registry
from deepspec.data.chat import Renderer
from deepspec.decoding.loop import generate
from deepspec.decoding.records import DecodeSettings, Generation
from deepspec.drafts import FROZEN, load_draft, read_weights, save_draft
from deepspec.errors import DeepSpecError, DraftError
from deepspec.export.consolidate import consolidate
from deepspec.export.convert import ExportOptions, export_draft
from deepspec.files import read_json
from deepspec.progress import Progress
from deepspec.serving.process import run
from deepspec.tables import Table
from deepspec.targets import Target, load_target, load_tokenizer
from deepspec.targets.positions import check_room
from deepspec.targets.served import ServedTarget

log = logging.getLogger(__name__)
TOLERANCE = 0.05
HIDDEN_STATES, HIDDEN_TOLERANCE = "hidden states", 1e-4  # the name of the check, and the largest difference it allows
REDUCED, FILL_IN = "-reduced", "-k-1"  # of a kind's name: a vocabulary of its own, an anchor's slot that drafts nothing


@dataclass(frozen=True)
class Kind:
    """One kind of draft in one format."""

    source: str  # the kind of draft, as engines' tables call it
    format: str
    form: str  # what the engine calls it
    embeddings: bool = True  # the export carries the target's embedding and head
    first: bool = True  # in the engine's first format, which its name does not show

    @property
    def name(self) -> str:
        """What the report calls it."""
        text = self.source.replace(REDUCED, " reduced vocabulary").replace(FILL_IN, " K-1")
        return text if self.first else f"{text} {self.format}"


def kinds_of(formats: Sequence[str]) -> list[Kind]:
    """Every kind of draft that the tables of ``formats`` have a form for; every second without frozen weights."""
    rows = [(source, name, form.name) for name in formats for source, form in registry.engine(name).forms.items()]
    kinds = [Kind(*row, embeddings=number % 2 == 0, first=row[1] == formats[0]) for number, row in enumerate(rows)]
    return [*kinds, Kind(rows[0][0] + REDUCED, *rows[0][1:])]


@dataclass
class Row:
    """What came out for a kind."""

    kind: str
    format: str
    status: str  # "equal", "FAILED", "not run", "refused"
    lossless: str = ""  # prompts whose tokens equal the engine's own
    ours: float | None = None  # acceptance length
    engine: float | None = None
    same_rounds: str = ""  # rounds that accept as many tokens as ours
    note: str = ""

    @property
    def difference(self) -> float | None:
        """Relative difference of the acceptance lengths."""
        return None if self.ours is None or self.engine is None else self.engine / self.ours - 1


@dataclass(frozen=True)
class CheckOptions:
    """What to check."""

    quickstart: Path = Path("build/quickstart")
    prompts: int = 12
    max_tokens: int = 48
    kinds: tuple[str, ...] = field(default=())  # names; empty: all


class ServeCheck:
    """The complete check.

    Args:
        options: what.
        server: the engine, a row of ``registry.SERVERS``.

    Raises:
        DraftError: no quickstart to take drafts from, or a target that the engine refuses.
    """

    def __init__(self, options: CheckOptions, server: Any) -> None:
        self.options, self.server = options, server
        target = options.quickstart / "target"
        if not (target / "config.json").is_file():
            raise DraftError("no target to serve", file=target, remedy="run `deepspec quickstart` first")
        self.target: Target = load_target(target, torch.float32)
        server.check_target(self.target.spec)
        renderer = Renderer(load_tokenizer(target), self.target.spec)
        lines = (options.quickstart / "prompts" / "held_out.jsonl").read_text(encoding="utf-8").split("\n")
        texts = [json.loads(line)["turns"][0] for line in lines[: options.prompts] if line.strip()]
        self.prompts = [renderer.prompt([{"role": "user", "content": text}]) for text in texts]
        self.longest = max(map(len, self.prompts)) + options.max_tokens
        self.settings = DecodeSettings(0.0, options.max_tokens, renderer.stop_token_ids)
        for number, prompt in enumerate(self.prompts):  # before an engine is made and drafts are trained
            check_room(self.target.spec.config, len(prompt), options.max_tokens, f"prompt {number}")
        self._ours: dict[str, list[Generation]] = {}

    def run(self) -> list[Row]:
        """Check every kind, with a line of progress each."""
        wanted = self.options.kinds
        chosen = [kind for kind in kinds_of(self.server.formats) if not wanted or kind.name in wanted]
        rows = []
        self.server.prepare()
        for number, kind in enumerate(chosen, 1):
            log.info("[%d/%d] %s (%s)", number, len(chosen), kind.name, kind.format)
            rows.append(self.check(kind))
        if self.server.hands_out_states and (not wanted or HIDDEN_STATES in wanted):
            rows.append(self.check_hidden_states())
        return rows

    def check(self, kind: Kind) -> Row:
        """Export, serve, compare one kind."""
        folder = self.server.work / "exports" / kind.name.replace(" ", "-")
        try:
            source = self.source(kind.source)
            shutil.rmtree(folder, ignore_errors=True)
            target = str(self.options.quickstart / "target")
            draft = export_draft(source, folder, ExportOptions(kind.format, kind.embeddings, target))
        except DraftError as refusal:
            return Row(kind.name, kind.format, "refused", note=str(refusal))
        lacks_shim = self.server.lacks_shim(kind.form)
        try:
            baseline = self.baseline
            answer = self.generate(kind.name, self.server.speculative(kind.format, draft, folder), kind.form)
        except DeepSpecError as problem:
            if lacks_shim:
                note = f"needs the CPU shim (--shim); the engine as it is answered: {problem.found}"
                return Row(kind.name, kind.format, "not run", note=note)
            return Row(kind.name, kind.format, "FAILED", note=f"{problem.problem}: {problem.found}")
        row = compare(kind, self.ours(kind.source, source), answer["rows"], baseline)
        if lacks_shim and row.status == "FAILED" and row.lossless.split("/")[0] != "0":
            row.status, row.note = "not run", f"acceptance needs the CPU shim (--shim); without: {row.note}"
        return row

    def check_hidden_states(self) -> Row:
        """Hidden states out of the served target, compared with those of the same target in this process."""
        row = Row(HIDDEN_STATES, "extraction", "equal")
        if self.server.shim is None:
            row.status, row.note = "not run", "needs the CPU shim's connector (--shim)"
            return row
        layers = list(range(0, self.target.spec.num_layers - 1, 2))
        storage = self.server.work / "hidden-states"
        try:
            with self.server.hidden_states(self.target.spec, layers, storage) as url:
                worst = largest_difference(url, storage, self.target, layers, self.prompts)
        except DeepSpecError as problem:
            row.status, row.note = "FAILED", str(problem)
            return row
        row.note = f"largest difference {worst:.1e} over {len(self.prompts)} prompts, layers {layers} and the last"
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
        job = {
            "target": str((self.options.quickstart / "target").resolve()),
            "speculative_config": speculative,
            "prompts": self.prompts,
            "max_tokens": self.options.max_tokens,
            "stop_token_ids": list(self.settings.stop_token_ids),
            "max_model_len": -(-(self.longest + 16) // 128) * 128,
        }
        return dict(self.server.generate(name.replace(" ", "-"), job, form))

    def ours(self, name: str, source: Path) -> list[Generation]:
        """Our own decoding of the same prompts."""
        if name not in self._ours:
            model = load_draft(source, self.target)
            drafter = model.algorithm.drafter(model, 4, self.longest)
            self._ours[name] = generate(self.target, drafter, self.prompts, self.settings, 4)
        return self._ours[name]

    def source(self, name: str) -> Path:
        """The draft folder of a kind, made where the quickstart has none of it."""
        if not name.endswith((REDUCED, FILL_IN)):
            return self.options.quickstart / f"{name}-draft"
        made: Path = self.server.work / f"{name}-draft"
        if not (made / "provenance.json").is_file():
            if name.endswith(REDUCED):
                reduce_vocabulary(self.source(name.removesuffix(REDUCED)), made)
            else:
                self._train_fill_in(name, made)
        return made

    def _train_fill_in(self, name: str, made: Path) -> None:
        """A draft whose anchor slot drafts nothing, from the quickstart's cache."""
        algorithm, folder = name.removesuffix(FILL_IN), self.server.work / name
        log.info("training %s with sample_from_anchor: false (about a minute)", algorithm)
        own = self.options.quickstart.resolve()
        settings = ("draft.sample_from_anchor=false", "train.max_steps=300", f"output={folder.resolve()}",
                    f"target.path={own / 'target'}", f"data.cache=[{own / 'cache'}]")  # fmt: skip
        command = [sys.executable, "-m", "deepspec", "train", "--recipe", f"quickstart_{algorithm}"]
        run([*command, *(part for one in settings for part in ("--set", one))], self.server.work / f"train-{name}.log")
        consolidate(folder, made)


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
    return worst


def reduce_vocabulary(source: Path, output: Path) -> None:
    """The draft over seven of every eight tokens: enough missing ones that a wrong mapping shows."""
    config, state = read_json(source / "config.json", DraftError), read_weights(source)
    vocabulary = int(config["vocab_size"])
    tokens = torch.tensor([token for token in range(vocabulary) if token % 8 != 3])
    state = {name: tensor for name, tensor in state.items() if name not in FROZEN}
    state["d2t"] = tokens - torch.arange(len(tokens))
    state["t2d"] = torch.zeros(vocabulary, dtype=torch.bool).index_fill(0, tokens, True)
    save_draft(output, state, config | {"draft_vocab_size": len(tokens)}, {"reduced_from": str(source)})


def compare(
    kind: Kind, ours: Sequence[Generation], engine: Sequence[Mapping[str, Any]], baseline: list[list[int]]
) -> Row:
    """The verdict on one kind: of every prompt our generation, the engine's tokens and (drafted, accepted) of every
    round, and its own tokens without a draft.
    """
    equal = sum(row["tokens"] == tokens for row, tokens in zip(engine, baseline, strict=True))
    own = [[one.accepted for one in generation.rounds[:-1]] for generation in ours]
    theirs = [[accepted for _, accepted in row["rounds"][:-1]] for row in engine]
    pairs = [pair for mine, their in zip(own, theirs, strict=True) for pair in zip(mine, their, strict=False)]
    row = Row(kind.name, kind.format, "equal", f"{equal}/{len(baseline)}", _length(own), _length(theirs))
    row.same_rounds = f"{sum(mine == their for mine, their in pairs)}/{sum(map(len, own))}"
    reasons = []
    if equal != len(baseline):
        reasons.append("the tokens are not those of the engine without a draft")
    if row.difference is None:
        reasons.append("no rounds to compare: every answer ended in its first")
    elif abs(row.difference) > TOLERANCE:
        reasons.append(f"acceptance length differs by more than {TOLERANCE:.0%}")
    if reasons:
        row.status, row.note = "FAILED", "; ".join(reasons)
    return row


def _length(accepted: Sequence[Sequence[int]]) -> float | None:
    rounds = [count + 1 for prompt in accepted for count in prompt]
    return sum(rounds) / len(rounds) if rounds else None


def table(rows: Sequence[Row], version: str) -> str:
    """The rows as a Markdown table."""
    header = ("kind", "format", "verdict", "lossless", "ours", "engine", "difference", "rounds equal", "note")
    cells = []
    for row in rows:
        ours, engine = ("" if value is None else f"{value:.3f}" for value in (row.ours, row.engine))
        difference = "" if row.difference is None else f"{row.difference:+.2%}"
        cells.append(
            (row.kind, row.format, row.status, row.lossless, ours, engine, difference, row.same_rounds, row.note)
        )
    return f"{version}, CPU, fp32, greedy\n\n{Table(header, cells).markdown()}"


def to_json(rows: Sequence[Row], check: ServeCheck) -> dict[str, Any]:
    """Everything as one JSON value."""
    server = check.server
    return {
        "engine": server.version,
        "shim": None if server.shim is None else str(server.shim),
        "prompts": len(check.prompts),
        "max_tokens": check.options.max_tokens,
        "tolerance": TOLERANCE,
        "rows": [asdict(row) | {"difference": row.difference} for row in rows],
    }
