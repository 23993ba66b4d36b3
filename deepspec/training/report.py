"""What a run reports: sums kept on the device between log steps, one line per log step, TensorBoard, a JSONL of all."""

from __future__ import annotations

import json
import logging
import math
import resource
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspec.batch import Batch
from deepspec.errors import DeepSpecError
from deepspec.files import named, write_text
from deepspec.metrics import LossTerms
from deepspec.progress import clock
from deepspec.recipe import Recipe

log = logging.getLogger(__name__)
SHORT = ("loss", "tau", "accepted_length", "score", "lr")  # on the line of a step or a validation, as far as there
GROUPS = {  # of charts; what is in none of these is a term of the loss
    "acceptance": ("tau", "accept_rate", "accepted_length", "decoded_rounds", "score"),
    "speed": ("tokens_per_second", "samples_per_second", "memory_gb"),
    "data": ("data_wait", "padding"),
    "optimizer": ("lr", "grad_norm"),
}


class NonFiniteLoss(DeepSpecError):
    """The loss became NaN or infinite."""


class Meter:
    """Sums of loss terms and metrics since the last report; no host synchronisation until then.

    Args:
        reduce: sums a CPU tensor over ranks.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
        self.reduce = reduce
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._shares: list[Tensor] = []  # of the step's loss, one per micro-batch
        self._samples: list[tuple[int, tuple[int, ...]]] = []  # (step, sample ids) of the same micro-batches
        self.steps = 0
        self.counts = torch.zeros(3, dtype=torch.float64)  # samples, real tokens, tokens with padding

    def add(self, step: int, batch: Batch, terms: LossTerms, share: Tensor | None = None) -> None:
        """Add one micro-batch; ``share`` is its part of the loss of optimizer step ``step``."""
        for name, ratio in {**terms.terms, **terms.metrics}.items():
            total = ratio.total.detach().double()
            weight = ratio.weight.detach().double().expand_as(total)
            if name in self._sums:
                old = self._sums[name]
                total, weight = total + old[0], weight + old[1]
            self._sums[name] = (total, weight)
        if share is not None:
            self._shares.append(share)
            self._samples.append((step, batch.supervision.sample_ids))
        if batch.part.number:
            return  # another rank that shares these samples counts them
        rows, padded = batch.input_ids.shape
        real = int(batch.supervision.lengths.sum())  # the batch as read, on the host
        self.counts += torch.tensor([rows, real, rows * padded], dtype=torch.float64)

    def check_finite(self) -> None:
        """Stop at a loss that is not a number (every rank calls this).

        Raises:
            NonFiniteLoss: with the optimizer step and the sample ids of the first such micro-batch of this rank.
        """
        shares = torch.stack(self._shares).double().cpu() if self._shares else torch.zeros(1, dtype=torch.float64)
        bad = ~torch.isfinite(shares)
        anywhere = self.reduce(bad.any().double().reshape(1))
        if anywhere.item() == 0:
            return
        if bad.any():
            step, samples = self._samples[int(bad.nonzero()[0])]
            where = f"in optimizer step {step + 1}, sample ids {list(samples)}"
        else:
            where = "on another rank"
        raise NonFiniteLoss(
            f"the loss is not finite {where}",
            found=float(shares[bad][0]) if bad.any() else None,
            remedy="lower train.lr or look at these samples; the last checkpoint is from before",
        )

    def take(self) -> dict[str, Any]:
        """All sums reduced over ranks and divided, then reset: loss, terms, metrics, samples, tokens, padding."""
        names = sorted(self._sums)
        shapes = [self._sums[name][0].shape for name in names]
        loss = torch.stack(self._shares).double().sum().cpu().reshape(1) if self._shares else torch.zeros(1).double()
        parts = [loss, self.counts] + [part.reshape(-1).cpu() for name in names for part in self._sums[name]]
        flat = self.reduce(torch.cat(parts))
        values: dict[str, Any] = {"loss": float(flat[0]) / max(self.steps, 1)} if self._shares else {}
        start = 4
        for name, shape in zip(names, shapes, strict=True):
            size = math.prod(shape)
            total, weight = flat[start : start + size], flat[start + size : start + 2 * size]
            mean = total / weight.clamp_min(1e-12)
            values[name] = mean.tolist() if len(shape) else float(mean)
            start += 2 * size
        values |= {
            "samples": int(flat[1]),
            "tokens": int(flat[2]),
            "padding": 1 - float(flat[2] / flat[3].clamp_min(1)),
        }
        self.__init__(self.reduce)  # type: ignore[misc]
        return values


def wandb_session(recipe: Recipe, run: Path, first_step: int) -> Any:
    """A session of Weights & Biases (extra ``wandb``); by ``<run>/wandb.id`` a resumed run continues its own.

    Raises:
        DeepSpecError: the library is not installed.
    """
    try:
        import wandb
    except ImportError:
        remedy = "pip install 'deepspec[wandb]', or set train.wandb_project=null"
        raise DeepSpecError("wandb is not installed", key="train.wandb_project", remedy=remedy) from None
    name = run / "wandb.id"
    if first_step == 0 or not name.exists():
        write_text(name, uuid.uuid4().hex[:8])
    return wandb.init(
        project=recipe.train.wandb_project, name=recipe.name, id=name.read_text(encoding="utf-8"), dir=str(run),
        config=recipe.to_dict(), resume="allow",
    )  # fmt: skip


def flatten(values: dict[str, Any]) -> dict[str, float]:
    """Numbers only; a list becomes ``name@1, name@2, ...`` (draft positions count from 1)."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, list):
            flat |= {f"{name}@{position}": float(one) for position, one in enumerate(value, 1)}
        elif isinstance(value, int | float):
            flat[name] = float(value)
    return flat


class Reporter:
    """What rank 0 reports: a line on stdout, ``log.jsonl``, TensorBoard, Weights & Biases.

    A run resumed after ``first_step`` steps does later ones again (it was killed after its last checkpoint): their
    rows are taken out of the log first, so that each step is there once.
    """

    def __init__(self, recipe: Recipe, run: Path, total_steps: int, first_step: int) -> None:
        self.run, self.total, self.first = run, total_steps, first_step
        cut_log(run / "log.jsonl", first_step)
        self.events: Any = None  # of TensorBoard
        if recipe.train.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)
        self.session = wandb_session(recipe, run, first_step) if recipe.train.wandb_project else None
        self.begun = self.last = time.perf_counter()

    def training(self, step: int, values: dict[str, Any], wait_seconds: float) -> None:
        """A log step: rates since the last one, time left, the line."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        left = (now - self.begun) / (step - self.first) * (self.total - step)
        rates = {
            "tokens_per_second": values.pop("tokens") / seconds,
            "samples_per_second": values.pop("samples") / seconds,
            "data_wait": wait_seconds / seconds,
            "memory_gb": memory_gb(),
        }
        self._write("train", step, values | rates)
        line = [*_shown(values), f"{rates['tokens_per_second']:,.0f} tokens/s", f"left {clock(left)}"]
        log.info(" | ".join([f"step {step}/{self.total}", *line]))

    def validation(self, step: int, values: dict[str, Any]) -> None:
        """The result of a validation."""
        shown = {
            name: value for name, value in values.items() if name.split("/")[-1] not in ("samples", "tokens", "padding")
        }
        self._write("validation", step, shown)
        log.info(" | ".join([f"validation at step {step}", *_shown(shown)]))

    def exclude(self, seconds: float) -> None:
        """Leave time spent outside training steps (validation) out of the next rates."""
        self.last += seconds

    def _write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        path = self.run / "log.jsonl"
        with named(path), open(path, "a", encoding="utf-8") as log:
            log.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        part = "" if kind == "train" else f"{kind}/"
        flat = {f"{_group(name)}/{part}{name}": value for name, value in flatten(values).items()}
        if self.events is not None:
            for name, value in flat.items():
                self.events.add_scalar(name, value, step)
        if self.session is not None:
            self.session.log(flat, step=step)

    def close(self) -> None:
        """Flush TensorBoard and Weights & Biases."""
        if self.events is not None:
            self.events.close()
        if self.session is not None:
            self.session.finish()


def cut_log(path: Path, last: int) -> None:
    """Keep the rows of steps up to ``last``; a row that a kill cut off is removed."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    kept = [line for line in text.splitlines(keepends=True) if line.endswith("\n") and json.loads(line)["step"] <= last]
    if len("".join(kept)) < len(text):
        write_text(path, "".join(kept))


def memory_gb() -> float:
    """Peak memory of this process so far: of the GPU where there is one, else resident, in GB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _group(name: str) -> str:
    """The group of charts that a number stands in; the terms of a loss are whatever the algorithm calls them."""
    short = name.split("/")[-1].split("@")[0]
    return next((group for group, names in GROUPS.items() if short in names), "loss")


def _shown(values: dict[str, Any]) -> Iterator[str]:
    """What the line shows of the numbers."""
    for name, value in values.items():
        if name.split("/")[-1] in SHORT:
            yield f"{name.replace('_', ' ')} {value:{'.2e' if name == 'lr' else '.4f'}}"
