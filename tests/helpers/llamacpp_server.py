"""The real llama.cpp server in a process of its own: ``python llamacpp_server.py JOB.json`` until stdin ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def running(folder: Path, name: str, **job: Any) -> Iterator[str]:
    """The URL of a server of ``target`` and ``speculative_config``, while the block runs."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"speculative_config": None, "max_model_len": 2048} | job))
    with open(folder / f"{name}.log", "wb") as log:
        command = [sys.executable, __file__, str(path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        try:
            assert process.stdout is not None
            url = process.stdout.readline().decode().strip()
            assert url, (folder / f"{name}.log").read_text()[-2000:]
            yield url
        finally:
            process.kill()
            process.communicate()


def main() -> None:
    import xllamacpp

    from deepspec.serving.llamacpp_run import parameters

    given = parameters(xllamacpp, json.loads(Path(sys.argv[1]).read_text()))
    given.n_parallel, given.port = 4, 0
    server = xllamacpp.Server(given)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
