"""Export a draft to an engine's format, import one from it: from folder to folder, with the model card beside it."""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deepspec.checkpoints import steps_of
from deepspec.drafts import FROZEN, SHARD_BYTES, build_draft, check_weights, read_weights, save_draft, weights_sha256
from deepspec.errors import DraftError, nearest
from deepspec.export.card import model_card
from deepspec.export.consolidate import consolidate
from deepspec.export.hub import fetch_draft
from deepspec.export.parts import Draft, Format, ImportHints, ascending
from deepspec.files import read_json, undone_on_error, write_text
from deepspec.identity import shown
from deepspec.locks import is_free, one_writer
from deepspec.targets import load_spec, load_target_embeddings
from deepspec.targets.digests import digest_like

FORMATS = {
    "deepspec": "deepspec.export.published",
    "vllm": "deepspec.export.vllm",
    "sglang": "deepspec.export.sglang",
    "speculators": "deepspec.export.speculators",
    "zlab": "deepspec.export.zlab",
}


def find_format(name: str) -> Format:
    """The format called ``name``.

    Raises:
        DraftError: there is none; the message lists them.
    """
    if name not in FORMATS:
        raise DraftError("unknown format", found=name, remedy=nearest(name, FORMATS))
    found: Format = importlib.import_module(FORMATS[name]).FORMAT
    return found


@dataclass(frozen=True)
class ExportOptions:
    """What an export writes besides the draft's own weights."""

    format: str = "deepspec"
    embeddings: bool = True  # the target's embedding and head too, so that the folder stands alone
    target: str | None = None  # where they are read from; None: where the draft says it was trained
    dtype: str | None = None  # of a checkpoint's weights, "bf16" or "fp32"
    shard_bytes: int = SHARD_BYTES
    results: str | None = None  # results.json of an evaluation, for the model card


def read_draft(folder: Path) -> Draft:
    """A draft folder in the published layout, every weight checked against its config.

    Raises:
        DraftError: not a draft, or weights that do not fit.
    """
    file = folder / "config.json"
    config = read_json(file, DraftError, "name a draft folder, a checkpoint or a run")
    state = read_weights(folder)
    with torch.device("meta"):
        model = build_draft(config, file)
    check_weights(model, {name: tensor for name, tensor in state.items() if name not in FROZEN}, folder)
    return Draft(config, state, file)


def export_draft(source: str | Path, output: str | Path, options: ExportOptions) -> Draft:
    """Write ``source``, a draft folder, a checkpoint or a run, to ``output`` in another format.

    Returns:
        The draft in our layout, its target layers in rising order.

    Raises:
        DraftError: the format cannot carry this draft, ``output`` holds one already, or the source is broken.
        CheckpointError: a checkpoint that cannot be put together.
    """
    format_ = find_format(options.format)
    with one_writer(output, "export", DraftError):
        _check_free(Path(output))
        return _export(Path(source), Path(output), format_, options)


def _export(source: Path, output: Path, format_: Format, options: ExportOptions) -> Draft:
    if (source / "config.json").is_file():
        return _export_folder(source, output, format_, options)
    if not (source / "manifest.json").is_file() and not steps_of(source):
        wanted = "a draft folder (config.json), a checkpoint (manifest.json) or a run (checkpoints/)"
        raise DraftError("nothing to export", file=source, wanted=wanted)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        consolidate(source, Path(folder) / "draft", options.dtype, embeddings=False)
        return _export_folder(Path(folder) / "draft", output, format_, options)


def _export_folder(source: Path, output: Path, format_: Format, options: ExportOptions) -> Draft:
    draft = ascending(read_draft(source))
    _check_carried(draft, format_)  # before the target is loaded
    written = format_.write(_with_frozen(draft, options))
    if not options.embeddings:
        shared = _shared_frozen(draft)
        kept = {name: tensor for name, tensor in written.state.items() if name not in shared}
        written = Draft(written.config, kept, written.file)
    provenance = _provenance(source)
    provenance["export"] = {"format": format_.name, "embeddings": options.embeddings, "source": str(source)}
    recipe = source / "recipe.yaml"
    recipe_text = recipe.read_text(encoding="utf-8") if recipe.is_file() else None
    results = _results(source, options.results)
    with undone_on_error(output):
        write_text(output / "README.md", model_card(draft, format_, provenance, recipe_text, results, output.name))
        save_draft(output, written.state, written.config, provenance, recipe_text, options.shard_bytes)
    return draft


def _check_carried(draft: Draft, format_: Format) -> None:
    """Ask a format whether it carries a draft, with the formats that do where it does not.

    Raises:
        DraftError: it does not.
    """
    light = _on_meta(draft)
    try:
        format_.write(light)
    except DraftError as problem:
        others = [name for name in FORMATS if name != format_.name and _carries(name, light)]
        remedies = ([problem.remedy] if problem.remedy else []) + [f"export to {' or '.join(others)}"] * bool(others)
        raise DraftError(
            problem.problem, file=problem.file, key=problem.key, found=problem.found, wanted=problem.wanted,
            remedy=", or ".join(remedies) or None,
        ) from None  # fmt: skip


def _carries(name: str, draft: Draft) -> bool:
    try:
        find_format(name).write(draft)
    except DraftError:
        return False
    return True


def _on_meta(draft: Draft) -> Draft:
    """The same draft without values: what a format refuses it refuses by config and names."""
    state = {name: tensor.to("meta") for name, tensor in draft.state.items() if name not in ("d2t", "t2d")}
    return Draft(draft.config, state, draft.file)


def _shared_frozen(draft: Draft) -> set[str]:
    """The frozen tensors that a folder can do without, because every engine takes the target's."""
    owned = zip(FROZEN, ("own_embedding", "own_head"), strict=True)
    names = {name for name, key in owned if not draft.config.get(key)}
    return names - {FROZEN[1]} if "d2t" in draft.state else names


def _with_frozen(draft: Draft, options: ExportOptions) -> Draft:
    """The draft with the target's embedding and head, where the folder shall stand alone or a head must be cut."""
    lacking = [name for name in FROZEN if name not in draft.state]
    needed = options.embeddings or ("d2t" in draft.state and options.format != "deepspec")
    if not lacking and options.target is not None:  # nothing is taken from it, but it is said to be the draft's
        folder = Path(draft.file or "").parent
        load_spec(options.target)  # refuses what is no target
        _check_weights(options.target, None, _provenance(folder), folder)
    if not lacking or not needed:
        return draft
    path = options.target or draft.config.get("target_model_name_or_path")
    if path is None:
        remedy = "name it (--target), or leave its embedding and head out (--without-embeddings)"
        raise DraftError("does not say which target it was trained for", file=draft.file, remedy=remedy)
    folder = Path(draft.file or "").parent
    provenance = _provenance(folder)
    trained_on = provenance.get("target") or {}
    revision = trained_on.get("revision") if path == trained_on.get("path") else None
    target = load_target_embeddings(path, draft.state["fc.weight"].dtype, "cpu", revision)
    _check_weights(path, revision, provenance, folder)
    weights = dict(zip(FROZEN, (target.embed_weight, target.head_weight), strict=True))
    return Draft(draft.config, draft.state | {name: weights[name] for name in lacking}, draft.file)


def _check_weights(path: str, revision: str | None, provenance: Mapping[str, Any], folder: Path) -> None:
    """The target whose embedding and head are taken is the one that the draft was trained for, as far as it says.

    Raises:
        DraftError: it has other weights.
    """
    known = (provenance.get("target") or {}).get("weights")
    if known is None:
        said = f"note: {folder} does not say which target's weights it was trained for; those of {path} are taken"
        print(said, file=sys.stderr, flush=True)
        return
    caches = (provenance.get("data") or {}).get("caches") or [{}]  # the dtype that an older digest was made in
    found = digest_like(known, path, getattr(torch, caches[0].get("dtype", "bfloat16")), revision)
    if found != known:
        raise DraftError(
            "the target's weights are not those of the training", file=path, found=shown(found), wanted=shown(known),
            remedy="put it back, name the right one (--target), or leave its embeddings out (--without-embeddings)",
        )  # fmt: skip


def import_draft(
    source: str | Path, output: str | Path, format_name: str = "auto", facts: ImportHints | None = None
) -> tuple[Draft, str]:
    """Write a draft of another format to ``output`` in ours, so that our evaluator can measure it.

    Args:
        source: its folder, or ``owner/name`` on the hub.
        output: the folder to create.
        format_name: a format's name, or ``auto``: what its config says.
        facts: what the config leaves open.

    Returns:
        The draft in our layout, and the name of the format it was in.

    Raises:
        DraftError: unknown or missing weights, parts that our drafts have not, or a convention that is not stated.
    """
    with one_writer(output, "import", DraftError):
        _check_free(Path(output))
        return _import(str(source), Path(output), format_name, facts or ImportHints())


def _import(named: str, output: Path, format_name: str, facts: ImportHints) -> tuple[Draft, str]:
    source = fetch_draft(named)
    config = read_json(source / "config.json", DraftError, "name a folder with config.json and *.safetensors")
    format_ = recognise(config, source) if format_name == "auto" else find_format(format_name)
    foreign = Draft(config, read_weights(source), source / "config.json")
    draft = format_.read(foreign, facts)
    if "num_target_layers" in draft.config:
        _check_target(draft, facts)
    with torch.device("meta"):
        model = build_draft(draft.config, source / "config.json")
    check_weights(model, {name: tensor for name, tensor in draft.state.items() if name not in FROZEN}, source)
    provenance = _provenance(source)
    imported = {"format": format_.name, "source": named, "weights": weights_sha256(source)}
    provenance["import"] = imported
    recipe = source / "recipe.yaml"
    save_draft(
        output, draft.state, draft.config, provenance, recipe.read_text(encoding="utf-8") if recipe.is_file() else None
    )
    return draft, format_.name


def recognise(config: dict[str, Any], source: Path) -> Format:
    """The format of a config.json.

    Raises:
        DraftError: none that we know.
    """
    for name in FORMATS:
        if find_format(name).matches(config):
            return find_format(name)
    raise DraftError(
        "no format that we know", file=source / "config.json", key="architectures", found=config.get("architectures"),
        wanted=f"one of {', '.join(FORMATS)}", remedy="name it (--from)",
    )  # fmt: skip


def _check_target(draft: Draft, facts: ImportHints) -> None:
    """The draft's widths are those of the target that the user names, before anything is written."""
    if facts.target is None:
        return
    sizes = {"hidden_size": facts.target.hidden_size, "vocab_size": facts.target.vocab_size,
             "num_target_layers": facts.target.num_layers}  # fmt: skip
    for key, wanted in sizes.items():
        if draft.config.get(key) != wanted:
            found, wanted_text = draft.config.get(key), f"{wanted} as in {facts.target.path}"
            raise DraftError("draft of another target", file=draft.file, key=key, found=found, wanted=wanted_text)
    facts.target.check_layers(draft.config["target_layer_ids"], draft.file, "target_layer_ids")


def target_facts(path: str | None) -> Any:
    """The spec of the target ``path``, or None."""
    return None if path is None else load_spec(path)


def _provenance(folder: Path) -> dict[str, Any]:
    path = folder / "provenance.json"
    return dict(read_json(path, DraftError)) if path.is_file() else {}


def _results(source: Path, named: str | None) -> dict[str, Any] | None:
    """The evaluation that the card shows: the named one, or that beside the draft."""
    path = Path(named) if named else source / "evaluation" / "results.json"
    if path.is_dir():
        path = path / "results.json"
    if not path.is_file() and not named:
        return None
    return dict(read_json(path, DraftError, "name the results.json of an evaluation"))


def _check_free(output: Path) -> None:
    if not is_free(output):
        raise DraftError("is not empty", file=output, remedy="name another folder, or remove this one")
