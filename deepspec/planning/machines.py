"""Machines and storage that a plan is made for: rates that were measured here, or data sheets times stated shares."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from deepspec.errors import DeepSpecError, nearest
from deepspec.files import read_json, write_json

SHIPPED = Path(__file__).with_name("machines.json")
FORMAT = "deepspec-machine-1"
_OTHERS = ("name", "title", "measured", "source", "device")  # fields that are no rates and sizes


@dataclass(frozen=True)
class Machine:
    """What one GPU, or one process of a CPU, does a second; and its host."""

    name: str
    title: str
    measured: bool  # else assumed: a data sheet's peak times a stated share
    source: str
    device: str  # "cpu" or "accelerator"
    memory: float  # bytes of a GPU, or of the CPU's host
    reserve: float  # bytes that Python and libraries take
    slack: float  # held / counted bytes of activations and loss buffers: what an allocator loses
    flops: dict[str, float]  # a second in products, by dtype
    memory_rate: float  # bytes a second that the other operators read and write
    operator_seconds: float  # of each operator, whatever its size
    optimizer_rate: float  # bytes a second that the optimizer's step reads and writes
    gpus: int = 1  # of a host
    cores: int = 1
    host_memory: float = 0.0
    link: float = float("inf")  # bytes a second between GPUs of a host, each way
    host_link: float = float("inf")  # between a GPU and its host
    network: float = float("inf")  # of a GPU to other hosts
    decode_rate: dict[str, float] = field(default_factory=dict)  # raw bytes a second and core, by level
    reserve_of: dict[str, float] = field(default_factory=dict)  # `reserve` of a drafter, where it was measured

    @property
    def label(self) -> str:
        """``measured`` or ``assumed``."""
        return "measured" if self.measured else "assumed"


@dataclass(frozen=True)
class Storage:
    """Where a cache lies; its rates are assumed unless a plan's words give them."""

    name: str
    title: str
    host_rate: float  # bytes a second that one host reads
    total_rate: float | None  # of all hosts together; None: every host has its own
    host_bytes: float | None  # room in a host; None: not of a host


@cache
def _shipped() -> dict[str, Any]:
    values: dict[str, Any] = json.loads(SHIPPED.read_text(encoding="utf-8"))
    return values


def machine_names() -> list[str]:
    """The machines that the package knows."""
    return sorted(_shipped()["machines"])


def storage_named(name: str) -> Storage:
    """A row of the storage table.

    Raises:
        DeepSpecError: no such row.
    """
    rows = _shipped()["storage"]
    if name not in rows:
        raise DeepSpecError("unknown storage", key="--storage", found=name, remedy=nearest(name, rows))
    return Storage(name, **rows[name])


def storages() -> list[Storage]:
    """All rows of the storage table."""
    return [storage_named(name) for name in _shipped()["storage"]]


def machine_named(name: str) -> Machine:
    """A machine of the package, or one that ``deepspec plan --measure`` wrote to the file ``name``.

    Raises:
        DeepSpecError: neither, or a file of another form.
    """
    rows, assumed = _shipped()["machines"], _shipped()["assumed"]
    if name in rows:
        row, share, memory = rows[name], assumed["flops_efficiency"], assumed["memory_efficiency"]
        rate = row["peak_memory_rate"] * memory
        return Machine(
            name, row["title"], False, row["source"], "accelerator", row["memory"], assumed["reserve"],
            assumed["slack"], {dtype: peak * share for dtype, peak in row["peak_flops"].items()}, rate,
            assumed["operator_seconds"], rate, assumed["gpus"], assumed["cores"], assumed["host_memory"],
            row["link"], row["host_link"], row["network"], assumed["decode_rate"],
        )  # fmt: skip
    if not os.path.exists(name):
        known = nearest(name, rows)
        raise DeepSpecError("unknown machine", key="--gpu", found=name, remedy=f"{known}, or `deepspec plan --measure`")
    values = read_json(name, DeepSpecError)
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise DeepSpecError("not a machine", file=name, remedy="make it with `deepspec plan --measure FILE`")
    try:
        return _checked(Machine(**values))
    except (TypeError, ValueError) as problem:
        remedy = "make it with `deepspec plan --measure FILE`"
        raise DeepSpecError("not a whole machine", file=name, found=str(problem), remedy=remedy) from None


def _checked(machine: Machine) -> Machine:
    """The machine, whose every rate can be divided by.

    Raises:
        ValueError: one cannot.
    """
    rates = {key: value for key, value in asdict(machine).items() if key not in _OTHERS}
    for key in ("flops", "decode_rate", "reserve_of"):
        rates |= {f"{key}.{name}": value for name, value in rates.pop(key).items()}
    for key, value in rates.items():
        least_too = key in ("reserve", "operator_seconds", "host_memory")
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not (value > 0 or (least_too and value == 0))
        ):
            raise ValueError(f"{key} {value!r:.40}")
    return machine


def save_machine(machine: Machine, path: str | Path) -> None:
    """Write a machine that was measured; a rate that nothing limits is left out, as JSON has no infinity."""
    values = {key: value for key, value in asdict(machine).items() if value != math.inf}
    write_json(path, {"format": FORMAT, **values})


def assumptions() -> list[tuple[str, str]]:
    """What the plans for machines of the package assume: (what, value)."""
    one = _shipped()["assumed"]
    rows = [
        ("share of the peak that products reach", f"{one['flops_efficiency']:.0%}"),
        ("share of the memory's peak that other operators reach", f"{one['memory_efficiency']:.0%}"),
        ("seconds of an operator's start", f"{one['operator_seconds'] * 1e6:.0f} µs"),
        ("bytes of a GPU that CUDA, NCCL and kernels take", f"{one['reserve'] / 1e9:.0f} GB"),
        ("bytes held by the allocator, of those counted", f"{one['slack']:.2f}x"),
        ("GPUs, cores, memory of a host", f"{one['gpus']}, {one['cores']}, {one['host_memory'] / 1e12:.0f} TB"),
    ]
    for storage in storages():
        total = "each host its own" if storage.total_rate is None else f"{storage.total_rate / 1e9:.0f} GB/s in all"
        rows.append((storage.title, f"{storage.host_rate / 1e9:.0f} GB/s a host, {total}"))
    return rows
