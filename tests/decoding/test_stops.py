"""Greedy decoding with lists of stop tokens: every algorithm on every family, ragged prompts, every batch size."""

from __future__ import annotations

import pytest
import torch
from algorithm_tools import ALGORITHMS, FAMILIES, tiny_draft, tiny_target

from deepspec.decoding.loop import generate
from deepspec.decoding.records import DecodeSettings

LIMIT = 10


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_drafted_output_is_the_plain_output_cut_at_the_first_of_the_stop_tokens(algorithm: str, family: str) -> None:
    """Prompts of one token and of thirty, some that end in a stop token or hold several; first tokens that stop."""
    target = tiny_target(family, initializer_range=0.5)
    draft = tiny_draft(algorithm, target)
    with torch.no_grad():  # it carries on what the target's last layer says, so that now and then it is accepted
        draft.fc.weight[:, -draft.shape.hidden_size :] += torch.eye(draft.shape.hidden_size)
    prompts = [[1, 5, 9, 12], [7], list(range(20, 50)), [2, 90, 4], [8, 8]]
    seen = [one.output_ids for one in generate(target, None, prompts, DecodeSettings(max_new_tokens=LIMIT), 5)]
    stops = (seen[0][3], seen[2][0], seen[3][-1], 94)
    prompts += [[*prompts[0], stops[0]], [stops[1]] * 3, [*prompts[1], *seen[1][:2], stops[2], stops[0]]]
    free = generate(target, None, prompts, DecodeSettings(max_new_tokens=LIMIT), 3)
    wanted = [until(stops, one.output_ids) for one in free]
    assert len(wanted[2]) == 1
    assert {len(output) < LIMIT for output in wanted} == {True, False}
    for batch_size, drafted, published in ((1, True, False), (3, True, True), (8, True, False), (3, False, False)):
        settings = DecodeSettings(max_new_tokens=LIMIT, stop_token_ids=stops, release_counting=published)
        drafter = draft.algorithm.drafter(draft, batch_size, 16) if drafted else None  # shorter than the rows get
        done = generate(target, drafter, prompts, settings, batch_size)
        assert [one.output_ids for one in done] == wanted
        assert [one.finish for one in done] == ["stop" if output[-1] in stops else "length" for output in wanted]
        assert not done[2].rounds


def until(stops: tuple[int, ...], tokens: list[int]) -> list[int]:
    """The tokens up to and with the first stop token."""
    return tokens[: next((number for number, token in enumerate(tokens, 1) if token in stops), len(tokens))]
