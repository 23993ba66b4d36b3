"""How a target is decoded: what its attention is handed decides, and nothing of it is dropped."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from algorithm_tools import tiny_draft, tiny_target
from model_types import config_of
from torch import Tensor, nn

from deepspec.decoding import padded
from deepspec.decoding.loop import generate
from deepspec.decoding.padded import snapshot
from deepspec.decoding.paths import decoding_path
from deepspec.decoding.records import DecodeSettings
from deepspec.errors import EvaluationError, TargetError
from deepspec.targets.adaptor import auto_class
from deepspec.targets.load import Target, spec_from_config

PROMPTS = [[5, 9, 40, 3, 3, 8], [7], [11, 80, 2, 6, 31, 17, 4, 4, 90], [60, 61]]
SETTINGS = DecodeSettings(max_new_tokens=12)


def target_of(model_type: str, **changes: Any) -> Target:
    config = config_of(model_type, **changes)
    torch.manual_seed(0)
    model = auto_class(config, model_type).from_config(config).float()
    return Target(model, spec_from_config(config, f"tiny-{model_type}"))


def own_text(target: Target, prompt: list[int], count: int) -> list[int]:
    """Greedy text by the model's own forward over all of it."""
    ids, model = list(prompt), target.model
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def check_text(target: Target, settings: DecodeSettings = SETTINGS, batch_size: int = 2) -> None:
    """Drafted and baseline text of rows that come and go are the model's own."""
    wanted = [own_text(target, prompt, settings.max_new_tokens) for prompt in PROMPTS]
    draft = tiny_draft("eagle3", target)
    for drafter in (None, draft.algorithm.drafter(draft, batch_size, 4)):
        found = generate(target, drafter, PROMPTS, settings, batch_size)
        assert [one.output_ids for one in found] == wanted


def with_argument(monkeypatch: pytest.MonkeyPatch, target: Target, change: Callable[[Tensor], Tensor]) -> None:
    """Every layer's attention is handed ``surprise``, and by its own attention applies it to the scores' mask."""
    attention: Any = target.layers[0].self_attn
    module = sys.modules[type(attention).__module__]
    original = module.eager_attention_forward

    def eager(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> Any:
        assert given.pop("surprise") == 1.5
        mixed, weights = original(module, query, key, value, mask, **given)
        return change(mixed), weights

    interface = module.ALL_ATTENTION_FUNCTIONS

    class Handing:
        def get_interface(self, kind: str, _default: Any) -> Any:
            found = eager if kind in ("eager", "sdpa") else interface.get_interface(kind, eager)
            return lambda *args, **given: found(*args, **given, surprise=1.5)

    monkeypatch.setattr(module, "ALL_ATTENTION_FUNCTIONS", Handing())
    target.decoder.config._attn_implementation = "eager"


def test_plain_attention_is_packed() -> None:
    target = target_of("mistral")
    assert str(decoding_path(target)) == "packed (its attention is the plain one)"
    assert str(decoding_path(tiny_target("llama"))) == "packed (its layers are a family's own)"
    check_text(target)


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_drafted_tokens_may_lie_beyond_the_last_position(model_type: str) -> None:
    """These learn an embedding of each position; the last answers end at the last of them."""
    target = target_of(model_type, max_position_embeddings=max(map(len, PROMPTS)) + SETTINGS.max_new_tokens)
    check_text(target)


def test_an_argument_of_attention_that_nobody_knows_is_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    target = target_of("mistral")
    with_argument(monkeypatch, target, lambda mixed: mixed * 1.5)
    path = decoding_path(target)
    assert path.name == "padded"
    assert "not packed: its attention takes what packed decoding does not honour (surprise)" in path.why
    check_text(target)


def test_a_target_that_sees_later_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    target = target_of("mistral")
    with_argument(monkeypatch, target, lambda mixed: mixed + mixed.mean(dim=1, keepdim=True))
    with pytest.raises(TargetError, match=r"cannot be decoded here.*surprise.*not complete text: its states differ"):
        generate(target, None, PROMPTS, SETTINGS)


@pytest.mark.parametrize(
    ("model_type", "name", "why"),
    [
        ("gpt_oss", "padded", "s_aux"),  # sinks
        ("deepseek_v3", "padded", "values of another size than keys"),  # latent attention
        ("llama4_text", "padded", "chunked_attention"),
        ("lfm2", "replay", "not packed, not padded: layers that are no attention (conv)"),
        ("jamba", "complete text", "not replay: its states differ from the model's own"),
    ],
)
def test_what_a_model_needs_decides_and_the_text_is_its_own(model_type: str, name: str, why: str) -> None:
    target = target_of(model_type)
    path = decoding_path(target)
    assert path.name == name
    assert why in path.why
    check_text(target)


def test_a_window_that_reaches_no_attention_is_left_to_the_model() -> None:
    path = decoding_path(target_of("olmo", sliding_window=6))
    assert path.name == "padded"
    assert "sliding_window 6 of its config reaches no attention" in path.why


def test_a_row_that_is_never_accepted_completely_is_not_replayed_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit of three tokens the caches are brought up to date many times over; the text stays the same."""
    monkeypatch.setattr(padded, "MOST_REPLAYED", 3)
    longest: list[int] = []
    original = padded.ReplayTarget._run

    def run(self: Any, row: Any, new: Tensor) -> Any:
        longest.append(len(row.after))
        return original(self, row, new)

    monkeypatch.setattr(padded.ReplayTarget, "_run", run)
    target = target_of("lfm2")
    check_text(target, DecodeSettings(max_new_tokens=24))
    # beyond the limit they run alone; before that at most one round's accepted tokens come on top
    assert max(longest) <= 3 + tiny_draft("eagle3", target).config.max_draft + 1


def test_a_snapshot_is_not_changed_by_what_runs_on_its_copy() -> None:
    from transformers import DynamicCache

    target = target_of("qwen3_next")
    config: Any = target.decoder.config
    cache = DynamicCache(config=config)
    target.forward(torch.tensor([PROMPTS[0]]), (), past_key_values=cache)
    kept = snapshot(cache)
    after = [target.forward(torch.tensor([[3, 4]]), (), past_key_values=snapshot(kept)).last_hidden for _ in range(2)]
    assert torch.equal(*after)


def test_a_tree_is_refused_where_tokens_can_only_follow_each_other() -> None:
    target = target_of("gpt_oss")
    draft = tiny_draft("eagle3", target)
    settings = DecodeSettings(max_new_tokens=4, tree=(2, 1))
    with pytest.raises(EvaluationError, match=r"tree is verified only by packed decoding.*s_aux.*leave the tree out"):
        generate(target, draft.algorithm.drafter(draft, 1, 4), PROMPTS[:1], settings)
