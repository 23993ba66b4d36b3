"""Why a greedy output differs from the baseline's: two tokens whose logits are closer than the target's own rounding.

A check of many tokens rounds otherwise than a pass of one token, so where two logits are nearly equal, either token can
come first. At the first difference the target is run over the same prefix twice: as it is, and with its weights turned
to a wider dtype (float32 for bfloat16 and float16, float64 for float32). The largest change of a logit is the target's
rounding there. Two tokens are tied where both lie within twice that of the largest exact logit: each of the two can
move by it. Anything else is a fault of the decoding, and is reported as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepspec.targets import Target

VOCABULARY_ROWS = 16384  # of the head, turned to the wider dtype at a time


@dataclass(frozen=True)
class FirstDifference:
    """The first difference of a greedy output from the baseline's, and whether rounding explains it."""

    turn: int
    position: int  # in the answer, from 0
    baseline_token: int | None  # None: the answer had ended
    drafted_token: int | None
    gap: float | None  # between the exact logits of the two tokens; None where one answer had ended
    rounding: float | None  # the largest difference of a logit from the exact one, at this position
    tied: bool  # both tokens lie within twice the rounding of the largest exact logit


def first_difference(
    target: Target,
    prompts: Sequence[Sequence[int]],
    baseline: Sequence[Sequence[int]],
    drafted: Sequence[Sequence[int]],
) -> FirstDifference | None:
    """Explain the first difference; None where the outputs are equal.

    Args:
        target: what decoded both.
        prompts: ids of the drafted decoding's turns; up to the first turn that differs they are the baseline's too.
        baseline: output ids of each turn.
        drafted: the same.
    """
    for turn, prompt in enumerate(prompts):
        first, other = (list(ids[turn]) if turn < len(ids) else [] for ids in (baseline, drafted))
        if first == other:
            continue
        pairs = zip(first, other, strict=False)
        position = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(other)))
        one, two = (ids[position] if position < len(ids) else None for ids in (first, other))
        if one is None or two is None:
            return FirstDifference(turn, position, one, two, gap=None, rounding=None, tied=False)
        own, exact = next_logits(target, [*prompt, *first[:position]])
        rounding = float((own.double() - exact.double()).abs().max())
        a, b = float(exact[one]), float(exact[two])
        tied = float(exact.max()) - min(a, b) <= 2 * rounding
        return FirstDifference(turn, position, one, two, gap=abs(a - b), rounding=rounding, tied=tied)
    return None


def next_logits(target: Target, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Logits [V] of the token after ``ids``: in the target's dtype, and with its weights in the wider one."""
    prefix = torch.tensor([list(ids)], device=target.device)
    own = target.logits(target.forward(prefix, ()).last_hidden[0, -1])
    wider = torch.float64 if target.dtype == torch.float32 else torch.float32
    with weights_in(target.decoder, wider):
        hidden = target.forward(prefix, ()).last_hidden[0, -1].to(wider)
    exact = torch.cat([part.to(wider) @ hidden for part in target.head_weight.split(VOCABULARY_ROWS)])
    cap = target.spec.softcap
    return own, exact if cap is None else cap * torch.tanh(exact / cap)


@contextmanager
def weights_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """While open, each module computes in ``dtype``: its forward turns its weights, and puts them back at its end.

    So one module's weights exist twice at a time, never the whole model's.
    """
    kept: dict[nn.Parameter, Tensor] = {}

    def widen(module: nn.Module, _: Any) -> None:
        for weight in module.parameters(recurse=False):
            if weight.is_floating_point():
                kept[weight] = weight.data
                weight.data = weight.data.to(dtype)

    def put_back(module: nn.Module, *_: Any) -> None:
        for weight in module.parameters(recurse=False):
            if weight in kept:
                weight.data = kept.pop(weight)

    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(widen))
        hooks.append(module.register_forward_hook(put_back, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
