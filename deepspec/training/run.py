"""A training run from a recipe file: open target and data, resume or begin, train, leave everything on disk."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from deepspec import registry
from deepspec.algorithms.base import DraftModel
from deepspec.checkpoints import check_files, read_untrained
from deepspec.distributed import World, on_all_ranks, on_rank0, pick_device
from deepspec.errors import CheckpointError, DeepSpecError
from deepspec.files import write_json
from deepspec.identity import target_fields
from deepspec.locks import one_writer
from deepspec.progress import bytes_in, bytes_read, waiting
from deepspec.recipe import DraftStart, Recipe, load_recipe
from deepspec.sources.base import FeatureSource, source_class
from deepspec.targets import TargetEmbeddings, load_spec, load_target, load_target_embeddings
from deepspec.training import checkpoints as store
from deepspec.training.engine import Engine, loss_backend, to_universal, training_processes
from deepspec.training.from_draft import (
    followed,
    frozen_pair,
    identity,
    keep_draft,
    kept_draft,
    kept_vocabulary,
    start_from,
)
from deepspec.training.initial import frozen_weights, reduced_vocabulary, warm_start
from deepspec.training.loop import Trainer, exhausted
from deepspec.training.plan import RunPlan
from deepspec.training.prefetch import Prefetcher
from deepspec.training.settings import deepspeed_settings, model_dtype, zero_stage
from deepspec.training.validation import open_validator, sets_of

log = logging.getLogger(__name__)


def train(path: str | Path, overrides: Sequence[str] = (), accept_changes: bool = False, profile: bool = False) -> int:
    """Run a recipe's training on this rank: begin, or resume from the newest complete checkpoint of its output.

    Args:
        path: the recipe.
        overrides: ``key.key=value`` texts.
        accept_changes: on resume, honour changed optimisation settings (a longer run, another rate).
        profile: write a profiler trace of a few steps to ``<output>/profile``.

    Returns:
        0: finished, already finished, or stopped by a signal and saved.

    Raises:
        DeepSpecError: bad input, on rank 0; other ranks exit with code 1 and report nothing.
    """
    with training_processes() as world, ExitStack() as stack:
        recipe = on_all_ranks(world, lambda: _hold(stack, load_recipe(path, overrides), world))
        on_rank0(world, lambda: keep_draft(recipe))
        on_rank0(world, lambda: source_class(recipe).begin(recipe))
        prepared = on_all_ranks(world, lambda: prepare(recipe, world, accept_changes))
        for source in (prepared.source, *prepared.held_out.values()):
            stack.callback(source.close)
        start, total = prepared.start, prepared.manifest.total_steps
        if start.step == total or exhausted(prepared.recipe.train, start.stale):
            if start.step >= prepared.plan.steps_per_epoch:
                prepared.source.finish()
            log.info("already finished: %s", start.folder)
            return 0
        if start.folder is not None:
            log.info("\n  changed: ".join([f"resuming {start.folder}, {total} steps in all", *start.changes]))
        trainer = assemble(prepared, world, profile)
        del prepared
        if trainer.run(start.step) and (trainer.saved or 0) >= trainer.prefetcher.plan.steps_per_epoch:
            trainer.prefetcher.source.finish()
        trainer.engine.close()
        return 0


def _hold(stack: ExitStack, recipe: Recipe, world: World) -> Recipe:
    """The recipe, its output folder this run's alone until the stack closes."""
    if world.is_main:
        stack.enter_context(one_writer(recipe.output, "training", CheckpointError))
    return recipe


@dataclass(frozen=True)
class Start:
    """Where a run resumes."""

    step: int = 0
    folder: Path | None = None  # of the checkpoint; None: from the beginning
    universal: bool = False  # whether it must be converted first
    stale: int = 0  # of its manifest
    changes: tuple[str, ...] = ()  # optimisation settings that were changed, and are honoured


@dataclass(frozen=True)
class Prepared:
    """Everything that can be wrong with a run's input, opened and checked; made without talking to other ranks."""

    recipe: Recipe
    target: TargetEmbeddings
    source: FeatureSource
    held_out: dict[str, FeatureSource]  # of every set of `train.validation`
    plan: RunPlan
    manifest: store.Manifest
    start: Start
    frozen: frozenset[str]  # names of the draft's weights that are not trained


def prepare(recipe: Recipe, world: World, accept_changes: bool) -> Prepared:
    """Open target and data, find the checkpoint to resume from.

    Raises:
        DeepSpecError: anything of it is missing, broken or does not fit the rest.
    """
    settings = deepspeed_settings(recipe.train, world.size)
    recipe = recipe.for_target(load_spec(recipe.target.path, recipe.target.revision))
    kind = source_class(recipe)
    target = frozen_target(recipe, pick_device(world.local_rank))
    source = kind.open(recipe, target)
    train = recipe.train
    plan = RunPlan(
        source.lengths, source.group_sizes, seed=recipe.seed, global_batch=train.global_batch,
        micro_batch=train.micro_batch, micro_tokens=train.micro_tokens, group_weights=source.group_weights,
    )  # fmt: skip
    total = train.epochs * plan.steps_per_epoch
    facts = {"target": target_fields(target.spec)}  # tokenizer and template are in the data's fingerprint
    manifest = store.Manifest(
        step=0,
        total_steps=total if train.max_steps is None else min(total, train.max_steps),
        recipe=recipe.to_dict(Path(recipe.output, "checkpoints", "step_0")),
        fingerprint=dict(source.fingerprint()),
        identity=facts,
        target_digest=facts["target"]["weights"],
        world_size=world.size,
        zero_stage=zero_stage(settings),
        dtype=str(model_dtype(settings)).removeprefix("torch."),
        versions=versions(),
        init=identity(recipe),
    )
    start = find_start(Path(recipe.output), recipe, manifest, accept_changes)
    if start.folder is not None and start.step < manifest.total_steps:
        with waiting(f"checking {start.folder}", start.folder, bytes_read):
            check_files(start.folder, store.read_manifest(start.folder), world.rank, world.size)
    held_out = {
        name: kind.open(replace(recipe, train=replace(train, validation=section)), target, held_out=True)
        for name, section in sets_of(train).items()
    }
    manifest, frozen = replace(manifest, stale=start.stale), frozen_weights(recipe, target.spec)
    return Prepared(recipe, target, source, held_out, plan, manifest, start, frozen)


def frozen_target(recipe: Recipe, device: torch.device) -> TargetEmbeddings:
    """The complete target where this process runs it (for the source, or in validations), else embedding and head."""
    decodes = any(section.decode_every is not None for section in sets_of(recipe.train).values())
    load = load_target if decodes or source_class(recipe).needs_model else load_target_embeddings
    return load(recipe.target.path, getattr(torch, recipe.target.dtype), device, recipe.target.revision)


def assemble(prepared: Prepared, world: World, profile: bool) -> Trainer:
    """The draft under DeepSpeed with the weights of the checkpoint, and the loop around it (all ranks together)."""
    recipe, start = prepared.recipe, prepared.start
    saved = store.Checkpoints(Path(recipe.output), recipe.train)
    on_rank0(world, lambda: _start_folder(saved, prepared))
    algorithm = registry.algorithm(recipe.algorithm)
    model = algorithm.build(recipe.draft, prepared.target.spec, recipe.seed)
    model.attach(*frozen_pair(recipe, prepared.target), prepared.target.head_weight)
    model.activation_checkpointing = recipe.train.activation_checkpointing
    model.loss = loss_backend(recipe.train.compile, pick_device(world.local_rank))
    if start.folder is None:
        _first_weights(model, prepared)
    for name, weight in model.named_parameters():
        weight.requires_grad_(name not in prepared.frozen)
    with waiting("preparing the training"):
        engine = Engine(model, recipe.train, world, universal=start.universal)
    _resume(engine, start, saved)
    part = engine.sequence.part
    prefetcher = Prefetcher(
        prepared.source, prepared.plan, partial(algorithm.plan_part, recipe.draft, part), seed=recipe.seed,
        world=world.groups_of(part.of), workers=recipe.train.workers, part=part,
    )  # fmt: skip
    trace = saved.run / "profile" if profile else None
    validator = open_validator(recipe, prepared.held_out, prepared.target)
    return Trainer(recipe, engine, prefetcher, saved, prepared.manifest, validator=validator, profile=trace)


def _first_weights(model: DraftModel, prepared: Prepared) -> None:
    """The weights of a run that begins: random, the target's, or a draft's; and the draft's vocabulary."""
    recipe, spec = prepared.recipe, prepared.target.spec
    init = recipe.train.init
    draft = kept_draft(recipe) if isinstance(init, DraftStart) else None
    if recipe.draft.draft_vocab_size is not None:
        kept = None if draft is None else kept_vocabulary(draft, recipe)
        size = recipe.draft.draft_vocab_size
        model.set_draft_vocab(reduced_vocabulary(prepared.source, spec.vocab_size, size, kept))
    if draft is not None and isinstance(init, DraftStart):
        now = prepared.manifest
        start_from(model, draft, init, followed(now.init, now.target_digest, spec.path))
    elif init == "target":
        warm_start(model, spec, recipe.target)


def find_start(run: Path, recipe: Recipe, now: store.Manifest, accept_changes: bool) -> Start:
    """The newest complete checkpoint of the run, if it fits.

    Raises:
        CheckpointError: the run there is another one, or cannot resume with these settings.
    """
    folders = store.steps_of(run)
    if not folders:
        return Start()
    folder = list(folders.values())[-1]
    old = store.read_manifest(folder)
    changes = store.check_resume(old, recipe, now, accept_changes)
    if old.dtype != now.dtype:
        remedy = "name a DeepSpeed configuration of the same precision in train.deepspeed"
        raise CheckpointError("of another precision", file=folder, found=now.dtype, wanted=old.dtype, remedy=remedy)
    if old.step > now.total_steps:
        raise CheckpointError(
            "the run is already past this recipe's end", file=folder, key="train.max_steps", found=now.total_steps,
            wanted=f"at least {old.step}",
        )  # fmt: skip
    stages = {old.zero_stage, now.zero_stage}
    if len(stages) > 1 and not stages <= {1, 2}:
        raise CheckpointError(
            "of another ZeRO stage", file=folder, key="train.deepspeed", found=now.zero_stage,
            wanted=f"stage {old.zero_stage}", remedy="only stages 1 and 2 can follow each other",
        )  # fmt: skip
    moved = old.world_size != now.world_size or len(stages) > 1
    return Start(old.step, folder, moved and old.zero_stage > 0, old.stale, tuple(changes))


def _resume(engine: Engine, start: Start, saved: store.Checkpoints) -> None:
    engine.barrier()
    if start.folder is None:
        return
    name = start.folder.name
    if start.universal:
        name = f".{name}.universal"
        if engine.world.is_main:
            try:
                with waiting(f"converting {start.folder}", start.folder, partial(bytes_in, saved.folder / name)):
                    to_universal(start.folder, saved.folder / name)
            except DeepSpecError:
                saved.clean()
                raise
        engine.barrier()
    with waiting(f"loading {start.folder}", start.folder, bytes_read):
        engine.load(saved.folder, name, start.step)
    if start.universal:
        engine.set_untrained(read_untrained(start.folder, store.read_manifest(start.folder)))
    engine.barrier()
    if start.universal and engine.world.is_main:
        saved.clean()


def _start_folder(saved: store.Checkpoints, prepared: Prepared) -> None:
    """The run's folder with the resolved recipe and what it runs on."""
    saved.clean()
    recipe, manifest = prepared.recipe, prepared.manifest
    if recipe.train.validation is not None and not prepared.held_out:
        log.info("no validation, and no best checkpoint: train.validation names no held-out data (path or sets)")
    recipe.save(saved.run / "recipe.yaml")
    about = {"seed": recipe.seed, "recipe_digest": recipe.digest(), "total_steps": manifest.total_steps}
    about |= {"target_digest": manifest.target_digest, "fingerprint": manifest.fingerprint}
    about |= {"init": manifest.init, "frozen": sorted(prepared.frozen)}
    about |= {"world_size": manifest.world_size, "zero_stage": manifest.zero_stage, "dtype": manifest.dtype}
    write_json(saved.run / "run.json", about | {"versions": manifest.versions})


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a result depends on."""
    names = ("deepspec", "torch", "deepspeed", "transformers", "zarr", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
