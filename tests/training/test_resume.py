"""Resume: the same bits at the same number of processes, the same losses at another, and nothing changed silently."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import fork_server
import pytest
import torch
import training_tools as tools
from safetensors.torch import load_file

from deepspec.checkpoints import read_manifest, read_weights, steps_of
from deepspec.distributed import free_port
from deepspec.errors import CheckpointError
from deepspec.export.consolidate import consolidate
from deepspec.files import read_json
from deepspec.recipe import load_recipe

Process = subprocess.Popen[str] | fork_server.Forked
STEPS = 8
WORKER = tools.ROOT / "tests" / "helpers" / "training_worker.py"


def losses(run: Path) -> dict[int, float]:
    """Loss by step."""
    return {row["step"]: row["loss"] for row in tools.log_of(run)}


def weights(run: Path) -> dict[str, torch.Tensor]:
    folder = list(steps_of(run).values())[-1]
    return read_weights(folder, read_manifest(folder))


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


FREEZE = ["*", "!markov_head.*", "!confidence_head.*", "!layers.0.mlp.*"]


class Runs:
    """For each configuration: an undisturbed run, one stopped and resumed, and one that changes its processes 2-1-2.

    Those of ``tuned`` are fine-tunings of the draft in ``folder/draft`` with frozen parts; ``kinds`` leaves runs out.
    """

    def __init__(
        self,
        folder: Path,
        configurations: list[tuple[str, str]],
        tuned: Sequence[str] = (),
        kinds: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
    ) -> None:
        self.folder = folder
        target = tools.make_target(folder / "target")
        if tuned:
            tools.make_draft(folder / "draft", target)
        first, second, third = [], [], []
        for algorithm, zero in configurations:
            for kind in kinds.get(zero, ("whole", "stopped", "elastic")):
                place = folder / f"{algorithm}_{zero}_{kind}"
                tune = {"init": {"draft": str(folder / "draft")}, "freeze": FREEZE} if zero in tuned else {}
                recipe = str(tools.write_recipe(place, target, algorithm, zero, max_steps=STEPS, **tune))
                if kind == "whole":
                    first.append({"recipe": recipe})
                    continue
                first.append({"recipe": recipe, "steps": 3})
                if kind == "elastic":
                    second.append({"recipe": recipe, "steps": 5})
                third.append({"recipe": recipe})
        for jobs, processes in ((first, 2), (second, 1), (third, 2)):
            for job in jobs:
                job["set"] = ["draft.draft_vocab_size=40"]  # a draft with buffers
            tools.run_jobs(folder, jobs, processes)

    def place(self, algorithm: str, zero: str, kind: str) -> Path:
        return self.folder / f"{algorithm}_{zero}_{kind}" / "run"


QUICK = [("dspark", "zero1_fp32")]
TUNED = ("dspark", "zero3_bf16")
ALL_TUNED = [f"zero{stage}_{precision}" for stage in range(4) for precision in ("fp32", "bf16")]
ALL = [(a, f"zero{s}_{p}") for a in ("dspark", "dflash", "eagle3") for s in range(4) for p in ("fp32", "bf16")]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    kinds = {QUICK[0][1]: ("whole", "elastic"), TUNED[1]: ("whole", "stopped")}  # the slow runs have every kind of each
    return Runs(tmp_path_factory.mktemp("resume"), [*QUICK, TUNED], [TUNED[1]], kinds)


@pytest.fixture(scope="module")
def all_tuned(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("resume_tuned"), [("dspark", zero) for zero in ALL_TUNED], ALL_TUNED)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("resume_all"), ALL)


def check_same_processes(runs: Runs, algorithm: str, zero: str) -> None:
    whole, stopped = (runs.place(algorithm, zero, kind) for kind in ("whole", "stopped"))
    assert losses(stopped) == losses(whole)
    assert len(losses(whole)) == STEPS
    assert equal(weights(stopped), weights(whole))


def check_other_processes(runs: Runs, algorithm: str, zero: str) -> None:
    whole, elastic = (runs.place(algorithm, zero, kind) for kind in ("whole", "elastic"))
    limit = 1e-5 if zero.endswith("fp32") else 2e-2
    found, wanted = losses(elastic), losses(whole)
    assert sorted(found) == sorted(wanted) == list(range(1, STEPS + 1))
    assert max(abs(found[step] - wanted[step]) / max(1.0, wanted[step]) for step in wanted) <= limit
    for buffer in ("d2t", "t2d"):  # DeepSpeed's conversion for another number of processes drops them
        assert torch.equal(weights(elastic)[buffer], weights(whole)[buffer])


def check_tuned(runs: Runs, zero: str, output: Path) -> None:
    """Resume and consolidation of a fine-tuning: its frozen weights stay the draft's to the bit."""
    check_same_processes(runs, "dspark", zero)
    start = load_file(runs.folder / "draft" / "model.safetensors")
    consolidate(runs.place("dspark", zero, "stopped"), output, embeddings=False)
    found = load_file(output / "model.safetensors")
    assert found.keys() == start.keys() | {"d2t", "t2d"}
    for name, wanted in start.items():
        free = name.startswith(("markov_head.", "confidence_head.", "layers.0.mlp."))
        if "markov_w2" not in name:  # its rows moved to another vocabulary
            assert torch.equal(found[name], wanted.to(found[name].dtype)) != free, name
    about = json.loads((output / "provenance.json").read_text())["init"]
    assert about["draft"] == str(runs.folder / "draft")


def test_a_fine_tuning_with_frozen_parts_resumes_and_consolidates(quick: Runs, tmp_path: Path) -> None:
    check_tuned(quick, TUNED[1], tmp_path / "draft")


@pytest.mark.slow
@pytest.mark.parametrize("zero", ALL_TUNED)
def test_every_stage_resumes_a_fine_tuning(all_tuned: Runs, zero: str, tmp_path: Path) -> None:
    check_tuned(all_tuned, zero, tmp_path / "draft")
    check_other_processes(all_tuned, "dspark", zero)


def test_two_one_two_processes_give_the_same_losses(quick: Runs) -> None:
    check_other_processes(quick, *QUICK[0])


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "zero"), ALL)
def test_every_configuration_resumes_bit_equal(everything: Runs, algorithm: str, zero: str) -> None:
    check_same_processes(everything, algorithm, zero)


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "zero"), ALL)
def test_every_configuration_changes_its_processes(everything: Runs, algorithm: str, zero: str) -> None:
    check_other_processes(everything, algorithm, zero)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps, kept every two; the folder of its recipe."""
    folder = tmp_path_factory.mktemp("finished")
    target = tools.make_target(folder / "target")
    recipe = tools.write_recipe(
        folder / "a", target, max_steps=6, save_every=1, keep_last=2, keep_every=2, tensorboard=True
    )
    tools.run_jobs(folder, [{"recipe": str(recipe)}], 1)
    return folder / "a"


def test_keeps_the_last_and_every_nth_checkpoint(finished: Path) -> None:
    assert list(steps_of(finished / "run")) == [2, 4, 5, 6]
    names = {path.name for path in (finished / "run" / "checkpoints").iterdir()}
    assert names == {"step_2", "step_4", "step_5", "step_6"}  # and nothing of DeepSpeed's beside them
    assert list((finished / "run" / "tensorboard").glob("events*"))


def test_checkpoints_hold_no_frozen_weights(finished: Path) -> None:
    names = set(weights(finished / "run"))
    assert names
    assert not any("embed_tokens" in name or "lm_head" in name for name in names)


REFUSED = {
    "train.global_batch=8": "train.global_batch",
    "seed=4": "seed",
    "draft.num_anchors=8": "draft.num_anchors",
    "train.lr=1.0e-4": "--accept-changes",
    "train.max_steps=9": "--accept-changes",
    "train.max_steps=3": "--accept-changes",
}


@pytest.mark.parametrize("change", REFUSED)
def test_a_changed_recipe_is_refused_by_name(
    finished: Path, change: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=REFUSED[change].replace(".", r"\.")):
        prepare(finished, [change], monkeypatch)


@pytest.mark.parametrize("change", ["train.global_batch=8", "seed=4", "draft.num_anchors=8"])
def test_accepting_changes_does_not_accept_another_run(
    finished: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match="cannot change this"):
        prepare(finished, [change], monkeypatch, accept=True)


@pytest.mark.parametrize("cut", ["train.micro_batch=2", "train.micro_tokens=99"])
def test_another_cut_of_a_step_is_no_change_of_the_run(
    finished: Path, cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = prepare(finished, [cut], monkeypatch).start
    assert (start.step, start.changes) == (6, ())


def test_a_run_that_began_with_length_buckets_says_how_to_go_on(
    finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "a")
    path = tmp_path / "a" / "run" / "checkpoints" / "step_6" / "manifest.json"
    manifest = read_json(path)
    manifest["recipe"]["train"]["bucket_batches"] = 50
    path.write_text(json.dumps(manifest))
    here = f"output={tmp_path / 'a' / 'run'}"
    with pytest.raises(CheckpointError, match=r"bucket_batches: .*it is gone \(.*random draw.*give --accept"):
        prepare(finished, [here], monkeypatch)
    assert prepare(finished, [here], monkeypatch, accept=True).start.changes == ("train.bucket_batches: 50 -> None",)


def test_an_extension_is_honoured_when_accepted(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = prepare(finished, ["train.max_steps=9", "train.lr=1.0e-4"], monkeypatch, accept=True).start
    assert start.step == 6
    assert start.changes == ("train.lr: 0.003 -> 0.0001", "train.max_steps: 6 -> 9")


def test_other_data_and_another_target_are_refused(
    finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="data are not the run's"):
        prepare(finished, [], monkeypatch, count=20)
    torch.manual_seed(1)
    other = tools.make_target(tmp_path / "other", seed=8)
    with pytest.raises(CheckpointError, match=r"target is not the run's: target\.weights: run"):
        prepare(finished, [f"target.path={other}"], monkeypatch)


def prepare(
    place: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch, accept: bool = False, count: int = 24
) -> Any:
    from deepspec.distributed import World
    from deepspec.training import run

    tools.use_memory_source(monkeypatch, count=count)
    return run.prepare(load_recipe(place / "recipe.yaml", overrides), World(), accept)


def test_a_cut_checkpoint_is_named(finished: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(finished / "run" / "checkpoints" / "step_6", tmp_path / "checkpoints" / "step_6")
    victim = next((tmp_path / "checkpoints" / "step_6").glob("*optim_states.pt"))
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"file missing or cut.*bytes"):
        consolidate(tmp_path, tmp_path / "draft")
    assert not (tmp_path / "draft").exists()


# -- signals and crashes ----------------------------------------------------------------------------------------------


def start_worker(folder: Path, recipe: Path, launcher: Sequence[str] = (sys.executable,)) -> Process:
    path = folder / "jobs.json"
    path.write_text(json.dumps([{"recipe": str(recipe)}]))
    environment = tools.own_environment()
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = [*launcher, str(WORKER), str(path)]
    with open(folder / "output.txt", "a", encoding="utf-8") as output:
        if launcher == (sys.executable,):
            return fork_server.start(command, output, output, environment)
        return subprocess.Popen(
            command, cwd=tools.ROOT, env=environment, stdout=output, stderr=output, text=True, start_new_session=True
        )


def wait_for(condition: Any, process: Process, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)


def deepspeed_command(processes: int) -> list[str]:
    command = [str(Path(sys.executable).with_name("deepspeed")), "-q", "--num_gpus", str(processes)]
    return [*command, "--master_port", str(free_port())]


def disturbed_equals_undisturbed(folder: Path, steps: int, kills: int, processes: int = 1) -> int:
    """Kill a run that saves at every step ``kills`` times with SIGKILL at random moments; then let it end.

    Three of four kills come in or just after a save, the others while the run starts and reads its checkpoint.

    Returns:
        How many kills hit a save (its temporary folder was there).
    """
    target = tools.make_target(folder / "target")
    settings: dict[str, Any] = {"max_steps": steps, "save_every": 1, "keep_last": 2}
    calm = tools.write_recipe(folder / "calm", target, **settings)
    tools.run_jobs(folder, [{"recipe": str(calm)}], processes)
    rough, moments = tools.write_recipe(folder / "rough", target, **settings), random.Random(5)
    killed = in_saves = 0
    checkpoints = folder / "rough" / "run" / "checkpoints"
    for _ in range(4 * kills):
        if killed == kills:
            break
        before = max(steps_of(folder / "rough" / "run"), default=0)
        if before >= steps - 1:
            break
        process = start_worker(folder, rough, deepspeed_command(processes) if processes > 1 else (sys.executable,))
        if killed % 4 == 3:
            time.sleep(moments.uniform(0.0, 3.0))
        else:  # the first save of this start has begun: kill somewhere in it or in what follows
            wait_for(lambda seen=before: (checkpoints / f".step_{seen + 1}.tmp").exists(), process)
            time.sleep(moments.uniform(0, 0.08))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # launcher and all ranks
            killed += 1
        process.wait()
        in_saves += bool(list(checkpoints.glob(".step_*.tmp")))
        for step, path in steps_of(folder / "rough" / "run").items():
            assert read_manifest(path).step == step  # whatever has a name is whole
        assert max(steps_of(folder / "rough" / "run"), default=0) >= before  # the latest is never lost
    assert killed == kills
    tools.run_jobs(folder, [{"recipe": str(rough)}], processes)
    assert equal(weights(folder / "rough" / "run"), weights(folder / "calm" / "run"))
    assert losses(folder / "rough" / "run") == losses(folder / "calm" / "run")
    assert [row["step"] for row in tools.log_of(folder / "rough" / "run")] == list(range(1, steps + 1))
    return in_saves


def test_killed_in_a_save_ends_in_the_same_bits(tmp_path: Path) -> None:
    disturbed_equals_undisturbed(tmp_path, steps=8, kills=1)


@pytest.mark.slow
def test_killed_twenty_times_ends_in_the_same_bits(tmp_path: Path) -> None:
    assert disturbed_equals_undisturbed(tmp_path, steps=60, kills=20) >= 5


@pytest.mark.slow
def test_two_processes_killed_ends_in_the_same_bits(tmp_path: Path) -> None:
    assert disturbed_equals_undisturbed(tmp_path, steps=20, kills=5, processes=2) >= 1


SIGNALS = [signal.SIGTERM, *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGUSR1, signal.SIGINT))]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_ends_well(tmp_path: Path, number: signal.Signals, finished: Path) -> None:
    recipe = tools.write_recipe(tmp_path / "a", finished.parent / "target", max_steps=100_000, epochs=100_000)
    process = start_worker(tmp_path, recipe)
    log = tmp_path / "a" / "run" / "log.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 2, process)
    process.send_signal(number)
    assert process.wait(timeout=60) == 0, (tmp_path / "output.txt").read_text()[-2000:]
    done = tools.log_of(tmp_path / "a" / "run")[-1]["step"]
    assert list(steps_of(tmp_path / "a" / "run")) == [done]
    assert f"stopped by a signal after step {done}/" in (tmp_path / "output.txt").read_text()


@pytest.mark.slow
def test_a_run_whose_deepspeed_command_was_terminated_saves_and_ends(tmp_path: Path, finished: Path) -> None:
    """SIGTERM kills the command without reaching its processes."""
    recipe = tools.write_recipe(tmp_path / "a", finished.parent / "target", max_steps=100_000, epochs=100_000)
    process = start_worker(tmp_path, recipe, deepspeed_command(1))
    run = tmp_path / "a" / "run"
    try:
        wait_for(lambda: (run / "log.jsonl").exists() and tools.log_of(run)[1:], process)
        process.terminate()
        assert process.wait() == -signal.SIGTERM
        end = time.monotonic() + 60
        while not steps_of(run) and time.monotonic() < end:
            time.sleep(0.05)
        assert list(steps_of(run)) == [tools.log_of(run)[-1]["step"]]
        assert "stopped by a signal after step" in (tmp_path / "output.txt").read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
