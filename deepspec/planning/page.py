"""The tables of docs/scale.md (``deepspec plan --page docs/scale.md``). Every rate in them is assumed; they say so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from deepspec.files import write_text
from deepspec.planning.machines import assumptions, machine_named, machine_names, storages
from deepspec.planning.plan import Cluster, Plan, make_plan
from deepspec.planning.target import known_targets, read_spec, target_cost
from deepspec.planning.work import work_of_numbers
from deepspec.progress import Progress, byte_size, duration
from deepspec.recipe import Recipe, load_recipe
from deepspec.tables import Table, fill_page

MACHINE, GPUS = "h100", 8
CASES = (  # what, recipe, another target and its layers, samples, tokens of one, longest
    ("Qwen3-4B", "dspark_qwen3_4b", (), 1_000_000, 1000, 4096),
    ("Qwen3-14B", "dspark_qwen3_4b", ("Qwen/Qwen3-14B", "[1, 10, 19, 28, 37]"), 1_000_000, 1000, 4096),
    ("Qwen3-235B-A22B", "dspark_qwen3_4b", ("Qwen/Qwen3-235B-A22B", "[1, 24, 47, 70, 91]"), 1_000_000, 1000, 4096),
    ("Qwen3-4B, 128k contexts", "dspark_qwen3_4b", (), 20_000, 65_536, 131_072),
)
HOSTS = (1, 8, 64)  # of 8 GPUs


def case_plans(case: tuple[str, str, tuple[str, ...], int, int, int]) -> list[Plan]:
    """The plans of a row of CASES: every number of hosts with every storage."""
    _, name, other, samples, tokens, longest = case
    overrides = [f"data.max_length={longest}", "train.global_batch=512"]
    if other:
        overrides += [
            f"target.path={other[0]}",
            f"target.layers={other[1]}",
            "data.conversations=null",
            "data.cache=[]",
        ]
    recipe: Recipe = load_recipe(name, overrides)
    spec, _ = read_spec(recipe.target.path)
    recipe, work = recipe.for_target(spec), work_of_numbers(samples, tokens, 0.75, longest)
    first = Cluster(machine_named(MACHINE), storages()[0], GPUS)
    return [
        make_plan(recipe, spec, work, replace(first, hosts=hosts, storage=storage))
        for hosts in HOSTS
        for storage in storages()
    ]


def _memory_rows(title: str, plans: list[Plan]) -> list[object]:
    plan = plans[0]
    shown = {part: plan.memory.device.get(part, 0.0) for part in ("activations", "loss buffers")}
    state = sum(plan.memory.device.get(part, 0.0) for part in ("draft weights", "gradients", "master copy", "moments"))
    fits = "yes" if plan.fits else "no"
    return [
        title, f"{plan.draft_parameters / 1e6:,.0f} M", f"{plan.target_parameters / 1e9:,.1f} B", byte_size(state),
        *(byte_size(one) for one in shown.values()), byte_size(plan.memory.total), fits, plan.largest_micro_batch,
        plan.replica_gpus, f"{plan.servers:.2f}",
    ]  # fmt: skip


def _hour_rows(title: str, plans: list[Plan]) -> list[list[object]]:
    rows: list[list[object]] = []
    for plan in plans:
        by_level = {one.level: one for one in plan.levels}
        lossless, raw = by_level["lossless"], by_level["raw"]
        rows.append(
            [
                title, plan.gpus * plan.hosts, plan.storage, byte_size(lossless.bytes),
                duration(3600 * plan.forward_hours), duration(plan.steps * lossless.step_seconds),
                f"{byte_size(lossless.read_rate)}/s", lossless.limit, raw.limit, by_level["smallest"].limit,
                f"{byte_size(lossless.bytes / max(3600 * plan.forward_hours, 1e-9) / plan.hosts)}/s",
            ]
        )  # fmt: skip
    return rows


def tables() -> dict[str, str]:
    """The parts of the page, by the name of their marks."""
    memory: list[list[object]] = []
    hours: list[list[object]] = []
    progress = Progress("page", len(CASES), noun="targets")
    for case in CASES:
        plans = case_plans(case)
        memory.append(_memory_rows(case[0], plans))
        hours += _hour_rows(case[0], plans)
        progress.add()
    progress.close()
    head = [
        "target",
        "draft",
        "target's weights",
        "weights and optimizer",
        "activations",
        "loss",
        "a GPU holds",
        "fits",
    ]
    memory_table = Table([*head, "largest micro-batch", "GPUs a copy", "serving GPUs for one that trains"], memory)
    head = ["target", "GPUs", "cache on", "cache, lossless", "target's forward", "training", "a host reads", "limit"]
    hour_table = Table([*head, "limit, raw", "limit, smallest", "a host writes while it is built"], hours)
    return {
        "memory of scale": memory_table.markdown(), "hours of scale": hour_table.markdown(),
        "assumptions of scale": Table(["assumed", "value"], assumptions()).markdown(),
        "machines of scale": machine_table().markdown(), "targets of scale": target_table().markdown(),
    }  # fmt: skip


def machine_table() -> Table:
    """Data sheets of the machines."""
    found = [machine_named(name) for name in machine_names()]
    rows = [
        [one.title, f"{one.memory / 1e9:.0f} GB", f"{one.flops['bfloat16'] / 1e12:.0f} TFLOP/s",
         f"{one.memory_rate / 1e12:.2f} TB/s", one.label, one.source]
        for one in found
    ]  # fmt: skip
    return Table(["machine", "memory", "bfloat16, planned with", "memory, planned with", "", "source"], rows)


def target_table() -> Table:
    """Sizes of the targets, counted from their modules."""
    rows = []
    for name in known_targets():
        spec, _ = read_spec(name)
        cost = target_cost(spec)
        rows.append([name, f"{cost.parameters:,}", f"{cost.active:,}", f"{cost.flops(1000) / 1000 / 1e9:.1f} GFLOP"])
    return Table(["target", "weights", "of them multiplied with a token", "a token of 1,000"], rows)


def fill(path: str | Path) -> None:
    """Write the tables between the marks of a page.

    Raises:
        DeepSpecError: a mark is missing.
    """
    text = Path(path).read_text(encoding="utf-8")
    for name, inside in tables().items():
        text = fill_page(text, name, inside)
    write_text(path, text)
