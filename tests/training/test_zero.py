"""Every ZeRO stage, both precisions, one and two processes: the same losses, and weights that consolidate exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import training_tools as tools
from safetensors.torch import load_file

from deepspec.export.consolidate import consolidate

STAGES = ("zero0", "zero1", "zero2", "zero3")
OFFLOAD = ("zero1_offload", "zero2_offload", "zero3_offload")
QUICK = [*((stage, "fp32") for stage in STAGES), ("zero0", "bf16"), ("zero3", "bf16")]
REST = [("zero1", "bf16"), ("zero2", "bf16")]
ALL = [*QUICK, *(pytest.param(*one, marks=pytest.mark.slow) for one in REST)]
STEPS = 4  # of the quick trainings
TOLERANCE = {"fp32": 1e-6, "bf16": 2e-3}


def shared_memory() -> set[str]:
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


class Runs:
    """Trainings of one set of configurations at one and two processes."""

    def __init__(self, folder: Path, algorithms: tuple[str, ...], configurations: list[str], steps: int) -> None:
        self.folder = folder
        target = tools.make_target(folder / "target")
        before = shared_memory()
        for processes in (1, 2):
            jobs = []
            cut = {} if processes == 1 else {"micro_tokens": 60}  # steps then differ in their number of micro-batches
            for algorithm in algorithms:
                for zero in configurations:
                    place = folder / f"{algorithm}_{zero}_{processes}"
                    recipe = tools.write_recipe(
                        place, target, algorithm, zero, max_steps=steps, save_every=steps, lr=5e-4, **cut
                    )
                    jobs.append({"recipe": str(recipe), "gather": str(place / "live.pt")})
            tools.run_jobs(folder, jobs, processes)
        self.left_behind = {name for name in shared_memory() - before if "torch" in name or "shm" in name}

    def losses(self, algorithm: str, zero: str, processes: int) -> list[float]:
        rows = tools.log_of(self.folder / f"{algorithm}_{zero}_{processes}" / "run")
        return [row["loss"] for row in rows]

    def rows(self, algorithm: str, zero: str, processes: int) -> list[dict[str, Any]]:
        return tools.log_of(self.folder / f"{algorithm}_{zero}_{processes}" / "run")


def check_losses(runs: Runs, algorithm: str, zero: str, processes: int, steps: int) -> None:
    precision = zero.split("_")[-1]
    reference = runs.losses(algorithm, f"zero0_{precision}", 1)
    losses = runs.losses(algorithm, zero, processes)
    assert len(losses) == len(reference) == steps
    for step, (loss, wanted) in enumerate(zip(losses, reference, strict=True)):
        assert abs(loss - wanted) <= TOLERANCE[precision] * max(1.0, abs(wanted)), f"step {step}: {loss} {wanted}"


def train(tmp_path_factory: pytest.TempPathFactory, chosen: list[tuple[str, str]]) -> Runs:
    with pytest.MonkeyPatch.context() as patch:  # so small a draft would not call it by itself
        patch.setenv("DEEPSPEC_PRODUCTS", "onednn")
        return Runs(tmp_path_factory.mktemp("zero"), ("dspark",), [f"{stage}_{kind}" for stage, kind in chosen], STEPS)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return train(tmp_path_factory, QUICK)


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return train(tmp_path_factory, [("zero0", "fp32"), ("zero0", "bf16"), *REST])  # with what they are compared with


@pytest.fixture
def runs(request: pytest.FixtureRequest, stage: str, precision: str) -> Runs:
    """The trainings that have a stage in a precision."""
    found: Runs = request.getfixturevalue("rest" if (stage, precision) in REST else "quick")
    return found


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("stage", "precision"), ALL)
def test_losses_do_not_depend_on_the_stage(runs: Runs, stage: str, precision: str, processes: int) -> None:
    check_losses(runs, "dspark", f"{stage}_{precision}", processes, STEPS)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("stage", "precision"), ALL)
def test_gradient_norms_do_not_depend_on_the_stage(runs: Runs, stage: str, precision: str, processes: int) -> None:
    wanted = [row["grad_norm"] for row in runs.rows("dspark", "zero0_fp32", 1)]
    found = [row["grad_norm"] for row in runs.rows("dspark", f"{stage}_{precision}", processes)]
    assert found == pytest.approx(wanted, rel=1e-4 if precision == "fp32" else 0.1)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("stage", "precision"), ALL)
def test_consolidated_weights_equal_the_live_ones(
    runs: Runs, stage: str, precision: str, processes: int, tmp_path: Path
) -> None:
    place = runs.folder / f"dspark_{stage}_{precision}_{processes}"
    consolidate(place / "run", tmp_path / "draft", embeddings=False)
    live = torch.load(place / "live.pt", weights_only=True)
    exported = load_file(tmp_path / "draft" / "model.safetensors")
    assert set(exported) == set(live)
    for name, tensor in live.items():
        assert exported[name].dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
        assert torch.equal(exported[name], tensor.cpu()), name


def test_nothing_is_left_in_shared_memory(quick: Runs) -> None:
    assert quick.left_behind == set()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    names = (*STAGES, *OFFLOAD)
    configurations = [f"{name}_{kind}" for kind in ("fp32", "bf16") for name in names]
    return Runs(tmp_path_factory.mktemp("whole"), ("dspark", "dflash", "eagle3"), configurations, 20)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("configuration", [*STAGES, *OFFLOAD])
@pytest.mark.parametrize("algorithm", ["dspark", "dflash", "eagle3"])
def test_twenty_steps(whole: Runs, algorithm: str, configuration: str, precision: str, processes: int) -> None:
    check_losses(whole, algorithm, f"{configuration}_{precision}", processes, 20)
