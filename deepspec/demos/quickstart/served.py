"""A training of the quickstart whose hidden states a feature server beside it computes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from deepspec.demos.runner import resolve
from deepspec.demos.stages import DEEPSPEC, settings
from deepspec.locks import ends_in_order
from deepspec.serving.process import serve

START = 120.0  # seconds that the server has to start


def train_served(recipe: str, overrides: Sequence[str], log: Path, command: Sequence[str]) -> int:
    """Serve a recipe's target on loopback, run ``command`` with ``data.servers``, end the server.

    Args:
        recipe: whose target it is.
        overrides: ``key=value`` of the recipe.
        log: of the server.
        command: takes ``--set``.

    Returns:
        The command's exit code.

    Raises:
        DeepSpecError: the server did not start.
    """
    server = resolve((DEEPSPEC, "serve-features", "--recipe", recipe, *settings(overrides)))
    with ends_in_order(), serve(server, log, {}, START) as url:
        sys.stdout.flush()
        return subprocess.run(resolve((*command, *settings([f"data.servers=[{url}]"]))), check=False).returncode
