"""A llama.cpp server in a process of its own: ``python -m deepspec.serving.llamacpp_serve JOB.json --host H --port P``.

JOB is that of :mod:`deepspec.serving.llamacpp_run` without prompts, and ``requests``: answered at a time, each with
``max_model_len`` positions. It runs until a signal ends it.
"""

from __future__ import annotations

import argparse
import json
import signal
from pathlib import Path

from deepspec.errors import run_main
from deepspec.serving.llamacpp_run import parameters


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", type=Path)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()

    import xllamacpp

    job = json.loads(given.job.read_text(encoding="utf-8"))
    settings = parameters(xllamacpp, job)
    settings.n_parallel, settings.n_ctx = job["requests"], job["requests"] * job["max_model_len"]
    settings.hostnames, settings.port = [given.host], given.port
    server = xllamacpp.Server(settings)
    print(server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    run_main(main)
