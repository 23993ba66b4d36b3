"""The loop in one process: a loss that is not finite, the profiler's trace, accumulation, workers, the log."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import training_tools as tools
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deepspec.checkpoints import steps_of
from deepspec.distributed import World
from deepspec.errors import DeepSpecError
from deepspec.recipe import load_recipe
from deepspec.training import run
from deepspec.training.loop import Trainer
from deepspec.training.report import NonFiniteLoss, wandb_session

pytest_plugins = ["training_fixtures"]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tools.make_target(tmp_path_factory.mktemp("loop") / "target")


@pytest.fixture(autouse=True)
def memory_source(monkeypatch: pytest.MonkeyPatch) -> None:
    tools.use_memory_source(monkeypatch)


def trainer_of(recipe: Path, world: World, *overrides: str, profile: bool = False) -> Trainer:
    return run.assemble(run.prepare(load_recipe(recipe, overrides), world, False), world, profile)


def train(recipe: Path, world: World, *overrides: str, profile: bool = False) -> list[dict[str, Any]]:
    trainer = trainer_of(recipe, world, *overrides, profile=profile)
    assert trainer.run(0)
    trainer.engine.close()
    return tools.log_of(trainer.checkpoints.run)


def test_a_loss_that_is_not_finite_names_step_and_samples(tmp_path: Path, target: Path, world: World) -> None:
    trainer = trainer_of(tools.write_recipe(tmp_path, target, max_steps=6, save_every=1), world)
    numbers = trainer.prefetcher.plan.step(2).samples
    bad = int(numbers[1])
    first = next(s for s in range(6) if bad in trainer.prefetcher.plan.step(s).samples)
    trainer.prefetcher.source.samples[bad][2][:] = float("nan")  # type: ignore[attr-defined]
    with pytest.raises(NonFiniteLoss, match=rf"optimizer step {first + 1}, sample ids \[{100 + bad}\]"):
        trainer.run(0)
    trainer.checkpoints.wait()
    trainer.engine.close()
    assert list(steps_of(trainer.checkpoints.run)) == list(range(max(1, first - 2), first + 1))


LINE = re.compile(
    r"^step 10/10 \| loss [\d.]+ \| tau [\d.]+ \| lr [\d.e-]+ \| [\d,]+ tokens/s \| left 0:00:00$", re.MULTILINE
)


def test_profile_and_tensorboard_leave_their_files(
    tmp_path: Path, target: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tools.write_recipe(tmp_path, target, max_steps=10, tensorboard=True)
    rows = train(recipe, world, profile=True)
    assert LINE.search(capsys.readouterr().out)
    assert "traceEvents" in (tmp_path / "run" / "profile" / "rank0.json").read_text()[:5000]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    written = [event.value for event in events.Scalars("loss/loss")]
    assert written == pytest.approx([row["loss"] for row in rows])
    names = set(events.Tags()["scalars"])
    assert {"acceptance/accept_rate@1", "acceptance/tau", "data/padding", "speed/tokens_per_second"} < names
    assert {name.split("/")[0] for name in names} == {"loss", "acceptance", "speed", "data", "optimizer"}
    assert rows[-1]["loss"] < rows[0]["loss"]
    wanted = {"tau", "lr", "grad_norm", "tokens_per_second", "samples_per_second", "data_wait", "memory_gb", "padding"}
    assert wanted <= set(rows[0])


@pytest.mark.parametrize("algorithm", ["dspark", "dflash", "eagle3"])
def test_nothing_depends_on_workers_or_checkpointed_activations(
    tmp_path: Path, target: Path, world: World, algorithm: str
) -> None:
    losses = []
    for name, extra in (("a", {"workers": 0}), ("b", {"workers": 3}), ("c", {"activation_checkpointing": True})):
        recipe = tools.write_recipe(tmp_path / name, target, algorithm, max_steps=4, **extra)
        losses.append([row["loss"] for row in train(recipe, world)])
    assert losses[0] == losses[1]
    assert losses[2] == pytest.approx(losses[0], abs=1e-6)


def test_the_loss_does_not_depend_on_how_a_step_is_cut(tmp_path: Path, target: Path, world: World) -> None:
    losses = []
    cuts = [{"micro_batch": size} for size in (1, 2, 4)] + [{"micro_tokens": tokens} for tokens in (1, 40, 70, 10_000)]
    for number, cut in enumerate(cuts):
        recipe = tools.write_recipe(tmp_path / str(number), target, max_steps=6, lr=1e-3, **cut)
        losses.append([row["loss"] for row in train(recipe, world)])
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=2e-5)


def test_a_gradient_is_that_of_one_large_batch(tmp_path: Path, target: Path, world: World) -> None:
    """Plain twin: the same samples in one batch, one backward, no DeepSpeed."""
    trainer = trainer_of(tools.write_recipe(tmp_path, target, max_steps=1, grad_clip=0.5), world)
    plan = trainer.prefetcher.plan.step(0)
    model = trainer.engine.model
    algorithm = run.registry.algorithm("dspark")
    plain = algorithm.build(trainer.recipe.draft, run.load_spec(str(target)), trainer.recipe.seed)
    frozen = model.frozen  # type: ignore[attr-defined]
    plain.attach(frozen.embed_VD, frozen.head_VD)
    batch = trainer.prefetcher.source.batch(plan.samples.tolist(), trainer.recipe.seed, 0)
    loss = plain(batch).loss()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
    assert trainer.run(0)
    row = tools.log_of(tmp_path / "run")[0]
    trainer.engine.close()
    assert row["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.filterwarnings("ignore:dynamo_pgo")
def test_without_a_compiler_the_loss_runs_uncompiled(
    tmp_path: Path, target: Path, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = [row["loss"] for row in train(tools.write_recipe(tmp_path / "a", target, max_steps=3), world)]
    with monkeypatch.context() as without:
        without.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
        without.setattr("torch._inductor.config.force_disable_caches", True)
        torch.compiler.reset()
        compiled = tools.write_recipe(tmp_path / "b", target, max_steps=3, compile=True)
        assert [row["loss"] for row in train(compiled, world)] == wanted
    said = [line for line in capsys.readouterr().out.splitlines() if "torch.compile does not work here" in line]
    assert len(said) == 1
    torch.compiler.reset()


@pytest.mark.slow
def test_a_compiled_loss_is_the_same_loss(tmp_path: Path, target: Path, world: World) -> None:
    losses = []
    for name in ("plain", "compiled"):
        recipe = tools.write_recipe(tmp_path / name, target, max_steps=3, compile=name == "compiled")
        losses.append([row["loss"] for row in train(recipe, world)])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_a_resumed_run_goes_on_in_its_own_wandb_session(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, Any]] = []
    fake = types.ModuleType("wandb")
    fake.init = lambda **settings: begun.append(settings)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    recipe = load_recipe(tools.write_recipe(tmp_path, target, wandb_project="drafts"))
    for first_step in (0, 4, 0):
        wandb_session(recipe, tmp_path, first_step)
    ids = [settings["id"] for settings in begun]
    assert ids[0] == ids[1] != ids[2]
    assert {settings["project"] for settings in begun} == {"drafts"}
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(DeepSpecError, match=r"wandb is not installed.*pip install 'deepspec\[wandb\]'"):
        wandb_session(recipe, tmp_path, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU DeepSpeed needs its kernels")
def test_a_start_compiles_no_test_programs(world: World) -> None:
    """DeepSpeed would, to learn which kernels it could build; a kill then leaves them in the temporary folder."""
    assert world.size >= 1
    assert vars(deepspeed.ops)["__compatible_ops__"] == {"deepspeed_shm_comm": False}
