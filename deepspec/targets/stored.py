"""A target's files, read as transformers would read them, without a value in memory until it is read.

transformers decides which file is read, how its names become the model's (prefixes; experts that are stored one by one
and held together), what is tied, and what is missing or left over. Its own loader therefore runs here over tensors
without storage: what it finds there is what it would find while it loads the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from deepspec.errors import DeepSpecError, TargetError
from deepspec.files import read_index, read_json, safe_join
from deepspec.progress import Progress
from deepspec.targets.adaptor import auto_class

NAMES = (  # in the order in which transformers looks for them
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
SHOWN = 8  # names of one kind in an error


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    file: str
    name: str
    shape: tuple[int, ...]

    def read(self, dtype: torch.dtype) -> Tensor:
        """The tensor; the file is mapped again for each, so that no more than one of them stays in memory."""
        with safe_open(self.file, "pt") as opened:
            tensor: Tensor = opened.get_tensor(self.name)
        return tensor.to(dtype)


@dataclass(frozen=True)
class StackedTensor:
    """One tensor of many stored ones: those of a row after each other, the rows along a new first axis."""

    rows: tuple[tuple[StoredTensor, ...], ...]

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of the whole; None where the rows' parts differ in shape."""
        shapes = {tuple(part.shape for part in row) for row in self.rows}
        if len(shapes) != 1:
            return None
        first, *others = shapes.pop()
        if any(other[1:] != first[1:] for other in others):
            return None
        return len(self.rows), first[0] + sum(other[0] for other in others), *first[1:]

    def read(self, dtype: torch.dtype) -> Tensor:
        """The tensor."""
        return torch.stack([torch.cat([part.read(dtype) for part in row]) for row in self.rows])


@dataclass(frozen=True)
class StoredTarget:
    """A model on ``meta`` and where its tensors are stored."""

    model: Any  # of transformers
    transforms: list[Any] = field(repr=False)  # of names and values, as transformers has them for this model
    found: Mapping[str, StoredTensor]  # by the model's name: what is stored as the model holds it
    parts: Mapping[str, list[StoredTensor]] = field(repr=False, default_factory=dict)  # what it is put together from
    unused: Mapping[str, StoredTensor] = field(repr=False, default_factory=dict)  # by stored name: no part of the model

    def name_of(self, module: nn.Module) -> str:
        """The model's name of a module."""
        return next(name for name, one in self.model.named_modules() if one is module)

    def embedding_and_head(self) -> tuple[str, str]:
        """The model's names of their weights."""
        modules = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        embed, head = (f"{self.name_of(module)}.weight" for module in modules)
        return embed, head

    def holds(self, name: str) -> bool:
        """Whether the files hold the model's tensor ``name``; a tied one is stored under one of its names."""
        return name in self.found or name in self.parts

    def tensor(self, name: str) -> StoredTensor | PartedTensor | None:
        """The model's tensor ``name``; None where the files do not hold it."""
        return PartedTensor(self, name) if name in self.parts else self.found.get(name)

    def read(self, name: str) -> Tensor:
        """The model's tensor ``name``, in the dtype that it is loaded in."""
        dtype = self.model.state_dict()[name].dtype
        if name in self.found:
            return self.found[name].read(dtype)
        run_loader(self.model, {part.name: part.read(dtype) for part in self.parts[name]}, self.transforms, "cpu")
        loaded: Tensor = self.model.get_parameter_or_buffer(name).detach()
        owner, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(owner), leaf, nn.Parameter(loaded.to("meta"), requires_grad=False))
        return loaded

    def tied(self) -> bool:
        """Whether embedding and head are one tensor where both may be stored: transformers' rule.

        They are tied where the config has it so, unless the files hold two with different values.
        """
        embed, head = self.embedding_and_head()
        if not {embed, head} & set(self.model.all_tied_weights_keys):
            return False
        return not (self.holds(embed) and self.holds(head)) or torch.equal(self.read(embed), self.read(head))


@dataclass(frozen=True)
class PartedTensor:
    """A tensor of the model that transformers puts together from stored parts."""

    target: StoredTarget
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the model's tensor."""
        return tuple(self.target.model.state_dict()[self.name].shape)

    def read(self, dtype: torch.dtype) -> Tensor:
        """The tensor."""
        return self.target.read(self.name).to(dtype)


def open_stored(path: str | Path, dtype: torch.dtype, revision: str | None) -> StoredTarget | None:
    """A target whose tensors can be read one by one; None for one that is quantized or not stored as safetensors.

    Raises:
        TargetError: tensors that are missing, left over or of another size than the config's.
    """
    from transformers import AutoConfig
    from transformers.conversion_mapping import get_model_conversion_mapping

    config = AutoConfig.from_pretrained(str(path), revision=revision)
    stored = _stored_tensors(path, revision, config)
    if not stored or getattr(config, "quantization_config", None) is not None:
        return None
    with torch.device("meta"):
        model: Any = auto_class(config, str(path)).from_config(config, dtype=dtype)
    transforms = get_model_conversion_mapping(model)
    shells = {name: torch.empty(tensor.shape, dtype=dtype, device="meta") for name, tensor in stored.items()}
    info = run_loader(model, shells, transforms, "meta")
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    check_fit(path, info.missing_keys, info.unexpected_keys, info.mismatched_keys, info.conversion_errors)
    return StoredTarget(model, transforms, *_locate(model, stored, transforms))


def weight_files(path: str | Path, revision: str | None = None, fetch: bool = False) -> list[str]:
    """The files that transformers loads a target's weights from; none where one of them is missing.

    Args:
        path: the target's folder or hub id.
        revision: of the hub id.
        fetch: whether files of a hub id that are not on this machine may be fetched.

    Raises:
        TargetError: a broken index.
    """

    def find(name: str) -> str | None:
        found: str | None = cached_file(
            str(path), name, revision=revision, local_files_only=not fetch,
            _raise_exceptions_for_missing_entries=False,
        )  # fmt: skip
        return found

    from transformers.utils import cached_file

    config = find("config.json")
    own = read_json(config, TargetError).get("transformers_weights") if config else None
    if config and own:
        safe_join(Path(config).parent, str(own), TargetError, "transformers_weights")
    for name in (*([own] if own else []), *NAMES):
        file = find(name)
        if file is None:
            continue
        if not name.endswith(".index.json"):
            return [file]
        shards = [find(shard) for shard in read_index(file, TargetError)]
        return [shard for shard in shards if shard is not None] if None not in shards else []
    return []


def _stored_tensors(path: str | Path, revision: str | None, config: Any) -> dict[str, StoredTensor]:
    """All stored tensors by stored name; none where the target has no readable safetensors files."""
    found: dict[str, StoredTensor] = {}
    try:
        files = weight_files(path, revision, fetch=True)
        if getattr(config, "transformers_weights", None) or not all(file.endswith(".safetensors") for file in files):
            return {}
        for file in files:
            with safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - no dict
                    found[key] = StoredTensor(file, key, tuple(opened.get_slice(key).get_shape()))
    except (OSError, SafetensorError):
        return {}
    return found


def run_loader(model: Any, tensors: Mapping[str, Tensor], transforms: list[Any], device: str) -> Any:
    """What transformers' loader makes of stored tensors; it puts them into ``model``. Returns its loading info."""
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    dtype = next(iter(tensors.values())).dtype
    plan = model._get_dtype_plan(dtype)
    config = LoadStateDictConfig(device_map={"": device}, dtype=dtype, dtype_plan=plan, weight_mapping=transforms)
    with silent():
        info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), config)
    return info


def _locate(
    model: Any, stored: Mapping[str, StoredTensor], transforms: list[Any]
) -> tuple[dict[str, StoredTensor], dict[str, list[StoredTensor]], dict[str, StoredTensor]]:
    """By the model's names: what is stored as it is, and what is put together from parts; and the rest as stored."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    states = model.state_dict()
    found: dict[str, StoredTensor] = {}
    parts: dict[str, list[StoredTensor]] = {}
    unused: dict[str, StoredTensor] = {}
    for key, tensor in stored.items():
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, states)
        if name not in states and key in states:  # as the loader itself then does
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, states)
        if name not in states:
            unused[key] = tensor
        elif pattern is None:
            found[name] = tensor
        else:
            parts.setdefault(name, []).append(tensor)
    return found, parts, unused


def check_fit(
    path: str | Path,
    missing: Iterable[str],
    unexpected: Iterable[str],
    mismatched: Iterable[tuple[str, Any, Any]],
    unreadable: Iterable[str] = (),
) -> None:
    """Refuse a target whose files and config do not belong together.

    Args:
        path: the target.
        missing: tensors that would be drawn at random.
        unexpected: tensors that no part of the model takes; those that transformers lists as harmless are left out.
        mismatched: (name, stored shape, shape by the config).
        unreadable: tensors that transformers failed to put together.

    Raises:
        TargetError: there is one of these.
    """
    sizes = [f"{name} {tuple(found)} for {tuple(wanted)}" for name, found, wanted in mismatched]
    kinds = {"missing": missing, "unexpected": unexpected, "of another size": sizes, "unreadable": unreadable}
    lines = [f"{kind}: {_listed(names)}" for kind, names in kinds.items() if names]
    if lines:
        raise TargetError(
            f"its tensors are not those of its config.json: {'; '.join(lines)}", file=path,
            wanted="every tensor of the model, none left over", remedy="fetch it again, or correct its config.json",
        )  # fmt: skip


def check_finite(tensors: Mapping[str, Tensor], file: str | Path, error: type[DeepSpecError] = TargetError) -> None:
    """Refuse weights that are infinite or no number: one pass over each.

    Raises:
        error: there is one; the tensor is named.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
            continue
        values = tensor.float() if tensor.itemsize == 1 else tensor  # float8 has no comparisons
        low, high = (float(value) for value in values.detach().aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            found = "NaN" if math.isnan(low) else "inf"
            remedy = "take an earlier checkpoint, or fetch it again"
            raise error("weights must be finite numbers", file=file, key=name, found=found, remedy=remedy)


def _listed(names: Iterable[str]) -> str:
    known = sorted(names)
    return ", ".join(known[:SHOWN]) + (f" and {len(known) - SHOWN} more" if len(known) > SHOWN else "")


@contextmanager
def silent(job: Progress | None = None) -> Iterator[None]:
    """Within it transformers logs only errors (:func:`check_fit` names what does not fit); its bars count ``job``."""
    from transformers.utils import logging

    def counted(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Any]:
        items = list(args[0])
        for number, item in enumerate(items):
            if job is not None and job.expected is not None:
                job.units = job.expected * number // len(items)
            yield item

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.set_tqdm_hook(counted)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.set_tqdm_hook(None)
