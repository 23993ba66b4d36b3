"""Export a draft to an engine's format, import one from it: from folder to folder, with the model card beside it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deepspec import registry
from deepspec.checkpoints import steps_of
from deepspec.drafts import (
    FROZEN,
    RECIPE,
    SHARD_BYTES,
    build_draft,
    check_files,
    check_target,
    check_weights,
    read_config,
    read_provenance,
    read_weights,
    save_draft,
)
from deepspec.errors import DraftError
from deepspec.export.card import model_card
from deepspec.export.consolidate import consolidate
from deepspec.export.engines.base import ExportEngine
from deepspec.export.hub import fetch_draft
from deepspec.export.parts import DraftCheckpoint, ImportHints, ascending
from deepspec.files import read_json, remove, write_text
from deepspec.identity import shown
from deepspec.outputs import whole_folder
from deepspec.progress import bytes_in, waiting
from deepspec.targets import load_spec, load_target_embeddings
from deepspec.targets.digests import digest_like

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportOptions:
    """What an export writes besides the draft's own weights."""

    format: str = "deepspec"  # an engine's name
    embeddings: bool = True  # the target's embedding and head too, so that the folder loads without the target
    target: str | None = None  # where they are read from; None: the target in the draft's config
    dtype: str | None = None  # of a checkpoint's weights, or of the engine's container: one of its `types`
    shard_bytes: int = SHARD_BYTES
    results: str | None = None  # results.json of an evaluation, for the model card
    tokenizer: str | None = None  # the target's GGUF, for a container that holds the tokenizer


def read_draft(folder: Path) -> DraftCheckpoint:
    """A draft folder in our layout, every weight checked against its config.

    Raises:
        DraftError: not a draft, or weights that do not fit.
    """
    config = read_config(folder, "name a draft folder, a checkpoint or a run")
    return _checked(DraftCheckpoint(config, read_weights(folder), folder / "config.json"), folder)


def _checked(draft: DraftCheckpoint, folder: Path) -> DraftCheckpoint:
    with torch.device("meta"):
        model = build_draft(draft.config, folder / "config.json")
    check_weights(model, draft.state, folder)
    return draft


def export_draft(source: str | Path, output: str | Path, options: ExportOptions) -> DraftCheckpoint:
    """Write ``source``, a draft folder, a checkpoint or a run, to ``output`` in another format.

    Returns:
        The draft in our layout, its target layers in rising order.

    Raises:
        DraftError: the format cannot carry this draft, ``output`` holds one already, or the source is broken.
        CheckpointError: a checkpoint that cannot be put together.
    """
    engine: ExportEngine = registry.engine(options.format)
    source, output = Path(source), Path(output)
    if options.dtype not in (None, *engine.types):
        problem, wanted = f"not a type of the {engine.name} format", f"one of {', '.join(engine.types)}"
        raise DraftError(problem, key="--dtype", found=options.dtype, wanted=wanted)
    with whole_folder(output, "export", DraftError) as inside:
        if (source / "config.json").is_file():
            return _export(source, inside, output.name, engine, options)
        if not (source / "manifest.json").is_file() and not steps_of(source):
            wanted = "a draft folder (config.json), a checkpoint (manifest.json) or a run (checkpoints/)"
            raise DraftError("nothing to export", file=source, wanted=wanted)
        draft = inside / ".consolidated"
        dtype = options.dtype if options.dtype in ExportEngine.types else None
        consolidate(source, draft, dtype, embeddings=False, target=options.target)
        try:
            return _export(draft, inside, output.name, engine, options)
        finally:
            remove(draft)


def _export(source: Path, output: Path, name: str, engine: ExportEngine, options: ExportOptions) -> DraftCheckpoint:
    draft = ascending(read_draft(source))
    _check_taken(draft, engine)  # before the target is loaded
    written = engine.write(_with_frozen(draft, engine, options))
    if not options.embeddings:
        shared = _shared_frozen(draft, engine)
        state = {name: tensor for name, tensor in written.state.items() if name not in shared}
        written = DraftCheckpoint(written.config, state, written.file)
    provenance = read_provenance(source)
    provenance["export"] = {"format": engine.name, "embeddings": options.embeddings, "source": str(source)}
    recipe, results = _recipe(source), _results(source, options.results)
    write_text(output / "README.md", model_card(draft, engine, provenance, recipe, results, name))
    target = options.tokenizer or options.target
    expected = sum(tensor.nbytes for tensor in written.state.values())
    with waiting(f"writing {name}", expected, partial(bytes_in, output)):
        engine.save(output, written, provenance, recipe, options.shard_bytes, options.dtype, target)
    return draft


def _check_taken(draft: DraftCheckpoint, engine: ExportEngine) -> None:
    """Check that an engine takes a draft.

    Raises:
        DraftError: it does not; the message names the engines that do.
    """
    if reason := engine.reason(draft):
        others = [name for name in registry.ENGINES if registry.engine(name).reason(draft) is None]
        raise engine.refusal(draft, reason, f"export to {' or '.join(others)}" if others else None)


def _learned_row(draft: DraftCheckpoint, engine: ExportEngine) -> bool:
    """Whether the engine's file holds an embedding because a row of it is the draft's own."""
    form = engine.forms.get(draft.kind)
    return form is not None and form.learned_row


def _shared_frozen(draft: DraftCheckpoint, engine: ExportEngine) -> set[str]:
    """The frozen tensors that a folder can do without, because every engine takes the target's."""
    owned = zip(FROZEN, ("own_embedding", "own_head"), strict=True)
    names = {name for name, key in owned if not draft.config.get(key)}
    names -= {FROZEN[0]} if _learned_row(draft, engine) else set()
    return names - {FROZEN[1]} if "d2t" in draft.state else names


def _with_frozen(draft: DraftCheckpoint, engine: ExportEngine, options: ExportOptions) -> DraftCheckpoint:
    """The draft with the target's embedding and head, where the folder needs them or a head must be cut."""
    folder = Path(draft.file or "").parent
    provenance = read_provenance(folder)
    lacking = [name for name in FROZEN if name not in draft.state]
    if not lacking and options.target is not None:  # nothing is taken from it, but the user named it as the draft's
        load_spec(options.target)  # refuses what is no target
        _check_weights(options.target, None, provenance, folder)
    wanted = (options.embeddings and engine.holds_frozen) or (engine.cuts_head and "d2t" in draft.state)
    wanted |= _learned_row(draft, engine)
    if not lacking or not wanted:
        return draft
    path = options.target or draft.config.get("target_model_name_or_path")
    if path is None:
        remedy = "name it (--target), or leave its embedding and head out (--without-embeddings)"
        raise DraftError("does not say which target it was trained for", file=draft.file, remedy=remedy)
    trained_on = provenance.get("target") or {}
    revision = trained_on.get("revision") if path == trained_on.get("path") else None
    target = load_target_embeddings(path, draft.state["fc.weight"].dtype, "cpu", revision)
    _check_weights(path, revision, provenance, folder)
    weights = dict(zip(FROZEN, (target.embed_weight, target.head_weight), strict=True))
    return DraftCheckpoint(draft.config, draft.state | {name: weights[name] for name in lacking}, draft.file)


def _check_weights(path: str, revision: str | None, provenance: Mapping[str, Any], folder: Path) -> None:
    """The target whose embedding and head are taken is the one that the draft was trained for, if it is recorded.

    Raises:
        DraftError: it has other weights.
    """
    known = (provenance.get("target") or {}).get("weights")
    if known is None:
        log.warning("%s does not say which target's weights it was trained for; those of %s are taken", folder, path)
        return
    caches = (provenance.get("data") or {}).get("caches") or [{}]  # the dtype that an older digest was made in
    found = digest_like(known, path, getattr(torch, caches[0].get("dtype", "bfloat16")), revision)
    if found != known:
        raise DraftError(
            "the target's weights are not those of the training", file=path, found=shown(found), wanted=shown(known),
            remedy="put it back, name the right one (--target), or leave its embeddings out (--without-embeddings)",
        )  # fmt: skip


def import_draft(
    source: str | Path, output: str | Path, format_name: str = "auto", hints: ImportHints | None = None
) -> tuple[DraftCheckpoint, str]:
    """Write a draft of another format to ``output`` in ours, so that our evaluator can measure it.

    Args:
        source: its folder, or ``owner/name`` on the hub.
        output: the folder to create.
        format_name: an engine's name, or ``auto``: found by its config.
        hints: what the config leaves open.

    Returns:
        The draft in our layout, and the name of the format it was in.

    Raises:
        DraftError: unknown or missing weights, parts that our drafts have not, or a convention that is not stated.
    """
    with whole_folder(output, "import", DraftError) as inside:
        draft, provenance = read_other(source, format_name, hints or ImportHints())
        save_draft(inside, draft.state, draft.config, provenance, _recipe(Path(draft.file or "").parent))
    return draft, provenance["import"]["format"]


def read_other(source: str | Path, format_name: str, hints: ImportHints) -> tuple[DraftCheckpoint, dict[str, Any]]:
    """A draft of any format in our layout, and its provenance; arguments and errors of :func:`import_draft`."""
    folder = fetch_draft(source)
    engine, foreign = find_engine(folder, registry.ENGINES if format_name == "auto" else (format_name,))
    draft = engine.read(foreign, hints)
    if hints.target is not None and "num_target_layers" in draft.config:  # not all released drafts have it
        check_target(draft.config, hints.target, draft.file)
        hints.target.check_layers(draft.config["target_layer_ids"], draft.file, "target_layer_ids")
    _checked(draft, folder)
    made = {"format": engine.name, "source": str(source), "weights": engine.sha256(folder)}
    provenance = {key: value for key, value in read_provenance(folder).items() if key != "export"}  # ours again
    return draft, provenance | {"import": made}


def find_engine(folder: Path, names: Iterable[str]) -> tuple[ExportEngine, DraftCheckpoint]:
    """The engine whose container and config a folder holds, and what it holds; a single name is taken at its word.

    Raises:
        DraftError: no known container or format, or weights that cannot be read or have changed.
    """
    engines: list[ExportEngine] = [registry.engine(name) for name in names]
    found: Any = None
    for engine in engines:
        config = engine.config(folder)
        if config is not None and (len(engines) == 1 or engine.matches(config)):
            check_files(folder, rewritten=_is_rewritten(read_provenance(folder), engine, config, folder))
            return engine, DraftCheckpoint(config, engine.state(folder), folder / "config.json")
        found = found if config is None else config.get("architectures")
    check_files(folder)
    raise DraftError(
        "no format that we know", file=folder, key="architectures", found=found,
        wanted=f"one of {', '.join(registry.ENGINES)}",
        remedy="name a folder with config.json and *.safetensors, and its format (--from)",
    )  # fmt: skip


def _is_rewritten(provenance: Mapping[str, Any], taken: ExportEngine, config: Mapping[str, Any], folder: Path) -> bool:
    """Whether config.json is in the form of ``taken``, and no longer in the form that ``provenance.json`` was for."""
    exported = provenance.get("export")
    written = registry.engine(str(exported.get("format")) if isinstance(exported, dict) else ExportOptions.format)
    if not provenance or written.matches(config) or not taken.matches(config):
        return False
    log.warning(
        "%s: in the %s form, its provenance.json in the %s form: the digest of config.json is not compared",
        folder / "config.json", taken.name, written.name,
    )  # fmt: skip
    return True


def _recipe(folder: Path) -> str | None:
    path = folder / RECIPE
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _results(source: Path, named: str | None) -> dict[str, Any] | None:
    """The evaluation that the card shows: the named one, or that beside the draft."""
    path = Path(named) if named else source / "evaluation" / "results.json"
    if path.is_dir():
        path = path / "results.json"
    if not path.is_file() and not named:
        return None
    return dict(read_json(path, DraftError, "name the results.json of an evaluation"))
