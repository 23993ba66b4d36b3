"""A draft folder: config.json, model.safetensors, the recipe and where it came from. Write one, load one.

The layout is the published one, so released checkpoints load here and ours load elsewhere. The folder may carry the
target's embedding and head (``embed_tokens.weight``, ``lm_head.weight``); without them they are taken from the target.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepspec import registry
from deepspec.algorithms.base import Algorithm, DraftModel
from deepspec.errors import DraftError
from deepspec.files import read_json, sync_folder, write_json, write_text
from deepspec.targets import Target, TargetSpec
from deepspec.targets.load import family_of

FROZEN = ("embed_tokens.weight", "lm_head.weight")


def save_draft(
    folder: str | Path,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
    recipe_text: str | None = None,
) -> None:
    """Write a draft folder; ``provenance.json`` is written last: it exists = the folder is whole.

    Args:
        folder: created where missing.
        state: tensors by published name; include the two frozen ones to make the folder standalone.
        config: config.json.
        provenance: versions, seeds, digests.
        recipe_text: the resolved recipe as YAML.

    Raises:
        DraftError: the folder already holds a draft.
    """
    folder = Path(folder)
    if (folder / "provenance.json").exists():
        raise DraftError("already holds a draft", file=folder, remedy="name another folder, or remove this one")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".model.safetensors.tmp"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    if tensors.get(FROZEN[0]) is not None and _shared(tensors[FROZEN[0]], tensors.get(FROZEN[1])):
        tensors[FROZEN[1]] = tensors[FROZEN[1]].clone()  # a tied head: safetensors refuses shared storage
    save_file(tensors, temporary, metadata={"format": "pt"})
    with open(temporary, "rb+") as handle:
        handle.flush()
    temporary.replace(folder / "model.safetensors")
    sync_folder(folder)
    write_json(folder / "config.json", dict(config))
    if recipe_text is not None:
        write_text(folder / "recipe.yaml", recipe_text)
    write_json(folder / "provenance.json", dict(provenance))


def _shared(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def draft_algorithm(config: Mapping[str, Any], file: str | Path | None = None) -> Algorithm:
    """The algorithm of a draft from its config.json.

    Raises:
        DraftError: an architecture that is none of the published ones.
    """
    names = config.get("architectures") or [""]
    if names[0].endswith("Eagle3Model"):
        return registry.algorithm("eagle3")
    if names[0].endswith("DSparkModel"):
        plain = not config.get("markov_rank") and not config.get("enable_confidence_head")
        return registry.algorithm("dflash" if plain else "dspark")
    raise DraftError(
        "unknown draft architecture",
        file=file,
        key="architectures",
        found=names[0],
        wanted="*DSparkModel or *Eagle3Model",
    )


def load_draft(
    folder: str | Path,
    target: Target | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> DraftModel:
    """Load a draft, strictly: every weight known, none missing, every shape right.

    Args:
        folder: a draft folder.
        target: gives embedding and head where the folder has none, and is checked against the draft.
        dtype: of the weights; None takes the target's, or the file's without a target.
        device: None takes the target's, or the CPU.

    Raises:
        DraftError: a missing file, an unknown or missing weight, or a draft of another target.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json", DraftError, "is this a draft folder?")
    algorithm = draft_algorithm(config, folder / "config.json")
    if config.get("sample_from_anchor") is False:
        raise DraftError(
            "K slots that give K-1 drafts are another convention", file=folder / "config.json",
            key="sample_from_anchor", found=False, wanted=True,
        )  # fmt: skip
    family = family_of(config["model_type"], folder / "config.json")
    spec = TargetSpec(str(folder), family, config, config["model_type"])
    if target is not None:
        _check_target(folder, config, target)
    model = algorithm.build_model(_read_config(algorithm, config, folder), spec.shape, family)
    state = _read_weights(folder)
    embed, head = (state.pop(name, None) for name in FROZEN)
    _load_strictly(model, state, folder / "model.safetensors")
    kept = next(iter(state.values())).dtype
    model = model.to(device or (target.device if target else "cpu"), dtype or (target.dtype if target else kept))
    if target is not None:
        model.attach(target.embed_weight, target.head_weight)
    elif embed is not None and head is not None:
        model.attach(embed, head)
    else:
        raise DraftError(
            "has no embedding and head",
            file=folder / "model.safetensors",
            wanted=" and ".join(FROZEN),
            remedy="give the target",
        )
    return model.eval()


def _read_config(algorithm: Algorithm, config: Mapping[str, Any], folder: Path) -> Any:
    try:
        return algorithm.read_config(config)
    except KeyError as missing:
        raise DraftError("missing field", file=folder / "config.json", key=missing.args[0]) from None


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / "model.safetensors"
    try:
        return load_file(path)
    except FileNotFoundError:
        raise DraftError("no such file", file=path, remedy="is this a draft folder?") from None
    except SafetensorError as problem:
        raise DraftError(f"not a safetensors file ({problem})", file=path) from None


def _load_strictly(model: DraftModel, state: Mapping[str, Tensor], path: Path) -> None:
    wanted = model.state_dict()
    unknown, missing = sorted(set(state) - set(wanted)), sorted(set(wanted) - set(state))
    if unknown or missing:
        raise DraftError(
            "weights do not fit the config", file=path, found=unknown or None, wanted=missing or "no others"
        )
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            raise DraftError(
                "wrong shape", file=path, key=name, found=tuple(tensor.shape), wanted=tuple(wanted[name].shape)
            )
    model.load_state_dict(dict(state))


def _check_target(folder: Path, config: Mapping[str, Any], target: Target) -> None:
    pairs = {
        "hidden_size": target.spec.hidden_size,
        "vocab_size": target.spec.vocab_size,
        "num_target_layers": target.spec.num_layers,
    }
    for key, wanted in pairs.items():
        if config.get(key) != wanted:
            raise DraftError(
                "draft of another target", file=folder / "config.json", key=key, found=config.get(key),
                wanted=f"{wanted} as in {target.spec.path}",
            )  # fmt: skip
