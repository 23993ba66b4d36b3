"""A plan against what it plans: memory and time of real trainings at four sizes, each a drafter of its own.

    python benchmarks/bench_plan.py [--json FILE] [--work FOLDER]

The machine is measured first (``deepspec plan --measure``), in the same run. Then for each size: a random target, a
cache of conversations, ``deepspec plan`` on it, and ``launch/train.py`` in a process of its own, bfloat16 and ZeRO-1 as
the published recipes have it (float32 where this CPU has no products in bfloat16). Time is CPU seconds of all threads
an optimizer step (median), which neighbours disturb least; memory is the peak of the process during the steps, in a
second training whose allocator hands back at once what is freed (glibc's own setting keeps some of it, and is the
faster one). What the process holds when it opens the target is taken off both: Python's and the libraries' code would
make the difference look small.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import runpy
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from bars import Bars, at_most, write_bars
from start import Benchmark, tell

from deepspec.errors import run_main
from deepspec.files import write_text
from deepspec.planning.memory import HANDED_BACK
from deepspec.progress import bytes_in
from deepspec.recipe_files import CONFIGS
from deepspec.tables import Table, fill_page

ROOT = Path(__file__).parents[1]
WORK, PAGE = Path("build/bench_plan"), ROOT / "docs/scale.md"
WIDTH = 1024  # of the model that is saved
STEPS = 5
# name -> hidden, intermediate, vocabulary, tokens of a sample, draft section, samples of a step
CASES: dict[str, tuple[int, int, int, int, dict[str, Any], int]] = {
    "dspark": (384, 1536, 8192, 448, {"num_layers": 3, "block_size": 7, "num_anchors": 48, "markov_rank": 64}, 3),
    "dflash": (512, 2048, 6144, 512, {"num_layers": 4, "block_size": 7, "num_anchors": 64}, 2),
    "eagle3": (512, 2048, 8192, 256, {"num_layers": 1, "ttt_length": 4}, 3),
    "p_eagle": (448, 1792, 5120, 384, {"num_layers": 3, "num_depths": 4}, 2),
}


def precision() -> str:
    """Of the trainings."""
    from deepspec.distributed import multiplies_bfloat16  # torch: not before the command has said what it does

    return "bfloat16" if multiplies_bfloat16() else "float32"


def make_target(folder: Path, hidden: int, intermediate: int, vocabulary: int) -> None:
    """A random Qwen3 of six layers."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from deepspec.demos.quickstart.tokenizer import train_tokenizer

    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=6,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, head_dim=64, tie_word_embeddings=True,
        max_position_embeddings=2048,
    )  # fmt: skip
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    train_tokenizer(["a cache keeps what the target computes"] * 3).save_pretrained(folder)


def make_case(work: Path, name: str) -> Path:
    """The recipe of a case, its target and cache made; the recipe's file."""
    from deepspec.data.conversations import write_conversations
    from deepspec.planning.probes import PRECISIONS

    hidden, intermediate, vocabulary, tokens, section, samples = CASES[name]
    folder = work / name
    shutil.rmtree(folder, ignore_errors=True)  # of a run before this one
    make_target(folder / "target", hidden, intermediate, vocabulary)
    dice, rows = random.Random(0), []
    for number in range(samples * 2):
        answer = "".join(dice.choice("abcdefghij") + dice.choice("0123456789") for _ in range(tokens // 2))
        messages = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": answer}]
        rows.append({"id": str(number), "messages": messages})
    write_conversations(folder / "data.jsonl", rows, {"made by": "bench_plan"})
    draft = section | ({"mask_token_id": 3} if "num_layers" in section and name != "eagle3" else {})
    recipe = {
        "name": name, "algorithm": name, "draft": draft,
        "target": {"path": "target", "layers": [0, 1, 2, 3, 4], "dtype": precision()},
        "data": {"max_length": tokens, "cache": ["cache"]},
        "train": {
            "deepspeed": str(CONFIGS / PRECISIONS[precision()]), "epochs": 50, "max_steps": STEPS,
            "micro_batch": 1, "global_batch": samples, "tensorboard": False, "log_every": 100,
        },
        "output": str(folder / "run"),
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    words = ["cache", "build", "--recipe", str(path), "--data", str(folder / "data.jsonl"), "--output"]
    deepspec(*words, str(folder / "cache"))
    return path


def deepspec(*words: str) -> None:
    """Run a command of the package, with one thread as the trainings have: two count more CPU seconds for the same.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "deepspec", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT, env=one_thread)


def status(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def run_training(recipe: str) -> None:
    """launch/train.py in this process; the last line tells its start, its peak and the CPU seconds of each step."""
    import zarr  # noqa: F401  # what it loads counts as its start

    from deepspec.targets import load_tokenizer
    from deepspec.training import loop, run

    load_tokenizer(Path(recipe).parent / "target")
    found: dict[str, Any] = {"steps": []}
    opening, optimize = run.frozen_target, loop.Trainer._optimize

    def open_target(*given: Any) -> Any:
        found.setdefault("start", status("VmRSS"))
        Path("/proc/self/clear_refs").write_text("5")
        return opening(*given)

    def step(trainer: Any, *given: Any) -> None:
        optimize(trainer, *given)
        found["steps"].append(time.process_time())
        found["peak"] = status("VmHWM")

    run.frozen_target, loop.Trainer._optimize = open_target, step  # type: ignore[method-assign]
    sys.argv = ["launch/train.py", "--recipe", recipe]
    try:
        runpy.run_path(str(ROOT / "launch/train.py"), run_name="__main__")
    finally:
        print("\n" + json.dumps(found), flush=True)


def trained(recipe: Path, environment: dict[str, str]) -> dict[str, Any]:
    """What :func:`run_training` of a recipe tells, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--train", str(recipe)], check=True, text=True, stdout=subprocess.PIPE, cwd=ROOT,
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def compare(work: Path, machine: Path, name: str) -> dict[str, float]:
    """Planned and measured seconds of a step and bytes of a process."""
    recipe = make_case(work, name)
    words = ["plan", "--recipe", str(recipe), "--gpu", str(machine), "--gpus", "1"]
    deepspec(*words, "--json", str(work / f"{name}.json"), "--data", str(work / name / "cache"))
    plan = json.loads((work / f"{name}.json").read_text())
    steps = trained(recipe, {})["steps"]
    seconds = [after - before for before, after in itertools.pairwise(steps)]
    shutil.rmtree(work / name / "run")
    held = trained(recipe, HANDED_BACK)
    chosen = next(one for one in plan["levels"] if one["level"] == plan["level"])
    return {
        "weights": plan["draft_parameters"], "planned seconds": chosen["step_seconds"],
        "seconds": statistics.median(seconds), "planned bytes": plan["device_bytes"] - held["start"],
        "bytes": held["peak"] - held["start"],
    }  # fmt: skip


def save_once(config: Path, folder: Path) -> None:
    """Train two steps of a plain model under a configuration and save it; rank 0's last line tells what that took."""
    import torch
    from torch import nn

    from deepspec.recipe import TrainSection
    from deepspec.training.engine import Engine, training_processes

    with training_processes() as world:
        train = TrainSection(deepspeed=str(config), global_batch=2 * world.size, micro_batch=1)
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)))
        engine = Engine(model, train, world)
        for turn in range(4):
            engine.begin_micro_batch(turn % 2 == 1)
            loss = engine.engine(torch.ones(1, WIDTH, dtype=engine.dtype)).float().sum()
            engine.engine.backward(loss * 1e-3)
            engine.step(1e-3)
        engine.barrier()
        begun = time.perf_counter()
        engine.save(folder, "saved")
        engine.barrier()
        if world.is_main:
            print("\n" + json.dumps({"seconds": time.perf_counter() - begun, "bytes": bytes_in(folder)}), flush=True)


def checkpoints(work: Path) -> Table:
    """Seconds and bytes a weight of a checkpoint by configuration, on two processes."""
    rows: list[list[object]] = []
    for file in sorted(CONFIGS.glob("*_bf16.json")):
        settings = json.loads(file.read_text())
        zero = settings["zero_optimization"]
        if zero.get("offload_optimizer", {}).get("device") == "nvme":
            rows.append([file.stem, None, "not run: async_io is compiled with libaio-dev"])
            continue
        if "zero_hpz_partition_size" in zero:
            zero["zero_hpz_partition_size"] = 2
        config, folder = work / file.name, work / f"saved_{file.stem}"
        config.write_text(json.dumps(settings))
        command = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "2", "--standalone", __file__]
        command += ["--save", str(config), "--work", str(folder)]
        done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        found = json.loads(done.stdout.strip().splitlines()[-1])
        rows.append([file.stem, f"{found['seconds']:.2f} s", f"{found['bytes'] / (4 * WIDTH**2):.1f}"])
        tell(" ".join(map(str, rows[-1])))
        shutil.rmtree(folder)
    return Table(["configuration", f"{4 * WIDTH**2 / 1e6:.1f} M weights saved in", "bytes a weight"], rows)


def fill(name: str, table: Table) -> None:
    """Write a table between the marks of the page."""
    write_text(PAGE, fill_page(PAGE.read_text(encoding="utf-8"), name, table.markdown()))


def main() -> int:
    """Measure the machine, then plan and train each case."""
    bars_text = "memory within 10 %, time within 20 % of the plan, at each size"
    parser = Benchmark(__doc__, bars=bars_text, takes="6 minutes")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for targets, caches and runs")
    parser.add_argument("--machine", type=Path, help="a file of `deepspec plan --measure`; default: measured now")
    parser.add_argument("--cases", default=",".join(CASES), help="which of them, commas between")
    parser.add_argument("--checkpoints", action="store_true", help="only: time and size of a checkpoint by ZeRO stage")
    parser.add_argument("--page", action="store_true", help="write the table into docs/scale.md")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.save is not None:
        save_once(given.save, given.work)
        return 0
    if given.train is not None:
        run_training(given.train)
        return 0
    work = given.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    if given.checkpoints:
        table = checkpoints(work)
        print(table.markdown())
        if given.page:
            fill("checkpoints of scale", table)
        return 0
    machine = given.machine and given.machine.absolute()
    if machine is None:
        machine = work / "machine.json"
        deepspec("plan", "--measure", str(machine), "--precision", precision())
    rows: list[list[object]] = []
    bars: Bars = {}
    for name in given.cases.split(","):
        one = compare(work, machine, name)
        memory, seconds = one["bytes"] / one["planned bytes"], one["seconds"] / one["planned seconds"]
        rows.append(
            [name, f"{one['weights'] / 1e6:.1f} M", f"{one['planned seconds']:.2f}", f"{one['seconds']:.2f}",
             f"{seconds:.2f}", f"{one['planned bytes'] / 1e6:.0f}", f"{one['bytes'] / 1e6:.0f}", f"{memory:.2f}"]
        )  # fmt: skip
        tell(" ".join(map(str, rows[-1])))
        bars[f"{name}: memory, from the plan"] = at_most(abs(memory - 1), 0.1)
        bars[f"{name}: CPU seconds of a step, from the plan"] = at_most(abs(seconds - 1), 0.2)
    head = [
        f"drafter, {precision()}",
        "weights",
        "planned s",
        "measured s",
        "ratio",
        "planned MB",
        "measured MB",
        "ratio",
    ]
    print(Table(head, rows).markdown())
    if given.page:
        fill("plan against training", Table(head, rows))
    write_bars(given.json, bars)
    return int(not all(bar["holds"] for bar in bars.values()))


if __name__ == "__main__":
    run_main(main)
