"""The quick suite has every newer algorithm over one family of layers; the others are slow."""

from __future__ import annotations

import pytest

EVERY_FAMILY, FAMILY = ("eagle3", "dflash", "dspark"), "qwen3"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        given = getattr(getattr(item, "callspec", None), "params", {})
        newer = "algorithm" in given and given["algorithm"] not in EVERY_FAMILY
        if newer and given.get("family", FAMILY) != FAMILY and "TestTrainingRun" not in item.nodeid:
            item.add_marker(pytest.mark.slow)
