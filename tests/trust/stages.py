"""The commands of the pipeline on tiny inputs, as stages that the harness kills, starves and feeds.

Another stage is one more :class:`Stage` in :func:`stages`; inputs that it needs are made in :class:`Place`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import pkgutil
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cache_tools
import torch
import yaml
from evaluate_tools import write_task
from processes import ROOT, Ended, Running, fork, launch

from deepspec.data.conversations import read_conversations
from deepspec.errors import DeepSpecError, run_main
from deepspec.registry import lookup

# keys of what no two runs share: times, and what the machine said
UNTIMED = re.compile(
    r".*seconds.*|.*_per_second|speed_up.*|phases|steps|finished|command|memory_gb|data_wait|seal_.*|row_sha256"
)
FOREIGN = ("torchelastic_*", "torchinductor_*", "pymp-*", "triton*", "hsperfdata*")  # that launchers and torch leave
HALF = ("--set", "target.dtype=bfloat16")  # the release's raw caches hold no other numbers
SIDES = ("train", "held_out")  # the files of prompts
ZERO = ("zero0_fp32", "zero1_fp32", "zero2_fp32", "zero3_fp32")


@dataclass(frozen=True)
class Place:
    """The folders of a harness: inputs that the commands themselves made once, and where a stage works."""

    root: Path

    @property
    def given(self) -> Path:
        """Inputs; no stage writes here."""
        return self.root / "given"

    def work(self, name: str) -> Path:
        """The folder of a stage: ``out`` and ``tmp``; both are looked through for what is left behind."""
        return self.root / "work" / name

    @property
    def recipe(self) -> Path:
        """A recipe of eight samples a part and six steps."""
        return self.given / "recipe.yaml"


@dataclass(frozen=True)
class Stage:
    """One command.

    Args:
        name: of the rows in the counts.
        main: the entry point, ``module:function``.
        words: its command line for an output folder.
        launcher: words in front of the Python script of a group of processes; empty: a fork of this process.
        before: what is in the output folder before the command starts.
        claim: the file of the output whose existence claims that these others are complete (patterns).
        check: what is wrong with an output after a kill, or None.
        again: the stage that continues where this one was killed, where its message names another; by the output.
    """

    name: str
    main: str
    words: Callable[[Path], Sequence[object]]
    script: tuple[str, ...] = ()
    launcher: tuple[str, ...] = ()
    before: Callable[[Path], None] | None = None
    claim: tuple[str, tuple[str, ...]] | None = None
    check: Callable[[Path], str | None] | None = None
    again: Callable[[Path], Stage | None] | None = None

    def start(self, work: Path, output: Path | None = None, max_file: int | None = None) -> Running:
        """Start it; ``output`` is where it writes instead of ``work/out``."""
        words = [str(word) for word in self.words(output or work / "out")]
        logs, temporary = work.parent / f"{work.name}-logs", work / "tmp"
        if not self.launcher:
            return fork(partial(run_command, self.main, words), logs, temporary, max_file)
        launcher = [word if word != "PORT" else str(free_port()) for word in self.launcher]
        return launch([*launcher, *self.script, *words], logs, temporary)

    def prepare(self, work: Path) -> None:
        """Make the folder of the stage as it is before its first start."""
        shutil.rmtree(work, ignore_errors=True)
        (work / "tmp").mkdir(parents=True)
        (work / "out").mkdir()
        if self.before is not None:
            self.before(work / "out")


def free_port() -> int:
    """A free TCP port."""
    from deepspec.distributed import free_port

    return free_port()


def run_command(main: str, words: Sequence[str]) -> int | None:
    """Run an entry point of this package as its script does."""
    import sys

    sys.argv = ["deepspec", *words]
    run_main(lookup("stage", {"main": main}, "main"))
    return 0


def preload() -> None:
    """Import everything once, so that a fork imports nothing."""
    import deepspeed  # noqa: F401
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    import deepspec

    for module in pkgutil.walk_packages(deepspec.__path__, "deepspec."):
        if not module.name.endswith("__main__") and ".testing" not in module.name and "vllm_run" not in module.name:
            importlib.import_module(module.name)
    importlib.import_module("deepspec.evaluate.__main__")


def content(path: Path) -> str:
    """A digest of a file that two runs of one command share."""
    data = path.read_bytes()
    if path.suffix in (".html", ".md"):
        return "a page"  # of figures with times in them
    if path.suffix in (".json", ".jsonl"):
        with contextlib.suppress(ValueError):  # what a kill cut is compared as it is
            data = _without_times(path.name, data.splitlines() if path.suffix == ".jsonl" else [data])
    return hashlib.sha256(data).hexdigest()


def _without_times(name: str, lines: list[bytes]) -> bytes:
    rows = [untimed(json.loads(line)) for line in lines]
    if name == "results.json":
        rows[0].pop("sha256", None)  # of rows with times in them
    return json.dumps(rows, sort_keys=True).encode()


def untimed(value: Any) -> Any:
    """A JSON value without what no two runs share."""
    if isinstance(value, dict):
        return {key: untimed(one) for key, one in value.items() if not UNTIMED.fullmatch(key)}
    return [untimed(one) for one in value] if isinstance(value, list) else value


def contents(folder: Path) -> dict[str, str]:
    """Every file and every empty folder under a folder, hidden ones too, with its content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.match(pattern) for part in (name, *name.parents) for pattern in FOREIGN):
            continue
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()) and name.parts not in (("out",), ("tmp",)):
                found[f"{name}/"] = "an empty folder"
        else:
            found[str(name)] = content(path) if path.is_file() else "a link, a pipe or a device"
    return found


# -- the inputs --------------------------------------------------------------------------------------------------------


def make_place(root: Path, trained: bool = True) -> Place:
    """Make the inputs of all stages by the commands themselves, in forks of this process.

    Without ``trained``: those of conversations and caches alone, for the quick tests.

    Raises:
        RuntimeError: a command failed.
    """
    place = Place(root)
    shutil.rmtree(root, ignore_errors=True)
    given = place.given
    given.mkdir(parents=True)
    cache_tools.make_target(given / "target", torch.float32)
    cache_tools.write_conversations(given / "data.jsonl", cache_tools.conversation_rows(20), {})
    cache_tools.write_conversations(given / "more.jsonl", cache_tools.conversation_rows(12, seed=1), {})
    write_task(given / "tasks" / "short.jsonl", [["What is one?"], ["What is two?"]])
    place.recipe.write_text(yaml.safe_dump(recipe(given)))
    words = ["--source", given / "data.jsonl", "--held-out", "0.4", "--output", given / "made"]
    run(place, "made", "deepspec.cli.data:prepare", *words)
    run(place, "cache", "deepspec.cli.cache:build", *building(place, given / "cache"))
    if not trained:
        return place
    for zero in ZERO:
        run(place, "run", "deepspec.cli.train:train", *training(place, given / zero, zero))
    run(place, "draft", "deepspec.cli.train:consolidate", given / "zero1_fp32", given / "draft")
    run(place, "cache16", "deepspec.cli.cache:build", *building(place, given / "cache16"), *HALF)
    run(place, "raw", "deepspec.cli.cache:cache", "export", given / "cache16", given / "raw")
    run(place, "served", "deepspec.cli.export:export", given / "draft", given / "served", "--format", "vllm")
    run(place, "results", "deepspec.evaluate.__main__:main", *evaluating(place, given / "results"))
    return place


def run(place: Place, name: str, main: str, *words: object) -> Ended:
    """Run a command to its end.

    Raises:
        RuntimeError: it failed.
    """
    running = fork(partial(run_command, main, [*map(str, words)]), place.root / "logs" / name, place.root / "w" / "tmp")
    ended = running.wait(300)
    if ended.code != 0 or ended.hung:
        raise RuntimeError(f"{name}: {ended.last_words}\n{ended.stderr[-3000:]}")
    return ended


def recipe(given: Path) -> dict[str, Any]:
    """Values of a recipe for the tiny target."""
    train = {
        "deepspeed": str(ROOT / "deepspeed_configs" / "zero1_fp32.json"), "epochs": 9, "max_steps": 6,
        "micro_batch": 1, "global_batch": 4, "lr": 3.0e-3, "log_every": 1, "save_every": 2, "keep_last": 2,
        "tensorboard": False, "workers": 1,
    }  # fmt: skip
    return {
        "name": "tiny",
        "algorithm": "dspark",
        "target": {"path": str(given / "target"), "layers": cache_tools.LAYERS, "dtype": "float32"},
        "draft": {"num_layers": 1, "block_size": 4, "num_anchors": 4, "mask_token_id": 3, "markov_rank": 8},
        "data": {"max_length": 256, "min_supervised": 4, "cache": str(given / "cache")},
        "regenerate": {"max_tokens": 12, "batch_size": 4},
        "cache": {"samples_per_part": 4, "tokens_per_batch": 256},
        "train": train,
        "output": str(given / "run"),
    }


def building(place: Place, output: Path, data: str = "data.jsonl") -> list[object]:
    """The words of a cache build."""
    return ["--recipe", place.recipe, "--data", place.given / data, "--output", output]


def training(place: Place, output: Path, zero: str = "zero1_fp32") -> list[object]:
    """The words of a training."""
    config = ROOT / "deepspeed_configs" / f"{zero}.json"
    return ["--recipe", place.recipe, "--set", f"output={output}", "--set", f"train.deepspeed={config}"]


def evaluating(place: Place, output: Path) -> list[object]:
    """The words of an evaluation."""
    given = place.given
    words = ["--target", given / "target", "--draft", given / "draft", "--tasks", given / "tasks"]
    return [*words, "--output", output, "--temperature", "0", "--max-new-tokens", "12"]


# -- the stages --------------------------------------------------------------------------------------------------------


def stages(place: Place, server: str | None = None) -> dict[str, Stage]:
    """Every stage by its name; ``server``: URL of one that answers prompts, for the regeneration by servers."""
    found = [*_data_stages(place, server), *_cache_stages(place), *_draft_stages(place), *_groups(place)]
    return {stage.name: stage for stage in found}


def _data_stages(place: Place, server: str | None) -> Iterator[Stage]:
    given = place.given

    def preparing(out: Path, seed: int = 0) -> list[object]:
        words = ["--source", given / "data.jsonl", "--source", given / "more.jsonl", "--seed", seed]
        return [*words, "--held-out", "0.3", "--exclude", given / "tasks" / "short.jsonl", "--output", out / "made"]

    def prepared(out: Path) -> None:
        run(place, "prepared", "deepspec.cli.data:prepare", *preparing(out, seed=1), "--held-out", "0.6")

    yield Stage("prepare", "deepspec.cli.data:prepare", preparing, before=prepared, check=both_sides)
    words = ["--recipe", place.recipe, "--prompts", given / "data.jsonl", "--max-failed", 0.5]
    claim = ("answers.jsonl.manifest.json", ("answers.jsonl",))
    yield Stage(
        "regenerate", "deepspec.cli.data:regenerate", lambda out: [*words, "--output", out / "answers.jsonl"],
        claim=claim,
    )  # fmt: skip
    if server is not None:
        served = [*words, "--server", server, "--concurrency", 2, "--timeout", 5, "--patience", 20]
        yield Stage(
            "regenerate, served", "deepspec.cli.data:regenerate",
            lambda out: [*served, "--output", out / "answers.jsonl"], claim=claim,
        )  # fmt: skip


def both_sides(out: Path) -> str | None:
    """A prompt that is on both sides of the split, where a reader takes both files."""
    try:
        sides = [{row["id"] for row in read_conversations(out / "made" / f"{one}.jsonl")} for one in SIDES]
    except DeepSpecError:
        return None
    return f"{len(sides[0] & sides[1])} prompts on both sides" if sides[0] & sides[1] else None


def _cache_stages(place: Place) -> Iterator[Stage]:
    given, tool = place.given, "deepspec.cli.cache:cache"
    claim = ("c/manifest.json", ("c/parts/*", "c/samples-*"))

    def copy(out: Path) -> None:
        shutil.copytree(given / "cache", out / "c")

    def broken(out: Path) -> None:
        copy(out)
        (out / "c/parts/00001/features/c/0/0").write_bytes(b"")

    append = partial(building, place, data="more.jsonl")
    yield Stage("append", "deepspec.cli.cache:build", lambda out: [*append(out / "c"), "--append"], before=copy)
    rebuild = ["--rebuild", "--recipe", place.recipe, "--data", given / "data.jsonl"]
    plain = Stage("build", "deepspec.cli.cache:build", lambda out: building(place, out / "c"), claim=claim)
    yield plain

    def unfinished(out: Path) -> Stage | None:  # verify says: run the build again, it continues
        return None if (out / "c" / "manifest.json").exists() else plain

    yield Stage("rebuild", tool, lambda out: ["verify", out / "c", *rebuild], before=broken, again=unfinished)
    recode = ["recode", given / "cache"]
    yield Stage("recode", tool, lambda out: [*recode, out / "c", "--level", "near"], claim=claim)
    yield Stage("cache export", tool, lambda out: ["export", given / "cache16", out / "raw"])
    words = ["import", given / "raw"]
    yield Stage("cache import", tool, lambda out: [*words, out / "c", "--recipe", place.recipe, *HALF], claim=claim)


def _draft_stages(place: Place) -> Iterator[Stage]:
    given, draft = place.given, ("d/provenance.json", ("d/*",))
    for zero in ("zero1_fp32", "zero3_fp32"):
        words = partial(training, place, zero=zero)
        yield Stage(f"train {zero}", "deepspec.cli.train:train", lambda out, words=words: words(out / "run"))
    checkpoint = given / "zero2_fp32"
    yield Stage("consolidate", "deepspec.cli.train:consolidate", lambda out: [checkpoint, out / "d"], claim=draft)
    convert = "deepspec.cli.export:export"
    yield Stage("export", convert, lambda out: [given / "draft", out / "d", "--format", "vllm"])
    target = ["--from", "auto", "--target", given / "target"]
    yield Stage("import", convert, lambda out: [given / "served", out / "d", *target], claim=draft)
    yield Stage("evaluate", "deepspec.evaluate.__main__:main", lambda out: evaluating(place, out / "results"))


def _groups(place: Place) -> Iterator[Stage]:
    """Stages of two processes under real launchers."""
    import sys

    python, folder = sys.executable, Path(sys.executable).parent
    deepspeed = (str(folder / "deepspeed"), "-q", "--num_gpus", "2", "--master_port", "PORT")
    torchrun = (str(folder / "torchrun"), "--nproc-per-node", "2", "--master-port", "PORT")
    mpirun = (str(folder / "mpirun"), "-n", "2", python)
    train, build = ("launch/train.py",), ("tools/build_cache.py",)
    for launcher, zero in ((deepspeed, "zero1_fp32"), (torchrun, "zero2_fp32")):
        words = partial(training, place, zero=zero)
        name = f"train, {Path(launcher[0]).name} of 2"
        yield Stage(name, "", lambda out, words=words: words(out / "run"), train, launcher)
    for launcher in (mpirun, torchrun):
        name = f"build, {Path(launcher[0]).name} of 2"
        yield Stage(name, "", lambda out: building(place, out / "c"), build, launcher)
    words = ("-m", "deepspec.evaluate")
    yield Stage("evaluate, mpirun of 2", "", lambda out: evaluating(place, out / "results"), words, mpirun)
