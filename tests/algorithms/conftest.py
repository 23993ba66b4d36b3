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
        if "TestDevice" in item.nodeid and _fakes_are_slow(item.nodeid, algorithm, family, given.get("temperature")):
            item.add_marker(pytest.mark.slow)  # a second each
        if algorithm is None or "TestTrainingRun" in item.nodeid or OWN.get(family) == algorithm:
            continue
        if family in OWN or (algorithm not in EVERY_FAMILY and family != FAMILY):
            item.add_marker(pytest.mark.slow)


def _fakes_are_slow(name: str, algorithm: str | None, family: str, temperature: float | None) -> bool:
    """Quick are a step of every algorithm and of the family with most parts, and rounds of those that differ most."""
    if "decoding" in name:  # at a temperature a round does more, and no less
        return family != FAMILY or temperature == 0 or algorithm not in ("eagle3", "p_eagle", "dspark")
    return family not in (FAMILY, *OWN) and (algorithm, family) != ("dflash", "gemma4")
