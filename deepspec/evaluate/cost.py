"""What each prompt cost: the rounds and seconds of a batch, split evenly over the prompts that were in it."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from deepspec.decoding.loop import Decoder
from deepspec.decoding.records import DecodeRequest, Generation


@dataclass
class Cost:
    """A prompt's share; in batches of one, all that its decoding took."""

    steps: float = 0.0  # rounds of the batch
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # a phase, and "total"

    def to_row(self) -> dict[str, Any]:
        """``steps`` and ``seconds``, rounded for a file."""
        return {"steps": round(self.steps, 5), "seconds": {name: round(s, 7) for name, s in self.seconds.items()}}


class CostMeter:
    """Follows a decoder from generation to generation; the tags of its requests are (index of the prompt, turn).

    Between two generations the batch is the same: prompts enter and leave only there. So the difference of the clock
    belongs to the prompts that were in the batch, to each alike.
    """

    def __init__(self, decoder: Decoder, requests: Sequence[DecodeRequest]) -> None:
        self.waiting = deque(requests)
        self._decoder = decoder
        self._order = [_index(request) for request in requests]  # in which prompts enter
        self._entered = 0
        self._inside: set[int] = set()
        self._costs: dict[int, Cost] = defaultdict(Cost)
        self._steps, self._seconds = 0, decoder.clock.seconds()

    def submit(self, request: DecodeRequest) -> None:
        """A next turn: it enters when a row is free."""
        self.waiting.append(request)
        self._order.append(_index(request))

    def left(self, generation: Generation) -> None:
        """``generation`` has come out of the decoder: charge the time and rounds since the one before."""

        while self._entered < len(self._order) - len(self.waiting):
            self._inside.add(self._order[self._entered])
            self._entered += 1
        steps, seconds = self._decoder.clock.rounds, self._decoder.clock.seconds()
        for index in self._inside:
            cost = self._costs[index]
            cost.steps += (steps - self._steps) / len(self._inside)
            for phase, value in seconds.items():
                cost.seconds[phase] += (value - self._seconds[phase]) / len(self._inside)
        self._steps, self._seconds = steps, seconds
        self._inside.discard(_index(generation.request))

    def take(self, index: int) -> Cost:
        """What all turns of a prompt cost, when the last is done."""
        return self._costs.pop(index)


def _index(request: DecodeRequest) -> int:
    index, _ = cast(tuple[int, int], request.tag)
    return index
