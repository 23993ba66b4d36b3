"""DeepSpeed's settings: sharding, offload and precision from a JSON file, everything else from the recipe.

A value in two files can differ between them; so batch sizes, clipping, optimizer and schedule are injected
from the recipe at run time, and a JSON file that names one of them is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from deepspec.errors import RecipeError
from deepspec.files import read_json
from deepspec.recipe import TrainSection

FROM_RECIPE = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "train.grad_clip",
    "optimizer": "train.lr, train.betas, train.eps and train.weight_decay",
    "scheduler": "train.lr and train.warmup_ratio",
    "steps_per_print": "train.log_every",
    "tensorboard": "train.tensorboard",
    "wandb": "train.wandb_project",
    "activation_checkpointing": "train.activation_checkpointing",
}


def accumulation_steps(train: TrainSection, world_size: int) -> int:
    """Micro-batches per process and optimizer step that DeepSpeed is set to, so that the global batch is the recipe's.

    With `train.micro_tokens` steps differ in their number, and it is set to single samples; see
    :meth:`deepspec.training.engine.Engine.begin_micro_batch`. Processes that share conversations
    (`train.sequence_parallel`) count as one.

    Raises:
        RecipeError: the global batch cannot be cut into equal shares for this many processes, or these into groups.
    """
    of = train.sequence_parallel
    if world_size % of:
        raise RecipeError(
            "processes cannot be grouped", key="train.sequence_parallel", found=of,
            wanted=f"a divisor of {world_size}, the number of processes",
        )  # fmt: skip
    micro_batch = _counted_micro_batch(train)
    share = micro_batch * (world_size // of)
    if train.global_batch % share:
        groups = train.global_batch // micro_batch
        sizes = [of * size for size in range(1, min(groups, 4096) + 1) if groups % size == 0]
        raise RecipeError(
            f"global batch cannot be shared by {world_size} processes",
            key="train.global_batch",
            found=train.global_batch,
            wanted=f"a multiple of micro_batch x {'processes' if of == 1 else 'groups of processes'} = "
            f"{micro_batch} x {world_size // of} = {share}",
            remedy=f"with this recipe the number of processes can be one of {', '.join(map(str, sizes))}",
        )
    return train.global_batch // share


def _counted_micro_batch(train: TrainSection) -> int:
    """Samples of a micro-batch as DeepSpeed counts them."""
    return train.micro_batch if train.micro_tokens is None else 1


def deepspeed_settings(train: TrainSection, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run.

    Raises:
        RecipeError: the JSON file is missing or broken, names a key that belongs to the recipe, or asks for fp16 or for
            two precisions in one draft.
    """
    path = Path(train.deepspeed)
    settings = read_json(path, RecipeError, remedy="name a file of deepspeed_configs/ in train.deepspeed")
    if not isinstance(settings, dict):
        raise RecipeError("not a DeepSpeed configuration", file=path, found=settings, wanted="a JSON object")
    for key in ("fp16", "bf16", "zero_optimization"):
        if not isinstance(settings.get(key, {}), dict):
            raise RecipeError("not a section", file=path, key=key, found=settings[key], wanted="a JSON object")
    for key, owner in FROM_RECIPE.items():
        if key in settings:
            raise RecipeError("belongs to the recipe", file=path, key=key, remedy=f"remove it and set {owner}")
    if settings.get("fp16", {}).get("enabled"):
        raise RecipeError("fp16 is not supported", file=path, key="fp16", remedy="use bf16, or neither for fp32")
    for key in ("buffer_dtype", "keep_in_fp32_modules"):
        if key in settings.get("data_types", {}):
            raise RecipeError(
                "weights and buffers of a draft have one precision", file=path, key=f"data_types.{key}",
                remedy="remove it; norms, softmaxes, losses and rotary tables are fp32 in any case",
            )  # fmt: skip
    settings |= {
        "train_batch_size": train.global_batch * train.sequence_parallel,  # as it counts: every process its own samples
        "train_micro_batch_size_per_gpu": _counted_micro_batch(train),
        "gradient_accumulation_steps": accumulation_steps(train, world_size),
        "gradient_clipping": train.grad_clip,
        "steps_per_print": 2**31,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW also steps offloaded shards, without a compiler
    }
    if settings.get("bf16", {}).get("enabled"):
        # without it deepspeed 0.19's stage 1 adds the gradients of earlier micro-batches once more at each later one
        settings["bf16"]["immediate_grad_update"] = True
        # by itself DeepSpeed casts only parameters: one fp32 buffer (Gemma4's layer scalars) makes every hidden state
        # after it fp32. Rotary tables are no buffers here and stay fp32
        settings["data_types"] = {**settings.get("data_types", {}), "buffer_dtype": "bf16"}
    zero = settings.get("zero_optimization", {})
    if not torch.cuda.is_available():
        for part in ("offload_optimizer", "offload_param"):
            if part in zero:
                zero[part] |= {"pin_memory": False}
        if "overlap_comm" in zero:
            zero["overlap_comm"] = False
    return settings


def model_dtype(settings: dict[str, Any]) -> torch.dtype:
    """bfloat16 or float32, the dtype of the draft's weights and activations."""
    return torch.bfloat16 if settings.get("bf16", {}).get("enabled") else torch.float32


def zero_stage(settings: dict[str, Any]) -> int:
    """0, 1, 2 or 3."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))
