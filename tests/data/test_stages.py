"""One rendering: the prompt's ids are the same in regeneration, cache, training and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import data_tools as tools
import pytest
import torch

from deepspec.cache.build import build_cache
from deepspec.data.chat import load_renderer, render_row
from deepspec.data.conversations import read_conversations, write_conversations
from deepspec.data.inspect import inspect
from deepspec.data.local import Generated, LocalSampler
from deepspec.data.regenerate import RegenerationPlan, regenerate
from deepspec.data.server import ServerOptions
from deepspec.evaluate import run as evaluation
from deepspec.recipe import recipe_from_dict
from deepspec.sources.online import OnlineSource
from deepspec.targets import load_target

QUESTION = [{"role": "user", "content": "how many words are in this ?"}]


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("target")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen3Config(vocab_size=520, num_key_value_heads=1, head_dim=16, max_position_embeddings=512, **sizes)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tools.small_case("reasoning").tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("system_prompt", [None, "Be brief."])
def test_prompt_ids_agree_in_all_four_stages(
    target_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thinking: bool, system_prompt: str | None
) -> None:
    values: dict[str, Any] = {
        "name": "stages",
        "algorithm": "eagle3",
        "target": {"path": str(target_folder), "layers": [0], "dtype": "float32"},
        "data": {"thinking": thinking, "system_prompt": system_prompt, "min_supervised": 1},
        "regenerate": {"max_tokens": 4},
    }
    recipe = recipe_from_dict(values)
    prompts, answers = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    write_conversations(prompts, [{"id": "one", "messages": QUESTION}], {})

    asked: list[list[int]] = []
    words = tools.small_tokenizer()("seven words", add_special_tokens=False)["input_ids"]

    def answer(self: LocalSampler, requests: Any) -> Any:
        asked.extend(request.input_ids for request in requests)
        return iter([Generated(request, list(words), "stop") for request in requests])

    monkeypatch.setattr(LocalSampler, "answer", answer)
    plan = RegenerationPlan.of_recipe(recipe)
    regenerate(prompts, answers, plan.local_engine(), plan.settings())
    (prompt,) = asked

    target = load_target(str(target_folder), torch.float32)
    (row,) = read_conversations(answers)
    cached = render_row(load_renderer(recipe, target.spec), row, 1)
    assert not isinstance(cached, str)
    trained = OnlineSource(recipe, target, answers).tokens(0).tolist()

    monkeypatch.setattr(evaluation, "load_draft", lambda *_: None)
    monkeypatch.setattr(evaluation, "load_tasks", lambda *_: [])
    monkeypatch.setattr(evaluation.Evaluation, "_identity", lambda _: {})
    options = evaluation.Options(
        str(target_folder), "draft", str(tmp_path), thinking=thinking, system_prompt=system_prompt
    )
    evaluated = evaluation.Evaluation(options).renderer.prompt(QUESTION)

    server = plan.server_engine(ServerOptions(("http://127.0.0.1:9",), "x")).renderer
    served = server.tokenizer.apply_chat_template(
        server.with_system(QUESTION), add_generation_prompt=True, **server.template_kwargs
    )["input_ids"]

    assert prompt == evaluated == served
    assert cached.input_ids[: len(prompt)] == trained[: len(prompt)] == prompt
    assert cached.input_ids == trained
    assert sum(cached.loss_mask[: len(prompt)]) == 0
    assert cached.loss_mask[len(prompt)] == 1


def test_refused_rows_have_the_same_reasons_in_build_online_and_inspect(
    target_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what is refused is counted, not passed over."""
    values: dict[str, Any] = {
        "name": "reasons",
        "algorithm": "eagle3",
        "target": {"path": str(target_folder), "layers": [0], "dtype": "float32"},
        "data": {"thinking": True, "min_supervised": 4},
    }
    call = {"type": "function", "function": {"name": "f", "arguments": "{"}}
    answers: list[dict[str, Any]] = [
        {"role": "assistant", "content": "seven words", "reasoning_content": "a thought of some words"},
        {"role": "assistant", "content": "seven \ufffd words", "finish_reason": "stop"},
        {"role": "assistant", "content": "", "tool_calls": [call], "finish_reason": "length"},
        {"role": "assistant", "content": "a", "weight": 0},
    ]
    rows = [{"id": f"row {n}", "messages": [*QUESTION, answer]} for n, answer in enumerate(answers)]
    write_conversations(tmp_path / "a.jsonl", rows, {})
    recipe = recipe_from_dict(values)
    manifest = build_cache(recipe, tmp_path / "a.jsonl", tmp_path / "cache")
    target = load_target(str(target_folder), torch.float32)
    online = OnlineSource(recipe, target, tmp_path / "a.jsonl")
    printed = capsys.readouterr().out
    shown = inspect(load_renderer(recipe, target.spec), rows, 4, 0)
    assert manifest.samples == len(online.lengths) == 1
    assert manifest.rejected == dict(sorted(online.rejected.items()))
    assert sorted(manifest.rejected) == [
        "an answer cut inside a tool call",
        "an answer with U+FFFD in it: bytes that its text does not tell",
        "no supervised token",
    ]
    for reason in manifest.rejected:
        assert f"dropped, {reason}: 1 (first: row" in printed
        assert f"dropped, {reason}: 1 (first: row" in shown
