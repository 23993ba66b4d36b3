"""What ``gpu_check.py`` measures on a GPU: training steps, the plain formulation, a cache's build and read, rounds.

Everything is random and made on the device. "of peak" is the products that were run, attention counted by what its
queries see, over the time, against a large product measured in the same run.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bench_train_step import described, make_batch, qwen3_config
from gpu_twins import graphs_of
from plain_objectives import plain_block_loss, plain_eagle3_loss
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from deepspec import registry
from deepspec.batch import Batch
from deepspec.decoding.captured import VERIFY, Captured
from deepspec.decoding.loop import Decoder
from deepspec.decoding.records import DecodeRequest, DecodeSettings
from deepspec.nn.attention import BACKENDS
from deepspec.targets import Target
from deepspec.targets.load import spec_from_config

PLAIN = {"dflash": plain_block_loss, "dspark": plain_block_loss, "eagle3": plain_eagle3_loss}
LAYERS = (1, 9, 17, 25, 33)
Row = dict[str, Any]
Size = dict[str, int]


def seconds(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median seconds of a call: between events of the device, or by the CPU's clock."""
    times = []
    for _ in range(rounds):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1000)
        else:
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_rate(device: torch.device) -> float:
    """Operations a second of a large bf16 product of random matrices: what "of peak" divides by."""
    size = 8192 if device.type == "cuda" else 64
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * size**3 / seconds(lambda: a @ b, device, 10)


def draft_on(device: torch.device, name: str, size: Size) -> Any:
    """A random draft in bf16, made on the device, with a random frozen head."""
    algorithm, config, spec = described(name, size)
    with torch.device("meta"):
        model = algorithm.build_model(config, spec.shape, spec.family)
    model = model.to(torch.bfloat16).to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    weight = torch.randn(size["vocab"], size["hidden"], device=device, dtype=torch.bfloat16).mul_(0.05)
    model.attach(weight, weight)
    return model


def planned_batch(model: Any, size: Size, device: torch.device) -> Batch:
    """One conversation of S tokens, half of them supervised."""
    batch = make_batch(size, torch.bfloat16, size["S"] // 2, len(model.config.target_layers))
    return batch.planned(model.algorithm.plan(model.config, batch.supervision)).to(device)


def operations(step: Callable[[], object]) -> float:
    """Multiplications and additions of a step's products, forward and backward, attention by its visible pairs."""
    attention = 0.0

    def counted(
        query: Tensor, ck: Tensor, cv: Tensor, ok: Tensor, ov: Tensor, limit: Tensor, _scale: float, causal: bool,
        start: Tensor | None,
    ) -> Tensor:  # fmt: skip
        nonlocal attention
        (B, N, K, H, E), M = query.shape, ok.shape[2]
        seen = limit[..., None].expand(B, N, K) - (0 if start is None else start.clamp_min(0))
        own = K * M - (K * (K - 1) // 2 if causal else 0)
        attention += 3.5 * 4 * H * E * (float(seen.clamp_min(0).sum()) + B * N * own)
        return query + 0.0 * sum(part.sum() for part in (ck, cv, ok, ov))

    with mock.patch.dict(BACKENDS, dict.fromkeys(BACKENDS, counted)), torch.compiler.set_stance("force_eager"):
        with FlopCounterMode(display=False) as counter:
            step()
        return counter.get_total_flops() + attention


def measure_step(
    step: Callable[[], object], model: Any, size: Size, device: torch.device, rounds: int, peak: float | None
) -> Row:
    """Tokens a second, share of the peak and memory of a forward and backward."""

    def once() -> None:
        model.zero_grad(set_to_none=True)
        step()

    for _ in range(3 if rounds > 1 else 1):  # compiles
        once()
    row: Row = {}
    if device.type == "cuda":
        model.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once()
        row["GB above weights and inputs"] = round((torch.cuda.max_memory_allocated() - before) / 1e9, 2)
    spent = seconds(once, device, rounds)
    row |= {"ms": round(1000 * spent, 2), "tokens/s": round(size["S"] / spent)}
    if peak is not None:
        row["of peak"] = round(operations(once) / spent / peak, 4)
    return row


def train_steps(device: torch.device, size: Size, rounds: int, peak: float) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Every drafter at its published section; the plain formulation of those that have one directly behind it."""
    for name in registry.ALGORITHMS:
        held: dict[str, Any] = {}

        def ours(name: str = name, held: dict[str, Any] = held) -> Row:
            model = draft_on(device, name, size)
            batch = planned_batch(model, size, device)
            held.update(model=model, batch=batch)
            return measure_step(lambda: model(batch).loss().backward(), model, size, device, rounds, peak)

        def plain(name: str = name, held: dict[str, Any] = held) -> Row:
            model, batch = held["model"], held["batch"]
            model.attention = "sdpa"
            return measure_step(
                lambda: PLAIN[name](model, batch).backward(), model, size, device, max(1, rounds // 3), None
            )

        yield name, ours
        if name in PLAIN:
            yield f"{name}, plain", plain
        held.clear()


def random_target(device: torch.device, size: Size) -> Target:
    """A random Qwen3 of 36 layers in bf16."""
    config = AutoConfig.for_model("qwen3", **qwen3_config(size))
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return Target(model, spec_from_config(model.config, "random"))


def cache_rates(device: torch.device, size: Size, target: Target) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Tokens a second of a build beside the bare forward, and of the reader by its threads, to the device."""
    from deepspec.cache.assemble import finish_cache
    from deepspec.cache.forward import forward_batch
    from deepspec.cache.parts import layout_of, write_part
    from deepspec.cache.plan import CachePlan, PlannedPart
    from deepspec.cache.reader import TargetCache
    from deepspec.cache.store import FolderStore
    from deepspec.data.chat import Rendered
    from deepspec.sources.cache import CacheSource

    length, samples = min(2048, size["S"]), 16
    ids = torch.randint(size["vocab"], (length,)).tolist()
    rows = [[(n, str(n), Rendered(ids, [0, 1] * (length // 2))) for n in range(k, k + 2)] for k in range(0, samples, 2)]
    place = tempfile.TemporaryDirectory(prefix="deepspec-gpu-")
    folder = FolderStore(Path(place.name) / "cache")

    def bare() -> Row:
        tokens = torch.tensor([ids, ids], device=device)
        target.forward(tokens, LAYERS)
        spent = seconds(lambda: [target.forward(tokens, LAYERS) for _ in rows], device, 1)
        return {"tokens/s": round(samples * length / spent)}

    def build() -> Row:
        levels = dict.fromkeys(("features", "last_hidden"), "lossless")
        mark: dict[str, Any] = {"target": {"hidden_size": size["hidden"]}, "layers": [*LAYERS], "dtype": "bfloat16"}
        mark |= {"levels": levels, "sources": []}
        plan = CachePlan(mark, 0, float(length), (PlannedPart("00000", 0, 0, samples, 0, 0),))
        start = time.perf_counter()
        with ThreadPoolExecutor() as pool:
            blocks = (forward_batch(target, LAYERS, True, some)[1]() for some in rows)
            write_part(folder, "00000", layout_of(mark), pool, blocks)
        folder.write("plan.json", plan.to_bytes())
        finish_cache(folder, plan)
        return {"tokens/s": round(samples * length / (time.perf_counter() - start))}

    def read(threads: int) -> Row:
        source = CacheSource([TargetCache.open(folder.path)])
        start = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            read = [
                batch.to(device).features.nbytes for batch in pool.map(lambda n: source.batch([n], 0, 0), range(16))
            ]
        spent = time.perf_counter() - start
        return {"tokens/s": round(samples * length / spent), "GB/s": round(sum(read) / spent / 1e9, 2)}

    try:
        yield "bare forward", bare
        yield "build, lossless", build
        for threads in (1, 8):
            yield f"read, {threads} threads", lambda threads=threads: read(threads)  # type: ignore[misc]
    finally:
        place.cleanup()


def decode_rounds(
    device: torch.device, size: Size, target: Target, tokens: int
) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Milliseconds of a round, eager and captured, with random drafts, which are hardly ever accepted, and without one.

    Phases are of eager rounds; the medians and tokens/s leave out the rounds in which graphs are made.
    """
    prompt = tuple(torch.randint(size["vocab"], (min(512, size["S"]),)).tolist())
    settings = DecodeSettings(max_new_tokens=tokens)

    def measure(name: str | None, batch_size: int) -> Row:
        drafter = None
        if name is not None:
            model = draft_on(device, name, size).eval()
            model.attach(target.embed_weight, target.head_weight)
            drafter = model.algorithm.drafter(model, batch_size, len(prompt) + tokens + 64)

        def decode(captured: Captured | None) -> tuple[Decoder, float, int]:
            decoder = Decoder(target, drafter, settings, batch_size, captured=captured)
            decoder.clock.timings = []
            list(decoder.stream(deque(DecodeRequest(prompt, number) for number in range(batch_size))))
            rows = [one for one in decoder.clock.timings if one.rows]
            emitted = sum(one.emitted for one in rows) / len(rows)
            middle = statistics.median(one.seconds for one in rows)
            return decoder, round(1000 * middle, 2), round(emitted / middle)

        decode(None)  # brings everything up
        decoder, _, rate = decode(None)
        captured = Captured(graphs_of(device))
        _, replayed, replayed_rate = decode(captured)
        spent, rounds = decoder.clock.seconds(), max(1, decoder.clock.rounds)
        shares = {phase: round(1000 * spent[phase] / rounds, 3) for phase in ("draft", "verify", "head", "other")}
        row: Row = {"ms a round": round(sum(shares.values()), 2), **shares, "tokens/s": rate}
        row |= {"captured, ms a round": replayed, "captured, tokens/s": replayed_rate}
        return row | {"captured rounds": captured.count(VERIFY), "eager": "; ".join(captured.refused) or "nothing"}

    for name in (None, *registry.ALGORITHMS):
        for batch_size in (1, 16) if device.type == "cuda" else (2,):
            label = f"{name or 'without a draft'}, batch {batch_size}"
            yield label, lambda name=name, batch_size=batch_size: measure(name, batch_size)  # type: ignore[misc]
