"""Which tokens are the target's: where it stops, by its own files, and that no id lies beyond its embedding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import data_tools
import pytest
import training_tools
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from deepspec.cache.build import build_cache
from deepspec.data.chat import Renderer, load_renderer, render_row
from deepspec.data.regenerate import RegenerationPlan
from deepspec.errors import CacheError, DataError, TargetError
from deepspec.recipe import load_recipe
from deepspec.sources.online import OnlineSource
from deepspec.targets import load_spec, load_target, load_tokenizer
from deepspec.targets.load import read_stops

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>' + m.content"
    " + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>' }}"
    "{% endif %}"
)
QWEN3 = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
LLAMA = {
    "<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|start_header_id|>": 128006, "<|end_header_id|>": 128007,
    "<|eom_id|>": 128008, "<|eot_id|>": 128009,
}  # fmt: skip


def tokenizer_with(ids: dict[str, int], template: str, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a few words whose special tokens have the ids of a real one."""
    made = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, **ids}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(list(ids))
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, unk_token="[UNK]", **special)


def folder_with(
    path: Path, kind: str, rows: int, tokenizer: Any, own: Any = None, generation: Any = None, **config: Any
) -> Path:
    """Config, generation config and tokenizer of a target, without weights."""
    tokenizer.save_pretrained(path)
    values = AutoConfig.for_model(kind, vocab_size=rows, hidden_size=32, num_hidden_layers=2, **config).to_dict()
    values.pop("eos_token_id", None)
    (path / "config.json").write_text(json.dumps(values | ({} if own is None else {"eos_token_id": own})))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    return path


def stops_of(path: Path) -> tuple[int, ...]:
    return Renderer(load_tokenizer(path), load_spec(path)).stop_token_ids


def test_qwen3_stops_at_both_of_its_ends(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(QWEN3, CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    path = folder_with(tmp_path, "qwen3", 151936, tokenizer, 151645, [151645, 151643])
    assert stops_of(path) == (151643, 151645)


def test_llama_3_1_stops_at_its_three_ends(tmp_path: Path) -> None:
    ids = [128001, 128008, 128009]
    tokenizer = tokenizer_with(LLAMA, HEADERS, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    for number, (own, generation) in enumerate(((ids, ids), (ids, None), (128001, ids), (None, ids))):
        path = folder_with(tmp_path / str(number), "llama", 128256, tokenizer, own, generation)
        assert stops_of(path) == (128001, 128008, 128009)


def test_each_place_that_names_an_end_counts() -> None:
    one, several, none = {"eos_token_id": 4}, {"eos_token_id": [9, 4]}, {"eos_token_id": None}
    assert read_stops(one, several, none, {}) == (4, 9)


def test_a_default_of_a_config_class_is_no_end(tmp_path: Path) -> None:
    assert AutoConfig.for_model("llama").eos_token_id == 2  # what a file that is silent would be read as
    tokenizer = tokenizer_with(LLAMA, HEADERS, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    assert stops_of(folder_with(tmp_path, "llama", 128256, tokenizer, None, [128001])) == (128001, 128009)


def test_every_stage_asks_the_same_renderer(tmp_path: Path) -> None:
    target = training_tools.make_talking_target(tmp_path / "target")
    for name in ("config.json", "generation_config.json"):
        file = target / name
        values = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(values | {"eos_token_id": [17, 30] if "generation" in name else 21}))
    recipe = load_recipe(training_tools.write_recipe(tmp_path / "recipe", target))
    built = load_renderer(recipe, load_spec(target)).stop_token_ids  # cache, online training, validation
    assert {17, 21, 30} < set(built)
    assert RegenerationPlan.of_recipe(recipe).renderer().stop_token_ids == built
    assert RegenerationPlan.of_recipe(recipe).local_engine().sampler.stop == set(built)


def grown(folder: Path) -> Path:
    """A talking target whose tokenizer has one token more than its embedding has rows."""
    target = training_tools.make_talking_target(folder)
    tokenizer, rows = load_tokenizer(target), load_spec(target).vocab_size
    tokenizer.add_tokens([*(f"<x{i}>" for i in range(rows - len(tokenizer))), "<|new|>"])
    assert tokenizer.convert_tokens_to_ids("<|new|>") == rows
    tokenizer.save_pretrained(target)
    return target


def rows_of(path: Path, *texts: str) -> Path:
    rows = [
        {
            "id": str(i),
            "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "the answer is"}],
        }
        for i, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_token_beyond_the_embedding_drops_its_row_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = grown(tmp_path / "target")
    data = rows_of(tmp_path / "data.jsonl", "the first", "a <|new|> word", "the last")
    section = {"conversations": str(data), "min_supervised": 1}
    recipe = load_recipe(training_tools.write_recipe(tmp_path / "recipe", target, data=section))
    reason = "a token beyond the target's embedding"
    manifest = build_cache(recipe, data, tmp_path / "cache")
    assert (manifest.samples, manifest.rejected) == (2, {reason: 1})
    source = OnlineSource(recipe.for_target(load_spec(target)), load_target(target), data)
    assert (source.group_sizes, source.rejected) == ((2,), {reason: 1})
    assert f"dropped, {reason}: 1 (first: 1)" in capsys.readouterr().out
    only = rows_of(tmp_path / "only.jsonl", "<|new|>")
    with pytest.raises(CacheError, match=reason):
        build_cache(recipe, only, tmp_path / "other")
    with pytest.raises(DataError, match=reason):
        OnlineSource(recipe.for_target(load_spec(target)), load_target(target), only)


def test_a_prompt_with_a_token_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    target = grown(tmp_path / "target")
    renderer = Renderer(load_tokenizer(target), load_spec(target))
    rows = load_spec(target).vocab_size
    with pytest.raises(DataError, match=rf"<\|new\|> \({rows}\)'; wanted ids below {rows}"):
        renderer.prompt([{"role": "user", "content": "say <|new|>"}])
    assert max(renderer.prompt([{"role": "user", "content": "say it"}])) < rows
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the answer <|new|>"}]
    assert isinstance(render_row(renderer, {"messages": messages}, 1), str)


def test_of_a_family_alone_nothing_is_known_of_the_embedding() -> None:
    case = data_tools.small_case("chatml")
    assert Renderer(case.tokenizer, case.family).prompt([{"role": "user", "content": "a"}])


@pytest.mark.parametrize("key", ["vocab", "merges"])
def test_a_tokenizer_that_lacks_a_key_is_named(key: str, tmp_path: Path) -> None:
    """A flipped bit in a key's name makes the tokenizers package raise a bare Exception, or another error."""
    folder = tmp_path / "target"
    training_tools.cache_tools.make_target(folder)
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"][key + "x"] = values["model"].pop(key)
    path.write_text(json.dumps(values))
    with pytest.raises(TargetError, match=r"cannot load the target \(.+\)"):
        load_tokenizer(folder)
