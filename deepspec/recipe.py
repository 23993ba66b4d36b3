"""A recipe: one YAML file with every setting of a draft, read once into frozen, validated sections.

A recipe may start from others (``extends: [base/a.yaml, base/b.yaml]``, relative to its own folder; later ones and the
file's own keys win), and single keys can be set from the command line (``train.lr=3e-4``); ``recipe_files`` reads them.
Whatever a recipe produces carries the resolved recipe beside it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from deepspec import registry
from deepspec.arguments import COUNT, NOT_NEGATIVE, POSITIVE, SEED, TEMPERATURE, check_fields
from deepspec.errors import RecipeError, nearest, without_logins
from deepspec.files import sha256_json, write_text
from deepspec.http import check_url
from deepspec.recipe_files import DEEPSPEED, locate, portable, read_files
from deepspec.sections import parse_section, relocate, section_to_dict

log = logging.getLogger(__name__)
LONGEST_NAME = 200  # bytes of a folder's name: file systems take 255, and files in preparation get a longer one
RETIRED = {  # keys of earlier releases, and why they mean nothing today
    "train.bucket_batches": "a step's samples are a random draw, whatever their lengths",
}


def _require(condition: bool, key: str, found: object, wanted: str, problem: str = "value out of range") -> None:
    if not condition:
        raise RecipeError(problem, key=key, found=found, wanted=wanted)


def _check_weights(key: str, weights: tuple[float, ...] | None, count: int, of: str) -> None:
    if weights is not None:
        _require(len(weights) == count, key, list(weights), f"{count} weights, one per {of}")
        _require(min(weights) > 0, key, list(weights), "weights above 0")


@dataclass(frozen=True)
class TargetSection:
    """The model that is to be sped up."""

    path: str  # a local folder or a hub id
    layers: tuple[int, ...]  # 0-based layers whose OUTPUT is read; -1 = the embedding, their number = the final norm
    family: str | None = None  # checked against the model's own config where given
    revision: str | None = None  # of a hub id: a branch, tag or commit
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # that it runs in

    def __post_init__(self) -> None:
        _require(len(self.layers) > 0, "layers", list(self.layers), "at least one layer")
        _require(min(self.layers) >= -1, "layers", list(self.layers), "layers from -1 (embeddings) upwards")
        distinct = len(set(self.layers)) == len(self.layers)
        _require(distinct, "layers", list(self.layers), "each layer once", "layer named twice")
        if self.family is not None and self.family not in registry.FAMILIES:
            remedy = nearest(self.family, registry.FAMILIES)
            raise RecipeError("unknown family", key="family", found=self.family, remedy=remedy)


@dataclass(frozen=True)
class DataSection:
    """Where training samples come from."""

    source: str = "cache"  # a row of deepspec.registry.SOURCES
    prompts: str | None = None  # hub id or file of prompts, for deepspec prepare; a file of them for `answers`
    answers: str | None = None  # JSONL of the target's answers to `prompts`, which the servers of a run sample first
    held_out: float = 0.05  # share of the prompts held out of training
    conversations: str | tuple[str, ...] | None = None  # JSONL of prompts with the target's answers; one or several
    conversation_weights: tuple[float, ...] | None = None  # as cache_weights, of each file where no cache is read
    cache: tuple[str, ...] = ()  # folders or URLs
    cache_weights: tuple[float, ...] | None = None  # share of each cache in an epoch; None: by its sample count
    write_cache: str | None = None  # folder of a cache that the run writes of what it computes: source online or served
    max_length: int = 4096  # tokens; longer conversations are cut
    min_supervised: int = 14  # samples with fewer answer tokens are dropped
    thinking: bool = False  # whether the target thinks before it answers, by its template's own switch
    system_prompt: str | None = None  # before every conversation without one
    servers: tuple[str, ...] = ()  # URLs that serve the target's hidden states, for `source: served`
    server_storage: str | None = None  # the folder that engines among them write to; no file elsewhere is read, removed
    server_level: str = "lossless"  # codec level of what feature servers send
    server_memory: int = 1 << 30  # bytes of hidden states on their way to a process, or waiting in it
    server_timeout: float = 600.0  # seconds that a server may take for a conversation
    server_patience: float = 120.0  # seconds without any server, after which the run saves and ends

    def __post_init__(self) -> None:
        _require(self.max_length >= 2, "max_length", self.max_length, "at least 2 tokens")
        _require(0 <= self.held_out < 1, "held_out", self.held_out, "a share in [0, 1)")
        _require(self.min_supervised >= 0, "min_supervised", self.min_supervised, "0 or more")
        if self.source not in registry.SOURCES:
            remedy = nearest(self.source, registry.SOURCES)
            raise RecipeError("unknown feature source", key="source", found=self.source, remedy=remedy)
        if self.answers is not None:
            self._check_answers(self.answers)
        for url in self.servers:
            check_url(url, "servers", RecipeError)
        limits = {"server_memory": POSITIVE, "server_timeout": POSITIVE, "server_patience": NOT_NEGATIVE}
        check_fields(self, limits, RecipeError)
        _check_weights("cache_weights", self.cache_weights, len(self.cache), "cache")
        _check_weights("conversation_weights", self.conversation_weights, len(self.files), "file of conversations")

    def _check_answers(self, answers: str) -> None:
        if self.conversations:
            remedy = "set data.conversations to null, or remove data.answers"
            problem = "the conversations are given, or sampled by the run: not both"
            raise RecipeError(problem, key="answers", found=answers, remedy=remedy)
        for key, remedy in {
            "prompts": "name a file of prompts: deepspec prepare makes one",
            "write_cache": "name a folder: the hidden states of the answers are kept there",
        }.items():
            if getattr(self, key) is None:
                raise RecipeError("data.answers needs it, and it is not set", key=key, remedy=remedy)

    @property
    def files(self) -> tuple[str, ...]:
        """The files of `conversations`, or that of `answers`."""
        given = self.conversations or self.answers
        return (given,) if isinstance(given, str) else given or ()


@dataclass(frozen=True)
class RegenerateSection:
    """How the target answers the prompts: its recommended sampling."""

    temperature: float = 0.7  # 0 is greedy
    top_p: float = 0.8  # the likeliest tokens of this much probability; 1: all
    top_k: int = 20  # so many of the likeliest tokens; 0: all
    min_p: float = 0.0  # tokens of at least this share of the likeliest one's probability
    max_tokens: int = 4096  # of an answer, at most
    batch_size: int = 32  # conversations at a time, where no server answers

    def __post_init__(self) -> None:
        TEMPERATURE.check("temperature", self.temperature, RecipeError)
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "a share in (0, 1]")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        _require(0 <= self.min_p < 1, "min_p", self.min_p, "a share in [0, 1)")
        _require(self.max_tokens > 0, "max_tokens", self.max_tokens, "1 or more")
        _require(self.batch_size > 0, "batch_size", self.batch_size, "1 or more")


@dataclass(frozen=True)
class CacheSection:
    """How a target cache is written."""

    level: str = "lossless"  # a codec level of deepspec.cache
    features_level: str | None = None  # overrides `level` for the features array
    last_hidden_level: str | None = None  # overrides `level` for the last_hidden array
    samples_per_part: int = 2048  # at most; a killed build repeats one part
    tokens_per_batch: int = 16384  # token budget of one forward of the target

    def __post_init__(self) -> None:
        _require(self.samples_per_part > 0, "samples_per_part", self.samples_per_part, "1 or more")
        _require(self.tokens_per_batch > 0, "tokens_per_batch", self.tokens_per_batch, "1 or more")


@dataclass(frozen=True)
class ValidationSection:
    """Validation on held-out samples while training; off where neither `path` nor `sets` names any."""

    path: str | None = None  # a cache of held-out conversations (source cache) or their JSONL (other sources)
    sets: dict[str, str] = field(default_factory=dict)  # instead of `path`: several of them by name
    weights: dict[str, float] = field(default_factory=dict)  # of sets in the score; 1 where a set has none
    every: int = 500  # optimizer steps
    samples: int = 128  # the first this many
    decode_every: int | None = None  # optimizer steps between real decodings; None: never
    decode_prompts: int = 8  # of each decoding
    max_new_tokens: int = 64  # of each decoded answer, at most
    patience: int | None = None  # scored validations in a row without a better score that end the run; None: never

    def __post_init__(self) -> None:
        _require(self.path is None or not self.sets, "sets", self.sets, "no `path` beside them", "two places named")
        for name in self.sets:
            _require(re.fullmatch(r"[\w.-]+", name) is not None, "sets", name, "names of letters, digits, _, . and -")
        for name, weight in self.weights.items():
            _require(name in self.sets, "weights", name, f"one of the sets: {', '.join(self.sets) or 'none'}", "no set")
            _require(weight > 0, f"weights.{name}", weight, "above 0")
        _require(self.patience is None or self.patience > 0, "patience", self.patience, "1 or more, or null")
        for name in ("every", "samples", "decode_prompts", "max_new_tokens"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "1 or more")
        if self.decode_every is not None:
            wanted = f"a multiple of every ({self.every})"
            _require(
                self.decode_every > 0 and self.decode_every % self.every == 0, "decode_every", self.decode_every, wanted
            )


@dataclass(frozen=True)
class DraftStart:
    """A draft that a training starts from (``train.init: {draft: ...}``)."""

    draft: str  # a draft folder of any known format, a checkpoint, a run, or a hub id
    format: str = "auto"  # an engine's name, or found by its config
    keep_layers: tuple[int, ...] | None = None  # indices into its layers, for the recipe's first ones; None: all
    vocabulary: Literal["draft", "data"] = "draft"  # of a reduced one: the draft's tokens where the size is the same

    def __post_init__(self) -> None:
        if self.format not in ("auto", *registry.ENGINES):
            remedy = nearest(self.format, ("auto", *registry.ENGINES))
            raise RecipeError("unknown format", key="format", found=self.format, remedy=remedy)
        kept = self.keep_layers
        if kept is not None:
            _require(len(kept) > 0 and min(kept) >= 0, "keep_layers", list(kept), "layers of the draft, from 0")
            _require(len(set(kept)) == len(kept), "keep_layers", list(kept), "each layer once", "layer named twice")


_TRAIN_COUNTS = (
    *("epochs", "micro_batch", "global_batch", "log_every", "save_every", "keep_last", "online_micro_batch"),
    "sequence_parallel",
)


@dataclass(frozen=True)
class TrainSection:
    """The optimisation. Batch sizes, clipping and the schedule are here and nowhere else."""

    deepspeed: str = DEEPSPEED  # JSON: sharding, offload and precision
    epochs: int = 10  # passes over the data
    max_steps: int | None = None  # optimizer steps; stops the run earlier, the schedule ends there
    micro_batch: int = 1  # samples per process and forward, where `micro_tokens` is null
    micro_tokens: int | None = None  # tokens per process and forward, padding included; balanced over the processes
    global_batch: int = 512  # samples per optimizer step, whatever the number of processes
    sequence_parallel: int = 1  # processes that share each conversation; each holds a part of its features (Ulysses)
    init: Literal["random", "target"] | DraftStart = "random"  # target: copies of the target's last layers
    freeze: tuple[str, ...] = ()  # patterns of weights that are not trained; `!` in front trains them; the last decides
    lr: float = 6.0e-4  # the highest of the schedule
    weight_decay: float = 0.0  # of AdamW, as the next two
    betas: tuple[float, ...] = (0.9, 0.999)  # decay of the means of gradients and of their squares
    eps: float = 1.0e-8  # of AdamW: added to the root of the mean square
    warmup_ratio: float = 0.04  # linear warm-up over this share of the steps, then cosine decay to 0
    grad_clip: float = 1.0  # norm of the complete gradient; 0 = off
    activation_checkpointing: bool = False  # activations are computed again in the backward pass: less memory
    compile: bool = False  # torch.compile of the loss also on CPU; CUDA always compiles it; not where no compiler works
    workers: int = 2  # threads that read and decode samples ahead of the step
    log_every: int = 10  # optimizer steps
    save_every: int = 3000  # optimizer steps between checkpoints
    keep_last: int = 3  # checkpoints
    keep_every: int | None = None  # checkpoints at multiples of this step are never deleted
    keep_best: bool = False  # keep the checkpoint with the best validation (decoding where it is on, else tau)
    tensorboard: bool = True  # log for TensorBoard
    wandb_project: str | None = None  # log to this project of Weights & Biases too (extra `wandb`)
    online_micro_batch: int = 8  # sequences per forward of the target with `data.source: online`
    validation: ValidationSection | None = None  # on held-out samples; None: off

    def __post_init__(self) -> None:
        for name in _TRAIN_COUNTS:
            _require(getattr(self, name) > 0, name, getattr(self, name), "1 or more")
        for name in ("max_steps", "keep_every", "micro_tokens"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, value, "1 or more, or null")
        for name in ("weight_decay", "grad_clip", "workers"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(self.lr > 0, "lr", self.lr, "above 0")
        _require(0 <= self.warmup_ratio < 1, "warmup_ratio", self.warmup_ratio, "a share in [0, 1)")
        _require(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", self.betas, "two in [0, 1)")
        if self.micro_tokens is None and self.global_batch % self.micro_batch:
            wanted = f"a multiple of train.micro_batch ({self.micro_batch})"
            raise RecipeError("global batch not divisible", key="global_batch", found=self.global_batch, wanted=wanted)
        if self.keep_best and self.validation is None:
            raise RecipeError("keep_best needs train.validation", key="keep_best", found=True)
        if self.validation is not None and self.validation.patience is not None and not self.keep_best:
            raise RecipeError("patience needs train.keep_best: true", key="keep_best", found=False)


@dataclass(frozen=True)
class EvaluateSection:
    """How the finished draft is measured."""

    tasks: tuple[str, ...] = (
        *("gsm8k", "math500", "aime25", "humaneval", "mbpp", "livecodebench", "mt-bench", "alpaca", "arena-hard-v2"),
    )  # names of deepspec/evaluate/tasks.yaml, JSONL files, folders of them
    temperature: tuple[float, ...] = (1.0,)  # each is measured by itself; 0 is greedy
    max_new_tokens: int = 2048  # of each answer, at most
    batch_size: int = 1  # prompts decoded together
    seed: int = 980406  # of sampling

    def __post_init__(self) -> None:
        TEMPERATURE.check_each("temperature", self.temperature, RecipeError)
        check_fields(self, {"max_new_tokens": COUNT, "batch_size": COUNT, "seed": SEED}, RecipeError)


@dataclass(frozen=True)
class _File:
    """A recipe file's top level, before the algorithm has parsed its own section."""

    name: str  # of the run; folders are called by it
    algorithm: str  # a row of deepspec.registry.ALGORITHMS
    target: TargetSection
    seed: int = 42  # of answers, first weights, the order of samples and their draws
    draft: dict[str, Any] = field(default_factory=dict)
    data: DataSection = DataSection()
    regenerate: RegenerateSection = RegenerateSection()
    cache: CacheSection = CacheSection()
    train: TrainSection = TrainSection()
    evaluate: EvaluateSection = EvaluateSection()
    output: str | None = None  # folder of the training; None: runs/<name>

    def __post_init__(self) -> None:
        SEED.check("seed", self.seed, RecipeError)
        short = all(len(part.encode()) <= LONGEST_NAME for part in self.name.split("/"))
        wanted = f"1 to {LONGEST_NAME} printable characters: folders are called by it"
        _require(bool(self.name) and self.name.isprintable() and short, "name", self.name, wanted, "not a name")


@dataclass(frozen=True)
class Recipe:
    """A recipe with all its keys; ``draft`` is the algorithm's own frozen config."""

    name: str
    algorithm: str
    seed: int
    target: TargetSection
    draft: Any  # deepspec.algorithms.base.DraftConfig: the `draft:` section and `target.layers`
    data: DataSection
    regenerate: RegenerateSection
    cache: CacheSection
    train: TrainSection
    evaluate: EvaluateSection
    output: str

    def to_dict(self, folder: str | Path | None = None) -> dict[str, Any]:
        """The resolved recipe as YAML values: every key with its value, readable by :func:`load_recipe`.

        Names and passwords in the URLs of servers are left out: what is recorded is copied and published.

        Args:
            folder: where they will be read from; paths that mean something else there become absolute.
        """
        values = {field.name: section_to_dict(getattr(self, field.name)) for field in fields(self)}
        del values["draft"]["target_layers"]  # they are in `target.layers`
        values["data"]["servers"] = [without_logins(url) for url in self.data.servers]
        return values if folder is None else portable(values, Path(folder))

    def to_yaml(self, folder: str | Path | None = None) -> str:
        """The resolved recipe as YAML text; ``folder`` as in :meth:`to_dict`."""
        return yaml.safe_dump(self.to_dict(folder), sort_keys=False, allow_unicode=True, width=120)

    def save(self, path: str | Path) -> None:
        """Write the resolved recipe as YAML, completely or not at all."""
        write_text(path, self.to_yaml(Path(path).parent))

    def digest(self) -> str:
        """Hex SHA-256 of the resolved recipe, independent of key order and of how it was written."""
        return sha256_json(self.to_dict())

    def for_target(self, spec: Any) -> Recipe:
        """The same recipe, checked against the target's own facts, ``draft`` parsed with them.

        Args:
            spec: the :class:`deepspec.targets.TargetSpec` of ``target.path``.

        Raises:
            RecipeError: a layer beyond the model, another family, or a `draft:` key that does not fit the target.
        """
        if max(self.target.layers) > spec.num_layers:
            wanted = f"layers below {spec.num_layers}, the depth of {self.target.path}, or it: after the final norm"
            raise RecipeError(
                "layer beyond the model", key="target.layers", found=list(self.target.layers), wanted=wanted
            )
        if self.target.family not in (None, spec.family.name):
            wanted = f"{spec.family.name}, the family of {self.target.path}"
            raise RecipeError("family of another target", key="target.family", found=self.target.family, wanted=wanted)
        draft = _parse_draft(self.algorithm, self.to_dict()["draft"], self.target.layers, spec)
        of = self.train.sequence_parallel
        if of > 1 and (heads := spec.draft_layers(draft.layers).shape.num_heads) % of:
            wanted = f"a divisor of {heads}, the heads of the draft's layers"
            raise RecipeError("heads cannot be shared", key="train.sequence_parallel", found=of, wanted=wanted)
        return replace(self, draft=draft)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, merge, override and validate a recipe.

    Args:
        path: the YAML file, or the name of a recipe of deepspec's own.
        overrides: ``key.key=value`` texts, the value in YAML (``train.lr=3e-4``, ``data.cache=[a, b]``).

    Raises:
        RecipeError: a missing file, bad YAML, an unknown key, a wrong type, a contradiction; file and key are named.
    """
    values = read_files(path, overrides)
    try:
        return recipe_from_dict(values)
    except RecipeError as error:
        raise relocate(error, file=error.file or path) from None


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """A recipe from YAML values (what :meth:`Recipe.to_dict` gives, or gave in an earlier release).

    Raises:
        RecipeError: as :func:`load_recipe`, without a file name.
    """
    file = parse_section(_File, _without_retired(values), "")
    if file.algorithm not in registry.ALGORITHMS:
        remedy = nearest(file.algorithm, registry.ALGORITHMS)
        raise RecipeError("unknown algorithm", key="algorithm", found=file.algorithm, remedy=remedy)
    of = file.train.sequence_parallel
    if of > 1 and not registry.algorithm(file.algorithm).shares_sequences:
        found, wanted = f"{of} with {file.algorithm}", f"1 with {file.algorithm}"
        problem = "the algorithm cannot share a conversation among processes"
        raise RecipeError(problem, key="train.sequence_parallel", found=found, wanted=wanted)
    sections = {name: getattr(file, name) for name in ("data", "regenerate", "cache", "train", "evaluate")}
    return Recipe(
        name=file.name,
        algorithm=file.algorithm,
        seed=file.seed,
        target=file.target,
        draft=_parse_draft(file.algorithm, file.draft, file.target.layers, None),
        output=file.output or f"runs/{file.name}",
        **sections,
    )


def _without_retired(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values without keys that an earlier release had, each named in the log."""
    kept = dict(values)
    for name, why in RETIRED.items():
        section, key = name.split(".")
        if isinstance(kept.get(section), Mapping) and key in kept[section]:
            kept[section] = {one: value for one, value in kept[section].items() if one != key}
            log.warning("recipe key %s is ignored: %s", name, why)
    return kept


def recipe_at(folder: Path, values: Mapping[str, Any]) -> Recipe:
    """The recipe whose values (what :meth:`Recipe.to_dict` gives) a file in ``folder`` holds, its paths resolved.

    Raises:
        RecipeError: as :func:`recipe_from_dict`.
    """
    return recipe_from_dict(locate(dict(values), Path(folder).absolute()))


def _parse_draft(algorithm: str, section: Mapping[str, Any], layers: tuple[int, ...], spec: Any) -> Any:
    if "target_layers" in section:
        raise RecipeError("belongs in another section", key="draft.target_layers", remedy="set target.layers")
    return registry.algorithm(algorithm).parse({**section, "target_layers": list(layers)}, spec)
