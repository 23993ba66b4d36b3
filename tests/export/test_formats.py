"""What engines refuse and why, other people's files, strict imports; round trips are in test_engines.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from algorithm_tools import random_batch, tiny_target
from export_tools import KINDS, LAYERS, made
from safetensors.torch import load_file, save_file

from deepspec import registry
from deepspec.drafts import load_draft, read_provenance, read_weights, save_draft
from deepspec.errors import DraftError
from deepspec.export.convert import ExportOptions, _is_rewritten, export_draft, import_draft, read_draft
from deepspec.export.parts import EMBED, HEAD, DraftCheckpoint, ImportHints

# what a format cannot carry, and a word of the reason
REFUSED = {
    ("vllm", "dspark-gated", "qwen3"): "only vanilla heads",
    ("sglang", "eagle3", "qwen3"): "norms of the heads",
    ("sglang", "eagle3-reduced", "qwen3"): "norms of the heads",
    ("sglang", "dflash-reduced", "qwen3"): "full vocabulary",
    ("sglang", "dspark-reduced", "qwen3"): "full vocabulary",
    ("speculators", "dspark-gated", "qwen3"): "only vanilla heads",
    ("vllm", "eagle3", "gemma4"): "no Eagle3 class",
    ("speculators", "eagle3", "gemma4"): "layers of qwen3 or llama",
    ("speculators", "dspark", "gemma4"): "layers of qwen3",
    ("vllm", "dflash", "llama"): "norm every head",
    ("vllm", "dflash-k-1", "gemma4"): "only Qwen3 layers",
    ("sglang", "dspark", "gemma4"): "Qwen3's layers",
    **{("zlab", kind, "qwen3"): "only DFlash drafts" for kind in KINDS if not kind.startswith("dflash")},
    **{("zlab", kind, "qwen3"): "K - 1 drafts" for kind in ("dflash", "dflash-reduced", "dflash2-anchor")},
    ("vllm", "dflash2-anchor", "qwen3"): "K - 1 drafts",
    ("vllm", "dflash2", "llama"): "only Qwen3 layers",
    ("vllm", "dflash2-reduced", "qwen3"): "full vocabulary",
    ("vllm", "dflash-causal-anchor", "qwen3"): "causal.*no such part",
    ("speculators", "dflash-causal", "qwen3"): "causal.*no such part",
    ("speculators", "dflash2-causal", "qwen3"): "causal.*no such part",
    ("sglang", "dflash-causal", "qwen3"): "causal.*no such part",
    ("sglang", "dflash-window", "qwen3"): "complete context",
    ("sglang", "dflash2", "qwen3"): "no class for such a draft",
    ("gguf", "dflash-causal", "qwen3"): "causal.*no such part",
    ("gguf", "dflash2-anchor", "qwen3"): "K - 1 drafts",
    ("gguf", "dflash2-reduced", "qwen3"): "full vocabulary",
}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Logits of every slot or TTT step of a small batch."""
    batch = random_batch([14, 9])
    if model.algorithm.name == "eagle3":
        slots = torch.arange(8).expand(2, -1)
        hidden = model.train_hidden(batch.features, batch.input_ids, slots, model.config.ttt_length, 9)
        return model.draft_logits(hidden)
    hidden = model.train_slots(batch.features, batch.input_ids, torch.tensor([[2, 5], [1, 4]]), 6)
    base = model.head.logits(hidden)
    if model.markov_head is None:
        return base
    previous = batch.input_ids[:, None, : hidden.shape[2]].expand(-1, 2, -1)
    return base + model.markov_head.markov_w2(model.markov_head.latents(model.markov_head.markov_w1(previous), hidden))


@pytest.mark.parametrize(("format_name", "kind", "family"), REFUSED)
def test_an_engine_says_why_it_refuses_a_draft(format_name: str, kind: str, family: str, tmp_path: Path) -> None:
    _, _, ours = made(tmp_path, kind, family)
    with pytest.raises(DraftError, match=REFUSED[format_name, kind, family]):
        export_draft(ours, tmp_path / "out", ExportOptions(format_name))
    assert not (tmp_path / "out").exists()


FOREIGN = [
    ("vllm", "eagle3"), ("vllm", "eagle3-reduced"), ("vllm", "dflash"), ("vllm", "dspark"), ("vllm", "dspark-reduced"),
    ("vllm", "dflash-k-1"),
    ("speculators", "eagle3-reduced"), ("speculators", "dspark-reduced"), ("speculators", "dflash-k-1"),
    ("speculators", "dspark"), ("zlab", "dflash-k-1"), ("vllm", "dflash-causal"), ("zlab", "dflash-window"),
    ("speculators", "dflash-window"), ("vllm", "dflash2"), ("speculators", "dflash2"), ("zlab", "dflash2-causal"),
]  # fmt: skip


@pytest.mark.parametrize(("format_name", "kind"), FOREIGN)
def test_a_foreign_file_without_our_key_gives_the_same_draft(format_name: str, kind: str, tmp_path: Path) -> None:
    """What others write: no `deepspec` key, defaults of the transformer left out, names behind `model.`."""
    target, model, ours = made(tmp_path, kind)
    export_draft(ours, tmp_path / "out", ExportOptions(format_name))
    (tmp_path / "out" / "provenance.json").unlink()  # changed on purpose
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    for key in ("deepspec", "attention_dropout", "rms_norm_eps", "use_cache"):
        config.pop(key, None)
        config.get("transformer_layer_config", {}).pop(key, None)
    config.pop("num_target_layers", None)
    path.write_text(json.dumps(config))
    state = load_file(tmp_path / "out" / "model.safetensors")
    renamed = {n if n in ("d2t", "t2d", "lm_head.weight") else f"model.{n}": t for n, t in state.items()}
    save_file(renamed, tmp_path / "out" / "model.safetensors")
    flat = kind in ("dflash", "dspark", "dspark-reduced")  # the released layout of DSpark, too
    origin = format_name if flat else "auto"
    with pytest.raises(DraftError, match=r"num_target_layers.*--target|ttt_length.*--max-draft"):
        import_draft(tmp_path / "out", tmp_path / "back", origin)
    length = model.config.max_draft if "eagle3" in kind else None
    _, found = import_draft(tmp_path / "out", tmp_path / "back", origin, ImportHints(target.spec, max_draft=length))
    back = load_draft(tmp_path / "back", target)
    zlabs = kind not in ("dflash", "dspark") and kind.startswith("dflash") and format_name != "speculators"
    assert found == ("zlab" if zlabs else format_name)
    own = json.loads((tmp_path / "back" / "config.json").read_text())
    assert own["own_head"]
    assert own["own_embedding"]
    torch.testing.assert_close(logits(back), logits(model), rtol=0, atol=0)


def test_a_draft_with_a_head_of_its_own_uses_it(tmp_path: Path) -> None:
    target, model, ours = made(tmp_path, "eagle3-reduced", "llama")
    export_draft(ours, tmp_path / "out", ExportOptions("sglang"))
    (tmp_path / "out" / "provenance.json").unlink()  # changed on purpose
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["deepspec"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert state["lm_head.weight"].shape[0] == 20
    save_file({**state, "lm_head.weight": 2 * state["lm_head.weight"]}, tmp_path / "out" / "model.safetensors")
    import_draft(tmp_path / "out", tmp_path / "back", "auto", ImportHints(target.spec, max_draft=3))
    back = load_draft(tmp_path / "back", target)
    torch.testing.assert_close(logits(back), 2 * logits(model))
    with pytest.raises(DraftError, match="not a draft in the sglang format"):
        import_draft(ours, tmp_path / "again", "sglang")


def test_a_config_rewritten_for_an_engine_is_imported_and_weights_are_still_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Our folder with another format's config.json: the digest of config.json says nothing there."""
    target, model, ours = made(tmp_path, "eagle3", "llama")
    config = json.loads((ours / "config.json").read_text())
    layers = config.pop("target_layer_ids")
    config |= {"architectures": ["Eagle3LlamaForCausalLM"], "eagle_aux_hidden_state_layer_ids": [i + 1 for i in layers]}
    (ours / "config.json").write_text(json.dumps(config))
    with pytest.raises(DraftError, match=r"config\.json: the file has changed"):
        load_draft(ours)  # as a draft of ours it is not the one that was written
    for format_name in ("vllm", "auto"):
        import_draft(ours, tmp_path / format_name, format_name, ImportHints(target.spec, max_draft=3))
        assert "the digest of config.json is not compared" in caplog.text
        torch.testing.assert_close(logits(load_draft(tmp_path / format_name, target)), logits(model), rtol=0, atol=0)
    weights = ours / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x77")
    with pytest.raises(DraftError, match=r"model\.safetensors: the file has changed"):
        import_draft(ours, tmp_path / "broken", "vllm", ImportHints(target.spec, max_draft=3))


EXPORTS = [
    ("deepspec", "dspark"), ("vllm", "eagle3"), ("vllm", "dflash-k-1"), ("vllm", "dspark"), ("zlab", "dflash-k-1"),
    ("sglang", "dspark"), ("speculators", "eagle3"), ("speculators", "dspark"),
]  # fmt: skip


@pytest.mark.parametrize(("format_name", "kind"), EXPORTS)
def test_no_flipped_bit_makes_an_exported_config_another_formats(format_name: str, kind: str, tmp_path: Path) -> None:
    """Every bit of the file: a flip is never taken for a config that was rewritten on purpose."""
    _, _, ours = made(tmp_path, kind)
    export_draft(ours, tmp_path / "out", ExportOptions(format_name))
    content = bytearray((tmp_path / "out" / "config.json").read_bytes())
    provenance, parsed = read_provenance(tmp_path / "out"), 0
    engines = [registry.engine(name) for name in registry.ENGINES]
    for bit in range(8 * len(content)):
        content[bit // 8] ^= 1 << bit % 8
        try:
            config = json.loads(content)
        except ValueError:
            config = None
        content[bit // 8] ^= 1 << bit % 8
        if isinstance(config, dict):
            parsed += 1
            assert not [one.name for one in engines if _is_rewritten(provenance, one, config, tmp_path)]
    assert parsed > 1000


def test_names_and_shapes_of_engines(tmp_path: Path) -> None:
    _, _, ours = made(tmp_path, "eagle3-reduced")
    export_draft(ours, tmp_path / "vllm", ExportOptions("vllm", embeddings=False))
    state = read_weights(tmp_path / "vllm")
    config = json.loads((tmp_path / "vllm" / "config.json").read_text())
    assert config["architectures"] == ["Eagle3Qwen3ForCausalLM"]
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    assert "target_layer_ids" not in config
    assert state["lm_head.weight"].shape == (20, 32)
    assert "embed_tokens.weight" not in state
    assert state["d2t"].dtype == torch.int64
    _, _, ours = made(tmp_path / "b", "dflash")
    export_draft(ours, tmp_path / "dflash", ExportOptions("vllm", embeddings=False))
    config = json.loads((tmp_path / "dflash" / "config.json").read_text())
    state = read_weights(tmp_path / "dflash")
    assert (config["architectures"], config["markov_rank"]) == (["Qwen3DSparkModel"], 1)
    assert config["sample_from_anchor"] is True
    assert not state["markov_head.markov_w1.weight"].any()
    _, _, ours = made(tmp_path / "c", "dflash-k-1")
    export_draft(ours, tmp_path / "plain", ExportOptions("sglang", embeddings=False))
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["architectures"] == ["DFlashDraftModel"]
    assert config["dflash_config"] == {"mask_token_id": 95, "target_layer_ids": LAYERS, "sample_from_anchor": False}


def test_sglang_takes_the_head_of_the_target_only_where_no_draft_vocabulary_is_stated(tmp_path: Path) -> None:
    """Its Eagle3 class makes a head of ``draft_vocab_size`` rows, and shares the target's where that is null alone."""
    for kind, changes, size in (("eagle3", {}, None), ("eagle3-reduced", {}, 20), ("eagle3", {"own_head": True}, 96)):
        _, _, ours = made(tmp_path / f"{kind}{size}", kind, "llama")
        draft = DraftCheckpoint(json.loads((ours / "config.json").read_text()) | changes, read_weights(ours))
        written = registry.engine("sglang").write(draft)
        assert written.config["draft_vocab_size"] == size
        assert size is None or written.state["lm_head.weight"].shape[0] == size


def test_sglang_states_the_slot_convention_of_a_dspark(tmp_path: Path) -> None:
    for number, kind in enumerate(("dspark", "dspark-k-1")):
        _, model, ours = made(tmp_path / kind, kind)
        export_draft(ours, tmp_path / str(number), ExportOptions("sglang"))
        config = json.loads((tmp_path / str(number) / "config.json").read_text())
        assert config["sample_from_anchor"] is (kind == "dspark")
        card = (tmp_path / str(number) / "README.md").read_text()
        assert f"--speculative-dspark-block-size {model.config.max_draft}" in card


@pytest.mark.parametrize(
    ("kind", "family", "changes", "reason"),
    [
        ("eagle3", "llama", {"own_embedding": True}, "takes the target's embedding; found True"),
        ("dflash-k-1", "qwen3", {"own_embedding": True}, "takes the target's embedding and head; found True"),
        ("dflash-k-1", "qwen3", {"own_head": True}, "takes the target's embedding and head; found True"),
        ("dspark", "qwen3", {"own_head": True}, "takes the target's embedding and head; found True"),
        ("eagle3", "llama", {"target_layer_ids": [0, 1, 3]}, "last layer is not handed out; found 3"),
        ("dspark", "qwen3", {"target_layer_ids": [0, 1, 3]}, "last layer is not handed out; found 3"),
    ],
)
def test_sglang_refuses_what_it_would_leave_out(
    kind: str, family: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    _, _, ours = made(tmp_path, kind, family)
    draft = DraftCheckpoint(json.loads((ours / "config.json").read_text()) | changes, read_weights(ours))
    with pytest.raises(DraftError, match=reason):
        registry.engine("sglang").write(draft)


def test_imports_refuse_what_is_not_stated(tmp_path: Path) -> None:
    target, _, ours = made(tmp_path, "dspark")
    export_draft(ours, tmp_path / "spec", ExportOptions("speculators"))
    (tmp_path / "spec" / "provenance.json").unlink()  # changed on purpose
    path = tmp_path / "spec" / "config.json"
    config = json.loads(path.read_text())
    del config["sample_from_anchor"]
    path.write_text(json.dumps(config))
    with pytest.raises(DraftError, match=r"sample_from_anchor.*--sample-from-anchor"):
        import_draft(tmp_path / "spec", tmp_path / "back")
    import_draft(tmp_path / "spec", tmp_path / "back", hints=ImportHints(sample_from_anchor=True))
    assert load_draft(tmp_path / "back", target).config.max_draft == 4
    _, _, ours = made(tmp_path / "e", "eagle3")
    export_draft(ours, tmp_path / "eagle", ExportOptions("speculators"))
    (tmp_path / "eagle" / "provenance.json").unlink()  # changed on purpose
    path = tmp_path / "eagle" / "config.json"
    config = json.loads(path.read_text())
    del config["norm_before_residual"]
    path.write_text(json.dumps(config))
    with pytest.raises(DraftError, match="norm_before_residual"):
        import_draft(tmp_path / "eagle", tmp_path / "never")
    config |= {"norm_before_residual": False}
    config.pop("eagle_aux_hidden_state_layer_ids")
    path.write_text(json.dumps(config))
    with pytest.raises(DraftError, match="--target-layers"):
        import_draft(tmp_path / "eagle", tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_norms_of_eagle_3_1_are_stated_to_engines_that_read_them_and_refused_by_the_others(tmp_path: Path) -> None:
    _, _, ours = made(tmp_path, "eagle3-norms", "llama")
    for name in ("vllm", "speculators"):
        export_draft(ours, tmp_path / name, ExportOptions(name))
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config["fc_norm"], config["norm_output"], config["norm_before_residual"]) == (True, True, True)
    for name, first in (("sglang", "norm_before_residual"), ("gguf", "fc_norm")):  # llama.cpp reads two of the four
        with pytest.raises(DraftError, match=rf"{first}: the \w+ format cannot .*does not read it"):
            export_draft(ours, tmp_path / "never", ExportOptions(name))
    made(tmp_path / "plain", "eagle3", "llama")
    export_draft(tmp_path / "plain" / "ours", tmp_path / "sgl", ExportOptions("sglang"))
    (tmp_path / "sgl" / "provenance.json").unlink()
    config = json.loads((tmp_path / "sgl" / "config.json").read_text())
    for change in ({"norm_output": False}, {"norm_output": True}, {"fc_norm": True}):  # the first means two things
        (tmp_path / "sgl" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(DraftError, match=next(iter(change))):
            import_draft(tmp_path / "sgl", tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("algorithm", "engine", "changed", "words"),
    [
        ("eagle3", "gguf", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                "partial_rotary_factor": 0.5}}, "turn complete heads.*0.5"),
        ("dspark", "vllm", {"final_logit_softcapping": 5.0}, "no softcap of the logits.*5.0"),
        ("dspark", "sglang", {"logit_scale": 0.5}, "no factor of the logits.*0.5"),
        ("dspark", "gguf", {"logit_scale": 0.5}, "no factor of the logits.*0.5"),
        ("dspark", "speculators", {"logit_scale": 0.5}, "no factor of the logits.*0.5"),
        ("dflash2", "vllm", {"logit_scale": 0.5}, "no factor of the logits.*0.5"),
        ("dspark", "vllm", {"logit_scale": 0.5}, None),
        ("dflash", "vllm", {"final_logit_softcapping": 5.0}, None),  # the order of its tokens is the same without it
    ],
)  # fmt: skip
def test_what_a_class_would_leave_out_of_layers_and_logits_is_refused(
    algorithm: str, engine: str, changed: dict[str, Any], words: str | None, tmp_path: Path
) -> None:
    draft = read_draft(made(tmp_path, algorithm, "llama" if algorithm == "eagle3" else "qwen3")[2])
    draft = DraftCheckpoint(draft.config | changed, draft.state)
    if words is None:
        assert registry.engine(engine).write(draft)
        return
    with pytest.raises(DraftError, match=words):
        registry.engine(engine).write(draft)


@pytest.mark.parametrize("format_name", ["vllm", "speculators"])
def test_a_p_eagle_has_its_learned_row_in_the_embedding_of_its_file(format_name: str, tmp_path: Path) -> None:
    """Also where the target's embeddings are left out; the engine is told to draft in parallel."""
    target, model, ours = made(tmp_path, "p_eagle")
    draft = export_draft(ours, tmp_path / "out", ExportOptions(format_name, embeddings=False))
    state = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert HEAD not in state
    token = model.config.mask_token_id
    wanted = target.embed_weight.clone()
    wanted[token] = model.mask.embedding.detach()
    assert torch.equal(state[EMBED], wanted)
    assert config["mask_token_id"] == token
    told = registry.engine(format_name).speculative(draft, "out")
    assert (told["method"], told["parallel_drafting"], told["num_speculative_tokens"]) == ("eagle3", True, 4)
    (tmp_path / "out" / "provenance.json").unlink()
    (tmp_path / "out" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "deepspec"}))
    foreign = ImportHints(target=target.spec, max_draft=4)  # its embedding is then its own
    import_draft(tmp_path / "out", tmp_path / "back", format_name, foreign)
    loaded = load_draft(tmp_path / "back", target)
    assert torch.equal(loaded.mask.embedding, model.mask.embedding)
    assert torch.equal(loaded.frozen.embed_VD, wanted)


def test_imports_are_strict_about_weights_and_targets(tmp_path: Path) -> None:
    _, _, ours = made(tmp_path, "dflash-k-1")
    export_draft(ours, tmp_path / "out", ExportOptions("zlab"))
    (tmp_path / "out" / "provenance.json").unlink()  # changed on purpose
    path = tmp_path / "out" / "model.safetensors"
    state = load_file(path)
    for change, reason in (
        ({"layers.0.gate.weight": torch.zeros(1)}, "layers.0.gate.weight"),
        ({"fc.weight": torch.zeros(32, 64)}, "wrong shape"),
    ):
        save_file(state | change, path)
        with pytest.raises(DraftError, match=reason):
            import_draft(tmp_path / "out", tmp_path / "never")
    save_file({name: tensor for name, tensor in state.items() if name != "norm.weight"}, path)
    with pytest.raises(DraftError, match=r"norm\.weight"):
        import_draft(tmp_path / "out", tmp_path / "never")
    save_file(state, path)
    wide = tiny_target("qwen3", hidden_size=64)
    with pytest.raises(DraftError, match="hidden_size"):
        import_draft(tmp_path / "out", tmp_path / "never", hints=ImportHints(wide.spec))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for key, value in {
        "projector_type": "domino",
        "attention_mode": "mla",
        "causal_head": True,
    }.items():
        changed = {**config, "dflash_config": {**config["dflash_config"], key: value}}
        (tmp_path / "out" / "config.json").write_text(json.dumps(changed))
        with pytest.raises(DraftError, match=f"{key}: a variant of DFlash"):
            import_draft(tmp_path / "out", tmp_path / "never")
    (tmp_path / "out" / "config.json").write_text(json.dumps({"architectures": ["Medusa"]}))
    with pytest.raises(DraftError, match="no format that we know"):
        import_draft(tmp_path / "out", tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_an_engines_layout_is_not_loaded_as_ours(tmp_path: Path) -> None:
    target, _, ours = made(tmp_path, "dflash-k-1")
    export_draft(ours, tmp_path / "out", ExportOptions("vllm"))
    with pytest.raises(DraftError, match="import it first"):
        load_draft(tmp_path / "out", target)


def test_embeddings_of_another_target_are_refused(tmp_path: Path) -> None:
    target, _, ours = made(tmp_path, "dspark")
    load_draft(ours, target)
    state = read_weights(ours)
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    config = json.loads((ours / "config.json").read_text())
    save_draft(tmp_path / "other", state, config, {})
    with pytest.raises(DraftError, match=r"lm_head\.weight: draft of another target"):
        load_draft(tmp_path / "other", target)
    save_draft(tmp_path / "half", {n: t.bfloat16() if t.is_floating_point() else t for n, t in
               read_weights(ours).items()}, config, {})  # fmt: skip
    load_draft(tmp_path / "half", target)  # the same weights, rounded


def test_weights_are_cut_into_files_above_a_size(tmp_path: Path) -> None:
    target, model, ours = made(tmp_path, "dspark")
    export_draft(ours, tmp_path / "cut", ExportOptions("deepspec", shard_bytes=20_000))
    files = sorted(path.name for path in (tmp_path / "cut").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 3
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(read_weights(ours))
    torch.testing.assert_close(logits(load_draft(tmp_path / "cut", target)), logits(model), rtol=0, atol=0)
    single = read_weights(tmp_path / "cut")
    save_file({name: tensor + 1 for name, tensor in single.items()}, tmp_path / "cut" / "model.safetensors")
    assert torch.equal(
        read_weights(tmp_path / "cut")["fc.weight"], single["fc.weight"] + 1
    )  # before an index beside it
    (tmp_path / "cut" / "model.safetensors").unlink()
    (tmp_path / "cut" / files[1]).unlink()
    with pytest.raises(DraftError, match="no such file"):
        load_draft(tmp_path / "cut", target)
    with pytest.raises(DraftError, match="is not empty"):
        export_draft(ours, tmp_path / "cut", ExportOptions("deepspec"))


def test_a_config_as_z_lab_publishes_it(tmp_path: Path) -> None:
    """Old rope fields, a tied flag copied from the target, code to trust, everything of drafting in dflash_config."""
    target, model, ours = made(tmp_path, "dflash-k-1", frozen=False)
    config = {
        "architectures": ["DFlashDraftModel"], "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "attention_bias": False, "block_size": 4, "dtype": "bfloat16", "model_type": "qwen3", "head_dim": 8,
        "dflash_config": {"mask_token_id": 95, "target_layer_ids": LAYERS, "projector_type": "dflash"},
        "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_target_layers": 4, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": True,
        "layer_types": ["full_attention"] * 2, "max_window_layers": 5, "vocab_size": 96, "use_cache": True,
        "transformers_version": "4.57.3", "initializer_range": 0.02,
    }  # fmt: skip
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    save_file(read_weights(ours), tmp_path / "theirs" / "model.safetensors")
    draft, found = import_draft(tmp_path / "theirs", tmp_path / "back")
    back = load_draft(tmp_path / "back", target)
    assert (found, draft.algorithm.name, back.config.max_draft) == ("zlab", "dflash", 3)
    assert back.shape.rope == model.shape.rope
    torch.testing.assert_close(logits(back), logits(model), rtol=0, atol=0)


def test_a_causal_draft_says_so_in_both_places_and_one_that_disagrees_is_refused(tmp_path: Path) -> None:
    target, _, ours = made(tmp_path, "dflash-causal")
    export_draft(ours, tmp_path / "out", ExportOptions("vllm"))
    (tmp_path / "out" / "provenance.json").unlink()  # changed on purpose
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    assert config["is_causal"] is config["dflash_config"]["causal"] is True
    path.write_text(json.dumps(config | {"is_causal": False}))
    with pytest.raises(DraftError, match=r"is_causal: says two things"):
        import_draft(tmp_path / "out", tmp_path / "back", "auto", ImportHints(target.spec))


def test_layers_of_the_speculators_library_that_are_causal_only_in_part_are_refused(tmp_path: Path) -> None:
    target, _, ours = made(tmp_path, "dflash-window")
    export_draft(ours, tmp_path / "out", ExportOptions("speculators"))
    (tmp_path / "out" / "provenance.json").unlink()  # changed on purpose
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    assert config["sliding_window_non_causal"]
    del config["sliding_window_non_causal"]  # the library's default, false: the layers with a window are causal
    path.write_text(json.dumps(config))
    with pytest.raises(DraftError, match="causal in some layers only"):
        import_draft(tmp_path / "out", tmp_path / "back", "auto", ImportHints(target.spec))
