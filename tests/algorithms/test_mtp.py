"""MTP heads: the plain computation, one for training and drafting, the state they continue, a target's own head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from algorithm_tools import EXPERTS, LAYERS, random_batch, tiny_draft, tiny_target
from reference_f import check
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepspec import registry
from deepspec.algorithms.mtp import apart
from deepspec.decoding.loop import generate
from deepspec.decoding.paths import decoding_path
from deepspec.decoding.records import DecodeSettings
from deepspec.drafts import FROZEN, save_draft
from deepspec.errors import DraftError, RecipeError, TargetError
from deepspec.export.convert import ExportOptions, export_draft, import_draft, read_draft
from deepspec.export.forms.mtp import as_ours, as_stored, from_library
from deepspec.export.parts import ImportHints
from deepspec.recipe import TargetSection
from deepspec.targets import load_spec, load_target
from deepspec.training.initial import warm_start

SHARED = Path(__file__).parents[3] / "shared" / "golden_new"
CASES = sorted(SHARED.glob("F_*/train.json"))
NORMED, PRENORM = LAYERS, LAYERS - 1  # ids of the target's last state, after its final norm and before
PROMPTS = [[1, 5, 9, 12], [7], [3, 3, 8, 20, 33, 41, 50, 6, 9, 10, 11], [2, 90, 4]]
KINDS = {  # kinds of target with experts in their layers -> the family of these
    "qwen3_moe": "qwen3", "qwen3_next": "qwen3_5", "qwen3_5_moe_text": "qwen3_5",
}  # fmt: skip
FAMILIES = ("qwen3", "llama", "qwen3_5", *KINDS)  # whose layers of transformers take the arguments below


def target_of(kind: str, **changes: Any) -> Any:
    """A tiny target of a family, or of a kind with experts."""
    if kind not in KINDS:
        return tiny_target(kind, **changes)
    shared = {"shared_expert_intermediate_size": 16} if KINDS[kind] == "qwen3_5" else {}
    return tiny_target(KINDS[kind], model_type=kind, **{**EXPERTS, **shared, **changes})


def head_over(target: Any, **changes: Any) -> Any:
    """A draft whose layer is the target's last one."""
    experts = {"experts": True} if target.spec.model_type in KINDS else {}
    draft, own = tiny_draft("mtp", target, **experts, **changes), target.decoder.layers[LAYERS - 1].state_dict()
    draft.layers[0].load_state_dict(as_ours(own, draft.family))
    return draft.eval()


@torch.no_grad()
def plain_step(target: Any, draft: Any, tokens: Tensor, states: Tensor) -> Tensor:
    """One causal pass of the target's own module over x of ``tokens`` [B, n] and ``states``, and the head's norm."""
    embedded = draft.pre_fc_norm_embedding(draft.frozen.embed(tokens))
    x = F.linear(torch.cat((embedded, draft.pre_fc_norm_hidden(states)), dim=-1), draft.fc.weight)
    return plain_layer(target, draft, x)


@torch.no_grad()
def plain_layer(target: Any, draft: Any, x: Tensor) -> Tensor:
    positions = torch.arange(x.shape[1])[None].expand(len(x), -1)
    table = target.decoder.rotary_emb(x, positions)
    mask = torch.full((x.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    mixed = target.decoder.layers[LAYERS - 1](x, position_embeddings=table, attention_mask=mask)
    return draft.norm(mixed)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_step_over_its_own_keys_is_a_pass_of_the_targets_own_layer(family: str) -> None:
    target, batch = target_of(family), random_batch([14, 14], 1)
    draft, every = head_over(target, step_keys="own"), torch.arange(10).expand(2, -1)
    found = draft.train_hidden(batch.features, batch.input_ids, every, 3, 10)
    hidden = batch.features[:, :10]
    for k in range(3):
        hidden = plain_step(target, draft, batch.input_ids[:, 1 + k : 11 + k], hidden)
        torch.testing.assert_close(found[k], hidden, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_later_steps_over_committed_keys_are_a_longer_text(family: str) -> None:
    """Step k of slot t is the last position of [step 0 at 0..t, the slot's steps 1..k]."""
    target, batch = target_of(family), random_batch([14], 1)
    draft, slot, steps = head_over(target), 6, 3
    active = torch.tensor([[slot, slot + 2]])
    found = draft.train_hidden(batch.features, batch.input_ids, active, steps, slot + 3)
    embedded = draft.pre_fc_norm_embedding(draft.frozen.embed(batch.input_ids[:, 1:]))
    states = batch.features[:, : slot + 1]
    x = draft.fc(torch.cat((embedded[:, : slot + 1], draft.pre_fc_norm_hidden(states)), dim=-1)).detach()
    for k in range(steps):
        hidden = plain_layer(target, draft, x)[:, -1:]
        torch.testing.assert_close(found[k, :, :1], hidden, atol=1e-4, rtol=1e-4)
        pair = torch.cat((embedded[:, slot + 1 + k, None], draft.pre_fc_norm_hidden(hidden)), dim=-1)
        x = torch.cat((x, draft.fc(pair).detach()), dim=1)


@pytest.mark.parametrize("family", [*FAMILIES, "gemma4"])
def test_a_drafted_token_is_what_training_computes(family: str) -> None:
    """A chain that is forced along a text gives the logits of training at every step."""
    target, batch = target_of(family), random_batch([12], 1)
    draft, slot = tiny_draft("mtp", target, steps=4, experts=family in KINDS).eval(), 5
    hidden = draft.train_hidden(batch.features, batch.input_ids, torch.tensor([[slot]]), 4, slot + 1)
    drafter = draft.algorithm.drafter(draft, 1, 4)
    ids, seen = batch.input_ids, []
    drafter.extend(batch.features[:, : slot + 1], ids[:, 1 : slot + 2], torch.tensor([slot + 1]), slot + 1)

    def forced(logits: Tensor, k: int) -> tuple[Tensor, None]:
        seen.append(logits)
        return ids[:, slot + 2 + k], None

    drafter.propose(ids[:, slot + 1], forced)
    with torch.no_grad():
        wanted = draft.draft_logits(hidden[:, :, 0])
    torch.testing.assert_close(torch.stack(seen), wanted, atol=1e-4, rtol=1e-4)


def test_the_loss_is_a_mean_over_steps_weighted_by_their_decay() -> None:
    target, batch = tiny_target("qwen3"), random_batch([19, 14], 1)
    draft = tiny_draft("mtp", target, steps=3, step_weight_decay=0.5)
    every = torch.arange(19).expand(2, -1)
    logits = draft.draft_logits(draft.train_hidden(batch.features, batch.input_ids, every, 3, 19))
    total = weight = 0.0
    for row, length in enumerate((19, 14)):
        for k in range(3):
            for t in range(length - 2 - k):
                if batch.supervision.loss_mask[row, t + 2 + k]:
                    ce = F.cross_entropy(logits[k, row, t], batch.input_ids[row, t + 2 + k])
                    total, weight = total + 0.5**k * float(ce.detach()), weight + 0.5**k
    terms = draft(batch)
    assert float(terms.loss().detach()) == pytest.approx(total / weight, rel=1e-5)
    assert float(terms.terms["ce"].weight) == pytest.approx(weight, rel=1e-6)


@pytest.mark.parametrize("family", ["qwen3", "gemma4", "qwen3_5"])
def test_the_id_after_the_last_layer_is_the_state_after_the_final_norm(family: str) -> None:
    target = tiny_target(family)
    seen = target.forward(torch.tensor([PROMPTS[2]]), (PRENORM, NORMED))
    prenorm, normed = seen.features.chunk(2, dim=-1)
    assert torch.equal(normed, seen.last_hidden)
    torch.testing.assert_close(target.decoder.norm(prenorm), normed)


@pytest.mark.parametrize("layers", [[0], [NORMED + 1], [PRENORM, NORMED]])
def test_only_the_targets_last_state_can_be_continued(layers: list[int]) -> None:
    with pytest.raises(RecipeError, match=r"target_layers"):
        tiny_draft("mtp", tiny_target("qwen3"), target_layers=layers)


@pytest.mark.parametrize("layer", [NORMED, PRENORM])
@pytest.mark.parametrize("tree", [(), (3, 2, 1)])
def test_decoding_is_the_targets_own_with_a_tree_too(layer: int, tree: tuple[int, ...]) -> None:
    target = tiny_target("qwen3", initializer_range=0.5)
    draft = tiny_draft("mtp", target, target_layers=[layer]).eval()
    with torch.no_grad():  # it carries on what the target's last state says, so that now and then it is accepted
        draft.fc.weight[:, -draft.shape.hidden_size :] += torch.eye(draft.shape.hidden_size)
    settings = DecodeSettings(max_new_tokens=16, tree=tree)
    drafted = generate(target, draft.algorithm.drafter(draft, 3, 8), PROMPTS, settings, 3)
    plain = generate(target, None, PROMPTS, DecodeSettings(max_new_tokens=16), 3)
    assert [one.output_ids for one in drafted] == [one.output_ids for one in plain]


def test_other_drafts_over_the_final_norm_are_refused_by_every_engine(tmp_path: Path) -> None:
    target = tiny_target("qwen3")
    draft = tiny_draft("eagle3", target, target_layers=[0, 1, NORMED])
    save_draft(tmp_path / "ours", draft.state_dict(), draft.algorithm.config_json(draft.config, target.spec), {})
    for name in ("vllm", "speculators"):
        with pytest.raises(DraftError, match=r"target_layer_ids.*after the final norm is not handed out"):
            registry.engine(name).write(read_draft(tmp_path / "ours"))


# -- a target's own head ----------------------------------------------------------------------------------------------


def with_own_head(folder: Path, seed: int = 3, kind: str = "qwen3_5", one_by_one: bool = False) -> dict[str, Tensor]:
    """A tiny target on disk whose checkpoint holds a head of its kind; the head's tensors as stored."""
    target = target_of(kind)
    target.model.save_pretrained(folder)
    draft = tiny_draft("mtp", target, seed=seed, experts=kind in KINDS)
    state = {name: rounded(tensor) for name, tensor in draft.state_dict().items()}
    head = as_stored(state, draft.family)
    head = {f"mtp.{name}": tensor.contiguous() for name, tensor in (apart(head) if one_by_one else head).items()}
    file = folder / "model.safetensors"
    save_file({**load_file(file), **head}, file, {"format": "pt"})
    return head


def rounded(tensor: Tensor) -> Tensor:
    """To bfloat16's values: as a published checkpoint's, which 1 can be added to and taken from in float32."""
    return tensor.bfloat16().float()


HEADS = [("qwen3_5", False), ("qwen3_next", True), ("qwen3_5_moe_text", False), ("qwen3_5_moe_text", True)]


@pytest.mark.parametrize(("kind", "one_by_one"), HEADS)
def test_a_training_starts_from_the_targets_own_head(kind: str, one_by_one: bool, tmp_path: Path) -> None:
    head = with_own_head(tmp_path, kind=kind, one_by_one=one_by_one)
    target = load_target(tmp_path, torch.float32)
    draft = tiny_draft("mtp", target, seed=9, experts=kind in KINDS)
    warm_start(draft, target.spec, TargetSection(path=str(tmp_path), layers=(NORMED,)))
    state = draft.state_dict()
    for name, tensor in (apart(state) if one_by_one else state).items():
        stored = head[f"mtp.{name}"]
        assert torch.equal(tensor, stored + 1.0 if tensor.dim() == 1 else stored), name  # all vectors are norms


@pytest.mark.parametrize(("kind", "experts"), [("qwen3_next", False), ("qwen3_5_moe_text", False), ("qwen3_5", True)])
def test_a_head_is_dense_or_has_experts_as_the_checkpoints_has(kind: str, experts: bool, tmp_path: Path) -> None:
    with_own_head(tmp_path, kind=kind)
    target = target_of("qwen3_next" if experts else kind)
    layers = {"layers": {"family": "qwen3_5"}} if not experts else {}
    draft = tiny_draft("mtp", target, experts=experts, **layers)
    wanted = "false" if experts else "true"
    with pytest.raises(TargetError, match=rf"draft\.experts: .*set draft\.experts: {wanted}, or train\.init: random"):
        warm_start(draft, load_spec(tmp_path), TargetSection(path=str(tmp_path), layers=(NORMED,)))


def test_a_head_with_further_parts_is_refused_by_name(tmp_path: Path) -> None:
    with_own_head(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "mtp.layers.1.mlp.up_proj.weight": torch.ones(2, 2)}, file, {"format": "pt"})
    draft = tiny_draft("mtp", tiny_target("qwen3_5"))
    with pytest.raises(TargetError, match=r"layers\.1\.mlp\.up_proj.*parts that ours lacks.*train\.init: random"):
        warm_start(draft, load_spec(tmp_path), TargetSection(path=str(tmp_path), layers=(NORMED,)))


def test_experts_are_a_targets_own_alone() -> None:
    with pytest.raises(RecipeError, match=r"experts: .*false: qwen3 has no experts"):
        tiny_draft("mtp", tiny_target("qwen3"), experts=True)
    with pytest.raises(RecipeError, match=r"layers: .*null with experts"):
        tiny_draft("mtp", target_of("qwen3_moe"), experts=True, layers={"num_heads": 2})
    assert not hasattr(tiny_draft("mtp", target_of("qwen3_moe")).layers[0].mlp, "experts")  # a fresh head is dense


@pytest.mark.parametrize("kind", ["qwen3_5", *KINDS])
def test_a_target_without_a_head_gives_its_last_layer(kind: str, tmp_path: Path) -> None:
    target_of(kind).model.save_pretrained(tmp_path)
    target = load_target(tmp_path, torch.float32)
    draft: Any = tiny_draft("mtp", target, experts=kind in KINDS)
    warm_start(draft, target.spec, TargetSection(path=str(tmp_path), layers=(NORMED,)))
    decoder: Any = target.decoder
    norm = {"norm.weight": decoder.norm.weight.detach()}
    for name, tensor in as_ours(decoder.layers[LAYERS - 1].state_dict(), draft.family).items():
        assert torch.equal(draft.layers[0].state_dict()[name], tensor), name
    assert torch.equal(draft.norm.weight, as_ours(norm, draft.family)["norm.weight"])


def saved_head(folder: Path, family: str = "qwen3_5", **changes: Any) -> Any:
    """A draft folder in ``folder/ours``; the model."""
    target = target_of(family)
    draft = tiny_draft("mtp", target, **changes)
    save_head(folder / "ours", target, draft)
    return draft


def save_head(folder: Path, target: Any, draft: Any) -> None:
    frozen = dict(zip(FROZEN, (target.embed_weight, target.head_weight), strict=True))
    config = draft.algorithm.config_json(draft.config, target.spec)
    save_draft(folder, {**draft.state_dict(), **frozen}, config, {})


@pytest.mark.parametrize(("kind", "one_by_one"), HEADS)
def test_a_head_goes_back_into_the_checkpoint_under_its_names(kind: str, one_by_one: bool, tmp_path: Path) -> None:
    """Untrained to the bit; a trained one is what the next training starts from, and nothing else changes."""
    head = with_own_head(tmp_path / "target", kind=kind, one_by_one=one_by_one)
    before, section = load_target(tmp_path / "target", torch.float32), {"experts": kind in KINDS}
    untrained = tiny_draft("mtp", before, seed=9, **section)
    warm_start(untrained, before.spec, TargetSection(path=str(tmp_path / "target"), layers=(NORMED,)))
    save_head(tmp_path / "untrained", before, untrained)
    options = ExportOptions("native_mtp", tokenizer=str(tmp_path / "target"))
    export_draft(tmp_path / "untrained", tmp_path / "same", options)
    same = load_file(tmp_path / "same/mtp.safetensors")
    assert set(same) == set(head)
    assert all(torch.equal(tensor, head[name]) for name, tensor in same.items())
    draft = tiny_draft("mtp", before, seed=5, **section)
    save_head(tmp_path / "ours", before, draft)
    export_draft(tmp_path / "ours", tmp_path / "out", options)
    for name in ("mtp.safetensors", "model.safetensors.index.json"):
        (tmp_path / "target" / name).write_bytes((tmp_path / "out" / name).read_bytes())
    (tmp_path / "target/model.safetensors").rename(tmp_path / "target/model-old.safetensors")
    index = tmp_path / "target/model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model.safetensors"', '"model-old.safetensors"'))
    after = load_target(tmp_path / "target", torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(before.model.parameters(), after.model.parameters(), strict=True))
    fresh = tiny_draft("mtp", after, seed=9, **section)
    warm_start(fresh, after.spec, TargetSection(path=str(tmp_path / "target"), layers=(NORMED,)))
    for name, tensor in draft.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[name], tensor)
    back, form = import_draft(tmp_path / "out", tmp_path / "back")
    assert (form, back.parsed) == ("native_mtp", draft.config)
    for name, tensor in draft.state_dict().items():
        torch.testing.assert_close(back.state[name], tensor)


def test_the_library_reads_the_state_before_the_norm_and_its_files_come_back(tmp_path: Path) -> None:
    for family in ("qwen3", "qwen3_5"):
        draft = saved_head(tmp_path / family, family, target_layers=[PRENORM])
        export_draft(tmp_path / family / "ours", tmp_path / family / "out", ExportOptions("speculators"))
        names = set(load_file(tmp_path / family / "out/model.safetensors")) - {*FROZEN}
        assert all(name.startswith("mtp_layers.0.") for name in names)
        back, form = import_draft(tmp_path / family / "out", tmp_path / family / "back")
        assert (form, back.parsed) == ("speculators", draft.config)
        for name, tensor in draft.state_dict().items():
            torch.testing.assert_close(back.state[name], tensor)


@pytest.mark.parametrize(
    ("engine", "family", "changes", "words"),
    [
        ("native_mtp", "qwen3", {}, "model_type.*no such head.*export to deepspec"),
        ("native_mtp", "qwen3_5", {"target_layers": [PRENORM]}, r"after the target's final norm.*layers: \[4\]"),
        ("native_mtp", "qwen3_5", {"draft_vocab_size": 20}, "draft_vocab_size"),
        ("speculators", "qwen3", {}, r"before the target's final norm.*layers: \[3\]"),
        ("vllm", "qwen3", {}, "from the target's own checkpoint"),
        ("gguf", "qwen3", {}, "no class for such a draft"),
        ("speculators", "qwen3_next", {"experts": True, "target_layers": [PRENORM]}, "draft_experts.*no such part"),
        ("native_mtp", "qwen3_moe", {"experts": True}, "model_type.*no such head"),
    ],
)  # fmt: skip
def test_what_an_engine_does_not_take_is_refused_by_name(
    engine: str, family: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    saved_head(tmp_path, family, **changes)
    with pytest.raises(DraftError, match=words):
        export_draft(tmp_path / "ours", tmp_path / "out", ExportOptions(engine))


def test_a_target_with_recurrent_layers_is_trained_for_and_decoded_by_replay() -> None:
    kinds = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
    sizes = {f"linear_{kind}_head_dim": 8 for kind in ("key", "value")}
    target = tiny_target("qwen3_5", layer_types=kinds, linear_num_key_heads=2, linear_num_value_heads=4, **sizes)
    draft = tiny_draft("mtp", target)
    settings = DecodeSettings(max_new_tokens=8)
    drafted = generate(target, draft.algorithm.drafter(draft, 2, 8), PROMPTS, settings, 2)
    alone = generate(target, None, PROMPTS, settings, 2)
    assert [one.output_ids for one in drafted] == [one.output_ids for one in alone]
    assert decoding_path(target).name == "replay"


@pytest.mark.skipif(not CASES, reason="no reference data in ../shared/golden_new")
@pytest.mark.parametrize("case", CASES, ids=lambda path: path.parent.name)
def test_reference_cases_are_equal(case: Path) -> None:
    found = check(case.parent)
    assert found.holds, found


@pytest.mark.skipif(not CASES, reason="no reference data in ../shared/golden_new")
def test_a_head_of_the_library_is_imported(tmp_path: Path) -> None:
    spec = load_spec(SHARED / "common_s0")
    back, form = import_draft(SHARED / "F_mtp_qwen3_s0", tmp_path / "back", hints=ImportHints(target=spec))
    assert (form, back.parsed.steps, back.parsed.target_layers) == ("speculators", 3, (7,))
    given = from_library(load_file(SHARED / "F_mtp_qwen3_s0/model.safetensors"))
    assert all(torch.equal(back.state[name], tensor) for name, tensor in given.items())
