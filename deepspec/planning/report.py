"""A plan as tables, as JSON and as a plot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from deepspec.cache.estimate import Totals
from deepspec.errors import RecipeError
from deepspec.pages import saved
from deepspec.planning.memory import PARTS
from deepspec.planning.plan import Cluster, DataSize, Plan, make_plan
from deepspec.progress import byte_size, duration
from deepspec.recipe import Recipe
from deepspec.tables import Table
from deepspec.targets import TargetSpec
from deepspec.training.settings import accumulation_steps

HOSTS, DATA = (1, 8, 64), (0.1, 1.0, 10.0)  # times as many, of a plot


def to_json(plan: Plan) -> dict[str, Any]:
    """Every number of a plan; rates that nothing limits are left out."""
    values = asdict(plan)
    values |= {"format": "deepspec-plan-1", "rates": plan.machine.label, "train_hours": plan.train_hours}
    values |= {"limit": plan.chosen.limit, "fits": plan.fits, "device_bytes": plan.memory.total}
    found: dict[str, Any] = _finite(values)
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if value in (float("inf"), float("-inf")) or value != value else value


def memory_table(plan: Plan) -> Table:
    """Bytes of a rank by part."""
    rows: list[list[object]] = []
    for part in PARTS:
        places = (plan.memory.device, plan.memory.host, plan.memory.nvme)
        if any(part in one for one in places):
            rows.append([part, *(byte_size(one[part]) if part in one else None for one in places)])
    total = [sum(one.values()) for one in (plan.memory.device, plan.memory.host, plan.memory.nvme)]
    rows.append(["all", *(byte_size(one) if one else None for one in total)])
    return Table(["memory of a rank", "GPU" if plan.machine.device != "cpu" else "process", "host", "NVMe"], rows)


def level_table(plan: Plan) -> Table:
    """The cache at each level, and what its reading takes."""
    rows = [
        [
            one.level + " *" * (one.level == plan.level), byte_size(one.bytes), f"{one.files:,}",
            f"{byte_size(one.read_rate)}/s", duration(plan.steps * one.step_seconds), one.limit,
            f"{byte_size(one.served_rate)}/s",
        ]
        for one in plan.levels
    ]  # fmt: skip
    return Table(["level", "cache", "files", "a host reads", "training", "limit", "served: to one GPU"], rows)


def text(plan: Plan) -> str:
    """What the command prints."""
    machine, cluster = plan.machine, f"{plan.hosts} x {plan.gpus}"
    one, several = ("process", "processes") if machine.device == "cpu" else ("GPU", "GPUs")
    copy = f"{plan.replica_gpus} {several} hold" if plan.replica_gpus > 1 else f"1 {one} holds"
    shares = ", ".join(f"{name} {duration(value)}" for name, value in plan.step_parts.items() if value)
    fits = "fits" if plan.fits else "DOES NOT FIT"
    lines = [
        f"{plan.recipe} for {plan.target} on {cluster} {machine.title}, {plan.storage}",
        f"rates: {machine.label} ({machine.source})",
        f"data: {plan.work.totals.samples:,} samples of {plan.work.totals.mean_tokens:,.0f} tokens, "
        f"the longest {plan.work.longest:,} ({plan.work.source})",
        f"draft: {plan.draft_parameters:,} weights; target: {plan.target_parameters:,}, "
        f"{plan.target_active:,} of them multiplied with a token",
        "",
        memory_table(plan).text(),
        f"{byte_size(plan.memory.total)} of {byte_size(machine.memory)}: {fits}; largest micro-batch of the longest "
        f"samples: {plan.largest_micro_batch}",
        "",
        level_table(plan).text(),
        "",
        f"target's forward over all data: {duration(3600 * plan.forward_hours)} ({copy} one copy)",
        f"training: {plan.steps:,} steps of {duration(plan.chosen.step_seconds)} ({shares}), "
        f"{plan.accumulation} micro-batches of {plan.micro_batch}: {duration(3600 * plan.train_hours)}",
        f"limit: {plan.chosen.limit}",
        f"without a cache: {plan.servers:.2f} serving GPUs for one that trains",
    ]
    return "\n".join(lines)


def variants(recipe: Recipe, spec: TargetSpec, work: DataSize, cluster: Cluster) -> list[tuple[int, int, Plan]]:
    """Plans of the same recipe for a tenth to ten times the tokens, on 1, 8 and 64 times the hosts: (tokens, hosts, _).

    Hosts that the global batch cannot be shared by are left out.
    """
    found = []
    for hosts in (cluster.hosts * count for count in HOSTS):
        try:
            accumulation_steps(recipe.train, cluster.gpus * hosts)
        except RecipeError:
            continue
        for factor in DATA:
            old = work.totals
            counts = (max(1, round(one * factor)) for one in (old.rows, old.samples, old.tokens, old.last_rows))
            larger = replace(work, totals=Totals(*counts))
            made = make_plan(recipe, spec, larger, replace(cluster, hosts=hosts))
            found.append((larger.totals.tokens, hosts, made))
    return found


def plot(plans: Iterable[tuple[int, int, Plan]], form: str) -> bytes:
    """GPU hours against tokens, a colour for each number of hosts, a line for each level.

    Args:
        plans: (tokens, hosts, plan).
        form: svg, png or pdf.
    """
    return saved(partial(_draw, list(plans)), (7.2, 4.2), form)


def _draw(plans: list[tuple[int, int, Plan]], axes: Any) -> None:
    styles = {"raw": ":", "lossless": "-", "smallest": "--"}
    for number, hosts in enumerate(sorted({one[1] for one in plans})):
        for level, style in styles.items():
            points = []
            for tokens, its, plan in plans:
                if its == hosts:
                    seconds = next(one for one in plan.levels if one.level == level).step_seconds
                    gpus = plan.gpus * plan.hosts
                    points.append((tokens, gpus * (plan.forward_hours + plan.steps * seconds / 3600)))
            axes.plot(*zip(*sorted(points), strict=True), style, color=f"C{number}", label=f"{hosts} hosts, {level}")
    axes.set(xscale="log", yscale="log", xlabel="tokens of the data", ylabel="GPU hours: target's forward and training")
    axes.legend(fontsize="small")
