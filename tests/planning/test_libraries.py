"""What libraries take of a training, measured in processes of their own."""

from __future__ import annotations

import platform

import pytest

from deepspec.errors import DeepSpecError
from deepspec.planning.libraries import library_bytes
from deepspec.planning.measure import machine_of
from deepspec.planning.probes import SIZES, RateProbe, count_step

pytestmark = pytest.mark.slow


def counted(name: str, size: tuple[int, ...]) -> RateProbe:
    """A probe that was counted and did not run."""
    return RateProbe(*count_step(name, size, "bfloat16", "cpu"), 1.0, 1.0)


@pytest.mark.skipif(platform.system() != "Linux", reason="sizes of processes differ by system")
def test_they_are_the_process_without_what_the_step_holds() -> None:
    probes = [counted("eagle3", size) for size in SIZES[:3]]
    machine = machine_of(probes, ["bfloat16"])
    found = [
        library_bytes(("eagle3", size, "bfloat16"), one, machine) for size, one in zip(SIZES, probes, strict=False)
    ]
    # a larger step is no more libraries: they differ by less than half of what its optimizer alone holds
    assert max(found) - min(found) < 0.5 * 16 * (probes[2].sizes.parameters - probes[0].sizes.parameters)
    assert min(found) > 200e6


def test_a_training_that_fails_is_named() -> None:
    probe = counted("eagle3", SIZES[0])
    with pytest.raises(DeepSpecError, match="a training of no such drafter failed"):
        library_bytes(("no such drafter", SIZES[0], "bfloat16"), probe, machine_of([probe], ["bfloat16"]))
