"""Measure the target cache on the hidden states of a real small model: levels, reading, building.

    python benchmarks/bench_cache.py                   # all three, of the real run's target or the quickstart's
    python benchmarks/bench_cache.py levels
    python benchmarks/bench_cache.py read --samples 24
    python benchmarks/bench_cache.py build --processes 2

The bars are of SmolLM2-135M-Instruct, which the target stage of `deepspec demo real` fetches; of another target the
figures are shown without. Text: the standard library's source. One thread; on a shared machine run it twice and take
the better figures.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from bars import Bars, at_least, at_most, write_bars
from numpy.typing import NDArray
from start import QUICKSTART, Benchmark, quickstart_inputs, tell
from torch.utils.data import DataLoader, Dataset, get_worker_info

from deepspec.arguments import COUNT
from deepspec.cache.assemble import finish_cache
from deepspec.cache.codecs.uniform import to_float
from deepspec.cache.format import HIDDEN_CHUNK
from deepspec.cache.forward import forward_batch
from deepspec.cache.levels import LEVELS
from deepspec.cache.memory import empty
from deepspec.cache.parts import Block, layout_of, write_part
from deepspec.cache.plan import CachePlan, PlannedPart, batches, read_rows, scan
from deepspec.cache.reader import TargetCache
from deepspec.cache.store import FolderStore
from deepspec.data.chat import load_renderer, render_row
from deepspec.data.conversations import write_conversations
from deepspec.errors import run_main
from deepspec.recipe import load_recipe
from deepspec.targets import TargetSpec, load_target, load_tokenizer
from deepspec.targets.load import load_spec

SMOLLM2, LAYERS = (30, 576), (1, 7, 14, 21, 27)  # layers and width of the target that the bars are of; those captured
REAL, WORK = Path("build/real/target"), Path("build/bench_cache")
WINDOW = 512  # tokens
WIDTH = 2560  # of the reading benchmark: windows joined side by side
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SIZE_LIMITS = {"lossless": 0.68, "near": 0.52, "compact": 0.47, "smallest": 0.40}  # of raw
TAKES = "5 to 10 minutes; `read` needs 5 GB of disk meanwhile"
SKIPPED = 512  # rows that the codecs were calibrated on are not measured


def of_bars(spec: TargetSpec) -> bool:
    """Whether the bars are of such a target."""
    return (spec.num_layers, spec.hidden_size) == SMOLLM2


def layers_of(spec: TargetSpec) -> tuple[int, ...]:
    """The layers whose states are taken: LAYERS, or as many of a shallower target."""
    if spec.num_layers > LAYERS[-1]:
        return LAYERS
    return tuple(map(round, np.linspace(0, spec.num_layers - 2, len(LAYERS))))


def texts() -> Iterator[str]:
    """Source files of the standard library, always in the same order."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        yield path.read_text(errors="ignore")


def hidden_states(target: Any) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Features [W, WINDOW, L*D] and last_hidden [W, WINDOW, D] of real text, as stored; W fills four wide windows."""
    tokenizer, rows = load_tokenizer(target.spec.path), []
    windows, layers = 4 * math.ceil(WIDTH / target.spec.hidden_size), layers_of(target.spec)
    for text in texts():
        ids = tokenizer(text)["input_ids"][: 4 * WINDOW]
        rows += [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]
        if len(rows) >= windows:
            break
    features, last = [], []
    for row in rows[:windows]:
        output = target.forward(torch.tensor([row]), layers)
        features.append(output.features[0].view(torch.uint16).numpy())
        last.append(output.last_hidden[0].view(torch.uint16).numpy())
    return np.stack(features), np.stack(last)


def best(work: Callable[[], Any], repeats: int = 3) -> float:
    """Least processor seconds of this thread over some runs."""
    found = []
    for _ in range(repeats):
        begun = time.thread_time()
        work()
        found.append(time.thread_time() - begun)
    return min(found)


def variation(target: Any, exact: NDArray[np.uint16], rounded: NDArray[np.uint16]) -> tuple[float, float]:
    """Mean and 99th percentile of the total variation between next-token distributions."""
    chosen = slice(SKIPPED, SKIPPED + 4096, 4)
    head = target.head_weight.float()  # in float32: the head's own rounding would hide what is measured
    probabilities = [torch.softmax(torch.from_numpy(to_float(rows[chosen])) @ head.T, -1) for rows in (exact, rounded)]
    distances = 0.5 * (probabilities[0] - probabilities[1]).abs().sum(dim=-1)
    return float(distances.mean()), float(distances.quantile(0.99))


def measure_level(name: str, array: str, values: NDArray[np.uint16]) -> tuple[dict[str, float], NDArray[np.uint16]]:
    """WeightedSum, speeds and error of one array at one level, chunk by chunk as in a cache."""
    codec = getattr(LEVELS[name], array)(values[:SKIPPED])
    chunks = [values[i : i + HIDDEN_CHUNK] for i in range(0, len(values), HIDDEN_CHUNK)]
    coded = [np.frombuffer(codec.encode_rows(chunk), np.uint8) for chunk in chunks]
    out = np.empty_like(values)

    def decode() -> None:
        for i, data in enumerate(coded):
            codec.decode_rows(data, out[i * HIDDEN_CHUNK : (i + 1) * HIDDEN_CHUNK], 0, HIDDEN_CHUNK)

    found = {
        "ratio": sum(len(data) + 20 for data in coded) / values.nbytes,
        "encode": values.nbytes / best(lambda: [codec.encode_rows(chunk) for chunk in chunks]) / 1e9,
        "decode": values.nbytes / best(decode) / 1e9,
    }
    exact, rounded = (to_float(rows[SKIPPED:]).astype(np.float64) for rows in (values, out))
    error = np.square(exact - rounded).sum(axis=0) / np.square(exact).sum(axis=0)
    return {**found, "error": float(np.median(np.sqrt(error)))}, out


def run_levels(options: argparse.Namespace) -> Bars:
    """The table of docs/cache.md."""
    bars: Bars = {}
    target = load_target(options.target, torch.bfloat16)
    features, last = hidden_states(target)
    share = features.shape[2] / (features.shape[2] + last.shape[2])
    narrow, wide = features.reshape(-1, features.shape[2]), joined(features, len(LAYERS))
    last_rows = last.reshape(-1, last.shape[2])
    print("level      ratio (feat./last)      bits   encode  decode GB/s   error feat./last     TV mean / p99")
    for name in LEVELS:
        one, _ = measure_level(name, "features", narrow)
        other, rounded = measure_level(name, "last_hidden", last_rows)
        speed, _ = measure_level(name, "features", wide)
        ratio = share * one["ratio"] + (1 - share) * other["ratio"]
        mean, tail = variation(target, last_rows, rounded)
        print(
            f"{name:9s}  {ratio:.3f} ({one['ratio']:.3f}/{other['ratio']:.3f})   {16 * ratio:5.2f}"
            f"   {speed['encode']:6.2f}  {speed['decode']:6.2f}        {one['error']:.4f} / {other['error']:.4f}"
            f"      {mean:.4f} / {tail:.4f}",
            flush=True,
        )
        if not of_bars(target.spec):
            continue
        if name in SIZE_LIMITS:
            bars[f"{name} of raw"] = at_most(ratio, SIZE_LIMITS[name])
        if name == "lossless":
            bars["lossless decode GB/s"] = at_least(speed["decode"], 1.2)
        if name in ("near", "compact"):
            bars[f"{name} TV"] = at_most(mean, 0.005)
    return bars


def joined(states: NDArray[np.uint16], layers: int) -> NDArray[np.uint16]:
    """[W, WINDOW, layers*D] -> [.., layers*WIDTH]: windows side by side, as wide as a 4B model's states."""
    windows, tokens, channels = states.shape
    hidden = channels // layers
    side = math.ceil(WIDTH / hidden)
    groups = windows // side
    split = states[: groups * side].reshape(groups, side, tokens, layers, hidden)
    wide = split.transpose(0, 2, 3, 1, 4).reshape(groups * tokens, layers, side * hidden)[:, :, :WIDTH]
    return np.ascontiguousarray(wide.reshape(groups * tokens, layers * WIDTH))


# -- reading ----------------------------------------------------------------------------------------------------------


def make_caches(target: Any, work: Path, samples: int, levels: list[str]) -> None:
    """Caches of samples of WINDOW tokens, 6 x WIDTH wide, and the same values in two flat files."""
    features, last = hidden_states(target)
    wide, wide_last = joined(features, len(LAYERS)), joined(last, 1)
    starts = [(number * WINDOW) % len(wide) for number in range(samples)]
    for name, values in (("features.bin", wide), ("last_hidden.bin", wide_last)):
        with open(work / name, "wb") as file:
            for start in starts:
                file.write(values[start : start + WINDOW].tobytes())
    for level in levels:
        folder = FolderStore(work / level)
        shutil.rmtree(folder.path, ignore_errors=True)
        mark: dict[str, Any] = {"target": {"hidden_size": WIDTH}, "layers": list(LAYERS), "dtype": "bfloat16"}
        mark |= {"levels": {"features": level, "last_hidden": level}, "sources": []}
        plan = CachePlan(mark, 0, float(WINDOW), (PlannedPart("00000", 0, 0, samples, 0, 0),))
        ids, mask = np.arange(WINDOW, dtype=np.int32), np.ones(WINDOW, np.uint8)

        def blocks(ids: Any = ids, mask: Any = mask) -> Iterator[Block]:
            for number, start in enumerate(starts):
                rows = slice(start, start + WINDOW)
                yield Block([number], [str(number)], [WINDOW], ids, mask, wide[rows], wide_last[rows][:-1].copy())

        with ThreadPoolExecutor(2) as pool:
            write_part(folder, "00000", layout_of(mark), pool, blocks())
        folder.write("plan.json", plan.to_bytes())
        finish_cache(folder, plan)


def fresh(shape: tuple[int, ...]) -> torch.Tensor:
    """What a plain loader uses: new memory, shared when it is in a worker process."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.bfloat16)
    count = math.prod(shape)
    storage = torch.UntypedStorage._new_shared(2 * count)
    return torch.empty(0, dtype=torch.bfloat16).set_(storage, 0, (count,)).view(shape)  # type: ignore[call-overload]


class MemoryMap(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The uncompressed loader: samples copied from a memory map into a padded batch."""

    def __init__(self, work: Path) -> None:
        widths = {"features.bin": len(LAYERS) * WIDTH, "last_hidden.bin": WIDTH}
        self.files = [np.memmap(work / name, np.uint16, "r").reshape(-1, width) for name, width in widths.items()]

    def __getitem__(self, numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = [fresh((len(numbers), WINDOW, values.shape[1])) for values in self.files]
        for tensor, values in zip(batch, self.files, strict=True):
            for row, number in enumerate(numbers):
                tensor[row].view(torch.uint16).numpy()[...] = values[number * WINDOW : (number + 1) * WINDOW]
        return batch[0], batch[1]


class Ours(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The cache's own reader."""

    def __init__(self, path: Path) -> None:
        self.cache = TargetCache.open(path)

    def __getitem__(self, numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        widths = (len(LAYERS) * WIDTH, WIDTH)
        features, last = (empty((len(numbers), WINDOW, width), torch.bfloat16) for width in widths)
        for row, number in enumerate(numbers):
            self.cache.tokens(number)
            self.cache.read_into(number, features[row], last[row])
        return features, last


def threaded(dataset: Any, plan: list[list[int]], workers: int) -> Iterator[Any]:
    """Batches in order, read ahead by threads, as training does it."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = [pool.submit(dataset.__getitem__, numbers) for numbers in plan[: 2 * workers]]
        for number in range(len(plan)):
            if number + 2 * workers < len(plan):
                waiting.append(pool.submit(dataset.__getitem__, plan[number + 2 * workers]))
            yield waiting[number].result()
            waiting[number] = pool.submit(int)  # lets go of the batch


def loaders(dataset: Any, plan: list[list[int]]) -> dict[str, Callable[[], Iterator[Any]]]:
    """The ways of reading that are compared."""
    processes: Any = DataLoader(dataset, batch_size=None, sampler=plan, num_workers=2, persistent_workers=True)
    return {
        "0 workers": lambda: (dataset[numbers] for numbers in plan),
        "2 threads": lambda: threaded(dataset, plan, 2),
        "2 processes": lambda: iter(processes),
    }


def rate(read: Callable[[], Iterator[Any]]) -> float:
    """GB/s of decoded bytes; the consumer does nothing."""
    begun, size = time.perf_counter(), 0
    for batch in read():
        size += sum(tensor.nbytes for tensor in batch)
    return size / (time.perf_counter() - begun) / 1e9


def drop_caches(folder: Path) -> None:
    """Put the files' pages out of the page cache."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def measure_cold(work: Path, levels: list[str], plan: list[list[int]], repeats: int) -> dict[str, float]:
    """Samples that come once, files out of the page cache; nothing may map them meanwhile, or their pages stay."""
    seen: set[int] = set()
    once = []
    for numbers in plan:
        if not seen & set(numbers):
            once.append(numbers)
            seen |= set(numbers)
    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name in ("memory map", *levels):
            drop_caches(work)
            dataset: Any = MemoryMap(work) if name == "memory map" else Ours(work / name)
            found.setdefault(name, []).append(rate(partial(threaded, dataset, once, 2)))
            del dataset
    return table("cold", {name: statistics.median(values) for name, values in found.items()})


def table(kind: str, rates: dict[str, float]) -> dict[str, float]:
    """Print the rates of one way of reading; give each as a multiple of the memory map's."""
    base = rates["memory map"]
    for name, value in rates.items():
        print(f"{kind:12s} {name:11s} {value:6.2f} GB/s  {value / base:5.2f}x", flush=True)
    return {name: value / base for name, value in rates.items()}


def run_read(options: argparse.Namespace) -> Bars:
    """Random samples into padded batches, side by side with the memory map."""
    work, levels = Path(options.work), options.levels.split(",")
    work.mkdir(parents=True, exist_ok=True)
    make_caches(load_target(options.target, torch.bfloat16), work, options.samples, levels)
    dice = np.random.default_rng(0)
    plan = [dice.permutation(options.samples)[:4].tolist() for _ in range(options.batches)]
    factors = {"cold": measure_cold(work, levels, plan, options.repeats)}
    ways = {"memory map": loaders(MemoryMap(work), plan)}
    ways |= {level: loaders(Ours(work / level), plan) for level in levels}
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(options.repeats):
        for kind in ("0 workers", "2 threads", "2 processes"):
            for name in ways:  # one behind the other, so that a busy moment hits all of them
                found.setdefault((kind, name), []).append(rate(ways[name][kind]))
    for kind in ("0 workers", "2 threads", "2 processes"):
        factors[kind] = table(kind, {name: statistics.median(found[kind, name]) for name in ways})
    print(
        f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB (memory-mapped pages included)"
    )
    limits = {"cold": {"lossless": 1.1}, "0 workers": {"raw": 0.8, "lossless": 0.4}}
    limits |= {kind: {"raw": 1.0, "lossless": 0.7} for kind in ("2 threads", "2 processes")}
    wanted = [(kind, level) for kind in limits for level in limits[kind] if level in levels]
    wanted = wanted if of_bars(load_spec(options.target)) else []
    return {f"{level}, {kind}": at_least(factors[kind][level], limits[kind][level]) for kind, level in wanted}


# -- building ---------------------------------------------------------------------------------------------------------


def write_inputs(options: argparse.Namespace, work: Path) -> tuple[Path, Path]:
    """A recipe and conversations whose answers are pieces of source text."""
    rows: list[dict[str, Any]] = []
    for text in texts():
        for start in range(0, min(len(text), 12_000), 1500):
            answer = text[start : start + 300 + 150 * (len(rows) % 9)].strip()
            if answer:
                messages = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": answer}]
                rows.append({"id": str(len(rows)), "messages": messages})
    data, recipe = work / "conversations.jsonl", work / "recipe.yaml"
    write_conversations(data, rows[: options.conversations], {"text": "standard library"})
    sections = {
        "name": "bench",
        "algorithm": "dspark",
        "target": {"path": str(options.target.resolve()), "layers": list(layers_of(load_spec(options.target)))},
        "draft": {"num_layers": 1, "block_size": 4, "num_anchors": 4, "mask_token_id": 3},
        "data": {"max_length": 1024},
        "cache": {"level": options.level, "tokens_per_batch": 4096, "samples_per_part": 8},
    }
    recipe.write_text(yaml.safe_dump(sections))
    return recipe, data


def bare_forward(recipe_path: Path, data: Path, parts: list[dict[str, Any]], budget: int) -> tuple[int, float]:
    """Tokens and seconds of the target alone over the same batches."""
    recipe = load_recipe(recipe_path)
    target = load_target(recipe.target.path, getattr(torch, recipe.target.dtype))
    renderer, source, seconds, tokens = load_renderer(recipe, target.spec), scan(data), 0.0, 0
    for part in parts:
        rows = read_rows(data, source.offsets[part["first"]], part["first"], part["rows"])
        rendered = [render_row(renderer, row, recipe.data.min_supervised) for _, row in rows]
        usable = [("0", one) for one in rendered if not isinstance(one, str)]
        for batch in batches([len(one.input_ids) for _, one in usable], budget):
            chosen = [(0, *usable[i]) for i in batch]
            begun = time.perf_counter()
            forward_batch(target, recipe.target.layers, True, chosen)
            seconds += time.perf_counter() - begun
            tokens += sum(len(usable[i][1].input_ids) for i in batch)
    return tokens, seconds


def run_bare(options: argparse.Namespace) -> Bars:
    """One process of the bare forward (started by `build`)."""
    work = Path(options.work)
    plan = json.loads((work / "cache" / "plan.json").read_text())
    share = plan["parts"][options.rank :: options.processes]
    print(*bare_forward(work / "recipe.yaml", work / "conversations.jsonl", share, plan["tokens_per_batch"]))
    return {}


def time_build(options: argparse.Namespace, recipe: Path, data: Path) -> float:
    """Tokens/s of a build in its forward loop, all ranks together."""
    work = Path(options.work)
    shutil.rmtree(work / "cache", ignore_errors=True)
    command = [sys.executable, "-m", "deepspec", "cache", "build", "--recipe", str(recipe), "--data", str(data)]
    if options.processes > 1:
        command = [str(Path(sys.executable).with_name("mpirun")), "-n", str(options.processes), *command]
    done = subprocess.run(
        [*command, "--output", str(work / "cache")], env=ENVIRONMENT, text=True, capture_output=True, check=True
    )
    said = [line for line in done.stderr.splitlines() if "tokens/s" in line][-1]
    print(said)
    return float(said.split(" tokens/s")[0].split()[-1].replace(",", "")) * options.processes


def time_bare(options: argparse.Namespace) -> float:
    """Tokens/s of the target alone over the same batches, in as many processes at once."""
    work, processes = Path(options.work), []
    for rank in range(options.processes):
        arguments = [sys.executable, __file__, "bare", "--target", str(options.target), "--work", str(work)]
        arguments += ["--processes", str(options.processes), "--rank", str(rank)]
        processes.append(subprocess.Popen(arguments, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE))
    outcomes = [process.communicate()[0].split()[-2:] for process in processes]
    return sum(float(tokens) / float(seconds) for tokens, seconds in outcomes)


def run_build(options: argparse.Namespace) -> Bars:
    """A build against the bare forward, one after the other, several times."""
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    recipe, data = write_inputs(options, work)
    ratios = []
    for _ in range(options.repeats):
        built, bare = time_build(options, recipe, data), time_bare(options)
        ratios.append(built / bare)
        print(
            f"{options.processes} processes: build {built:,.0f} tokens/s, bare forward {bare:,.0f}: {ratios[-1]:.3f}x"
        )
    print(f"median {statistics.median(ratios):.3f}x")
    name = f"build over bare forward, {options.processes} processes"
    return {name: at_least(statistics.median(ratios), 0.9)} if of_bars(load_spec(options.target)) else {}


RUNS = {"levels": run_levels, "read": run_read, "build": run_build}


def main() -> None:
    """Parse the command line and run one of the benchmarks, or all."""
    bars = "sizes of raw at most 0.68, 0.52, 0.47, 0.40 by level, decoded at 1.2 GB/s, total variation at most 0.005; "
    bars += "read, of a memory map's speed: raw 0.8x or 1x, lossless 0.4x to 1.1x by way; build 0.9x of bare passes"
    parser = Benchmark(__doc__, bars=bars, takes=TAKES)
    parser.add_argument("benchmark", nargs="?", default="all", choices=["all", *RUNS, "bare"], help="which one")
    parser.add_argument("--target", type=Path, default=REAL if REAL.exists() else QUICKSTART / "target",
                        help="folder of a small model")  # fmt: skip
    parser.add_argument("--work", type=Path, default=WORK, help="folder for caches; the default is removed at the end")
    parser.add_argument("--levels", default="raw,lossless,near,smallest", help="of `read`")
    parser.add_argument("--level", default="lossless", help="of `build`")
    parser.add_argument("--samples", type=COUNT, default=96, help="of `read`; 55 MB of disk each")
    parser.add_argument("--batches", type=COUNT, default=20, help="of `read`, each time")
    parser.add_argument("--repeats", type=COUNT, default=5, help="of `read` and `build`")
    parser.add_argument("--conversations", type=COUNT, default=128, help="of `build`")
    parser.add_argument("--processes", type=COUNT, default=1, help="of `build`")
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    quickstart_inputs(target=options.target)
    torch.set_num_threads(1)
    if options.benchmark == "bare":
        run_bare(options)
        return
    if not of_bars(load_spec(options.target)):
        tell("this is not the target that the bars are of: figures are shown without")
    bars_found: Bars = {}
    for name in RUNS if options.benchmark == "all" else [options.benchmark]:
        print(f"\n{name}", flush=True)
        bars_found |= RUNS[name](options)
    write_bars(options.json, bars_found)
    if options.work == WORK:
        shutil.rmtree(WORK, ignore_errors=True)


if __name__ == "__main__":
    run_main(main)
