"""Every engine passes the suite that ships with deepspec."""

from __future__ import annotations

from deepspec.registry import ENGINES
from deepspec.testing.engine import EngineSuite

for name in ENGINES:
    globals()[f"Test_{name}"] = type(f"Test_{name}", (EngineSuite,), {"engine": name})
