"""What a draft's numbers mean in every format: its rotary frequencies, and the order of the layers that it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from algorithm_tools import random_batch, tiny_draft, tiny_target
from transformers import AutoConfig

from deepspec.drafts import FROZEN, load_draft, read_weights, save_draft
from deepspec.errors import DraftError, TargetError
from deepspec.export.convert import ExportOptions, export_draft, import_draft
from deepspec.export.parts import ImportHints
from deepspec.targets import load_spec

ROPES: dict[str, dict[str, Any]] = {
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_theta": 5e5,
    },
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
}  # fmt: skip
DRAFTS: tuple[tuple[str, str, dict[str, Any], tuple[str, ...]], ...] = (
    ("llama", "eagle3", {}, ("deepspec", "vllm", "sglang", "speculators")),
    ("qwen3", "dspark", {}, ("deepspec", "vllm", "sglang", "speculators")),
    ("qwen3", "dflash", {"sample_from_anchor": False}, ("vllm", "sglang", "speculators", "zlab")),
)


def made(folder: Path, family: str, algorithm: str, layers: list[int], changes: dict[str, Any], **target: Any) -> Any:
    """(target, model) of a tiny draft that is written to ``folder``."""
    target = tiny_target(family, **target)
    model = tiny_draft(algorithm, target, target_layers=layers, **changes).eval()
    frozen = dict(zip(FROZEN, (target.embed_weight, target.head_weight), strict=True))
    save_draft(folder, {**model.state_dict(), **frozen}, model.algorithm.config_json(model.config, target.spec), {})
    return target, model


@pytest.mark.parametrize("kind", ROPES)
def test_frequencies_come_back_from_every_format(kind: str, tmp_path: Path) -> None:
    for number, (family, algorithm, changes, formats) in enumerate(DRAFTS):
        ours = tmp_path / f"ours{number}"
        target, model = made(ours, family, algorithm, [0, 1, 2], changes, rope_parameters=ROPES[kind])
        theirs = target.decoder.rotary_emb
        assert torch.equal(model.rotary._inv_freq, theirs.inv_freq)
        assert model.rotary._scaling == theirs.attention_scaling
        for format_ in formats:
            out, back = tmp_path / f"{number}-{format_}", tmp_path / f"{number}-{format_}-back"
            export_draft(ours, out, ExportOptions(format_))
            import_draft(out, back, format_)
            again = load_draft(back, target)
            assert torch.equal(again.rotary._inv_freq, model.rotary._inv_freq)
            assert again.rotary._scaling == model.rotary._scaling


def test_a_foreign_file_with_the_older_rope_fields_has_the_same_frequencies(tmp_path: Path) -> None:
    target, model = made(tmp_path / "ours", "llama", "eagle3", [0, 1, 2], {}, rope_parameters=ROPES["llama3"])
    export_draft(tmp_path / "ours", tmp_path / "out", ExportOptions("sglang"))
    (tmp_path / "out" / "provenance.json").unlink()  # changed on purpose
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["rope_scaling"] = {key: value for key, value in config.pop("rope_parameters").items() if key != "rope_theta"}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))
    import_draft(tmp_path / "out", tmp_path / "back", "sglang")
    assert torch.equal(load_draft(tmp_path / "back", target).rotary._inv_freq, model.rotary._inv_freq)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_batch_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    AutoConfig.for_model("llama", head_dim=8, rope_parameters=rope).save_pretrained(tmp_path)
    with pytest.raises(TargetError, match=rf"{tmp_path}: rope_type: .* found '{kind}'"):
        load_spec(tmp_path)
    layered = {"full_attention": {"rope_type": kind, "rope_theta": 1e4}, "sliding_attention": {"rope_type": "default"}}
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["Gemma4Eagle3Model"]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_parameters": layered, "model_type": "gemma4"}))
    with pytest.raises(DraftError, match=rf"found '{kind}'"):
        load_draft(tmp_path)


def test_a_mask_token_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    made(tmp_path, "qwen3", "dflash", [0, 1, 2], {})
    (tmp_path / "provenance.json").unlink()  # changed on purpose
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"mask_token_id": 96}))
    with pytest.raises(DraftError, match=r"mask_token_id: no such token; found 96; wanted .*below 96"):
        load_draft(tmp_path)


@torch.no_grad()
def test_layers_that_do_not_rise_are_sorted_and_the_columns_of_fc_with_them(tmp_path: Path) -> None:
    for number, (family, algorithm, changes, formats) in enumerate(DRAFTS):
        ours = tmp_path / f"ours{number}"
        target, model = made(ours, family, algorithm, [2, 0, 1], changes)
        batch, D = random_batch([9]), target.spec.hidden_size
        features = batch.features
        by_layer = dict(zip([2, 0, 1], features.split(D, dim=-1), strict=True))
        rising = torch.cat([by_layer[layer] for layer in (0, 1, 2)], dim=-1)
        assert json.loads((ours / "config.json").read_text())["target_layer_ids"] == [2, 0, 1]
        for format_ in formats:
            out, back = tmp_path / f"{number}-{format_}", tmp_path / f"{number}-{format_}-back"
            export_draft(ours, out, ExportOptions(format_))
            config = json.loads((out / "config.json").read_text())
            inner = config.get("eagle_config") or config.get("dflash_config") or config
            ids = next(value for key, value in inner.items() if key.endswith("layer_ids"))
            assert ids in ([0, 1, 2], [1, 2, 3])
            weight = read_weights(out)["fc.weight"]
            torch.testing.assert_close(rising @ weight.T, features @ model.fc.weight.T)
            import_draft(out, back, format_)
            again = load_draft(back, target)
            assert again.config.target_layers == (0, 1, 2)
            torch.testing.assert_close(again.fc(rising), model.fc(features))


def test_a_foreign_list_that_does_not_rise_is_refused_unless_its_order_is_stated(tmp_path: Path) -> None:
    target, _ = made(tmp_path / "ours", "llama", "eagle3", [0, 1, 2], {})
    export_draft(tmp_path / "ours", tmp_path / "out", ExportOptions("vllm"))
    (tmp_path / "out" / "provenance.json").unlink()  # changed on purpose
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"eagle_aux_hidden_state_layer_ids": [3, 1, 2]}))
    import_draft(tmp_path / "out", tmp_path / "old")  # an older export of ours: in the list's order
    assert load_draft(tmp_path / "old", target).config.target_layers == (2, 0, 1)
    foreign = {key: value for key, value in config.items() if key != "deepspec"}
    path.write_text(json.dumps(foreign | {"eagle_aux_hidden_state_layer_ids": [3, 1, 2]}))
    facts = {"target": target.spec, "max_draft": 3}
    with pytest.raises(DraftError, match=r"layers do not rise.*found \[2, 0, 1\].*--target-layers"):
        import_draft(tmp_path / "out", tmp_path / "back", hints=ImportHints(**facts))
    import_draft(tmp_path / "out", tmp_path / "back", hints=ImportHints(**facts, target_layers=(0, 1, 2)))
    assert load_draft(tmp_path / "back", target).config.target_layers == (0, 1, 2)
