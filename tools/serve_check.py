"""Serve the quickstart's drafts with vLLM on CPU and compare with our own decoding: ``make serve-check``.

Needs a finished quickstart (``make quickstart``). The engine gets an environment of its own (``--engine``, or
DEEPSPEC_VLLM; made where missing). Block drafters need the CPU shim (``--shim``, or DEEPSPEC_VLLM_SHIM; default
../shared/vllm_cpu/shim): without it they are reported as not run, with what the engine answered.
Exit code 1 when a kind failed.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from deepspec.arguments import COUNT, POSITIVE, Parser
from deepspec.errors import run_main

SHIM = Path(__file__).resolve().parents[2] / "shared" / "vllm_cpu" / "shim"


def shim_folder(named: Path | None) -> Path | None:
    """The shim to use: the named one, else the default where it exists.

    Raises:
        DraftError: the named folder is no shim; with it every kind that needs one would fail for another reason.
    """
    from deepspec.errors import DraftError

    if named is not None and not (named / "tricpu").is_dir():
        raise DraftError("no CPU shim", file=named, key="--shim", wanted="a folder that holds tricpu/")
    return named or (SHIM if SHIM.is_dir() else None)


def main() -> int:
    """Parse the arguments, check, print the table."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, default=Path("build/quickstart"), help="a finished quickstart")
    parser.add_argument("--work", type=Path, default=Path("build/serve-check"), help="exports, logs, results")
    parser.add_argument("--engine", type=Path, default=Path(os.environ.get("DEEPSPEC_VLLM", ".venv-vllm")))
    parser.add_argument("--shim", type=Path, default=os.environ.get("DEEPSPEC_VLLM_SHIM"))
    parser.add_argument("--prompts", type=COUNT, default=12)
    parser.add_argument("--max-tokens", type=COUNT, default=48)
    parser.add_argument("--timeout", type=POSITIVE, default=1800.0, help="seconds of one run of the engine")
    parser.add_argument("--kind", action="append", default=[], help="only this kind; may be repeated")
    parser.add_argument("--json", type=Path, help="write the results here too")
    given = parser.parse_args()

    from deepspec.files import write_json
    from deepspec.serving.check import CheckOptions, ServeCheck, engine_version, table, to_json

    options = CheckOptions(
        quickstart=given.quickstart,
        work=given.work,
        engine=given.engine,
        shim=shim_folder(None if given.shim is None else Path(given.shim)),
        prompts=given.prompts,
        max_tokens=given.max_tokens,
        timeout=given.timeout,
        kinds=tuple(given.kind),
    )
    check = ServeCheck(options)
    rows = check.run()
    print(table(rows, engine_version(given.engine)))
    if given.json:
        write_json(given.json, to_json(rows, check))
    return int(any(row.status == "FAILED" for row in rows))


if __name__ == "__main__":
    run_main(main)
