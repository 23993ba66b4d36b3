"""Serve the quickstart's drafts with vLLM on CPU and compare with our own decoding: ``make serve-check``.

Needs a finished quickstart (``make quickstart``). The engine gets an environment of its own (``--engine``, or
DEEPSPEC_VLLM; made where missing). Block drafters need the CPU shim (``--shim``, or DEEPSPEC_VLLM_SHIM; default
../shared/vllm_cpu/shim): without it they are reported as not run, with what the engine answered.
Exit code 1 when a kind failed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from deepspec import registry
from deepspec.arguments import COUNT, POSITIVE, Parser
from deepspec.errors import run_main


def main() -> int:
    """Parse the arguments, check, print the table."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, default=Path("build/quickstart"), help="a finished quickstart")
    parser.add_argument("--work", type=Path, default=Path("build/serve-check"), help="exports, logs, results")
    parser.add_argument("--engine", type=Path, help="folder of the engine's environment")
    parser.add_argument("--shim", help="folder of the CPU shim")
    parser.add_argument("--prompts", type=COUNT, default=12)
    parser.add_argument("--max-tokens", type=COUNT, default=48)
    parser.add_argument("--timeout", type=POSITIVE, default=1800.0, help="seconds of one run of the engine")
    parser.add_argument("--kind", action="append", default=[], help="only this kind; may be repeated")
    parser.add_argument("--json", type=Path, help="write the results here too")
    given = parser.parse_args()

    from deepspec.files import write_json
    from deepspec.serving.check import CheckOptions, ServeCheck, table, to_json

    name = next(iter(registry.SERVERS))  # the one engine that runs here
    kind = registry.lookup("server", registry.SERVERS, name)
    folder, shim = given.engine or kind.default_folder(), kind.find_shim(given.shim)
    server = kind(given.work, folder, shim, given.timeout)
    options = CheckOptions(given.quickstart, given.prompts, given.max_tokens, tuple(given.kind))
    check = ServeCheck(options, server)
    rows = check.run()
    print(table(rows, server.version))
    if given.json:
        write_json(given.json, to_json(rows, check))
    return int(any(row.status == "FAILED" for row in rows))


if __name__ == "__main__":
    run_main(main)
