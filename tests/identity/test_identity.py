"""An identity is complete: weights to the last byte, config, tokenizer, template and its date; older records too."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_tools import make_target
from data_tools import CHATML, MARKED, small_tokenizer, with_template
from safetensors.torch import load_file, save_file

from deepspec.data.chat import Renderer
from deepspec.errors import TargetError
from deepspec.identity import as_recorded, differences, identity_of, vocabulary_digest
from deepspec.targets import digests, load_spec, load_target, load_target_embeddings, load_tokenizer
from deepspec.targets.date import DATE
from deepspec.targets.digests import sampled_digest, weights_digest

SIDES = ("then", "now")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("identity") / "target")


@pytest.fixture
def target(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "target"))


def identity(path: Path) -> dict[str, Any]:
    return identity_of(load_spec(path), load_tokenizer(path))


def change_weight(path: Path, name: str, place: tuple[int, int]) -> None:
    weights = load_file(path / "model.safetensors")
    weights[name][place] += 1
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- weights ----------------------------------------------------------------------------------------------------------


def test_one_fine_tuned_row_of_the_embedding_is_another_target(target: Path) -> None:
    before, sampled = weights_digest(target), sampled_digest(target, torch.bfloat16)
    change_weight(target, "model.embed_tokens.weight", (700, 5))
    assert sampled_digest(target, torch.bfloat16) == sampled  # what older versions did not see
    assert weights_digest(target) != before


def test_embedding_and_head_alone_have_the_identity_of_the_whole_target(target: Path) -> None:
    whole, ends = load_target(target, torch.float32), load_target_embeddings(target, torch.bfloat16)
    assert whole.spec == ends.spec
    assert weights_digest(target) == identity(target)["target"]["weights"]


def test_how_the_weights_are_spread_over_files_does_not_matter(target: Path, tmp_path: Path) -> None:
    load_target(target).model.save_pretrained(tmp_path / "cut", max_shard_size="60KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    assert weights_digest(tmp_path / "cut") == weights_digest(target)
    next((tmp_path / "cut").glob("*.safetensors")).unlink()
    with pytest.raises(TargetError, match="no weights to compare"):
        weights_digest(tmp_path / "cut")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The files whose bytes are read, with small and fresh files remembered too."""
    found: list[Path] = []
    read = digests._file_number
    monkeypatch.setattr(digests, "_file_number", lambda file, job: (found.append(file), read(file, job))[1])
    monkeypatch.setattr(digests, "SMALL", 0)
    monkeypatch.setattr(digests, "SETTLED", -1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return found


def test_a_file_is_read_once_and_again_only_when_it_changed(target: Path, reads: list[Path]) -> None:
    first = weights_digest(target)
    assert weights_digest(target) == first
    assert len(reads) == 1
    file = target / "model.safetensors"
    stamp = file.stat()
    change_weight(target, "model.layers.1.mlp.up_proj.weight", (3, 3))
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert file.stat().st_size == stamp.st_size
    assert weights_digest(target) != first
    assert len(reads) == 2
    digests.memory_file().write_text("not JSON")
    weights_digest(target)
    assert len(reads) == 3


def test_a_memory_that_cannot_be_written_is_no_error(
    target: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (target.parent / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(target.parent / "file"))
    assert weights_digest(target) == weights_digest(target)
    assert len(reads) == 2


def test_a_file_that_was_just_written_is_not_remembered(
    target: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED", 10**12)
    weights_digest(target)
    assert not digests.memory_file().exists()


# -- config, tokenizer, template --------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention"] * 3}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_parameters": YARN}, "rope_parameters.rope_type: then default, now yarn"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters.rope_theta"),
        (SLIDING, "sliding_window"),
        ({"rms_norm_eps": 1e-2}, "rms_norm_eps: then 1e-06, now 0.01"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings: then True, now False"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping: then None, now 30.0"),
    ],
)
def test_a_config_field_that_changes_the_forward_is_named(target: Path, changes: dict[str, Any], named: str) -> None:
    before = identity(target)
    edit(target / "config.json", **changes)
    assert any(f"target.config.{named}" in line for line in differences(before, identity(target), SIDES))


def test_fields_that_change_no_hidden_state_and_the_place_are_not_compared(target: Path, tmp_path: Path) -> None:
    before = identity(target)
    edit(target / "config.json", use_cache=False, transformers_version="4.0", dtype="float32", eos_token_id=[3, 4])
    moved = Path(shutil.move(target, tmp_path / "moved"))
    assert differences(before, identity(moved), SIDES) == []


def test_a_field_that_only_a_newer_transformers_knows_is_not_compared(target: Path) -> None:
    before = identity(target)
    edit(target / "config.json", new_field=1)
    after = identity(target)
    assert differences(before, after, SIDES) == ["target.config.new_field: then None, now 1"]
    before["target"]["reader"] = "transformers 4.57"
    assert differences(before, after, SIDES) == []


@pytest.mark.parametrize(
    ("file", "changes", "named"),
    [
        (
            "tokenizer.json",
            {"normalizer": {"type": "Lowercase"}},
            'normalizer: then {"type": "NFC"}, now {"type": "Lowercase"}',
        ),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer: then "),
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>"}, "special_tokens: then "),
    ],
)
def test_a_tokenizer_that_cuts_text_otherwise_is_named_by_its_part(
    target: Path, file: str, changes: dict[str, Any], named: str
) -> None:
    before = identity(target)
    edit(target / file, **changes)
    assert any(line.startswith(f"tokenizer.{named}") for line in differences(before, identity(target), SIDES))


def test_another_template_and_other_stop_tokens_are_named(target: Path) -> None:
    spec, tokenizer = load_spec(target), load_tokenizer(target)
    before = identity_of(spec, tokenizer, (2, 3))
    tokenizer.chat_template += " "
    lines = differences(before, identity_of(spec, tokenizer, (2,)), SIDES)
    assert [line.split(":")[0] for line in lines] == ["stop_tokens", "template"]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_the_date_that_a_template_writes_is_fixed_and_recorded(template: str) -> None:
    asks = '{%- set day = strftime_now("%d %b %Y") if strftime_now is defined else "none" %}\n{{ day }}|' + template
    plain, fixed = (Renderer(with_template(small_tokenizer(), one), "llama") for one in (template, asks))
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    text = fixed.prompt_text(talk[:1])
    assert text == "26 Jul 2024|" + plain.prompt_text(talk[:1])
    whole, alone = fixed.conversation(talk), plain.conversation(talk)
    assert fixed.tokenizer.decode(whole.input_ids) == "26 Jul 2024|" + plain.tokenizer.decode(alone.input_ids)
    assert whole.supervised == alone.supervised
    assert (plain.date, fixed.date) == (None, DATE)


def test_a_rendered_date_stands_in_the_identity_beside_the_template_as_it_is_stored(target: Path) -> None:
    tokenizer = load_tokenizer(target)
    assert identity_of(load_spec(target), tokenizer)["date"] is None
    tokenizer.chat_template = '{{ strftime_now("%Y") }}' + tokenizer.chat_template
    known = identity_of(load_spec(target), tokenizer)
    assert known["date"] == DATE
    assert identity_of(load_spec(target), Renderer(tokenizer, "qwen3").tokenizer) == known


# -- records of before ------------------------------------------------------------------------------------------------


def older(path: Path) -> dict[str, Any]:
    """What the previous version recorded."""
    tokenizer, now = load_tokenizer(path), identity(path)
    target = {"path": str(path), "revision": None, "weights": sampled_digest(path, torch.bfloat16), "hidden_size": 32}
    return {"target": target, "tokenizer": vocabulary_digest(tokenizer), "template": now["template"]}


def test_an_older_record_is_compared_by_what_it_holds_and_a_line_says_so(
    target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = older(target)
    assert differences(found, as_recorded(found, identity(target), torch.bfloat16, "caches/x"), SIDES) == []
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for words in ("caches/x is of an earlier version", "weights (a sample", "not compared: target.config"):
        assert words in said
    change_weight(target, "model.layers.1.mlp.up_proj.weight", (0, 0))
    edit(target / "config.json", rms_norm_eps=1e-2)
    lines = differences(found, as_recorded(found, identity(target), torch.bfloat16, "caches/x"), SIDES)
    assert [line.split(":")[0] for line in lines] == ["target.weights"]


def test_a_record_of_today_is_compared_whole_and_nothing_is_said(
    target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = identity(target)
    assert as_recorded(json.loads(json.dumps(now)), now, torch.bfloat16, "x") == now
    assert differences(now, json.loads(json.dumps(now)), SIDES) == []
    assert capsys.readouterr().err == ""
