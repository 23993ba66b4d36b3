"""Rot in an artefact: a bit, a cut, two files exchanged. Its reader refuses it, or gives what it gave before."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from counts import Row
from processes import each
from stages import Place, contents, run_command, stages, training

from deepspec import drafts
from deepspec.cache.reader import TargetCache
from deepspec.cache.verify import verify_cache
from deepspec.data.conversations import read_conversations
from deepspec.distributed import World
from deepspec.errors import CacheError, DeepSpecError, EvaluationError, as_os_error
from deepspec.evaluate.compare import Run
from deepspec.evaluate.results import open_rows, recipe_of, trained_to_think
from deepspec.export.consolidate import consolidate
from deepspec.recipe import load_recipe
from deepspec.training import run as training_run

KINDS = ("bit",) * 7 + ("cut", "empty", "swap")
SECONDS = 60.0  # that a reader may take


@dataclass(frozen=True)
class Artefact:
    """Files of one kind, and who reads them.

    Args:
        name: of the row in the counts.
        folder: of an intact one.
        files: patterns of the files to spoil, relative to the folder.
        read: everything that a reader takes from a folder, as a value that can be compared.
        flips: in a whole run.
    """

    name: str
    folder: Path
    files: tuple[str, ...]
    read: Callable[[Path], Any]
    flips: int


def flip_every_kind(artefact: Artefact, n: int, place: Place, seed: int = 0) -> Row:
    """Spoil one file of a copy of the artefact ``n`` times, file after file, and read it each time.

    Refused: an error of ours. Right: what the intact one gives. Lost: anything else that is returned.

    Returns:
        The counts.
    """
    copy, row = place.work("flip") / artefact.folder.name, Row("flip", artefact.name)
    shutil.rmtree(copy.parent, ignore_errors=True)
    shutil.copytree(artefact.folder, copy)
    files = sorted({path for one in artefact.files for path in copy.glob(one) if path.is_file()})
    random.Random(seed).shuffle(files)
    try:
        intact = artefact.read(copy)
    except Exception as problem:
        row.add({"lost": f"intact: {type(problem).__name__}: {str(problem)[:300]}"})
        return row

    def flip(number: int) -> dict[str, str]:
        dice = random.Random(f"{artefact.name} {seed} {number}")
        path = files[number % len(files)]
        before = {one: one.read_bytes() for one in (path, dice.choice(files))}
        text = spoil(path, list(before)[-1], dice.choice(KINDS), dice)
        try:
            return judge(artefact, copy, intact, f"{text} of {path.relative_to(copy)}")
        finally:
            for one, data in before.items():
                one.write_bytes(data)

    for found in each(n, flip, place.root / "work" / "flip-logs", SECONDS):
        row.add({found["verdict"]: found.get("note", "")})
    shutil.rmtree(copy.parent)
    return row


def spoil(path: Path, other: Path, kind: str, dice: random.Random) -> str:
    """Spoil a file in place; returns how. A swap of files of other kinds, or of an equal one, is a flipped bit."""
    data = bytearray(path.read_bytes())
    if kind == "swap" and path.suffix == other.suffix and other.read_bytes() != data:
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
        return f"a swap with {other.name}"
    if kind in ("cut", "empty") and data:
        size = dice.randrange(len(data)) if kind == "cut" else 0
        os.truncate(path, size)
        return f"a cut to {size} bytes"
    if not data:
        path.write_bytes(b"x")
        return "a byte"
    place, bit = dice.randrange(len(data)), dice.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {place}"


def judge(artefact: Artefact, folder: Path, intact: Any, what: str) -> dict[str, str]:
    """The verdict on reading a spoilt artefact."""
    try:
        found = artefact.read(folder)
    except DeepSpecError as error:
        return {"verdict": "refused", "note": str(error)[:200]}
    except Exception as problem:
        if as_os_error(problem) is not None:  # becomes one line in every command
            return {"verdict": "refused", "note": str(problem)[:200]}
        return {"verdict": "traceback", "note": f"{what}: {type(problem).__name__}: {str(problem)[:200]}"}
    return {"verdict": "right" if found == intact else "lost", "note": f"{what}: other values, and no word"}


# -- the artefacts -----------------------------------------------------------------------------------------------------


def artefacts(place: Place) -> Iterator[Artefact]:
    """Every artefact with its readers."""
    given = place.given
    weights = ("checkpoints/step_6/**/*",)
    yield Artefact("cache, read", given / "cache", ("**/*",), read_cache, 200)
    yield Artefact("cache, verified", given / "cache", ("**/*",), verified, 80)
    yield Artefact("bf16 cache, read", given / "cache16", ("**/*",), read_cache, 60)
    yield Artefact("plan.json, rebuilt from", given / "cache", ("plan.json",), partial(rebuilt, place), 30)
    yield Artefact("conversations", given / "made", ("*",), read_text, 120)
    yield Artefact("draft", given / "draft", ("*",), read_draft, 160)
    yield Artefact("results", given / "results", ("*.json*",), read_results, 90)
    unfinished = partial(read_unfinished, given / "results")
    yield Artefact("rows of an unfinished evaluation", given / "results", ("*.jsonl",), unfinished, 60)
    yield Artefact("target, by a training", given / "target", ("*",), partial(read_target, place), 90)
    for zero, flips in (("zero0", 30), ("zero1", 40), ("zero2", 40), ("zero3", 40)):
        reader = partial(consolidated, place)
        yield Artefact(f"checkpoint {zero}, consolidated", given / f"{zero}_fp32", weights, reader, flips)
    weights = ("checkpoints/step_4/**/*",)
    yield Artefact("checkpoint zero1, resumed", given / "zero1_fp32", weights, partial(resumed, place), 30)


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Of names, types, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def read_cache(folder: Path) -> Any:
    """Every sample, as a training reads it, and the fingerprint."""
    cache, found = TargetCache.open(folder), hashlib.sha256()
    for number in range(len(cache)):
        sample = cache.sample(number)
        found.update(f"{sample.sample_id} {sample.input_ids.tolist()} {sample.loss_mask.tolist()}".encode())
        last = {} if sample.last_hidden is None else {"last": sample.last_hidden}
        found.update(digest({"features": sample.features, **last}).encode())
    return found.hexdigest(), cache.fingerprint


def verified(folder: Path) -> Any:
    """The same of a cache that ``verify`` calls complete."""
    if problems := verify_cache(folder, 1):
        raise CacheError(problems[0].text)
    return read_cache(folder)


def rebuilt(place: Place, folder: Path) -> Any:
    """The files of a cache of which one part was made again: from its plan and the conversations."""
    copy = folder.parent / "rebuilt"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    (copy / "parts/00001/features/c/0/0").write_bytes(b"")
    stage = stages(place)["rebuild"]
    command(stage.main, ["verify", copy, *list(stage.words(copy))[2:]], place)
    if problems := verify_cache(copy, 1):
        raise CacheError(problems[0].text)
    found = contents(copy)
    found.pop("plan.json")
    return found


def command(main: str, words: list[object], place: Place) -> None:
    """Run a command in a fork.

    Raises:
        DeepSpecError: it refused.
        RuntimeError: it ended with a traceback, or did not end.
    """
    from processes import fork

    logs = place.root / "work" / "command-logs"
    ended = fork(partial(run_command, main, [str(word) for word in words]), logs, logs / "tmp").wait(SECONDS)
    if ended.has_traceback or ended.hung:
        raise RuntimeError(ended.last_words)
    if ended.code:
        raise DeepSpecError(ended.last_words)


def read_text(folder: Path) -> Any:
    """The rows of two files of conversations, each with its manifest."""
    return [list(read_conversations(folder / f"{name}.jsonl")) for name in ("train", "held_out")]


def read_draft(folder: Path) -> Any:
    """The loaded draft, and what an evaluation takes from its recipe."""
    model = drafts.load_draft(folder)
    tensors = dict(model.state_dict()) | {"embedding": model.frozen.embed_VD, "head": model.frozen.head_VD}
    return digest(tensors), repr(model.config), repr(model.shape), recipe_of(folder), trained_to_think(folder)


def read_results(folder: Path) -> Any:
    """What a comparison and a resumed evaluation read."""
    run, plain = Run.load(folder), open_rows(folder, "plain")
    if any(key not in run.rows for key in plain):
        raise EvaluationError("plain rows of other prompts", file=folder)
    return run.results.to_row(), {key: run.rows[key] for key in run.rows}, {key: plain[key] for key in plain}


def read_unfinished(intact: Path, folder: Path) -> Any:
    """The rows that a resumed evaluation goes on with and that are not the intact ones; those it misses it makes."""
    copy = folder.parent / "unfinished"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for path in folder.glob("*.jsonl"):
        shutil.copy(path, copy)
    found = {name: (open_rows(intact, name), open_rows(copy, name)) for name in ("results", "plain")}
    return {(name, key): rows[key] for name, (whole, rows) in found.items() for key in rows
            if key not in whole or rows[key] != whole[key]}  # fmt: skip


def read_target(place: Place, folder: Path) -> Any:
    """A training's target beside the cache that was made with it."""
    recipe = load_recipe(place.recipe, [f"target.path={folder}", f"output={place.root / 'work' / 'none'}"])
    prepared = training_run.prepare(recipe, World(), False)
    target = prepared.target
    return digest({"embedding": target.embed_weight, "head": target.head_weight}), prepared.manifest.identity


def consolidated(place: Place, folder: Path) -> Any:
    """The draft that a run's newest checkpoint becomes."""
    output = folder.parent / "draft"
    shutil.rmtree(output, ignore_errors=True)
    consolidate(folder, output)
    return digest(drafts.read_weights(output)), (output / "config.json").read_text()


def resumed(place: Place, folder: Path) -> Any:
    """The last checkpoint of a run that is resumed from the one before it, and the losses."""
    copy = place.given / "zero1_fp32"
    kept = folder.parent / "whole"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(folder, kept)
    shutil.rmtree(kept / "checkpoints" / "step_6")
    words = training(place, kept)
    command("deepspec.cli.train:train", words, place)
    names = [path.name for path in (copy / "checkpoints" / "step_6").glob("*.pt")]
    states = {name: (kept / "checkpoints" / "step_6" / name).read_bytes() for name in names}
    return {name: hashlib.sha256(data).hexdigest() for name, data in states.items()}
