"""Tiny random targets, drafts and batches: what the suites and our own tests are built from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from deepspec import registry
from deepspec.algorithms.base import DraftModel
from deepspec.batch import Batch, Supervision
from deepspec.demos.quickstart.tokenizer import CHAT_TEMPLATE, END, END_OF_TEXT, MARKERS
from deepspec.targets.load import Target, spec_from_config

VOCAB, HIDDEN, LAYERS = 96, 32, 4
TARGET_LAYERS = (-1, 1, 3)  # that a tiny draft reads, the embedding among them


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """A transformers config of ``family`` with four tiny layers; ``model_type`` among the changes is another kind."""
    owner = registry.family(family)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
        "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    stated = {**sizes, **owner.tiny_config, **changes}
    return AutoConfig.for_model(stated.pop("model_type", owner.draft_model_type), **stated)


def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """A random causal LM of ``family`` in fp32; ``changes`` are fields of its config."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(family, **changes)).float()
    return model


def tiny_target(family: str, **changes: Any) -> Target:
    """:func:`tiny_model` as a target."""
    model = tiny_model(family, **changes)
    return Target(model, spec_from_config(model.config, f"tiny-{family}"))


def tiny_folder(target: Target, folder: Path) -> Path:
    """A tiny target on disk, with a byte-level tokenizer that has a sign for every token."""
    vocabulary = {chr(33 + number): number for number in range(target.spec.vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    cast(PreTrainedModel, target.model).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of small letters, digits and a few signs, with chat markers: fewer tokens than VOCAB."""
    wanted = "abcdefghijklmnopqrstuvwxyz0123456789:.,?!-'"
    vocabulary = {sign: number for number, sign in enumerate([*MARKERS, *wanted, "\u0120", "\u010a"])}  # space, newline
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END_OF_TEXT, additional_special_tokens=list(MARKERS)
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def tiny_section(algorithm: str, **changes: Any) -> dict[str, Any]:
    """The algorithm's smallest ``draft:`` section, with the target's layers."""
    return {"target_layers": list(TARGET_LAYERS), **registry.algorithm(algorithm).tiny_section, **changes}


def tiny_draft(section: Mapping[str, Any], algorithm: str, target: Target, seed: int = 0) -> DraftModel:
    """A random draft for ``target``, its weights larger than a real initialisation so that every path shows."""
    owner = registry.algorithm(algorithm)
    model: DraftModel = owner.build(owner.parse(section, target.spec), target.spec, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    model.attach(target.embed_weight, target.head_weight)
    return model


def random_batch(
    lengths: list[int], num_layers: int = 3, seed: int = 0, share: float = 0.7, dtype: torch.dtype = torch.float32
) -> Batch:
    """Random tokens and hidden states; answers are random runs covering about ``share`` of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    B, S = len(lengths), max(lengths)
    inside = torch.arange(S) < torch.tensor(lengths)[:, None]
    runs = (torch.rand(B, (S + 3) // 4, generator=generator) < share).repeat_interleave(4, dim=1)[:, :S]
    tokens = torch.randint(3, VOCAB - 1, (B, S), generator=generator) * inside
    features = torch.randn(B, S, num_layers * HIDDEN, generator=generator) * inside[..., None]
    last = torch.randn(B, S, HIDDEN, generator=generator) * inside[..., None]
    supervision = Supervision(runs & inside, torch.tensor(lengths), tuple(range(10, 10 + B)), seed=3, epoch=1)
    return Batch(supervision, tokens, features.to(dtype), last.to(dtype))


def rows_of(batch: Batch, index: list[int]) -> Batch:
    """The batch of some of its rows, in that order."""
    s = batch.supervision
    ids = tuple(s.sample_ids[i] for i in index)
    supervision = Supervision(s.loss_mask[index], s.lengths[index], ids, s.seed, s.epoch)
    last = None if batch.last_hidden is None else batch.last_hidden[index]
    return Batch(supervision, batch.input_ids[index], batch.features[index], last)


def padded(batch: Batch, extra: int) -> Batch:
    """The same batch with ``extra`` more positions of padding, filled with garbage."""

    def longer(x: torch.Tensor, value: float) -> torch.Tensor:
        return torch.cat((x, torch.full((x.shape[0], extra, *x.shape[2:]), value).to(x.dtype)), dim=1)

    s = batch.supervision
    supervision = Supervision(longer(s.loss_mask, 0), s.lengths, s.sample_ids, s.seed, s.epoch)
    last = None if batch.last_hidden is None else longer(batch.last_hidden, 9.0)
    return Batch(supervision, longer(batch.input_ids, 7), longer(batch.features, 9.0), last)
