"""Everything that only a GPU can tell, in one command of at most nine minutes: ``make gpu-check``.

    python benchmarks/gpu_check.py [--json docs/gpu.json] [--page docs/gpu.md] [--minutes 8.5]
    python benchmarks/gpu_check.py --dry-run        # all of it at tiny sizes on the CPU: what CI runs

Its own kernels against their plain twins (what the tests marked ``gpu`` check), then what is measured: a forward and
backward of every drafter at the shape of Qwen3-4B (random weights, vocabulary 151,936, 4096 tokens, 512 anchors, bf16)
with the plain formulation of three of them behind it in the same run, a cache's build and read, and rounds of
decoding. Nothing is read from a network. A row that fails is written down with its reason, and so is one that the
time did not reach; both end the command with exit code 1.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bars import Bars, at_most, write_bars
from bench_train_step import REAL
from gpu_measures import cache_rates, decode_rounds, peak_rate, random_target, train_steps
from gpu_twins import CHECKS
from start import Benchmark, tell

from deepspec.arguments import POSITIVE
from deepspec.errors import DataError, printable, run_main
from deepspec.files import write_json
from deepspec.tables import Table, fill_page

TINY = {"hidden": 32, "heads": 4, "kv": 2, "head_dim": 8, "mlp": 48, "vocab": 96, "S": 64, "anchors": 4}
HEADERS = {
    "training steps": ["drafter", "ms", "tokens/s", "of peak", "GB above weights and inputs"],
    "cache": ["what", "tokens/s", "GB/s"],
    "decoding": [
        "drafter",
        "ms a round",
        "draft",
        "verify",
        "head",
        "other",
        "tokens/s",
        "captured, ms a round",
        "captured, tokens/s",
        "captured rounds",
        "eager",
    ],
}
Work = Callable[[], dict[str, Any]]


class Report:
    """What was found, and what was not."""

    def __init__(self, minutes: float) -> None:
        self.begun = time.monotonic()
        self.deadline = self.begun + 60 * minutes
        self.sections: dict[str, list[dict[str, Any]]] = {}
        self.bars: Bars = {}
        self.missing: list[str] = []  # rows that failed or that the time did not reach, each with its reason

    def row(self, section: str, name: str, work: Work) -> dict[str, Any] | None:
        """Run ``work`` and keep its row; what it raises is written down, and the others run."""
        if time.monotonic() > self.deadline:
            self.missing.append(f"{section}, {name}: not reached in the time")
            return None
        try:
            row = {"row": name, **work()}
        except Exception as problem:  # one row must not cost the others: the machine is lent once
            traceback.print_exc()
            self.missing.append(printable(f"{section}, {name}: {type(problem).__name__}: {problem}".split("\n")[0]))
            return None
        finally:
            if torch.cuda.is_available():
                gc.collect()  # the row's weights
                torch.cuda.empty_cache()
        self.sections.setdefault(section, []).append(row)
        tell(f"{section}: {', '.join(f'{key} {value}' for key, value in row.items())}")
        return row

    def value(self, machine: dict[str, Any], status: str) -> dict[str, Any]:
        """As JSON."""
        spent = round(time.monotonic() - self.begun, 1)
        found = {"sections": self.sections, "bars": self.bars, "missing": self.missing}
        return {"status": status, "machine": machine, "seconds": spent, **found}


def machine_of(device: torch.device, peak: float) -> dict[str, Any]:
    """What it ran on."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, tiny sizes: a dry run"
    found: dict[str, Any] = {"device": name, "torch": torch.__version__, "bf16 product, TFLOP/s": round(peak / 1e12, 3)}
    if device.type == "cuda":
        found["GB"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
        found["compute capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    return found


def twins(report: Report, device: torch.device) -> None:
    """All comparisons, a bar each."""
    for check in CHECKS:
        for twin in check(device):
            row = report.row("twins", twin.name, lambda twin=twin: {"difference": float(f"{twin.compare():.2g}")})
            if row is not None:
                report.bars[twin.name] = at_most(row["difference"], twin.limit)


def measures(report: Report, device: torch.device, peak: float, dry: bool) -> None:
    """The measured sections."""
    size, rounds = (TINY, 1) if dry else (REAL, 10)
    found: dict[str, dict[str, Any] | None] = {}
    for name, work in train_steps(device, size, rounds, peak):
        found[name] = row = report.row("training steps", name, work)
        ours = found.get(name.removesuffix(", plain"))
        if row and ours and row is not ours and not dry:
            report.bars[f"{name.removesuffix(', plain')}, time of plain"] = at_most(ours["ms"] / row["ms"], 1.0)
            memory = "GB above weights and inputs"
            report.bars[f"{name.removesuffix(', plain')}, memory of plain"] = at_most(ours[memory] / row[memory], 1.0)
    held: list[Any] = []
    if report.row("cache", "target", lambda: held.append(random_target(device, size)) or {}) is None:
        return
    for section, rows in (
        ("cache", cache_rates(device, size, held[0])),
        ("decoding", decode_rounds(device, size, held[0], 6 if dry else 64)),
    ):
        for name, work in rows:
            report.row(section, name, work)


def page(value: dict[str, Any]) -> str:
    """The tables of the page."""
    if value["status"] != "run":
        return "Not run: no GPU has been there since this command was written."
    lines = [", ".join(f"{key} {one}" for key, one in value["machine"].items()) + f"; {value['seconds']:.0f} s in all."]
    for section, header in HEADERS.items():
        rows = [[row["row"], *(row.get(key) for key in header[1:])] for row in value["sections"].get(section, [])]
        lines += [f"**{section}**", Table(header, rows).markdown()]
    bars = [[name, one["value"], one["limit"], "yes" if one["holds"] else "NO"] for name, one in value["bars"].items()]
    lines += ["**bars**", Table(["bar", "found", "limit", "holds"], bars).markdown()]
    if value["missing"]:
        lines += ["**missing**", "\n".join(f"- {one}" for one in value["missing"])]
    return "\n\n".join(lines)


def main() -> int:
    """Check, measure, write."""
    limits = "every figure of a twin within its limit; no slower and no larger than the plain formulation"
    parser = Benchmark(__doc__, bars=limits, takes="nine minutes on one H100 or H200; --dry-run 20 seconds of a CPU")
    parser.add_argument("--dry-run", action="store_true", help="everything at tiny sizes on the CPU; writes no page")
    parser.add_argument("--page", type=Path, help="write the tables between the marks of this page")
    parser.add_argument("--minutes", type=POSITIVE, default=8.5, help="no row begins later")
    given = parser.parse_args()
    if not given.dry_run and not torch.cuda.is_available():
        raise DataError("no GPU", found="CPU", wanted="a CUDA device", remedy="--dry-run tries all of it on the CPU")
    if given.dry_run and given.page is not None:
        raise DataError("a dry run measures nothing", key="--page", remedy="leave --page out")
    device = torch.device("cpu" if given.dry_run else "cuda")
    torch.manual_seed(0)
    report = Report(given.minutes)
    with torch.compiler.set_stance("force_eager" if given.dry_run else "default"):
        peak = peak_rate(device)
        twins(report, device)
        measures(report, device, peak, given.dry_run)
    value = report.value(machine_of(device, peak), "dry run" if given.dry_run else "run")
    write_bars(None, report.bars)
    for line in report.missing:
        print(f"missing: {line}")
    if given.json is not None:
        write_json(given.json, value)
    if given.page is not None:
        given.page.write_text(fill_page(given.page.read_text(), "gpu", page(value)))
    return int(bool(report.missing) or not all(bar["holds"] for bar in report.bars.values()))


if __name__ == "__main__":
    run_main(main)
