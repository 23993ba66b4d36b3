"""What runs inside an engine's environment shares: a job read from one JSON file, its answer written to another.

Like the modules that use it, it imports nothing of deepspec but its errors.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from deepspec.errors import run_main


def answer_job(work: Callable[[dict[str, Any]], dict[str, Any]], defaults: Mapping[str, str] | None = None) -> None:
    """The program: ``work`` gets the job of the first argument, the second one is the file of what it returns.

    Args:
        work: the job.
        defaults: environment variables that are set where the caller has not set them.
    """
    run_main(partial(_answer, work, defaults or {}))


def _answer(work: Callable[[dict[str, Any]], dict[str, Any]], defaults: Mapping[str, str]) -> int:
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    result = work(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
    return 0
