"""The quickstart from the first stage to the table."""

from __future__ import annotations

import os
import time

from deepspec.demos.quickstart.plan import LOGS, ROOT, plan
from deepspec.demos.quickstart.report import write_report
from deepspec.demos.runner import Runner


def quickstart() -> None:
    """Run every stage that is not whole yet, write the report and print the table.

    Raises:
        DeepSpecError: not in the checkout's root, or a stage failed.
    """
    started = time.monotonic()
    Runner(plan(), LOGS, cores=max(2, os.cpu_count() or 1)).run()
    print(f"\n{write_report()}")
    print(f"\n{time.monotonic() - started:.0f} s in all; {ROOT}/report.html, {ROOT}/results.json, logs in {LOGS}")
