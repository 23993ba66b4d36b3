"""Make the reference cases of tests/reference: ``python tests/helpers/make_reference.py``, where numbers shall change.

Losses, logits and gradients come from the plain twins (``benchmarks/plain_objectives.py``: every slot, every logit,
softmaxes materialised, gradients by autograd, one attention mask over everything), not from the fused code that is
checked. Decodings come from the decoding loop; that their tokens are the target's own is asked of transformers.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from deepspec.algorithms.base import DraftModel
from deepspec.algorithms.block_plan import draw_anchors
from deepspec.batch import Batch
from deepspec.decoding.loop import generate
from deepspec.decoding.records import DecodeSettings
from deepspec.demos.subjects import batch_of, learn
from deepspec.drafts import save_draft
from deepspec.errors import run_main
from deepspec.files import write_json
from deepspec.targets import Target
from deepspec.testing import tiny

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from plain_losses import supervised_slots_NK
from plain_objectives import plain_block_loss, plain_eagle3_loss

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "tests" / "reference"
FAMILY, SEED, S = "qwen3", 0, 28
DRAFTS = ("eagle3", "dflash", "dspark")  # those with a plain twin
SETTINGS = {  # of the recipe, as the cases name them
    "loss_decay_gamma": "loss_decay_gamma", "ce_loss_alpha": "ce_weight", "l1_loss_alpha": "l1_weight",
    "confidence_head_alpha": "confidence_weight", "step_loss_decay": "step_loss_decay", "ttt_length": "ttt_length",
}  # fmt: skip
NEW_TOKENS, STEPS = 24, 300


def training_case(name: str, target: Target, folder: Path) -> None:
    """A random draft, one conversation, and what its loss is, written the plain way."""
    model = tiny.tiny_draft(tiny.tiny_section(name, num_layers=1), name, target, SEED)
    batch = tiny.random_batch([S], seed=SEED + 1)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    state |= {"embed_tokens.weight": target.embed_weight.clone(), "lm_head.weight": target.head_weight.clone()}
    save_draft(folder, state, model.algorithm.config_json(model.config, target.spec), {"made by": "make_reference.py"})
    (folder / "provenance.json").unlink()
    model.attention = "sdpa"  # one mask over everything: the backends of training are compared with it
    inputs = {
        "input_ids": batch.input_ids, "attention_mask": torch.ones(1, S, dtype=torch.int64),
        "loss_mask": batch.supervision.loss_mask.long(), "target_hidden_states": batch.features,
        "target_last_hidden_states": batch.last_hidden,
    }  # fmt: skip
    outputs, blocks = dict[str, Tensor](), hasattr(model, "train_slots")
    with torch.no_grad():
        if blocks:
            inputs |= anchors_of(model, batch)
            outputs = slots_of(model, batch, inputs["anchor_positions"])
        else:
            mask = inputs["loss_mask"]
            inputs["loss_mask"] = torch.cat((mask[:, 2:], mask.new_zeros(1, 2)), 1)  # as the published mask is laid
            hidden = model.train_hidden(batch.features, batch.input_ids, torch.arange(S)[None], steps_of(model), S)
            for j in range(steps_of(model)):
                outputs[f"draft_logits_step{j}"] = model.frozen.logits(model.norm(hidden[j]))
    found = gradients(model, (plain_block_loss if blocks else plain_eagle3_loss)(model, batch))
    own = {theirs: getattr(model.config, ours) for theirs, ours in SETTINGS.items() if hasattr(model.config, ours)}
    train: dict[str, Any] = {"kind": f"{FAMILY}_{name}", "seed": SEED, "model_args": own, "torch": torch.__version__}
    train |= {"terms": {}, **found} if blocks else {f"ttt{steps_of(model)}": found}
    write_json(folder / "train.json", train)
    save_file({key: value.contiguous() for key, value in inputs.items()}, folder / "inputs.safetensors")
    save_file({key: value.contiguous() for key, value in outputs.items()}, folder / "outputs.safetensors")


def steps_of(model: Any) -> int:
    """Steps of the training-time test."""
    return int(model.config.ttt_length)


def anchors_of(model: Any, batch: Batch) -> dict[str, Tensor]:
    """The anchors of the conversation's draw, and which of them are there."""
    drawn, count = draw_anchors(batch.supervision, model.config.num_anchors)[0], model.config.num_anchors
    anchors = torch.zeros(1, count, dtype=torch.int64)
    anchors[0, : len(drawn)] = drawn
    return {"anchor_positions": anchors, "block_keep_mask": torch.arange(count)[None] < len(drawn)}


def slots_of(model: Any, batch: Batch, anchors_BN: Tensor) -> dict[str, Tensor]:
    """Hidden states, logits and confidences of every slot, and which are supervised."""
    K = model.config.block_size
    hidden_BNKD = model.train_slots(batch.features, batch.input_ids, anchors_BN, S)
    logits, embedded = model.frozen.logits(hidden_BNKD), None
    outputs = {"output_hidden": hidden_BNKD.flatten(1, 2)}
    if model.markov_head is not None:
        positions = (anchors_BN[..., None] + torch.arange(K)).clamp_max(S - 1)
        embedded = model.markov_head.markov_w1(batch.input_ids[0, positions])
        logits = logits + model.markov_head.markov_w2(model.markov_head.latents(embedded, hidden_BNKD))
    if model.confidence_head is not None:
        outputs["confidence_pred"] = model.confidence_head(hidden_BNKD, embedded)
    supervised = supervised_slots_NK(batch.supervision.loss_mask[0], S, anchors_BN[0], K)
    return outputs | {"draft_logits": logits, "eval_mask": supervised[None]}


def gradients(model: DraftModel, loss: Tensor) -> dict[str, Any]:
    """The loss and the norm of every parameter's gradient."""
    loss.backward()
    norms = {name: {"norm": float(one.grad.norm())} for name, one in model.named_parameters() if one.grad is not None}
    return {"total_loss": float(loss.detach()), "grads": norms}


def decoding_case(name: str, target: Target, folder: Path) -> None:
    """Greedy decodings of a draft that knows some of the target's answers by heart."""
    prompts = [torch.randint(3, tiny.VOCAB - 1, (6,), generator=torch.Generator().manual_seed(n)).tolist()
               for n in range(4)]  # fmt: skip
    settings = DecodeSettings(max_new_tokens=NEW_TOKENS, release_counting=True)
    plain = [one.output_ids for one in generate(target, None, prompts, settings, len(prompts))]
    for prompt, tokens in zip(prompts, plain, strict=True):
        if greedily(target, prompt) != tokens:
            raise RuntimeError(f"{name}: the loop does not write what the target's model writes")
    model = tiny.tiny_draft(tiny.tiny_section(name, num_layers=1), name, target, SEED)
    texts = [[*prompt, *tokens] for prompt, tokens in zip(prompts[:2], plain, strict=False)]
    learn(model, batch_of(target, texts, model.config.target_layers), STEPS)
    save_draft(folder / "draft", model.state_dict(), model.algorithm.config_json(model.config, target.spec), {})
    (folder / "draft" / "provenance.json").unlink()
    runs = []
    for prompt in prompts:
        (found,) = generate(target, model.algorithm.drafter(model, 1, 100), [prompt], settings)
        lengths = [one.length for one in found.rounds]
        sent = [{"verify_input_ids": list(one)} for one in found.proposals]
        runs.append({
            "prompt": prompt, "stop_token_ids": None, "confidence_threshold": 0.0,
            "output_ids": prompt + found.output_ids, "acceptance_lengths": found.acceptance_lengths,
            "proposal_lengths": lengths, "proposals": sent,
        })  # fmt: skip
    written = {"kind": f"{FAMILY}_{name}", "target_dir": f"../infer_target_{FAMILY}", "max_new_tokens": NEW_TOKENS}
    write_json(folder / "results.json", written | {"runs": runs})


def greedily(target: Target, prompt: list[int]) -> list[int]:
    """The target's answer, a complete pass of transformers' model a token."""
    tokens = list(prompt)
    for _ in range(NEW_TOKENS):
        tokens.append(int(target.model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def main() -> None:
    """Make every case anew."""
    torch.set_num_threads(1)
    shutil.rmtree(REFERENCE, ignore_errors=True)
    target = tiny.tiny_target(FAMILY)
    target.model.save_pretrained(REFERENCE / f"infer_target_{FAMILY}")
    for name in DRAFTS:
        training_case(name, target, REFERENCE / f"{FAMILY}_{name}")
        decoding_case(name, target, REFERENCE / f"infer_{FAMILY}_{name}")
    size = sum(path.stat().st_size for path in REFERENCE.rglob("*") if path.is_file())
    print(f"{REFERENCE}: {size / 1000:,.0f} kB")


if __name__ == "__main__":
    run_main(main)
