"""What a trace counts, against what the same step does with values."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from deepspec import registry
from deepspec.algorithms.base import DraftModel
from deepspec.batch import Batch
from deepspec.errors import RecipeError
from deepspec.planning import trace as tracing
from deepspec.planning.probes import probe_batch, probe_config, probe_spec
from deepspec.planning.trace import example, trace

SPEC = probe_spec(64, 128, 256)
DTYPES = [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)]


def counted(
    name: str, device: str = "cpu", tokens: int = 48, samples: int = 1, dtype: torch.dtype = torch.bfloat16,
    **changes: Any,
) -> tracing.MicroBatchCost:  # fmt: skip
    config = probe_config(name, SPEC, **changes)
    return trace(name, config, SPEC, example(tokens, samples, 0.6), dtype, device)


def real_step(name: str, tokens: int, dtype: torch.dtype) -> tuple[DraftModel, Tensor, Batch]:
    """A draft with values, its head, and a planned batch."""
    config, algorithm = probe_config(name, SPEC), registry.algorithm(name)
    model = algorithm.build(config, SPEC).to(dtype)
    head = torch.randn(SPEC.vocab_size, SPEC.hidden_size).to(dtype)
    model.attach(head, head)
    batch = probe_batch(SPEC, config, tokens, dtype)
    return model, head, batch.planned(algorithm.plan(config, batch.supervision))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", registry.ALGORITHMS)
def test_the_products_are_those_of_a_real_step(name: str, dtype: torch.dtype) -> None:
    model, _, batch = real_step(name, 48, dtype)
    with FlopCounterMode(display=False) as real:
        model(batch).loss().backward()
    assert counted(name, dtype=dtype).flops.total() == real.get_total_flops()


class _Made(TorchDispatchMode):
    """Bytes of the storages that operators make, at the fullest moment; those that were there before do not count."""

    def __init__(self, before: list[Tensor]) -> None:
        super().__init__()
        self._known = {one.untyped_storage()._cdata for one in before}
        self._now = self.fullest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, Tensor) and (key := one.untyped_storage()._cdata) not in self._known:
                self._known.add(key)
                self._add(one.untyped_storage().nbytes())
                weakref.finalize(one.untyped_storage(), self._free, key, one.untyped_storage().nbytes())
        return found

    def _add(self, size: int) -> None:
        self._now += size
        self.fullest = max(self.fullest, self._now)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", registry.ALGORITHMS)
def test_the_bytes_held_are_those_that_a_real_step_makes_and_no_weights(name: str, dtype: torch.dtype) -> None:
    model, head, batch = real_step(name, 480, dtype)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda one: setattr(one, "grad", None))
    given = [one for one in (batch.features, batch.last_hidden) if one is not None]
    with _Made([*model.parameters(), *model.buffers(), head, *given]) as made:
        model(batch).loss().backward()
    assert counted(name, tokens=480, dtype=dtype).held == pytest.approx(made.fullest, rel=0.05)


@pytest.mark.parametrize("name", registry.ALGORITHMS)
def test_every_drafter_is_counted_for_an_accelerator_too(name: str) -> None:
    cost = counted(name, "accelerator")
    assert cost.flops.total() > 0
    assert cost.peak["activations"] > 0
    assert cost.peak["loss buffers"] > 0


def test_a_longer_sample_costs_more_and_a_second_one_twice() -> None:
    name = next(iter(registry.ALGORITHMS))
    one, longer, two = counted(name), counted(name, tokens=96), counted(name, samples=2)
    assert longer.flops.total() > 1.5 * one.flops.total()
    assert two.last == 2 * one.last
    assert 1.5 < two.flops.total() / one.flops.total() < 2.5


def test_nothing_of_a_trace_stays() -> None:
    default = torch.get_default_dtype()
    backends = set(tracing.attention.BACKENDS)
    counted(next(iter(registry.ALGORITHMS)), "accelerator")
    gc.collect()
    assert torch.get_default_dtype() == default
    assert set(tracing.attention.BACKENDS) == backends
    assert set(tracing.tiles.CHUNK_BYTES) == {"cpu"}


def test_an_objective_that_waits_for_a_hidden_state_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = registry.algorithm(next(iter(registry.ALGORITHMS)))
    monkeypatch.setattr(type(algorithm), "objective", lambda self, model, batch: float(batch.features.sum()))
    with pytest.raises(RecipeError, match="reads a value from the device"):
        counted(algorithm.name)
