"""A greedy output that differs from the baseline's: explained by rounding, or called a fault."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluate_tools import Folders, make_folders, rows_of

from deepspec.evaluate.report import markdown
from deepspec.evaluate.run import Evaluation
from deepspec.evaluate.ties import first_difference, next_logits, weights_in
from deepspec.targets import Target, load_target

WIDER = {torch.bfloat16: torch.float32, torch.float32: torch.float64}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("ties"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_exact_logits_are_those_of_a_wider_copy(folders: Folders, dtype: torch.dtype) -> None:
    """Turning a module at a time gives what a wider model gives, and leaves every weight as it was."""
    target = load_target(folders.target, dtype)
    before = {name: (weight.data_ptr(), weight.clone()) for name, weight in target.model.named_parameters()}
    ids = torch.randint(0, target.spec.vocab_size, (11,), generator=torch.Generator().manual_seed(1)).tolist()
    own, exact = next_logits(target, ids)
    assert own.dtype == dtype
    assert exact.dtype == WIDER[dtype]
    for name, weight in target.model.named_parameters():
        assert weight.data_ptr() == before[name][0]
        assert torch.equal(weight, before[name][1])
    copied = Target(copy.deepcopy(target.model).to(WIDER[dtype]), target.spec)
    wanted = copied.logits(copied.forward(torch.tensor([ids]), ()).last_hidden[0, -1])
    torch.testing.assert_close(exact, wanted, rtol=1e-5, atol=1e-6)
    assert 0 < float((own.double() - exact.double()).abs().max()) < 0.5


def test_weights_come_back_after_an_error(folders: Folders) -> None:
    target = load_target(folders.target, torch.bfloat16)
    with pytest.raises(IndexError), weights_in(target.decoder, torch.float32):
        target.forward(torch.tensor([[target.spec.vocab_size + 5]]), ())
    assert {weight.dtype for weight in target.model.parameters()} == {torch.bfloat16}


def test_a_tie_and_a_fault(folders: Folders) -> None:
    """Two tokens with the same row of the head are tied; the least likely token and an answer that ended are not."""
    target = load_target(folders.target, torch.bfloat16)
    prompt, start = [5, 6, 7], [9, 8]
    _, exact = next_logits(target, [*prompt, *start])
    best, worst = int(exact.argmax()), int(exact.argmin())
    twin = (best + 1) % len(exact)
    target.head_weight[twin] = target.head_weight[best]
    _, exact = next_logits(target, [*prompt, *start])

    tie = first_difference(target, [[1], prompt], [[4], [*start, best, 2]], [[4], [*start, twin, 3]])
    assert tie is not None
    assert (tie.turn, tie.position, tie.baseline_token, tie.drafted_token) == (1, 2, best, twin)
    assert tie.gap == 0.0
    assert tie.tied

    fault = first_difference(target, [prompt], [[*start, best]], [[*start, worst]])
    assert fault is not None
    assert fault.gap == pytest.approx(float(exact[best] - exact[worst]))
    assert fault.rounding is not None
    assert not fault.tied
    both = first_difference(target, [prompt], [[*start, worst]], [[*start, worst - 1]])
    assert both is not None
    assert not both.tied  # close to each other, far from the likeliest

    ended = first_difference(target, [prompt], [start], [[*start, best]])
    assert ended is not None
    assert (ended.position, ended.baseline_token, ended.tied, ended.gap) == (2, None, False, None)
    assert first_difference(target, [prompt], [start], [start]) is None


def test_a_run_tells_ties_from_faults(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16: all equal or tied; where the drafted decoding gives another token, the report calls it a fault."""
    good = folders.run(tmp_path / "good", dtype="bfloat16", batch_size=2)
    assert [row.equal_or_tied for row in good.summaries] == [1.0, 1.0, 1.0]
    assert "a fault" not in markdown(good.to_row())

    decode = Evaluation._decode

    def faulty(self: Evaluation, *given: Any, with_draft: bool) -> Iterator[Any]:
        for index, generations, cost in decode(self, *given, with_draft=with_draft):
            if with_draft and index == 1:
                last = generations[0].output_ids[-1]
                generations[0].output_ids[-1] = (last + 1) % self.target.spec.vocab_size
            yield index, generations, cost

    monkeypatch.setattr(Evaluation, "_decode", faulty)
    bad = folders.run(tmp_path / "bad")
    rows = {row.task: row for row in bad.summaries}
    assert rows["short"].equal_or_tied == rows["short"].equal_to_baseline == 2 / 3
    assert rows["short"].beyond_rounding == [1]
    assert rows["talk"].equal_or_tied == 1.0
    found = next(row for row in rows_of(tmp_path / "bad") if (row["task"], row["index"]) == ("short", 1))["difference"]
    assert found["position"] == 11
    assert not found["tied"]
    assert found["gap"] > 2 * found["rounding"]
    assert "short at T=0: prompts 1 differ from the baseline by more than the target's rounding" in markdown(
        bad.to_row()
    )
