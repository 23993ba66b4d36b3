"""The quickstart's own target: a tiny Qwen3, or one of experts or linear attention, trained on generated text."""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from deepspec.demos.quickstart import TYPES, USUAL_TYPE
from deepspec.demos.quickstart.muon import Muon
from deepspec.demos.quickstart.text import Conversation, conversations
from deepspec.demos.quickstart.tokenizer import END, END_OF_TEXT, VOCAB_SIZE, train_tokenizer
from deepspec.distributed import multiplies_bfloat16
from deepspec.files import named, undone_on_error, write_json
from deepspec.progress import Progress

log = logging.getLogger(__name__)

MANIFEST = "target.json"
STEPS, ROWS = 400, 12  # optimizer steps, conversations a step
TOKENIZER_ROWS = 4000  # conversations that the tokenizer's merges are learnt from
PROMPT_WEIGHT = 0.2  # of a prompt token's loss; an answer's counts 1
MUON_LR, ADAM_LR = 0.012, 0.012
HELD_OUT_ROWS = 200


def build_model(tokenizer: PreTrainedTokenizerBase, model_type: str = USUAL_TYPE) -> PreTrainedModel:
    """A model of 6 layers and hidden size 128, with the tokenizer's markers in its configs; of a type in TYPES."""
    pad, end = (tokenizer.get_vocab()[token] for token in (END_OF_TEXT, END))
    config = AutoConfig.for_model(
        model_type, vocab_size=VOCAB_SIZE, hidden_size=128, intermediate_size=384, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=1024,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},  # short texts: a small base learns sooner
        pad_token_id=pad, bos_token_id=None, eos_token_id=end, **TYPES[model_type],
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.set_attn_implementation("eager")  # on a CPU the fused kernel's backward takes six times as long in bfloat16
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    return model


def collate(tokenizer: PreTrainedTokenizerBase, rows: list[Conversation]) -> tuple[Tensor, Tensor]:
    """Token ids and loss weights of some conversations, one a row: both [B, S], the padding with weight 0."""
    pad = tokenizer.get_vocab()[END_OF_TEXT]
    encoded = []
    for row in rows:
        messages = row.messages()
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        encoded.append((len(prompt), tokenizer.apply_chat_template(messages, return_dict=False)))
    ids = torch.full((len(rows), max(len(whole) for _, whole in encoded)), pad)
    weights = torch.zeros(ids.shape)
    for row_ids, row_weights, (prompt_length, whole) in zip(ids, weights, encoded, strict=True):
        row_ids[: len(whole)] = torch.tensor(whole)
        row_weights[: len(whole)] = 1.0
        row_weights[:prompt_length] = PROMPT_WEIGHT
    return ids, weights


def losses(model: PreTrainedModel, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean cross-entropy, and the share of answer tokens predicted first: ids and weights [B, S]."""
    with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bfloat16()):
        logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    labels, weights = ids[:, 1:].flatten(), weights[:, 1:].flatten()
    entropy = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    hits = (logits.argmax(-1) == labels)[weights == 1].float().mean()
    return (entropy * weights).sum() / weights.sum(), hits


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Conversation], steps: int) -> None:
    """Train on ``steps`` batches of ROWS conversations, each seen once, the learning rate falling to 0."""
    matrices = [p for n, p in model.named_parameters() if p.ndim >= 2 and "embed" not in n and "conv" not in n]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = (Muon(matrices, MUON_LR), torch.optim.AdamW(others, ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0))
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 - step / steps) for o in optimizers]
    progress = Progress("target", steps, noun="steps", more=lambda: f"loss {loss.item():.3f}, top-1 {hits.item():.3f}")
    for step in range(steps):
        ids, weights = collate(tokenizer, rows[step * ROWS : (step + 1) * ROWS])
        loss, hits = losses(model, ids, weights)
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        progress.add(1, int((weights > 0).sum()))
    progress.finish()


def make_target(folder: Path, steps: int = STEPS, seed: int = 0, model_type: str = USUAL_TYPE) -> None:
    """Train tokenizer and model and save them as a Hugging Face folder; ``target.json`` is written last."""
    folder.mkdir(parents=True, exist_ok=True)  # an output that cannot be made is refused before the training
    torch.set_num_threads(1)  # the matrices are so small that a second thread slows it down
    torch.manual_seed(seed)
    rows = list(islice(conversations(seed), max(steps * ROWS, TOKENIZER_ROWS)))
    tokenizer = train_tokenizer(text for row in rows[:TOKENIZER_ROWS] for text in (row.question, row.answer))
    model = build_model(tokenizer, model_type)
    train(model, tokenizer, rows, steps)
    model.eval()
    with torch.no_grad():
        held_out = list(islice(conversations(seed, held_out=True), HELD_OUT_ROWS))
        top1 = losses(model, *collate(tokenizer, held_out))[1].item()
    log.info("target: predicts %.1f%% of the held-out answers' tokens", 100 * top1)
    with undone_on_error(folder), named(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    write_json(folder / MANIFEST, {"model_type": model_type, "steps": steps, "seed": seed, "held_out_top1": top1})
