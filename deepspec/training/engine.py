"""DeepSpeed: the only file that imports its runtime.

Forward, backward, step, save and load of a sharded model, on one process or many, on GPUs or on CPUs over gloo.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.constants import default_pg_timeout
from torch import Tensor, nn

from deepspec.algorithms.base import DraftModel
from deepspec.batch import Batch, Part
from deepspec.checkpoints import known_types
from deepspec.distributed import FOREVER, World, pick_device, process_group, world_from_environment
from deepspec.errors import CheckpointError
from deepspec.metrics import LossTerms
from deepspec.nn.sequence import ALONE, SequenceGroup
from deepspec.recipe import TrainSection
from deepspec.training.settings import accumulation_steps, deepspeed_settings, model_dtype, zero_stage

log = logging.getLogger(__name__)
UNIVERSAL_VERSION = 0.4


KEPT_SHAPES = "64"


@contextlib.contextmanager
def training_processes() -> Iterator[World]:
    """The process group of the launcher, or one of a single process.

    On CPU the shared-memory op of DeepSpeed stays off: it needs a compiler at run time and leaves 69 MB per rank
    in /dev/shm. oneDNN keeps what it compiled for a product's shape, some 2 MB each, and steps differ in their shapes:
    it keeps the last of :data:`KEPT_SHAPES`, not its usual 1,024.
    """
    backend, world = "nccl", world_from_environment()
    if torch.cuda.is_available():
        torch.cuda.set_device(pick_device(world.local_rank))
    else:
        backend = "gloo"
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KEPT_SHAPES)  # read at the first product
        # before DeepSpeed asks: it would compile test programs, which a kill leaves in the temporary folder
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    timeout = FOREVER if backend == "gloo" else default_pg_timeout  # of what a GPU waits for inside a step
    with process_group(world, backend, timeout, even_alone=True, error=CheckpointError):
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
        yield world


class Engine:
    """A draft model under DeepSpeed.

    Args:
        model: the draft, its frozen weights attached.
        train: the recipe's section.
        world: this process's rank.
        universal: whether :meth:`load` will read a Universal Checkpoint.
    """

    def __init__(self, model: nn.Module, train: TrainSection, world: World, universal: bool = False) -> None:
        settings = deepspeed_settings(train, world.size)
        if universal:
            settings["checkpoint"] = {"load_universal": True}
        self.train, self.world = train, world
        self.stage, self.dtype = zero_stage(settings), model_dtype(settings)
        self.accumulation = accumulation_steps(train, world.size)
        self.device = pick_device(world.local_rank)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trainable, train.lr, betas=(train.betas[0], train.betas[1]), eps=train.eps, weight_decay=train.weight_decay
        )
        with contextlib.redirect_stdout(io.StringIO()):  # it prints unwanted memory tables
            self.engine = deepspeed.initialize(
                model=model, model_parameters=trainable, optimizer=self.optimizer, config=settings
            )[0]
        for state in self.optimizer.state.values():  # stage 0 in bf16 allocates them by a step on zeros, and counts it
            state["step"].zero_()
        self.model: nn.Module = self.engine.module
        self._norm: Tensor | None = None
        if self.stage == 0 and self.dtype == torch.float32:  # the one case whose norm DeepSpeed computes and drops
            self.engine.clip_fp32_gradients = self._clip
        self.sequence = sequence_group(world, train.sequence_parallel)
        if isinstance(self.model, DraftModel):
            self.model.sequence = self.sequence
        self.control = dist.new_group(backend="gloo")  # host-side agreement without a device synchronisation

    def begin_micro_batch(self, last: bool) -> None:
        """Set whether this micro-batch is the step's last: steps may differ in their number (`train.micro_tokens`)."""
        self.engine.set_gradient_accumulation_boundary(last)

    def forward(self, batch: Batch) -> LossTerms:
        """The loss terms of a micro-batch, which is moved to the device and the model's dtype."""
        terms: LossTerms = self.engine(batch.to(self.device, self.dtype))
        return terms

    def backward(self, terms: LossTerms, step_weight: float) -> Tensor:
        """Add the micro-batch's share of the step's gradient; returns its share of the step's loss (detached scalar).

        DeepSpeed averages over ranks and divides by the accumulation steps of its configuration; the loss of a step is
        a sum over ranks and micro-batches, divided by the step's weight: it does not depend on the cut.
        """
        share = terms.weighted_sum() / step_weight
        self.engine.backward(share * (self.world.size * self.accumulation))
        return share.detach()

    def step(self, lr: float) -> None:
        """End a micro-batch; at the last one of the step update the weights with rate ``lr``."""
        train = self.train
        for group in self.optimizer.param_groups:
            group.update(lr=lr, betas=tuple(train.betas), eps=train.eps, weight_decay=train.weight_decay)
        self.engine.step()

    def _clip(self) -> None:
        self._norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.train.grad_clip)

    def grad_norm(self) -> float:
        """Norm of the last step's gradient before clipping; nan where DeepSpeed did not compute it."""
        norm = self.engine.get_global_grad_norm() if self._norm is None else self._norm
        return float("nan") if norm is None else float(norm)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks of a CPU tensor, on the host."""
        if self.world.size > 1:
            dist.all_reduce(values, group=self.control)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world.size > 1:
            dist.barrier(group=self.control)

    def saved_bytes(self) -> int:
        """About as many as :meth:`save` writes: of every weight that is trained AdamW's master copy and two moments."""
        every = list(self.model.parameters())
        counts = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in every]  # of a sharded one, its all
        pairs = zip(every, counts, strict=True)
        return sum(count * (one.itemsize + 12 * one.requires_grad) for one, count in pairs)

    def save(self, folder: Path, tag: str) -> None:
        """Write the draft's weights, frozen ones too, and optimizer state to ``folder/tag`` (every rank calls this)."""
        info = {"universal_checkpoint_info": {"universal_checkpoint_version": UNIVERSAL_VERSION}}
        self.engine.save_checkpoint(str(folder), tag=tag, client_state=info, save_latest=False)

    def load(self, folder: Path, tag: str, steps: int) -> None:
        """Read what :meth:`save` wrote, after ``steps`` optimizer steps.

        Raises:
            CheckpointError: DeepSpeed cannot read it.
        """
        try:
            with known_types(folder / tag):
                found, _ = self.engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False)
        except (RuntimeError, OSError, ValueError, KeyError, AssertionError) as problem:
            line = (str(problem).strip() or repr(problem)).splitlines()[0]
            raise CheckpointError(f"cannot be read ({line})", file=folder / tag) from problem
        if found is None:
            raise CheckpointError("no checkpoint files", file=folder / tag)
        self.engine.global_steps = steps
        self.engine.micro_steps = steps * self.accumulation
        self.engine.global_samples = steps * self.train.global_batch

    def set_untrained(self, values: Mapping[str, Tensor]) -> None:
        """Overwrite buffers (a reduced vocabulary is one) and frozen weights: a Universal Checkpoint holds neither."""
        frozen = {name: weight for name, weight in self.model.named_parameters() if not weight.requires_grad}
        own = dict(self.model.named_buffers()) | frozen
        sharded = deepspeed.zero.GatheredParameters(list(frozen.values()), modifier_rank=0, enabled=self.stage == 3)
        with torch.no_grad(), sharded:
            for name in values.keys() & own.keys():
                own[name].copy_(values[name])

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it :meth:`forward` computes no gradients (every rank must call it equally often)."""
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train()

    @contextlib.contextmanager
    def complete_model(self) -> Iterator[nn.Module]:
        """The module with all its weights on every rank, for reading (ZeRO-3 gathers them meanwhile)."""
        parameters = list(self.model.parameters())
        enabled = self.stage == 3
        with deepspeed.zero.GatheredParameters(parameters, enabled=enabled), torch.no_grad():
            self.model.eval()
            try:
                yield self.model
            finally:
                self.model.train()

    def close(self) -> None:
        """Release the engine's hooks and buffers."""
        self.engine.destroy()


def sequence_group(world: World, of: int) -> SequenceGroup:
    """The ``of`` neighbouring ranks that share conversations with this one; their exchange is DeepSpeed's Ulysses."""
    if of == 1:
        return ALONE
    from deepspeed.sequence.layer import _SeqAllToAll

    groups = [dist.new_group(range(first, first + of)) for first in range(0, world.size, of)]
    own = groups[world.rank // of]

    def all_to_all(x: Tensor, scatter: int, gather: int) -> Tensor:
        exchanged: Tensor = _SeqAllToAll.apply(own, x, scatter, gather, 0)
        return exchanged

    return SequenceGroup(Part(world.rank % of, of), all_to_all)


def loss_backend(wanted: bool, device: torch.device) -> str:
    """The backend of the draft's loss: compiled on CUDA and where ``wanted`` (``train.compile``), if that works here.

    A small function is compiled to find out; where that fails, a line reports it.
    """
    if "DEEPSPEC_LOSS" in os.environ or not (wanted or device.type == "cuda"):
        return "auto"  # the environment variable chooses, or the device
    try:
        torch.compile(lambda x: (x * 2).exp().sum())(torch.ones(64, device=device))
    except (RuntimeError, ImportError, OSError) as problem:  # torch's own errors are RuntimeErrors
        line = next(iter(str(problem).strip().splitlines()), type(problem).__name__)
        log.info("torch.compile does not work here (%s); the loss runs uncompiled", line)
        return "tiled"
    return "compiled"


_CONVERT = """
import runpy, sys
from pathlib import Path
from deepspec.checkpoints import known_types
from deepspec.errors import run_main

def convert():
    with known_types(Path(sys.argv[sys.argv.index("--input_folder") + 1])):
        runpy.run_module("deepspeed.checkpoint.ds_to_universal", run_name="__main__", alter_sys=True)
    return 0

run_main(convert)
"""


def to_universal(source: Path, target: Path) -> None:
    """Convert a checkpoint folder of DeepSpeed's into a Universal Checkpoint, readable at any number of processes.

    Raises:
        CheckpointError: the conversion failed; its last line is given.
    """
    command = [
        sys.executable,
        "-c",
        _CONVERT,
        "--no_strict",
        "--input_folder",
        str(source),
        "--output_folder",
        str(target),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise CheckpointError(f"conversion for another number of processes failed ({lines[-1]})", file=source)
