"""Plans: memory by stage, limits, data, files of machines, the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepspec.cache.estimate import Totals
from deepspec.cli.plan import plan as command
from deepspec.errors import DataError, DeepSpecError, RecipeError, run_main
from deepspec.planning import plan as planning
from deepspec.planning.machines import Machine, machine_named, machine_names, save_machine, storage_named
from deepspec.planning.measure import fit
from deepspec.planning.memory import Sizes, sharded_parts
from deepspec.planning.plan import Cluster, DataSize, Plan, exchange_seconds, make_plan
from deepspec.planning.report import plot, text, to_json, variants
from deepspec.planning.target import read_spec, target_cost
from deepspec.planning.trace import MicroBatchCost
from deepspec.planning.work import work_of_data, work_of_numbers
from deepspec.recipe import load_recipe
from deepspec.recipe_files import CONFIGS
from deepspec.training.settings import deepspeed_settings

COUNTED = {  # bytes a weight of live tensors after half a step (rank 0 of W; buckets left out): plan_static, 2026-11-30
    ("zero1_bf16", 1): 18.0, ("zero2_bf16", 1): 18.0, ("zero3_bf16", 1): 18.0, ("zero0_bf16", 1): 16.0,
    ("zero1_bf16", 2): 12.0, ("zero2_bf16", 2): 10.0, ("zero3_bf16", 2): 9.0,
}  # fmt: skip


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A plan of a published recipe whose micro-batch is not counted but given."""
    cost = MicroBatchCost(moved=1e10, operators=1000, last=10**8)
    cost.flops["bfloat16"] = 10**13  # type: ignore[assignment]
    cost.peak.update({"activations": 4 * 10**9, "loss buffers": 10**9})
    monkeypatch.setattr(planning, "trace", lambda *given: cost)
    monkeypatch.setattr(planning, "_counted", {})

    def plan(
        hosts: int = 1, storage: str = "disk", machine: Machine | None = None, overrides: Sequence[str] = (),
        **rates: Any,
    ) -> Plan:  # fmt: skip
        recipe = load_recipe("dspark_qwen3_4b", overrides)
        spec, _ = read_spec(recipe.target.path)
        place = replace(storage_named(storage), **rates)
        cluster = Cluster(machine or machine_named("h100"), place, 8, hosts)
        return make_plan(recipe.for_target(spec), spec, work_of_numbers(100_000, 1000, 0.75, 4096), cluster)

    return plan


def test_the_draft_of_a_plan_has_the_layers_that_the_recipe_states() -> None:
    recipe = load_recipe("dspark_qwen3_4b", ["draft.layers={family: llama, intermediate_size: 1024}"])
    spec, _ = read_spec(recipe.target.path)
    stated = planning.draft_sizes(recipe.for_target(spec), spec)
    own = planning.draft_sizes(load_recipe("dspark_qwen3_4b").for_target(spec), spec)
    shape, layers = spec.shape, recipe.draft.num_layers
    less = 3 * shape.hidden_size * (shape.intermediate_size - 1024) + 2 * shape.head_dim  # and no norms of heads
    assert own.parameters - stated.parameters == layers * less


@pytest.mark.parametrize(("name", "ranks"), COUNTED)
def test_weights_gradients_and_optimizer_are_those_that_deepspeed_held(name: str, ranks: int) -> None:
    train = replace(load_recipe("dspark_qwen3_4b").train, deepspeed=str(CONFIGS / f"{name}.json"))
    held = sharded_parts(Sizes(10**9, 0, 0, 2), deepspeed_settings(train, ranks), ranks)
    gathered = 0.1 if ranks > 1 and name.startswith("zero3") else 0.0  # a layer that runs
    assert held.total / 1e9 == pytest.approx(COUNTED[name, ranks] + gathered, abs=0.01)


def test_what_is_offloaded_leaves_the_gpu() -> None:
    train = load_recipe("dspark_qwen3_4b").train
    parts = {}
    for name in ("zero2_bf16", "zero2_offload_bf16", "zero3_offload_bf16", "zero3_nvme_bf16"):
        settings = deepspeed_settings(replace(train, deepspeed=str(CONFIGS / f"{name}.json")), 8)
        parts[name] = sharded_parts(Sizes(10**9, 0, 0, 2), settings, 8)
    assert parts["zero2_offload_bf16"].host["moments"] == parts["zero2_bf16"].device["moments"]
    assert "moments" not in parts["zero2_offload_bf16"].device
    assert parts["zero3_offload_bf16"].host["draft weights"] == 2e9 / 8
    assert set(parts["zero3_nvme_bf16"].nvme) == {"moments", "master copy"}


def test_the_slower_of_gpus_and_storage_is_the_limit(made: Any) -> None:
    fast, slow = made(), made(host_rate=1e8)
    assert (fast.chosen.limit, slow.chosen.limit) == ("compute", "reading")
    assert slow.train_hours > 5 * fast.train_hours
    by_level = {one.level: one for one in slow.levels}
    assert by_level["smallest"].step_seconds < by_level["raw"].step_seconds


def test_more_hosts_share_the_work_and_a_file_system_that_all_share_becomes_the_limit(made: Any) -> None:
    one, many = made(1, "s3"), made(8, "s3")
    assert many.chosen.step_seconds < one.chosen.step_seconds
    assert many.chosen.read_seconds == pytest.approx(one.chosen.read_seconds / 8, rel=1e-6)
    assert made(8, "s3", total_rate=6e9).chosen.read_seconds == pytest.approx(one.chosen.read_seconds)


def test_the_largest_micro_batch_is_what_the_memory_leaves(made: Any) -> None:
    small = replace(machine_named("h100"), memory=10e9)
    assert not made(machine=small).fits
    assert made(machine=small).largest_micro_batch == 0


def test_stage_1_exchanges_once_a_step_and_stage_2_at_every_micro_batch() -> None:
    cluster = Cluster(machine_named("h100"), storage_named("disk"), 8)
    once = [exchange_seconds(cluster, 10**9, stage, count, {}) for stage in (1, 2) for count in (1, 64)]
    assert once[0] == once[1]
    assert once[3] > 20 * once[2]
    assert exchange_seconds(replace(cluster, gpus=1), 10**9, 3, 64, {}) == 0
    far = replace(cluster, hosts=8)
    assert exchange_seconds(far, 10**9, 3, 1, {"zero_hpz_partition_size": 8}) < exchange_seconds(far, 10**9, 3, 1, {})


def test_a_plan_says_which_rates_are_assumed_and_all_of_it_is_json(made: Any) -> None:
    plan = made()
    assert "rates: assumed" in text(plan)
    values = json.loads(json.dumps(to_json(plan), allow_nan=False))
    assert (values["rates"], values["limit"], values["fits"]) == ("assumed", "compute", True)
    assert all(not machine_named(name).measured for name in machine_names())


def test_conversations_that_processes_share_are_not_planned_as_if_each_had_them_alone(made: Any) -> None:
    with pytest.raises(RecipeError, match=r"train\.sequence_parallel: .*not counted; found 2"):
        made(overrides=["train.sequence_parallel=2"])


@pytest.mark.parametrize("settings", [[], ["train.micro_batch=16", "train.micro_tokens=8192"]])
def test_a_plot_has_a_line_for_every_level_and_number_of_hosts_that_can_share_a_step(
    made: Any, settings: list[str]
) -> None:
    recipe = load_recipe("dspark_qwen3_4b", settings)
    spec, _ = read_spec(recipe.target.path)
    work, cluster = work_of_numbers(100_000, 1000, 0.75, 4096), Cluster(machine_named("h100"), storage_named("s3"), 8)
    plans = variants(recipe.for_target(spec), spec, work, cluster)
    assert sorted({(tokens, hosts) for tokens, hosts, _ in plans}) == [
        (tokens, hosts) for tokens in (10**7, 10**8, 10**9) for hosts in (1, 8, 64)
    ]
    assert plot(plans, "png").startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--recipe: missing"),
        (["--recipe=dspark_qwen3_4b", "--samples=9"], "--tokens: samples and tokens belong together"),
        (["--recipe=dspark_qwen3_4b", "--samples=9", "--tokens=9", "--data=x"], "--data: the data are given twice"),
        (["--recipe=dspark_qwen3_4b", "--precision=bfloat16"], "--precision: only a measurement has one"),
        (["--measure=m.json", "--json=x"], "--json: nothing is planned without --recipe"),
        (["--recipe=dspark_qwen3_4b", "--samples=9", "--tokens=9", "--plot=a.gif"], r"--plot: not a form.*svg, png"),
        (["--recipe=dspark_qwen3_4b", "--samples=9", "--tokens=9"], r"not one whole step; found 9; wanted .* = 512"),
    ],
)
def test_words_that_would_be_ignored_or_lead_nowhere_are_refused(
    words: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["deepspec plan", *words])
    with pytest.raises(DeepSpecError, match=told):
        command()


@pytest.mark.parametrize(
    ("override", "following"),
    [
        ("data.cache=[none]", "cache build"),
        ("data.cache=[done, none]", "cache build"),
        ("data.cache=[done]", "train"),
        ("data.source=online", "train"),
    ],
)
def test_the_next_command_builds_a_cache_only_where_one_is_missing(
    override: str, following: str, tmp_path: Path, made: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "manifest.json").write_text("{}")
    words = ["--recipe=dspark_qwen3_4b", "--samples=100000", "--tokens=1000", f"--set={override}"]
    monkeypatch.setattr("sys.argv", ["deepspec plan", *words])
    with pytest.raises(SystemExit):
        run_main(command)
    assert capsys.readouterr().err.endswith(f"; next: deepspec {following} --recipe dspark_qwen3_4b\n")


def test_a_rate_that_nothing_limits_is_left_out_of_a_machines_file(tmp_path: Path) -> None:
    machine = replace(machine_named("h100"), name="here", measured=True, link=float("inf"), network=float("inf"))
    save_machine(machine, tmp_path / "here.json")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    assert "link" not in json.loads((tmp_path / "here.json").read_text(), parse_constant=refuse)
    assert machine_named(str(tmp_path / "here.json")) == machine


def test_a_measured_machine_is_read_back_and_another_file_is_refused(tmp_path: Path) -> None:
    machine = replace(machine_named("h100"), name="here", measured=True)
    save_machine(machine, tmp_path / "here.json")
    assert machine_named(str(tmp_path / "here.json")) == machine
    kept = json.loads((tmp_path / "here.json").read_text())
    less = {key: value for key, value in kept.items() if key != "memory"}
    others: tuple[tuple[dict[str, Any], str], ...] = (
        ({}, "not a machine"), (less, "not a whole machine.*memory"), (kept | {"more": 1}, "not a whole machine.*more"),
        (kept | {"memory_rate": 0}, "not a whole machine.*memory_rate 0"),
        (kept | {"flops": {"bfloat16": "fast"}}, "not a whole machine.*flops.bfloat16 'fast'"),
    )  # fmt: skip
    for values, told in others:
        (tmp_path / "other.json").write_text(json.dumps(values))
        with pytest.raises(DeepSpecError, match=told):
            machine_named(str(tmp_path / "other.json"))
    with pytest.raises(DeepSpecError, match=r"unknown machine.*h100"):
        machine_named("h10")
    with pytest.raises(DeepSpecError, match="unknown storage"):
        storage_named("tape")


def test_rates_are_found_from_what_they_made_and_none_is_below_zero() -> None:
    rows = np.array([[1e9, 1e8, 50.0], [2e9, 5e8, 20.0], [5e8, 9e8, 300.0], [3e9, 1e7, 10.0]])
    wanted = np.array([1e-10, 2e-9, 1e-5])
    assert fit(rows, rows @ wanted) == pytest.approx(wanted, rel=1e-6)
    assert fit(rows, rows[:, 0] * 1e-10).min() >= 0


def test_the_sizes_of_the_targets_are_their_names() -> None:
    for name, billions in (("Qwen/Qwen3-4B", 4.0), ("Qwen/Qwen3-235B-A22B", 235.1)):
        cost = target_cost(read_spec(name)[0])
        assert cost.parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert cost.active / 1e9 == pytest.approx(20.9, rel=0.01)  # 22 with embedding and head, which no token multiplies


def test_data_is_a_file_or_numbers(tmp_path: Path) -> None:
    recipe = load_recipe("dspark_qwen3_4b")
    spec, _ = read_spec(recipe.target.path)
    message = {"role": "user", "content": "x" * 400}
    rows = [json.dumps({"id": str(number), "messages": [message]}) for number in range(3)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    work = work_of_data(recipe, spec, str(tmp_path / "data.jsonl"), 0.5)
    assert (work.totals.samples, "assumed" in work.source) == (3, True)
    assert work_of_numbers(10, 100, 0.5, 50) == DataSize(Totals(10, 10, 1000, 500), 100, "numbers given")
    with pytest.raises(DataError, match="--samples and --tokens"):
        work_of_data(recipe, spec, str(tmp_path / "none"), 0.5)
