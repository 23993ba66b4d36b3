"""A draft folder: config.json, model.safetensors, the recipe and where it came from. Write one, load one.

The layout is the published one, so released checkpoints load here and ours load elsewhere. The folder may carry the
target's embedding and head (``embed_tokens.weight``, ``lm_head.weight``); without them they are taken from the target.
An imported draft may have trained its own: its config then has ``own_embedding`` or ``own_head``. Tensors beyond
``SHARD_BYTES`` are cut into several files with an index, as transformers does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepspec import registry
from deepspec.algorithms.base import Algorithm, DraftModel
from deepspec.errors import DraftError, RecipeError
from deepspec.files import (
    check_digests,
    digests_of,
    read_index,
    read_json,
    safe_join,
    sealed,
    sha256_file,
    sha256_json,
    temporary_file,
    undone_on_error,
    write_json,
    write_text,
)
from deepspec.targets import Target, TargetSpec
from deepspec.targets.load import check_rope, family_of
from deepspec.targets.stored import check_finite

FROZEN = ("embed_tokens.weight", "lm_head.weight")
OWN = ("own_embedding", "own_head")  # keys of a config.json whose draft trained these two for itself
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, PROVENANCE, RECIPE = "config.json", "provenance.json", "recipe.yaml"
SHARD_BYTES = 5 * 10**9
IMPORT = "import it first: deepspec import FOLDER OUT"


def save_draft(
    folder: str | Path,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
    recipe_text: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a draft folder; ``provenance.json`` is written last: it exists = the folder is complete.

    It holds the SHA-256 of every file that is written here.

    Args:
        folder: created where missing.
        state: tensors by published name; include the two frozen ones to make the folder standalone.
        config: config.json.
        provenance: versions, seeds, digests.
        recipe_text: the resolved recipe as YAML.
        shard_bytes: no file of weights is larger, unless one tensor is.

    Raises:
        DraftError: the folder already holds a draft.
    """
    folder = Path(folder)
    if (folder / PROVENANCE).exists():
        raise DraftError("already holds a draft", file=folder, remedy="name another folder, or remove this one")
    with undone_on_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        names = [*_write_weights(folder, state, shard_bytes), CONFIG]
        write_json(folder / CONFIG, dict(config))
        seal_draft(folder, names, provenance, recipe_text)


def seal_draft(
    folder: Path, names: Sequence[str], provenance: Mapping[str, Any], recipe_text: str | None = None
) -> None:
    """Write the recipe beside the draft's files ``names``, and last the provenance with the SHA-256 of them all."""
    if recipe_text is not None:
        write_text(folder / RECIPE, recipe_text)
        names = [*names, RECIPE]
    write_json(folder / PROVENANCE, sealed({**provenance, "sha256": digests_of(folder, names)}))


def _write_weights(folder: Path, state: Mapping[str, Tensor], shard_bytes: int) -> list[str]:
    """Write the tensors; returns the names of the files."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    if tensors.get(FROZEN[0]) is not None and _shared(tensors[FROZEN[0]], tensors.get(FROZEN[1])):
        tensors[FROZEN[1]] = tensors[FROZEN[1]].clone()  # a tied head: safetensors refuses shared storage
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=shard_bytes)
    for file, names in split.filename_to_tensors.items():
        with temporary_file(folder / file) as temporary:
            save_file({name: tensors[name] for name in names}, temporary, metadata={"format": "pt"})
    if split.is_sharded:
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    return [*split.filename_to_tensors, *([INDEX] if split.is_sharded else [])]


def _shared(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def weight_files(folder: str | Path) -> list[Path]:
    """The files of a draft's weights, in a fixed order: the single one, else those of the index, as in transformers.

    Raises:
        DraftError: there is none.
    """
    folder = Path(folder)
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        return [folder / name for name in read_index(folder / INDEX, DraftError)]
    if not safe_join(folder, WEIGHTS, DraftError, "weights").is_file():
        raise DraftError("no such file", file=folder / WEIGHTS, remedy="is this a draft folder?")
    return [folder / WEIGHTS]


def weights_sha256(folder: str | Path) -> str:
    """SHA-256 of a draft's weights: of the one file, or of the digests of all files."""
    digests = [sha256_file(path) for path in weight_files(folder)]
    return digests[0] if len(digests) == 1 else sha256_json(digests)


def read_provenance(folder: Path) -> dict[str, Any]:
    """The content of ``provenance.json``; empty where the folder has none (a foreign draft).

    Raises:
        DraftError: it is not ours, or has changed since it was written.
    """
    values: Any = read_json(folder / PROVENANCE, DraftError) if (folder / PROVENANCE).is_file() else {}
    if not isinstance(values, dict) or not isinstance(values.get("sha256", {}), dict):
        wanted = "a JSON object, its `sha256` too"
        raise DraftError("not where a draft came from", file=folder / PROVENANCE, found=values, wanted=wanted)
    return values


def check_files(folder: Path, *, rewritten: bool = False) -> None:
    """Compare a draft's files with the digests of its ``provenance.json``; a foreign or older draft has none.

    Args:
        rewritten: config.json was rewritten in another format's form, so that only the other files are compared.

    Raises:
        DraftError: a file has changed since the draft was written.
    """
    remedy = f"put it back, or remove {PROVENANCE} where you changed the draft on purpose"
    digests = read_provenance(folder).get("sha256", {})
    compared = {name: digest for name, digest in digests.items() if not (rewritten and name == CONFIG)}
    check_digests(folder, compared, DraftError, remedy)


def read_config(folder: Path, remedy: str = "is this a draft folder?") -> dict[str, Any]:
    """``config.json``, read before anything else of a draft: the whole folder's digests are checked here.

    Raises:
        DraftError: it is missing, or a file of the draft has changed.
    """
    check_files(folder)
    config: dict[str, Any] = read_json(folder / CONFIG, DraftError, remedy)
    return config


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of a draft folder, one file or several.

    Raises:
        DraftError: a file that is missing or cut, or a weight that is not finite.
    """
    state: dict[str, Tensor] = {}
    for path in weight_files(folder):
        state |= read_tensors(path)
    return state


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one file.

    Raises:
        DraftError: it is missing or cut, or a weight is not finite.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError:
        raise DraftError("no such file", file=path, remedy="the index names it; fetch all of the folder") from None
    except SafetensorError as problem:
        raise DraftError(f"not a safetensors file ({problem})", file=path) from None
    check_finite(tensors, path, DraftError)
    return tensors


def draft_algorithm(config: Mapping[str, Any], file: str | Path | None = None) -> Algorithm:
    """The algorithm of a draft: the one of the registry that its config.json matches.

    Raises:
        DraftError: none does, or several.
    """
    known: list[Algorithm] = [registry.algorithm(name) for name in registry.ALGORITHMS]
    found = [one for one in known if one.matches(config)]
    if len(found) == 1:
        return found[0]
    wanted = " or ".join(dict.fromkeys(f"*{one.architecture}" for one in known))
    remedy = IMPORT if not found else f"fix `matches` of {' or '.join(one.name for one in found)}"
    raise DraftError(
        "several algorithms claim this draft" if found else "unknown draft architecture", file=file,
        key="architectures", found=config.get("architectures"), wanted=wanted, remedy=remedy,
    )  # fmt: skip


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
        DraftError: a missing or changed file, an unknown or missing weight, one that is not finite, or a draft of
            another target.
    """
    folder = Path(folder)
    config = read_config(folder)
    if target is not None:
        check_target(config, target.spec, folder / "config.json")
    model = build_draft(config, folder / "config.json")
    state = read_weights(folder)
    frozen = {name: state.pop(name) for name in FROZEN if name in state}
    check_weights(model, state, folder)
    model.load_state_dict(state)
    stored = next(iter(state.values())).dtype
    model = model.to(device or (target.device if target else "cpu"), dtype or (target.dtype if target else stored))
    embedding, head = _frozen_weights(folder, config, frozen, target)
    model.attach(embedding, head, None if target is None else target.head_weight)
    return model.eval()


def build_draft(config: Mapping[str, Any], file: Path) -> DraftModel:
    """An uninitialised draft of a config.json in the published layout.

    Raises:
        DraftError: an unknown architecture, a missing field or a value out of range.
    """
    if "deepspec" in config:
        raise DraftError("a draft in an engine's layout, not in ours", file=file, remedy=IMPORT)
    algorithm = draft_algorithm(config, file)
    if "model_type" not in config:
        raise DraftError("missing field", file=file, key="model_type")
    family = family_of(config["model_type"], file)
    check_rope(config, file, DraftError)
    spec = TargetSpec(str(file.parent), family, config, config["model_type"])
    try:
        parsed, shape = algorithm.read_config(config), spec.shape
        algorithm.check_target(parsed, spec)
    except KeyError as missing:
        raise DraftError("missing field", file=file, key=missing.args[0]) from None
    except RecipeError as error:
        key = str(error.key).removeprefix("draft.")
        raise DraftError(error.problem, file=file, key=key, found=error.found, wanted=error.wanted) from None
    return algorithm.build_model(parsed, shape, family)


def check_weights(model: DraftModel, state: Mapping[str, Tensor], path: Path) -> None:
    """Check that ``state``, but for the frozen two, has exactly the model's tensors, in its shapes.

    Raises:
        DraftError: an unknown or missing weight, or a wrong shape.
    """
    wanted = model.state_dict()
    unknown, missing = sorted(set(state) - set(wanted) - set(FROZEN)), sorted(set(wanted) - set(state))
    if unknown or missing:
        problem, lacking = "weights do not fit the config", missing or "no others"
        raise DraftError(problem, file=path, found=unknown or None, wanted=lacking)
    for name, tensor in wanted.items():
        found, shape = tuple(state[name].shape), tuple(tensor.shape)
        if found != shape:
            raise DraftError("wrong shape", file=path, key=name, found=found, wanted=shape)


def _frozen_weights(
    folder: Path, config: Mapping[str, Any], stored: Mapping[str, Tensor], target: Target | None
) -> list[Tensor]:
    """Embedding and head: the target's, or the folder's where there is no target or the draft trained its own.

    Raises:
        DraftError: there is none, or the folder's is not the target's.
    """
    chosen = []
    for name, own in zip(FROZEN, map(config.get, OWN), strict=True):
        weight = stored.get(name)
        if weight is None and (target is None or own):
            remedy = "give the target" if target is None and not own else "the config says that the draft has its own"
            raise DraftError("has no embedding and head", file=folder, wanted=name, remedy=remedy)
        if target is None or own:
            chosen.append(weight)
            continue
        theirs = target.embed_weight if name == FROZEN[0] else target.head_weight
        if weight is not None:
            _check_same(folder, name, weight, theirs, target)
        chosen.append(theirs)
    return chosen  # type: ignore[return-value]


def _check_same(folder: Path, name: str, stored: Tensor, theirs: Tensor, target: Target) -> None:
    """The folder's copy of a frozen weight is the target's as bfloat16 sees it: training may have rounded it."""
    rounded = torch.bfloat16
    if stored.shape == theirs.shape and torch.equal(stored.to(theirs.device, rounded), theirs.to(rounded)):
        return
    raise DraftError(
        "draft of another target", file=folder, key=name, found=f"{tuple(stored.shape)} with other values",
        wanted=f"{tuple(theirs.shape)} as in {target.spec.path}",
        remedy="name the target it was trained for; a draft that trained its own says own_embedding or own_head",
    )  # fmt: skip


def check_target(config: Mapping[str, Any], target: TargetSpec, file: Path | None) -> None:
    """Check that a draft's widths are the target's.

    Raises:
        DraftError: they are not.
    """
    sizes = {"hidden_size": target.hidden_size, "vocab_size": target.vocab_size, "num_target_layers": target.num_layers}
    for key, size in sizes.items():
        if config.get(key) != size:
            wanted = f"{size} as in {target.path}"
            raise DraftError("draft of another target", file=file, key=key, found=config.get(key), wanted=wanted)
