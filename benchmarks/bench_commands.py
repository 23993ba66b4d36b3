"""The commands of another checkout and of this one in turn: CPU seconds to prepare prompts, build a cache and train.

    make quickstart
    git worktree add build/before a06a0c0
    python benchmarks/bench_commands.py

What a user types has stayed, so any checkout since a06a0c0 can be the baseline. Each command runs at two sizes, in
processes of its own: a row, sample or step costs the difference over the difference in size, what is left is the start.
CPU seconds of the command and its children; the checkout that begins a pair changes from pair to pair. Each trains from
the cache that it built, of the same answers, by its own recipe with as many anchors, one sample in a micro-batch: a
step is a random draw now and was samples of like lengths at a06a0c0, so that several in one pad more, 16 % of the
quickstart's tokens at four of eight. ``bench_decode.py --baseline-checkout`` compares decoding.
"""

from __future__ import annotations

import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median

from bars import Bars, at_most, write_bars
from bench_data import write_rows
from start import QUICKSTART, Benchmark, quickstart_inputs, tell

from deepspec.arguments import COUNT
from deepspec.errors import DataError, run_main
from deepspec.serving.process import run
from deepspec.tables import Table

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 1.10  # of the baseline's cost; single runs of the same code differ by as much on a shared machine
ANCHORS = 16  # of the block drafters: the recipes' number has changed
Words = Callable[[Path, int, Path], list[str]]  # of a checkout, a size and its own folder of outputs -> what is typed


@dataclass(frozen=True)
class Command:
    """What is typed, at two sizes; it writes to the folder ``output`` and a size."""

    name: str
    unit: str
    sizes: tuple[int, int]
    output: str
    words: Words


@dataclass(frozen=True)
class Cost:
    """CPU seconds of a command, and of one unit of it, as the two sizes tell."""

    start: float
    unit: float


def commands(inputs: Path, algorithms: list[str]) -> Iterator[Command]:
    """All that is compared; ``inputs`` holds files of both sizes."""

    def prepare(_checkout: Path, size: int, own: Path) -> list[str]:
        return ["tools/prepare_data.py", "--source", f"{inputs}/rows-{size}.jsonl", "--output", f"{own}/prompts-{size}"]

    def build(checkout: Path, size: int, own: Path) -> list[str]:
        words = ["--data", f"{inputs}/answers-{size}.jsonl", "--output", f"{own}/cache-{size}"]
        return ["tools/build_cache.py", "--recipe", f"{checkout}/recipes/quickstart_dspark.yaml", *words, *_target()]

    yield Command("prepare prompts", "row", (2_000, 20_000), "prompts", prepare)
    yield Command("build a cache", "sample", (100, 1_100), "cache", build)
    for algorithm in algorithms:
        yield Command(f"train {algorithm}", "step", (10, 60), algorithm, _training(algorithm, inputs))


def _training(algorithm: str, inputs: Path) -> Words:
    def train(checkout: Path, size: int, own: Path) -> list[str]:
        recipe = ["--recipe", f"{checkout}/recipes/quickstart_{algorithm}.yaml", *_target()]
        settings = [f"output={own}/{algorithm}-{size}", f"data.cache=[{own}/cache-1100]", f"train.max_steps={size}"]
        settings += [f"data.conversations={inputs}/answers-1100.jsonl", "train.micro_batch=1"]
        settings += [f"draft.num_anchors={ANCHORS}"] * (algorithm != "eagle3")
        return ["launch/train.py", *recipe, *(word for one in settings for word in ("--set", one))]

    return train


def _target() -> list[str]:
    return ["--set", f"target.path={(QUICKSTART / 'target').resolve()}"]


def write_inputs(folder: Path, every: list[Command]) -> None:
    """The files that the commands read, at both sizes."""
    rows, answers = (next(one.sizes for one in every if one.unit == unit) for unit in ("row", "sample"))
    for size in rows:
        write_rows(folder / f"rows-{size}.jsonl", size)
    lines = (QUICKSTART / "conversations.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    if len(lines) < answers[-1]:
        wanted = f"{answers[-1]} answers"
        raise DataError("too few", file=QUICKSTART / "conversations.jsonl", found=len(lines), wanted=wanted)
    for size in answers:
        (folder / f"answers-{size}.jsonl").write_text("".join(islice(lines, size)), encoding="utf-8")


def cpu_seconds(words: list[str], checkout: Path, log: Path) -> float:
    """Run one command of a checkout to its end.

    Raises:
        DeepSpecError: it failed; ``found`` is the last error in its log.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(checkout / words[0]), *words[1:]]
    run(command, log, {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}, folder=checkout)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def cost(command: Command, checkout: Path, own: Path) -> Cost:
    """One command at both sizes, from nothing."""
    seconds = []
    for size in command.sizes:
        shutil.rmtree(own / f"{command.output}-{size}", ignore_errors=True)  # an earlier pair's: nothing is continued
        seconds.append(cpu_seconds(command.words(checkout, size, own), checkout, own / "log"))
    small, large = command.sizes
    unit = (seconds[1] - seconds[0]) / (large - small)
    return Cost(seconds[0] - small * unit, unit)


def measure(command: Command, checkouts: dict[str, Path], folder: Path, pairs: int) -> tuple[list[object], float]:
    """A row of the table, and the ratio of a unit's cost."""
    found: dict[str, list[Cost]] = {name: [] for name in checkouts}
    for pair in range(pairs):
        for name in sorted(checkouts, reverse=bool(pair % 2)):
            found[name].append(cost(command, checkouts[name], folder / name))
            unit_ms = 1000 * found[name][-1].unit
            tell(f"{command.name}, pair {pair + 1} of {pairs}, {name}: {unit_ms:.3f} ms a {command.unit}")
    ratios = [now.unit / before.unit for before, now in zip(found["before"], found["now"], strict=True)]
    unit, start = (
        {name: median(getattr(one, what) for one in ones) for name, ones in found.items()} for what in ("unit", "start")
    )
    row = [
        command.name, command.unit, f"{1000 * unit['before']:.3f}", f"{1000 * unit['now']:.3f}",
        f"{median(ratios):.3f}x", f"{min(ratios):.2f}-{max(ratios):.2f}",
        f"{start['before']:.1f}", f"{start['now']:.1f}",
    ]  # fmt: skip
    return [*row], median(ratios)


def main() -> None:
    """Measure, print a table."""
    bars = f"building a cache and training cost at most {LIMIT} times the baseline's"
    parser = Benchmark(__doc__, bars=bars, takes="a quarter of an hour")
    parser.add_argument(
        "--baseline-checkout", type=Path, default=Path("build/before"), metavar="DIR", help="the older deepspec"
    )
    parser.add_argument("--pairs", type=COUNT, default=3, help="of each command; the median counts")
    parser.add_argument("--algorithms", nargs="+", default=["eagle3", "dflash", "dspark"], help="that are trained")
    given = parser.parse_args()
    quickstart_inputs(target=QUICKSTART / "target", answers=QUICKSTART / "conversations.jsonl")
    if not (given.baseline_checkout / "launch/train.py").exists():
        remedy = f"git worktree add {given.baseline_checkout} a06a0c0"
        raise DataError("no checkout", file=given.baseline_checkout, key="--baseline-checkout", remedy=remedy)
    checkouts = {"before": given.baseline_checkout.resolve(), "now": ROOT}
    header = ["command", "unit", "before, CPU ms", "now, CPU ms", "ratio", "of single pairs", "start before, s"]
    rows, bars = [], Bars()
    with tempfile.TemporaryDirectory(prefix="deepspec-commands-") as name:
        folder, every = Path(name), list(commands(Path(name), given.algorithms))
        write_inputs(folder, every)
        for checkout in checkouts:
            (folder / checkout).mkdir()
        for command in every:
            row, ratio = measure(command, checkouts, folder, given.pairs)
            rows.append(row)
            if command.unit != "row":  # preparing does more than at a06a0c0: signs count, values are looked into
                bars[f"{command.name}, of the baseline"] = at_most(ratio, LIMIT)
    print(Table([*header, "start now, s"], rows).markdown())
    write_bars(given.json, bars)


if __name__ == "__main__":
    run_main(main)
