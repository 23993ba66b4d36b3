"""What the serve check serves: the quickstart's drafts, and drafts of random small targets of other families.

A random target needs no training: its drafts, and kinds that the quickstart has not trained, learn the target's own
answers to the prompts by heart in seconds, so that rounds accept none, some and all of what they draft.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from deepspec import registry
from deepspec.algorithms.base import DraftModel
from deepspec.batch import Batch, Supervision
from deepspec.data.chat import Renderer
from deepspec.decoding.loop import generate
from deepspec.decoding.records import DecodeSettings
from deepspec.drafts import FROZEN, draft_algorithm, read_weights, save_draft
from deepspec.errors import DraftError
from deepspec.files import read_json
from deepspec.serving.check import CheckRow, ServeCheck, Subject
from deepspec.targets import Target, load_target, load_tokenizer
from deepspec.targets.positions import check_room

log = logging.getLogger(__name__)
# of a kind: a vocabulary of its own; an anchor slot that drafts nothing; a key of the draft section that is true
REDUCED, FILL_IN, SET = "-reduced", "-k-1", "+"
QUICKSTART = "quickstart"  # its subject's name
TABLE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
STEPS, LR, ANCHORS = 80, 3e-3, 48  # of a draft that learns answers by heart


def quickstart_subject(folder: Path, count: int, max_tokens: int) -> Subject:
    """A finished quickstart's target, the first ``count`` of its held-out prompts, and its drafts.

    Raises:
        DraftError: there is none, or a prompt that does not fit.
    """
    path = folder / "target"
    if not (path / "config.json").is_file():
        raise DraftError("no target to serve", file=path, remedy="run `deepspec quickstart` first")
    target = load_target(path, torch.float32)
    renderer = Renderer(load_tokenizer(path), target.spec)
    lines = (folder / "prompts" / "held_out.jsonl").read_text(encoding="utf-8").split("\n")
    texts = [json.loads(line)["turns"][0] for line in lines[:count] if line.strip()]
    prompts = [renderer.prompt([{"role": "user", "content": text}]) for text in texts]
    decoding = DecodeSettings(0.0, max_tokens, renderer.stop_token_ids)
    for number, prompt in enumerate(prompts):  # before an engine is made and drafts are trained
        check_room(target.spec.config, len(prompt), max_tokens, f"prompt {number}")
    draft = partial(_quickstart_draft, folder, partial(_taught, target, _answered(target, prompts, decoding)))
    return Subject(QUICKSTART, path, target, prompts, decoding, tuple(TABLE[QUICKSTART]), draft, states=True)


def _quickstart_draft(folder: Path, teach: Callable[[str, Path], Path], kind: str, work: Path) -> Path:
    """The draft folder of a kind; where the quickstart has none of it one in ``work`` that ``teach`` makes."""
    finished, made = folder / f"{kind}-draft", work / f"{kind}-draft"
    if (finished / "provenance.json").is_file():
        return finished
    if not kind.endswith(REDUCED):
        return teach(kind, work)
    if not (made / "provenance.json").is_file():
        reduce_vocabulary(_quickstart_draft(folder, teach, kind.removesuffix(REDUCED), work), made)
    return made


def _options(kind: str) -> tuple[str, dict[str, bool]]:
    """The algorithm of a kind, and what its name sets in the draft section."""
    name, *keys = kind.split(SET)
    fill_in = {"sample_from_anchor": False} if name.endswith(FILL_IN) else {}
    return name.removesuffix(REDUCED).removesuffix(FILL_IN), fill_in | dict.fromkeys(keys, True)


def reduce_vocabulary(source: Path, output: Path) -> None:
    """The draft over seven of every eight tokens: enough missing ones that a wrong mapping shows."""
    config, state = read_json(source / "config.json", DraftError), read_weights(source)
    vocabulary = int(config["vocab_size"])
    tokens = torch.tensor([token for token in range(vocabulary) if token % 8 != 3])
    state = {name: tensor for name, tensor in state.items() if name not in FROZEN}
    for name in {*draft_algorithm(config).vocabulary_rows} & {*state}:
        state[name] = state[name][tokens].contiguous()
    state["d2t"] = tokens - torch.arange(len(tokens))
    state["t2d"] = torch.zeros(vocabulary, dtype=torch.bool).index_fill(0, tokens, True)
    save_draft(output, state, config | {"draft_vocab_size": len(tokens)}, {"reduced_from": str(source)})


def random_target(model_type: str, like: Subject, work: Path) -> Subject:
    """A random target of ``model_type`` in ``work``, with the tokenizer and the prompts of ``like``."""
    chosen, folder = TABLE["random"][model_type], work / model_type / "target"
    if not (folder / "tokenizer.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        own = like.target.spec.config
        config = AutoConfig.for_model(
            model_type, **TABLE["common"], **chosen["config"], vocab_size=own["vocab_size"],
            eos_token_id=own["eos_token_id"], pad_token_id=own["pad_token_id"],
        )  # fmt: skip
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
        load_tokenizer(like.folder).save_pretrained(folder)
    target = load_target(folder, torch.float32)
    # a random target writes markers that no trained one would; llama.cpp ends there, whatever it is told
    stops = (*like.settings.stop_token_ids, *load_tokenizer(folder).all_special_ids)
    settings = replace(like.settings, stop_token_ids=tuple(dict.fromkeys(stops)))
    draft = partial(_taught, target, _answered(target, like.prompts, settings))
    return Subject(model_type, folder, target, like.prompts, settings, tuple(chosen["kinds"]), draft)


def _answered(target: Target, prompts: Sequence[Sequence[int]], settings: DecodeSettings) -> Callable[[], Batch]:
    """The target's own answers to the prompts with its hidden states, made when they are first asked for."""

    @cache
    def batch() -> Batch:
        answers = generate(target, None, prompts, settings, 4)
        texts = [[*prompt, *one.output_ids] for prompt, one in zip(prompts, answers, strict=True)]
        return batch_of(target, texts, _layers(target))

    return batch


def batch_of(target: Target, texts: Sequence[Sequence[int]], layers: Sequence[int]) -> Batch:
    """Complete texts as training reads them, with the target's states of ``layers``; every token is supervised."""
    lengths, longest = torch.tensor([len(text) for text in texts]), max(map(len, texts))
    tokens = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
    outputs = target.forward(tokens, layers)
    inside = torch.arange(longest) < lengths[:, None]
    supervision = Supervision(inside, lengths, tuple(range(len(texts))), seed=1, epoch=0)
    return Batch(supervision, tokens, outputs.features, outputs.last_hidden)


def learn(model: DraftModel, batch: Batch, steps: int = STEPS, lr: float = LR) -> DraftModel:
    """Train on one batch until a draft knows much of it by heart; the model, in eval mode."""
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(model(batch).loss())
        optimizer.step()
    return model.eval()


def _layers(target: Target) -> tuple[int, ...]:
    return tuple(range(target.spec.num_layers - 1))


def _taught(target: Target, answered: Callable[[], Batch], kind: str, work: Path) -> Path:
    """A draft of a kind that has learnt the target's answers by heart."""
    made = work / f"{kind}-draft"
    if (made / "provenance.json").is_file():
        return made
    name, options = _options(kind)
    algorithm, batch = registry.algorithm(name), answered()
    section = {**algorithm.tiny_section, "target_layers": list(_layers(target)), **options}
    if "num_anchors" in section:
        section["num_anchors"] = ANCHORS
    if kind.endswith(REDUCED):
        section["draft_vocab_size"] = len(batch.input_ids.unique()) - 8
    model = algorithm.build(algorithm.parse(section, target.spec), target.spec, 0)
    model.attach(target.embed_weight, target.head_weight)
    if kind.endswith(REDUCED):
        model.set_draft_vocab(batch.input_ids.unique()[: model.config.draft_vocab_size])
    learn(model, batch)
    config = algorithm.config_json(model.config, target.spec)
    save_draft(made, model.state_dict(), config, {"taught": {"steps": STEPS, "lr": LR}})
    return made


def check_engines(
    servers: Mapping[str, Callable[[Path], Any]], like: Subject, names: Sequence[str] | None, work: Path,
    kinds: Sequence[str] = (),
) -> list[CheckRow]:  # fmt: skip
    """Check every engine with every subject.

    Args:
        servers: engines by name, made with their folder.
        like: the quickstart's subject.
        names: of subjects; None: all.
        work: folder of everything that is made.
        kinds: of drafts; empty: all.

    Raises:
        DraftError: a name that is no subject's.
    """
    known = (QUICKSTART, *TABLE["random"])
    if unknown := [name for name in names or () if name not in known]:
        raise DraftError("no such target", key="--target", found=unknown[0], wanted=f"one of {', '.join(known)}")
    chosen = [name for name in known if name in (names or known)]
    subjects = [like if name == QUICKSTART else random_target(name, like, work / "targets") for name in chosen]
    rows = []
    for engine, make in servers.items():
        for subject in subjects:
            try:
                check = ServeCheck(subject, make(work / engine / subject.name), kinds)
            except DraftError as refusal:
                rows.append(CheckRow(subject.name, "", "", "refused", note=str(refusal), server=engine))
                continue
            rows += check.run()
    return rows
