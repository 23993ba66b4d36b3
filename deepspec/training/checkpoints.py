"""Checkpoints of a run: ``<run>/checkpoints/step_N/``, complete or absent.

DeepSpeed writes under a temporary name; then every file is synced and digested, ``manifest.json`` is written last and
the folder gets its name by one rename. There is no ``latest`` file to lose: the newest folder with a manifest is the
latest. Removal goes the other way: the folder loses its name first.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from deepspec.checkpoints import Manifest, read_manifest, steps_of, target_differences
from deepspec.errors import CheckpointError
from deepspec.files import named, sealed, sync, write_json
from deepspec.identity import as_recorded, differences, flatten
from deepspec.recipe import RETIRED, Recipe, TrainSection, recipe_from_dict

HONOURED = RETIRED.keys() | {  # optimisation settings that a resumed run may change, with --accept-changes
    f"train.{key}" for key in ("lr", "weight_decay", "betas", "eps", "warmup_ratio", "grad_clip", "epochs", "max_steps")
}
FREE = (  # keys that do not change what is computed; data and target are compared by their fingerprints instead
    *("name", "output", "evaluate", "regenerate", "cache", "target.path", "target.revision", "target.family"),
    *("data.prompts", "data.held_out", "data.conversations", "data.cache", "data.source", "data.write_cache"),
    "data.answers",
    *(f"data.{key}" for key in ("servers", "server_storage", "server_memory", "server_timeout", "server_patience")),
    *(f"train.{key}" for key in ("deepspeed", "log_every", "save_every", "keep_last", "keep_every", "keep_best")),
    *(f"train.{key}" for key in ("workers", "tensorboard", "wandb_project", "online_micro_batch", "validation")),
    *(f"train.{key}" for key in ("activation_checkpointing", "compile", "micro_batch", "micro_tokens")),
    "train.sequence_parallel",
    *("train.init.draft", "train.init.format"),  # compared by `Manifest.init`
)


class Checkpoints:
    """The checkpoints of one run, as rank 0 writes them; other ranks only use names.

    Args:
        run: the run's folder.
        train: the recipe's section (what to keep).
    """

    def __init__(self, run: Path, train: TrainSection) -> None:
        self.run, self.train = run, train
        self.folder = run / "checkpoints"
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._pending: Future[None] | None = None

    def clean(self) -> None:
        """Remove what a crash left partly written or partly removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(".*"):
            shutil.rmtree(path, ignore_errors=True)

    def temporary(self, step: int) -> str:
        """The name under which DeepSpeed writes a checkpoint."""
        return f".step_{step}.tmp"

    def discard(self, step: int) -> None:
        """Remove what DeepSpeed has written of a checkpoint that it could not finish."""
        shutil.rmtree(self.folder / self.temporary(step), ignore_errors=True)

    def commit(self, manifest: Manifest) -> None:
        """Make the files under the temporary name a checkpoint, in a thread while the training continues."""
        self.wait()
        self._pending = self._pool.submit(self._commit, manifest)

    def _commit(self, manifest: Manifest) -> None:
        try:
            self._finish(manifest)
        except BaseException:
            self.discard(manifest.step)
            raise

    def _finish(self, manifest: Manifest) -> None:
        source = self.folder / self.temporary(manifest.step)
        sizes, digests = dict[str, int](), dict[str, str]()
        for path in sorted(source.rglob("*")):
            if path.is_file():
                with named(path), open(path, "rb") as handle:
                    os.fsync(handle.fileno())
                    name = str(path.relative_to(source))
                    sizes[name] = path.stat().st_size
                    digests[name] = hashlib.file_digest(handle, "sha256").hexdigest()  # just written: still in memory
        write_json(source / "manifest.json", sealed({**asdict(manifest), "files": sizes, "sha256": digests}))
        final = self.folder / f"step_{manifest.step}"
        if final.exists():
            self._remove(final)
        os.rename(source, final)
        for script in ("zero_to_fp32.py", "zero_to_torch.py"):  # deepspeed's own, which do not fit a draft
            (self.folder / script).unlink(missing_ok=True)
        sync(self.folder)
        self._prune()

    def wait(self) -> None:
        """Wait for the last commit.

        Raises:
            OSError: it failed, for instance on a full disk; the checkpoint before it is complete.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def best(self) -> tuple[int, float] | None:
        """(step, score) of the best checkpoint that was scored."""
        scores = {step: read_manifest(path).score for step, path in steps_of(self.run).items()}
        scored = [(score, step) for step, score in scores.items() if score is not None]
        return None if not scored else (max(scored)[1], max(scored)[0])

    def _prune(self) -> None:
        steps = steps_of(self.run)
        kept = set(list(steps)[-self.train.keep_last :])
        if self.train.keep_every:
            kept |= {step for step in steps if step % self.train.keep_every == 0}
        if self.train.keep_best:
            best = self.best()
            kept |= {best[0]} if best else set()
        for step, path in steps.items():
            if step not in kept:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        dead = path.with_name(f".{path.name}.dead")
        os.rename(path, dead)
        sync(self.folder)
        shutil.rmtree(dead)


def check_resume(old: Manifest, recipe: Recipe, now: Manifest, accept: bool) -> list[str]:
    """Compare a checkpoint with the run that is to resume from it.

    Args:
        old: the checkpoint's manifest.
        recipe: the recipe now.
        now: the run's own manifest: the data's fingerprint, the target's identity.
        accept: whether changed optimisation settings are to be honoured.

    Returns:
        The honoured changes, for the log.

    Raises:
        CheckpointError: another target, other data, or a changed key of the recipe; both values are named.
    """
    where = old.recipe.get("output")
    if lines := target_differences(old, now.identity, ("run", "now"), where):
        remedy = "train on from the same target, or choose another output"
        raise CheckpointError(f"the target is not the run's: {'; '.join(lines)}", file=where, remedy=remedy)
    if lines := _data_differences(old.fingerprint, now.fingerprint, where):
        remedy = "put the data back, or choose another output"
        raise CheckpointError(f"the data are not the run's: {'; '.join(lines)}", file=where, remedy=remedy)
    defaults = recipe_from_dict(old.recipe).to_dict()  # of keys that came after the run began
    before, after = flatten(defaults) | flatten(old.recipe), flatten(recipe.to_dict())
    honoured = []
    for key in sorted({*before, *after}):
        if before.get(key) == after.get(key) or any(key == free or key.startswith(f"{free}.") for free in FREE):
            continue
        change = {"file": where, "key": key, "found": after.get(key), "wanted": f"the run's {before.get(key)!r}"}
        if key not in HONOURED:
            remedy = "put it back, or choose another output for a new run"
            raise CheckpointError("a run cannot change this and resume", **change, remedy=remedy)
        if not accept:
            remedy = "give --accept-changes to resume with the new value, or choose another output"
            remedy = f"it is gone ({RETIRED[key]}): {remedy}" if key in RETIRED else f"put it back, or {remedy}"
            raise CheckpointError("the recipe differs from the run's", **change, remedy=remedy)
        honoured.append(f"{key}: {before.get(key)!r} -> {after.get(key)!r}")
    return honoured


def _data_differences(old: Mapping[str, Any], now: Mapping[str, Any], where: object) -> list[str]:
    """A line for each field in which a run's data differ from those of its checkpoint; data sets in their order."""
    sides = ("run", "now")
    counted = [{**one, "caches": len(one.get("caches", ()))} for one in (old, now)]
    if lines := differences(counted[0], counted[1], sides):
        return lines
    for found, wanted in zip(old.get("caches", ()), now.get("caches", ()), strict=True):
        if found != wanted:
            lines += differences(found, as_recorded(found, wanted, getattr(torch, wanted["dtype"]), where), sides)
    return lines
