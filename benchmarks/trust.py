"""Try to break everything: ``make trust``, or ``python benchmarks/trust.py [--share 0.1] [--json FILE] [--page FILE]``.

Every stage is killed and run again, every artefact is spoilt and read, servers send odd replies, disks are full or
read-only, recipes and command lines are fuzzed (tests/trust/). Exit code 1 where a bar does not hold. CPU only.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from start import Benchmark

from deepspec.arguments import SEED, SHARE
from deepspec.distributed import RANK_VARIABLES
from deepspec.errors import run_main
from deepspec.files import write_json

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("flip", "hostile", "disk", "kill", "fuzz")  # fuzzed last: a command line may write beside the inputs
FORKED, GROUPED = 20, 7  # kills of a stage that is forked, and of one under a launcher


def main() -> int:
    """Try, count, write."""
    bars = "no wrong result, no traceback, no hang, whatever is tried: a row each, against its own limit"
    parser = Benchmark(__doc__, bars=bars, takes="an hour; with --share 0.1 some minutes")
    parser.add_argument("--share", type=SHARE, default=1.0, help="of the whole, for development")
    parser.add_argument("--seed", type=SEED, default=0, help="of the moments, bits and texts")
    parser.add_argument("--only", action="append", choices=KINDS, help="this kind; may be repeated")
    parser.add_argument("--stage", action="append", default=[], help="kills and disks of this stage; may be repeated")
    parser.add_argument("--page", type=Path, help="write the table between the marks of this page")
    given = parser.parse_args()
    for name in list(os.environ):  # of a launcher around us: the commands are alone, or have launchers of their own
        if name in RANK_VARIABLES:
            del os.environ[name]
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path[:0] = [str(ROOT / "tests" / name) for name in ("helpers", "trust")]

    import counts
    from servers import polite_server
    from stages import make_place, preload

    found = counts.Counts(given.share)

    def add(row: counts.Row) -> None:
        found.add(row)
        if given.json is not None:
            write_json(given.json, found.to_json())  # after every row: what was measured stays

    preload()
    with tempfile.TemporaryDirectory(prefix="deepspec-trust-") as folder, polite_server() as url:
        place = make_place(Path(folder) / "place")
        for kind in given.only or KINDS:
            try_kind(kind, place, url, given, add)
    value = found.to_json()
    print(counts.table(value))
    if given.page is not None:
        counts.write_table(given.page, value)
    return int(not all(bar["holds"] for bar in value["bars"].values()))


def try_kind(kind: str, place: object, server: str, given: argparse.Namespace, add: Callable[..., None]) -> None:
    """All tries of one kind, a row after the other."""
    import disks
    import flips
    import fuzz
    import kills
    import servers
    import stages

    def some(number: int) -> int:
        return max(1, round(number * given.share))

    table = stages.stages(place, server)
    chosen = [stage for name, stage in table.items() if name in given.stage or not given.stage]
    if kind == "kill":
        for stage in chosen:
            number = some(GROUPED if stage.launcher else FORKED)
            add(kills.kill_anywhere(stage, number, place, given.seed))
    elif kind == "flip":
        for artefact in flips.artefacts(place):
            add(flips.flip_every_kind(artefact, some(artefact.flips), place, given.seed))
    elif kind == "hostile":
        for reader in ("regenerate", "served target"):
            add(servers.hostile_server(reader, place, given.share))
    elif kind == "disk":
        for name in disks.TOOLS[: max(1, some(len(disks.TOOLS)))]:
            if table[name] in chosen:
                add(disks.full_disk(table[name], place))
                add(disks.read_only(table[name], place))
    else:
        for work, number in ((fuzz.fuzz_recipes, 250), (fuzz.fuzz_files, 250), (fuzz.fuzz_commands, 250)):
            add(work(some(number), place, given.seed))


if __name__ == "__main__":
    run_main(main)
