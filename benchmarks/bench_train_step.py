"""Time and memory of one forward + backward of each objective, fused against plain, side by side in one run.

    python benchmarks/bench_train_step.py [--json FILE] [--real] [--rounds N] [--before CHECKOUT]

One thread; hidden 256, 4 heads / 2 kv, head_dim 64, intermediate 1024, vocabulary 32,768, markov rank 256, S 1024, 128
anchors, block 7, half the tokens supervised in 3 spans. "published" is the published code measured on such a machine.
Seconds are CPU seconds of the one thread, which a busy neighbour disturbs least; memory is the peak of the process
above model and inputs (each measurement runs in its own process, after a tiny step that loads the libraries' code).
``--real`` adds the loss at V 151,936, 512 anchors, hidden 2560, S 4096.

Then a row for every other drafter, every loss of the table and D-PACE (fp32): the rows of a group take turns in one
process, a step each, and are compared with the group's base; memory again in processes of their own, from which the C
library hands every freed tensor back at once: what is held, and not what the library keeps for later.

Last comes the time between a micro-batch's arrival and its first kernel (S 4096, 512 anchors, 2048 tokens supervised):
what the host does before the device has work. ``--before`` measures it also of another checkout, with the same Python;
one that planned in the step (such as a06a0c0) does so between the two.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from bars import Bars, at_most, write_bars
from plain_objectives import plain_block_loss, plain_eagle3_loss
from start import Benchmark

from deepspec import registry
from deepspec.batch import Batch, Supervision
from deepspec.errors import run_main
from deepspec.nn.loss_table import LOSSES
from deepspec.planning.memory import HANDED_BACK
from deepspec.targets import TargetSpec

PUBLISHED = {  # (algorithm, dtype) -> seconds, MB above model and inputs
    ("dspark", "fp32"): (2.57, 1299), ("dspark", "bf16"): (1.64, 1031), ("dflash", "fp32"): (1.59, 1034),
    ("dflash", "bf16"): (0.96, 794), ("eagle3", "fp32"): (6.94, 1974), ("eagle3", "bf16"): (5.68, 1329),
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SMALL = {"hidden": 256, "heads": 4, "kv": 2, "head_dim": 64, "mlp": 1024, "vocab": 32_768, "S": 1024, "anchors": 128}
REAL = {"hidden": 2560, "heads": 32, "kv": 8, "head_dim": 128, "mlp": 9728, "vocab": 151_936, "S": 4096, "anchors": 512}
MEMORY = 1.1  # of its base's, at most, for every row below


@dataclass(frozen=True)
class Row:
    """A drafter or loss that is compared with another row."""

    algorithm: str
    section: dict[str, Any]  # keys of its draft section
    base: str  # the row
    limit: float | None = None  # of its time in the base's; None: no bar
    memory: float | None = MEMORY  # of its memory in the base's; None: no bar


def _weighed(**terms: float) -> dict[str, Any]:
    return {"loss": [{"name": name, "weight": weight} for name, weight in terms.items()]}


ROWS = {  # those of drafters appear with the drafter
    "dflash2": Row("dflash2", {"block_size": 7, "sample_from_anchor": True}, "dflash", 1.35),  # of the same shape
    "p_eagle, K 7": Row("p_eagle", {"num_depths": 7, "num_layers": 1}, "eagle3", 0.5),
    "mtp": Row("mtp", {}, "eagle3"),
    "dflash d_pace": Row("dflash", {"d_pace": 0.5}, "dflash", 1.05),
    "dflash l1": Row("dflash", _weighed(l1=1.0), "dflash", memory=None),  # it holds the target's logits of a chunk too
    **{
        f"dflash {name}": Row("dflash", _weighed(**{name: 1.0}), "dflash l1", 1.05 if name == "lk_hybrid" else None)
        for name in LOSSES
        if name not in ("ce", "l1", "e2e_tv")
    },
    "dflash l1 + e2e_tv": Row("dflash", _weighed(l1=1.0, e2e_tv=1.0), "dflash l1", 1.05),
    "dflash ce + l1 + e2e_tv": Row("dflash", _weighed(ce=0.1, l1=0.9, e2e_tv=1.0), "dflash l1"),
}


def qwen3_config(size: dict[str, int]) -> dict[str, Any]:
    """The text config of a Qwen3 of ``size``."""
    return {
        "hidden_size": size["hidden"], "intermediate_size": size["mlp"], "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv"], "head_dim": size["head_dim"], "vocab_size": size["vocab"],
        "rms_norm_eps": 1e-6, "hidden_act": "silu", "max_position_embeddings": 8192, "num_hidden_layers": 36,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }  # fmt: skip


def described(name: str, size: dict[str, int], keys: Mapping[str, Any] | None = None) -> tuple[Any, Any, TargetSpec]:
    """(algorithm, config, target) of a draft of ``size``, of an algorithm or a row; ``keys`` of its section."""
    spec = TargetSpec("bench", registry.family("qwen3"), qwen3_config(size), "qwen3")
    row = ROWS.get(name, Row(name, {}, name))
    algorithm = registry.algorithm(row.algorithm)
    section: dict[str, Any] = {"target_layers": [1, 9, 17, 25, 33]}
    if "target_layers" in algorithm.tiny_section:  # it continues the target's last state
        section["target_layers"] = [36]
    known = {"num_anchors": size["anchors"], "mask_token_id": 5}
    section |= {key: value for key, value in known.items() if key in algorithm.tiny_section}
    section |= {**row.section, **(keys or {})}
    return algorithm, algorithm.parse(section, None), spec


def build(name: str, dtype: torch.dtype, size: dict[str, int], keys: Mapping[str, Any] | None = None) -> Any:
    """A draft of ``size`` as :func:`described`, with random frozen embedding and head."""
    algorithm, config, spec = described(name, size, keys)
    model = algorithm.build(config, spec).to(dtype)
    weights = torch.randn(size["vocab"], size["hidden"], generator=torch.Generator().manual_seed(1)).mul_(0.05)
    model.attach(weights.to(dtype), weights.to(dtype))
    return model


def make_batch(size: dict[str, int], dtype: torch.dtype, supervised: int, layers: int = 5) -> Batch:
    """One conversation of S tokens, ``supervised`` of them in three spans, with the states of ``layers`` layers."""
    S, generator = size["S"], torch.Generator().manual_seed(0)
    mask = torch.zeros(1, S, dtype=torch.bool)
    span = supervised // 3
    for start in (S // 8, S // 2 - span // 2, S - S // 16 - span):
        mask[0, start : start + span] = True
    hidden = torch.randn(1, S, 6 * size["hidden"], generator=generator).to(dtype)
    return Batch(
        Supervision(mask, torch.tensor([S]), (0,), 0, 0),
        torch.randint(0, size["vocab"], (1, S), generator=generator),
        hidden[..., : layers * size["hidden"]].contiguous(),
        hidden[..., 5 * size["hidden"] :].contiguous(),
    )


def step(model: Any, batch: Batch, plain: bool) -> float:
    """One forward and backward; the loss."""
    model.zero_grad(set_to_none=True)
    if plain:
        loss = (plain_eagle3_loss if model.config.algorithm == "eagle3" else plain_block_loss)(model, batch)
    else:
        loss = model(batch).loss()
    loss.backward()
    return float(loss.detach())


def measure(name: str, dtype: str, supervised: int, plain: bool, rounds: int, real: bool) -> dict[str, float]:
    """Median seconds, peak MB above model and inputs, and the loss; run in a process of its own."""
    torch.set_num_threads(1)
    size = REAL if real else SMALL
    tiny = {**SMALL, "vocab": 512, "S": 128, "anchors": 8}
    first = build(name, DTYPES[dtype], tiny)
    layers = len(first.config.target_layers)
    step(first, make_batch(tiny, DTYPES[dtype], 48, layers), plain)
    model, batch = build(name, DTYPES[dtype], size), make_batch(size, DTYPES[dtype], supervised, layers)
    if plain:
        model.attention = "sdpa"
    if real:
        return measure_real_loss(model, batch)
    before = forget_peak()
    loss, times = step(model, batch, plain), [0.0] * (not rounds)
    for _ in range(rounds):
        start = time.process_time()
        step(model, batch, plain)
        times.append(time.process_time() - start)
    return {"seconds": statistics.median(times), "megabytes": resident("VmHWM") - before, "loss": loss}


def measure_real_loss(model: Any, batch: Batch) -> dict[str, float]:
    """The DSpark loss alone at the real shape: from the slots' hidden states to its gradients."""
    from deepspec.algorithms.block_plan import BlockPlan, draw_anchors
    from deepspec.nn.loss_chunk import LossWeights
    from deepspec.nn.losses import head_loss

    config = model.config
    plan = BlockPlan.make(batch.supervision, draw_anchors(batch.supervision, 512), config.block_size, 4.0)
    hidden = torch.randn(len(plan.slot_R), model.shape.hidden_size, dtype=model.dtype, requires_grad=True)
    tokens = batch.input_ids.flatten()
    rows = plan.rows.with_labels(tokens[plan.label_R])
    target = batch.last_hidden.flatten(0, 1)[plan.position_P]  # type: ignore[union-attr]
    latent = model.markov_head.markov_w1(tokens[plan.position_P])
    before = forget_peak()
    start = time.process_time()
    w2 = model.markov_head.markov_w2.weight
    loss = head_loss(hidden, model.frozen, rows, LossWeights(ce=0.1, l1=0.9), target, latent, w2)
    loss.combined.backward()
    seconds = time.process_time() - start
    return {"seconds": seconds, "megabytes": resident("VmHWM") - before, "loss": float(loss.combined.detach())}


def measure_turns(names: str, dtype: str, supervised: int, rounds: int) -> dict[str, float]:
    """Median seconds of each row of ``names`` (between |), which take turns."""
    torch.set_num_threads(1)
    models = {name: build(name, DTYPES[dtype], SMALL) for name in names.split("|")}
    layers = {name: len(model.config.target_layers) for name, model in models.items()}
    batches = {count: make_batch(SMALL, DTYPES[dtype], supervised, count) for count in set(layers.values())}
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            start = time.process_time()
            step(model, batches[layers[name]], plain=False)
            if turn:
                times[name].append(time.process_time() - start)
    return {name: statistics.median(spent) for name, spent in times.items()}


class FirstKernel(Exception):
    """The draft's first product is about to run."""


def measure_arrival(name: str, rounds: int) -> dict[str, float]:
    """Median milliseconds from a micro-batch's arrival to its first kernel."""
    torch.set_num_threads(1)
    size = {**SMALL, "vocab": 512, "S": 4096, "anchors": 512}
    model, batch = build(name, torch.float32, size), make_batch(size, torch.float32, 2048)
    if hasattr(batch, "planned"):  # as the reading threads hand it over
        batch = batch.planned(model.algorithm.plan(model.config, batch.supervision))

    def stop(*_: Any) -> None:
        raise FirstKernel

    model.fc.register_forward_pre_hook(stop)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        with contextlib.suppress(FirstKernel):
            model(batch)
        times.append(1000 * (time.perf_counter() - start))
    return {"milliseconds": statistics.median(times)}


def compare_rows(rounds: int, bars: Bars) -> None:
    """The table of :data:`ROWS`, group by group."""
    print("\n| row | base | s | of base's | MB | of base's |\n|---|---|---|---|---|---|")
    there = {name: row for name, row in ROWS.items() if row.algorithm in registry.ALGORITHMS}
    for base in dict.fromkeys(row.base for row in there.values()):
        group = [base, *(name for name, row in there.items() if row.base == base)]
        seconds = in_process("|".join(group), "fp32", "512", str(rounds), "turns")
        memory = {name: in_process(name, "fp32", "512", "0", "fused", more=HANDED_BACK)["megabytes"] for name in group}
        for name in group:
            ratio, more = seconds[name] / seconds[base], memory[name] / memory[base]
            print(
                f"| {name} | {base} | {seconds[name]:.2f} | {ratio:.2f} | {memory[name]:.0f} | {more:.2f} |", flush=True
            )
            if name == base:
                continue
            for what, value, limit in (("time", ratio, there[name].limit), ("memory", more, there[name].memory)):
                if limit is not None:
                    bars[f"{name} {what} of {base}"] = at_most(value, limit)


def arrivals(before: Path | None, bars: Bars) -> None:
    """The table of :func:`measure_arrival`."""
    print("\n| algorithm | first kernel after, ms | with --before, ms |\n|---|---|---|")
    for name in ("dspark", "dflash", "eagle3"):
        common = (name, "fp32", "2048", "50", "arrival")
        now = in_process(*common)["milliseconds"]
        then = None if before is None else in_process(*common, package=before)["milliseconds"]
        print(f"| {name} | {now:.3f} | {'' if then is None else f'{then:.3f}'} |", flush=True)
        bars[f"{name} milliseconds to the first kernel"] = at_most(now, 0.5)


def resident(field: str) -> float:
    """MB of VmRSS (now) or VmHWM (the peak since :func:`forget_peak`) of this process, from the kernel."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"the kernel tells no {field}")


def forget_peak() -> float:
    """Start a new peak at the present size, in MB, which is returned."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def in_process(
    *arguments: str, package: Path | None = None, more: Mapping[str, str] = MappingProxyType({})
) -> dict[str, float]:
    """Run one measurement in a fresh process, of the deepspec in the folder ``package`` where one is given.

    ``more``: environment variables of it.
    """
    environment = {**os.environ, **more} | ({} if package is None else {"PYTHONPATH": str(package.resolve())})
    command, here = [sys.executable, __file__, "--one", *arguments], Path(__file__).parent
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=here, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def compare(rounds: int) -> Bars:
    """The table of all cells; returns the bars."""
    bars: Bars = {}
    print("| algorithm | dtype | supervised | plain s | fused s | ratio | plain MB | fused MB | ratio | of published |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for (name, dtype), (seconds, megabytes) in PUBLISHED.items():
        for supervised, limit in ((512, 0.45), (24, 0.25)):
            common = (name, dtype, str(supervised), str(rounds))
            plain, fused = in_process(*common, "plain"), in_process(*common, "fused")
            ratio, memory = fused["seconds"] / plain["seconds"], fused["megabytes"] / plain["megabytes"]
            print(
                f"| {name} | {dtype} | {supervised} | {plain['seconds']:.2f} | {fused['seconds']:.2f} | {ratio:.2f} | "
                f"{plain['megabytes']:.0f} | {fused['megabytes']:.0f} | {memory:.2f} | "
                f"{fused['seconds'] / seconds:.2f} s, {fused['megabytes'] / megabytes:.2f} MB |",
                flush=True,
            )
            bars[f"{name} {dtype} {supervised} time"] = at_most(ratio, limit)
            if supervised == 512:
                bars[f"{name} {dtype} memory against published"] = at_most(fused["megabytes"] / megabytes, 0.20)
                bars[f"{name} {dtype} time against published"] = at_most(fused["seconds"] / seconds, 0.45)
            else:
                bars[f"{name} {dtype} 24 time against published"] = at_most(fused["seconds"] / seconds, 0.25)
    return bars


def main() -> None:
    """Parse arguments and print the table."""
    limits = "time at most 0.45 of the plain twin's and the published (24 tokens: 0.25), memory 0.20; 0.5 ms to start"
    parser = Benchmark(__doc__, bars=limits, takes="10 minutes; --rounds 0 half a minute")
    parser.add_argument("--rounds", type=int, default=3, help="0: the time to the first kernel alone")
    parser.add_argument("--rows", action="store_true", help="leave out the comparison with the plain twins")
    parser.add_argument("--real", action="store_true", help="also the loss at the real shape (about 10 GB, minutes)")
    parser.add_argument("--before", type=Path, help="a checkout to compare the time to the first kernel with")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        name, dtype, supervised, rounds, mode = given.one
        if mode == "arrival":
            print(json.dumps(measure_arrival(name, int(rounds))))
            return
        if mode == "turns":
            print(json.dumps(measure_turns(name, dtype, int(supervised), int(rounds))))
            return
        print(json.dumps(measure(name, dtype, int(supervised), mode == "plain", int(rounds), mode == "real")))
        return
    bars = compare(given.rounds) if given.rounds and not given.rows else {}
    if given.rounds:
        compare_rows(2 * given.rounds + 1, bars)
    arrivals(given.before, bars)
    if given.real:
        real = in_process("dspark", "bf16", "2048", "1", "real")
        print(
            f"\nreal shape (V 151,936, 512 anchors, hidden 2560, S 4096): DSpark loss {real['seconds']:.1f} s, "
            f"peak {real['megabytes']:.0f} MB above its inputs"
        )
        bars["real shape peak GB"] = at_most(real["megabytes"] / 1024, 1.5)
    write_bars(given.json, bars)


if __name__ == "__main__":
    run_main(main)
