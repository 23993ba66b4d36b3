"""What a GPU computes by its own kernels beside the plain twin: attention, losses, training steps, decoding.

``gpu_check.py`` runs all of it, the tests marked ``gpu`` too; on a CPU it runs uncompiled, flex attention only forward.
A figure is the norm of the difference as a share of the norm of the twin's result, which is computed in fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepspec import registry
from deepspec.algorithms.base import DraftModel
from deepspec.batch import Batch
from deepspec.decoding.captured import VERIFY, Captured, CudaGraphs, Graphs
from deepspec.decoding.loop import generate
from deepspec.decoding.records import DecodeSettings
from deepspec.nn.attention import attend
from deepspec.nn.heads import FrozenHead
from deepspec.nn.loss_table import LOSSES, LossWeights
from deepspec.nn.losses import HeadRows, head_loss
from deepspec.targets import Target
from deepspec.testing import tiny
from deepspec.testing.case import Case, loss_and_gradients
from deepspec.testing.recorder import RecordedGraphs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LIMITS = {"fp32": 1e-3, "bf16": 3e-2}
SIGNS = 0.3  # of a gradient along sign(p - q) in bf16: signs of small differences flip
PROMPTS = [[1, 5, 9, 12], [7], [3, 3, 8, 20, 33, 41]]


class Twin(NamedTuple):
    """One comparison; a check computes what several share, the twin's result, before it gives them."""

    name: str
    limit: float
    compare: Callable[[], float]


def difference(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|; NaN is never small."""
    exact = wanted.detach().double().cpu()
    return float((found.detach().double().cpu() - exact).norm() / exact.norm().clamp_min(1e-12))


def worst(run: Callable[[], list[Tensor]], wanted: list[Tensor]) -> float:
    """The largest :func:`difference` of several results; NaN if one is."""
    found = [difference(one, other) for one, other in zip(run(), wanted, strict=True)]
    return max(found) if all(value == value for value in found) else float("nan")


def attention(device: torch.device) -> Iterator[Twin]:
    """Flex attention against the reference with a mask, dense and packed: rows of different limits, windows, causal."""
    small = device.type == "cpu"
    B, N, K, S, G, E = (2, 5, 3, 40, 2, 16) if small else (2, 200, 7, 1000, 8, 128)
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, N, K, 2 * G, E), (B, S, G, E), (B, S, G, E), (B, N, K, G, E), (B, N, K, G, E)]
    exact = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    limit = torch.randint(0, S + 1, (B, N), generator=generator).to(device)
    weight = torch.randn(shapes[0], generator=generator).to(device)
    windows = (limit[..., None] - torch.arange(8, 8 + K, device=device)).clamp_min(0)
    for kind, causal, start in (("all", False, None), ("causal", True, None), ("window", True, windows)):

        def run(backend: str, dtype: torch.dtype, causal: bool = causal, start: Tensor | None = start) -> list[Tensor]:
            query, ck, cv, ok, ov = leaves = [one.to(dtype).requires_grad_(not small) for one in exact]
            out = attend(query, (ck, cv), (ok, ov), limit, E**-0.5, backend, causal, start)
            return [out, *(torch.autograd.grad((out.float() * weight).sum(), leaves) if not small else ())]

        wanted = run("sdpa", torch.float32)
        for name, dtype in DTYPES.items():
            yield Twin(
                f"flex attention, {kind}, {name}", LIMITS[name], partial(worst, partial(run, "flex", dtype), wanted)
            )


def losses(device: torch.device) -> Iterator[Twin]:
    """Every loss of the table compiled against the tiled one, values and gradients, with and without a Markov head."""
    small = device.type == "cpu"
    R, V, D, M = (24, 61, 8, 4) if small else (3000, 32_000, 512, 64)
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device)

    position = torch.arange(R) // 3
    rows = HeadRows.plan(position, torch.rand(R, generator=generator))
    rows = rows.with_labels(torch.randint(0, V, (R,), generator=generator).to(device))
    exact = [normal(R, D), normal(len(rows.starts) - 1, M), normal(V, M, scale=0.1)]
    head, target = normal(V, D, scale=D**-0.5), normal(len(rows.starts) - 1, D)

    def run(backend: str, weights: LossWeights, dtype: torch.dtype, markov: bool) -> list[Tensor]:
        leaves = [one.to(dtype).requires_grad_() for one in (exact if markov else exact[:1])]
        frozen = FrozenHead(head.to(dtype), head.to(dtype))
        loss = head_loss(leaves[0], frozen, rows, weights, target.to(dtype), *leaves[1:], backend=backend)
        return [loss.combined.detach(), *torch.autograd.grad(loss.combined, leaves)]

    for loss in (name for name, row in LOSSES.items() if row.value is not None):
        weights = LossWeights(**{loss: 1.0})
        torch._dynamo.reset()  # past its limit of recompilations it would run eagerly, and say nothing
        for markov in (False, True):
            wanted = run("tiled", weights, torch.float32, markov)
            for name, dtype in DTYPES.items():
                limit = SIGNS if name == "bf16" and weights.reads("l1") else LIMITS[name]
                compiled = partial(run, "compiled", weights, dtype, markov)
                yield Twin(f"compiled {loss}{', Markov' * markov}, {name}", limit, partial(worst, compiled, wanted))


def _case(name: str, family: str) -> Case:
    return Case(registry.algorithm(name), tiny.tiny_target(family), tiny.tiny_section(name), {})


def steps(device: torch.device) -> Iterator[Twin]:
    """A training step of every drafter of every family against the CPU's, and that nothing in it waits."""
    pairs = [(name, family) for name in registry.ALGORITHMS for family in registry.FAMILIES]
    for name, family in pairs if device.type == "cuda" else pairs[:1]:
        case = _case(name, family)
        model, batch = case.draft(), case.batch([40, 25])
        batch = batch.planned(case.owner.plan(model.config, batch.supervision))
        wanted = _results(model, batch)
        model.attention = "auto" if device.type == "cuda" else "sdpa"
        model.to(device)
        moved = batch.to(device)
        again = partial(worst, partial(_results, model, moved), wanted)
        yield Twin(f"training step, {name}, {family}", LIMITS["fp32"], again)
        yield Twin(f"waits of a training step, {name}, {family}", 0.0, partial(_waits, model, moved))


def _results(model: Any, batch: Batch) -> list[Tensor]:
    """The loss and every gradient."""
    loss, gradients = loss_and_gradients(model, batch)
    return [torch.tensor(loss), *(gradients[name] for name in sorted(gradients))]


def _waits(model: Any, batch: Batch) -> float:
    """1 where CUDA saw the host wait for the device in a step, else 0."""
    if model.device.type != "cuda":
        return 0.0
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(batch).loss().backward()
    except RuntimeError as problem:
        if "synchronizing" not in str(problem):
            raise
        return 1.0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return 0.0


def decoding(device: torch.device) -> Iterator[Twin]:
    """Greedy decoding with every drafter gives what the target alone gives: the share of answers that differ."""
    pairs = [(name, family) for name in registry.ALGORITHMS for family in ("qwen3", "gemma4")]
    for name, family in pairs if device.type == "cuda" else pairs[:1]:
        yield Twin(f"decoding, {name}, {family}", 0.0, partial(_wrong_answers, _case(name, family), device))


def _moved(case: Case, device: torch.device) -> tuple[Target, DraftModel]:
    target = Target(copy.deepcopy(case.target.model).to(device), case.target.spec)
    model = case.draft().eval().to(device)
    model.attach(target.embed_weight, target.head_weight)
    return target, model


def _wrong_answers(case: Case, device: torch.device) -> float:
    settings = DecodeSettings(max_new_tokens=16)
    target, model = _moved(case, device)
    plain = generate(target, None, PROMPTS, settings, 3)
    drafted = generate(target, case.owner.drafter(model, 3, 16), PROMPTS, settings, 3)
    return sum(a.output_ids != b.output_ids for a, b in zip(plain, drafted, strict=True)) / len(PROMPTS)


def captured(device: torch.device) -> Iterator[Twin]:
    """Rounds in CUDA graphs beside eager ones, greedy and sampled: the share of answers that differ."""
    pairs = [(name, family) for name in registry.ALGORITHMS for family in ("qwen3", "gemma4")]
    for name, family in pairs if device.type == "cuda" else pairs[:1]:
        for temperature in (0.0, 1.0):
            compare = partial(_changed_answers, _case(name, family), device, temperature)
            yield Twin(f"captured rounds, {name}, {family}, temperature {temperature:g}", 0.0, compare)


def _changed_answers(case: Case, device: torch.device, temperature: float) -> float:
    """1 where a piece of the rounds was not captured."""
    settings = DecodeSettings(temperature, 24, seed=1)
    target, model = _moved(case, device)
    rounds = Captured(graphs_of(device))
    eager, replayed = (
        generate(target, case.owner.drafter(model, 3, 16), PROMPTS, settings, 3, None, one) for one in (None, rounds)
    )
    if rounds.refused or not rounds.count(VERIFY):
        return 1.0
    return sum(a.output_ids != b.output_ids for a, b in zip(eager, replayed, strict=True)) / len(PROMPTS)


def graphs_of(device: torch.device) -> Graphs:
    """CUDA graphs; on the CPU what stands in for them."""
    return CudaGraphs() if device.type == "cuda" else RecordedGraphs()


CHECKS = (attention, losses, steps, decoding, captured)
