"""The house in figures: ``make house``, or ``python benchmarks/house.py [--json FILE]``.

Source lines against those of a06a0c0, what is too long, names that were renamed, classes that share a name, and whether
the import contracts hold. Exit code 1 where one does not.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from bars import Bars, at_most, write_bars
from start import Benchmark

from deepspec.errors import run_main

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for folder in ("deepspec", "launch", "tools") for path in (ROOT / folder).rglob("*.py"))
LINES = 20_744 + 753 - 1_500  # at most: deepspec/ and the scripts of a06a0c0, which held the command lines, less 1,500
FUNCTION_LINES, FILE_LINES = 60, 450
RENAMED = {  # design.md's table, as far as a name alone tells: `place`, `kept`, `whole`, `product` are words too
    "TargetEnds", "said", "sayable", "whole_logits", "reach", "Facts", "Verdict", "Turn", "Ratio", "Feeder", "Folder",
    "adopt", "products", "meet", "meeting", "recognises", "cautions", "floors",
}  # fmt: skip


@cache
def parsed() -> list[tuple[Path, ast.Module]]:
    """Every source file with its syntax tree."""
    return [(path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))) for path in SOURCES]


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a file, methods included."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def lines() -> int:
    """Source lines in all."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES)


def long_functions() -> list[str]:
    """Functions of too many lines."""
    return [
        f"{path}:{node.lineno} {node.name}"
        for path, tree in parsed()
        for node in functions(tree)
        if (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES
    ]


def long_files() -> list[str]:
    """Files of too many lines."""
    return [str(path.relative_to(ROOT)) for path in SOURCES if len(path.read_text().splitlines()) > FILE_LINES]


def renamed() -> list[str]:
    """Names that have another name now: of modules, classes, functions, arguments, attributes and variables."""
    found = {str(path) for path, _ in parsed() if path.stem in RENAMED}
    for path, tree in parsed():
        for node in ast.walk(tree):
            names = {getattr(node, field, None) for field in ("name", "id", "attr", "arg")}
            found |= {f"{path}:{getattr(node, 'lineno', 0)} {name}" for name in names & RENAMED}
    return sorted(found)


def doubles(trees: Iterable[tuple[Path, ast.Module]]) -> list[str]:
    """Public classes that share their name with another class, or with an alias of a type; a second pipeline.py."""
    classes, aliases = Counter[str](), set[str]()
    for path, tree in trees:
        classes[path.name] += path.name == "pipeline.py"
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                classes[node.name] += 1
            elif isinstance(node, ast.Assign) and not isinstance(node.value, ast.Call):  # a call makes no type
                aliases |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return sorted(name for name, n in classes.items() if n + (name in aliases) > 1 and not name.startswith("_"))


def broken_contracts() -> list[str]:
    """Import contracts that do not hold."""
    program = Path(sys.executable).with_name("lint-imports")
    report = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    return [line for line in report.splitlines() if line.endswith(" BROKEN")] or ([] if " KEPT" in report else [report])


def measure() -> tuple[Bars, list[str]]:
    """Every figure with its limit, and where what should not be stands."""
    bars: Bars = {"source lines": at_most(lines(), LINES)}
    found: list[str] = []
    for name, check in (
        (f"functions over {FUNCTION_LINES} lines", long_functions),
        (f"files over {FILE_LINES} lines", long_files),
        ("renamed names left", renamed),
        ("names of two classes", lambda: doubles(parsed())),
        ("broken import contracts", broken_contracts),
    ):
        faults = check()
        bars[name] = at_most(len(faults), 0)
        found += [f"{name}: {fault}" for fault in faults]
    return bars, found


def main() -> int:
    """Measure, print, write."""
    bars = f"{LINES:,} source lines, {FUNCTION_LINES} a function, {FILE_LINES} a file, no old name, contracts kept"
    parser = Benchmark(__doc__, bars=bars, takes="10 seconds")
    given = parser.parse_args()
    measured, found = measure()
    print("\n".join(found))
    write_bars(given.json, measured)
    return int(not all(bar["holds"] for bar in measured.values()))


if __name__ == "__main__":
    run_main(main)
