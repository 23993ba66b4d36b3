"""Costs of a batch are split over the prompts in it, and nothing is lost."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

from deepspec.decoding.records import DecodeRequest, Generation
from deepspec.evaluate.cost import CostMeter


class Clock:
    """A decoder's clock that is moved by hand."""

    def __init__(self) -> None:
        self.rounds = 0

    def seconds(self) -> dict[str, float]:
        return {"draft": 1.0 * self.rounds, "total": 3.0 * self.rounds}


def test_each_prompt_pays_its_share_of_the_rounds_it_was_in() -> None:
    clock = Clock()
    decoder: Any = SimpleNamespace(clock=clock)
    requests = [DecodeRequest((1,), n, tag=(n, 0)) for n in (10, 11, 12)]
    meter = CostMeter(decoder, requests)

    def leaves(index: int, turn: int, rounds: int, entered: int) -> None:
        for _ in range(entered):
            meter.waiting.popleft()
        clock.rounds += rounds
        meter.left(Generation(DecodeRequest((1,), index, tag=(index, turn))))

    leaves(10, 0, rounds=4, entered=2)  # 10 and 11 together
    first = meter.take(10)
    leaves(11, 0, rounds=2, entered=1)  # 11 and 12 together
    meter.submit(DecodeRequest((1,), 11, tag=(11, 1)))  # its next turn
    leaves(12, 0, rounds=6, entered=1)  # 12 and 11's second turn
    leaves(11, 1, rounds=1, entered=0)  # 11 alone
    costs = [first, meter.take(11), meter.take(12)]
    assert [cost.steps for cost in costs] == [2.0, 2.0 + 1.0 + 3.0 + 1.0, 1.0 + 3.0]
    assert sum(cost.steps for cost in costs) == clock.rounds
    assert sum(cost.seconds["total"] for cost in costs) == 3.0 * clock.rounds
    assert costs[0].to_row() == {"steps": 2.0, "seconds": {"draft": 2.0, "total": 6.0}}
    assert meter.waiting == deque()
