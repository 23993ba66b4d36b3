"""The quick suite has every newer algorithm over one family, a newer family with one algorithm; the others are slow."""

from __future__ import annotations

import pytest

EVERY_FAMILY, FAMILY = ("eagle3", "dflash", "dspark"), "qwen3"
OWN = {"qwen3_5": "mtp"}  # a newer family -> the algorithm that has parts for it


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        given = getattr(getattr(item, "callspec", None), "params", {})
        algorithm, family = given.get("algorithm"), given.get("family", FAMILY)
        if "TestDevice" in item.nodeid and (family == "llama" or ("decoding" in item.nodeid and family != FAMILY)):
            item.add_marker(pytest.mark.slow)  # a second each
        if "TestDevice" in item.nodeid and given.get("temperature") == 0:
            item.add_marker(pytest.mark.slow)  # at a temperature a round does more, and no less
        if algorithm is None or "TestTrainingRun" in item.nodeid or OWN.get(family) == algorithm:
            continue
        if family in OWN or (algorithm not in EVERY_FAMILY and family != FAMILY):
            item.add_marker(pytest.mark.slow)
