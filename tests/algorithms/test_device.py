"""Every drafter of every family on fake CUDA tensors: no CPU tensor among them, no waiting step, one read a round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from algorithm_tools import ALGORITHMS, EXPERTS
from torch import Tensor

from deepspec import registry
from deepspec.algorithms.base import Drafter
from deepspec.testing import tiny
from deepspec.testing.case import Case
from deepspec.testing.drafter import DeviceSuite
from deepspec.testing.fake_cuda import CUDA, DeviceError, fake_cuda

Plant = Callable[[Tensor], object]
READS: dict[str, Plant] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x.sum() > 0),
    "nonzero": lambda x: x.nonzero(),
    "boolean index": lambda x: x[x > 0],
    "equal": lambda x: torch.equal(x, x),
}
MIXED: dict[str, Plant] = {
    "sum": lambda x: x + torch.ones(4),
    "index": lambda x: x[torch.tensor([1, 0, 2])],
    "written index": lambda x: x.index_put_((torch.tensor([1]),), x[:1]),
}
WAITS: dict[str, Plant] = {
    "tensor of a list": lambda x: torch.tensor([1, 2], device=x.device),
    "index of a list": lambda x: x[[1, 0, 2]],
    "number": lambda x: x.new_tensor(2.0),
    "blocking copy": lambda x: torch.ones(3).to(x.device),
    "copy in place": lambda x: x.copy_(torch.ones(4)),
}
FINE: dict[str, Plant] = {
    "numbers of the host": lambda x: x * torch.tensor(2.0) + torch.where(x > 0, 1.0, x),
    "copy that nobody waits for": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "fill": lambda x: x.__setitem__(slice(1), 3.0),
    "made there": lambda x: torch.arange(4, device=x.device) + x,
}


class TestDevice(DeviceSuite):
    algorithms, families = ALGORITHMS, ("qwen3",)


@pytest.mark.slow
class TestDeviceOfOtherFamilies(DeviceSuite):
    algorithms, families = ALGORITHMS, tuple(name for name in registry.FAMILIES if name != "qwen3")


class _HalfPrecision(Case):
    def draft(self, **changes: Any) -> Any:
        return super().draft(**changes).bfloat16()


class TestExpertsOnDevice(DeviceSuite):
    """In bfloat16, whose experts are grouped; rounds are left out: transformers asks the driver for its target's."""

    algorithms, families, section = ("mtp",), ("qwen3",), {"experts": True}
    target_config: ClassVar = {"model_type": "qwen3_moe", **EXPERTS}
    test_a_round_of_decoding_reads_once_and_waits_for_nothing_else = None  # type: ignore[assignment]
    test_what_is_captured_of_a_round_copies_nothing = None  # type: ignore[assignment]

    @pytest.fixture(scope="class")
    def case(self, algorithm: str, family: str) -> Case:
        target = tiny.tiny_target(family, **self.target_config)
        section = tiny.tiny_section(algorithm, **self.section)
        return _HalfPrecision(registry.algorithm(algorithm), target, section, self.target_config)


@pytest.mark.parametrize("plant", {**READS, **MIXED}.values(), ids=[*READS, *MIXED])
@pytest.mark.parametrize("inference", [False, True])
def test_a_read_and_a_tensor_of_the_host_fail_where_they_are(plant: Plant, inference: bool) -> None:
    with fake_cuda(), torch.inference_mode(inference), pytest.raises(DeviceError):
        plant(torch.ones(4, device=CUDA))


@pytest.mark.parametrize("plants", [WAITS, FINE])
@pytest.mark.parametrize("inference", [False, True])
def test_a_copy_that_waits_is_counted_and_no_other(plants: dict[str, Plant], inference: bool) -> None:
    for name, plant in plants.items():
        with fake_cuda() as traffic, torch.inference_mode(inference):
            plant(torch.ones(4, device=CUDA))
        assert (len(traffic.waits), traffic.reads) == (int(plants is WAITS), []), name


def test_a_copy_to_the_host_is_a_read_and_gives_zeros() -> None:
    with fake_cuda() as traffic:
        x = torch.ones(2, 3, device=CUDA)
        assert x.is_cuda
        assert x.cpu().numpy().tolist() == [[0, 0, 0], [0, 0, 0]]
    assert [place.rsplit(":", 1)[0] for place in traffic.reads] == [__file__]


@pytest.fixture(scope="module")
def case() -> Case:
    target = tiny.tiny_target("qwen3")
    return Case(registry.algorithm("dflash"), target, tiny.tiny_section("dflash"), {})


@pytest.mark.parametrize("plant", [READS["item"], MIXED["index"]], ids=["item", "CPU tensor"])
def test_what_is_planted_in_an_objective_fails_the_suite(
    case: Case, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = type(case.owner).objective

    def planted(self: Any, model: Any, batch: Any) -> Any:
        plant(batch.features[0, 0, :4])
        return objective(self, model, batch)

    monkeypatch.setattr(type(case.owner), "objective", planted)
    with pytest.raises(DeviceError):
        DeviceSuite().test_a_training_step_mixes_no_devices_and_never_waits(case)


@pytest.mark.parametrize(
    ("plant", "error"),
    [(READS["item"], DeviceError), (MIXED["index"], DeviceError), (Tensor.cpu, AssertionError)],
    ids=["item", "CPU tensor", "a second read"],
)
def test_what_is_planted_in_a_drafter_fails_the_suite(
    case: Case, plant: Plant, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Planted(case.owner.drafter_class):  # type: ignore[misc, name-defined]
        def propose(self: Drafter, *arguments: Any) -> Any:
            plant(self._length_B.expand(4, -1)[:, 0].float())
            return super().propose(*arguments)

    monkeypatch.setattr(type(case.owner), "drafter_class", Planted)
    with pytest.raises(error):
        DeviceSuite().test_a_round_of_decoding_reads_once_and_waits_for_nothing_else(case, 0.0)
    with pytest.raises(DeviceError):
        DeviceSuite().test_what_is_captured_of_a_round_copies_nothing(case, 0.0)
