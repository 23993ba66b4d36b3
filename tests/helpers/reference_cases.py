"""Compare with reference cases computed by released implementations: what ``tools/check_reference.py`` runs.

A folder holds training cases (``<case>/{config.json, model.safetensors, inputs.safetensors, outputs.safetensors,
train.json}``) and greedy decodings (``infer_*/{draft/, results.json}`` with their target's folder). Equal means: logits
within 2e-5, losses within 2e-6, gradient norms within 5e-4 relative; ids, proposals and acceptance lengths equal.

Cases of newer drafters (``A_.._s0`` and so on, with the target in ``common_s0``) have one reader a letter in a file of
its own, ``reference_<letter>.py``: ``check(case)`` gives a :class:`CaseErrors`, or one for each variant of the case.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from deepspec import registry
from deepspec.algorithms.base import DraftModel
from deepspec.algorithms.block_plan import BlockPlan
from deepspec.algorithms.eagle3 import TTTPlan
from deepspec.batch import Batch, Supervision
from deepspec.decoding.loop import generate
from deepspec.decoding.records import DecodeSettings
from deepspec.drafts import load_draft
from deepspec.errors import EvaluationError
from deepspec.files import read_json
from deepspec.metrics import LossTerms
from deepspec.tables import Table
from deepspec.targets import load_target

TOLERANCES = {"logits": 2e-5, "loss": 2e-6, "gradient": 5e-4, "index": 0.0, "decoding": 0.0}
NEW_FORMS = {  # how the name of a case's folder begins -> the module that reads it
    "A_": "reference_a",
    "B_": "reference_b",
    "C_": "reference_c",
    "D_": "reference_d",
    "E_": "reference_e",
    "F_": "reference_f",
    "infer_dflash2": "reference_infer",
}
_OLD_FORM = ("train.json", "results.json")


@dataclass
class CaseErrors:
    """The worst errors of one case; None where the case does not hold such a value."""

    name: str
    logits: float | None = None  # absolute; in the newer forms relative to the tensor's largest value
    loss: float | None = None  # absolute over all terms, relative above 1
    gradient: float | None = None  # relative, of the gradient's norm per parameter
    index: float | None = None  # tensors of indices, masks, paths that differ anywhere
    decoding: float | None = None  # runs that differ in any id, proposal or acceptance length
    convention: str = ""  # whose masks, labels or weights were passed in; what is not ours and was left out

    def worst(self, field: str, error: float) -> None:
        """Keep the larger of the known error and ``error`` (a NaN counts as infinite)."""
        known = getattr(self, field)
        error = float("inf") if error != error else error
        setattr(self, field, error if known is None else max(known, error))

    @property
    def holds(self) -> bool:
        """Whether every value is within its tolerance, and at least one was compared."""
        values = {name: getattr(self, name) for name in TOLERANCES}
        known = {name: value for name, value in values.items() if value is not None}
        return bool(known) and all(value <= TOLERANCES[name] for name, value in known.items())


def check_folder(folder: str | Path) -> Iterator[CaseErrors]:
    """Check every case below ``folder``, in order of name.

    Raises:
        EvaluationError: no case there.
    """
    cases = sorted(path for path in Path(folder).iterdir() if path.is_dir()) if Path(folder).is_dir() else []
    cases = [path for path in cases if new_form(path) or any((path / name).exists() for name in _OLD_FORM)]
    if not cases:
        raise EvaluationError(
            "no reference case", file=folder, wanted="folders with train.json or results.json", remedy="check the path"
        )
    for case in cases:
        if module := new_form(case):
            found = _reader(module, case)(case)
            yield from found if isinstance(found, list) else [found]
        else:
            yield check_decoding(case) if (case / "results.json").exists() else check_training(case)


def new_form(case: Path) -> str | None:
    """The module that reads a case of a newer form; None: it is of the first form, or no case."""
    return next((module for start, module in NEW_FORMS.items() if case.name.startswith(start)), None)


def _reader(module: str, case: Path) -> Any:
    try:
        return importlib.import_module(module).check
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        wanted = f"tests/helpers/{module}.py"
        raise EvaluationError("no reader for this form of case", file=case, wanted=wanted) from None


def check_training(case: Path) -> CaseErrors:
    """Logits, loss terms and gradient norms of one training case."""
    train = read_json(case / "train.json", EvaluationError)
    errors = CaseErrors(case.name)
    inputs, outputs = load_file(case / "inputs.safetensors"), load_file(case / "outputs.safetensors")
    model = load_draft(case).train()
    model.config = _with_settings(model, train["model_args"])
    model.algorithm = registry.algorithm(model.config.algorithm)
    check = _check_blocks if "anchor_positions" in inputs else _check_steps
    check(model, train, inputs, outputs, errors)
    return errors


def _with_settings(model: DraftModel, arguments: dict[str, Any]) -> Any:
    """The config with the loss settings of the case, which a config.json does not carry."""
    names = {
        "loss_decay_gamma": "loss_decay_gamma",
        "ce_loss_alpha": "ce_weight",
        "l1_loss_alpha": "l1_weight",
        "confidence_head_alpha": "confidence_weight",
        "step_loss_decay": "step_loss_decay",
    }
    config = model.config
    if arguments.get("l1_loss_alpha") or arguments.get("ce_loss_alpha", 1.0) != 1.0:
        config = _with_loss_weights(model)
    known = {f.name for f in dataclasses.fields(config)}
    given = {ours: arguments[theirs] for theirs, ours in names.items() if theirs in arguments and ours in known}
    return dataclasses.replace(config, **given)


def _with_loss_weights(model: DraftModel) -> Any:
    """The config as that algorithm has it which trains the same model by these loss terms."""
    values = {f.name: getattr(model.config, f.name) for f in dataclasses.fields(model.config)}
    for one in map(registry.algorithm, registry.ALGORITHMS):
        loss_terms = {f.name for f in dataclasses.fields(one.config_class)} - set(values)
        if one.architecture == model.algorithm.architecture and "l1_weight" in loss_terms:
            return one.config_class(**values)
    return model.config


def _batch(inputs: dict[str, Tensor], lengths: Tensor) -> Batch:
    ids = inputs["input_ids"]
    supervision = Supervision(inputs["loss_mask"].bool(), lengths, tuple(range(len(ids))), 0, 0)
    return Batch(supervision, ids, inputs["target_hidden_states"], inputs["target_last_hidden_states"])


def _check_blocks(
    model: Any, train: dict[str, Any], inputs: dict[str, Tensor], outputs: dict[str, Tensor], errors: CaseErrors
) -> None:
    batch = _batch(inputs, inputs["attention_mask"].sum(dim=1))
    anchors, kept = inputs["anchor_positions"], inputs["block_keep_mask"]
    with torch.no_grad():
        hidden = model.train_slots(batch.features, batch.input_ids, anchors, batch.input_ids.shape[1])  # [B, N, K, D]
        logits = model.frozen.logits(hidden)
        positions = anchors[..., None] + torch.arange(hidden.shape[2])
        positions = positions.clamp_max(batch.input_ids.shape[1] - 1)
        previous = batch.input_ids.gather(1, positions.flatten(1)).view_as(positions)
        embedded = None
        if model.markov_head is not None:
            embedded = model.markov_head.markov_w1(previous)
            logits = logits + model.markov_head.markov_w2(model.markov_head.latents(embedded, hidden))
    slots = outputs["eval_mask"].bool() & kept[..., None]
    errors.worst("logits", _gap(hidden[kept], outputs["output_hidden"].view(hidden.shape)[kept]))
    errors.worst("logits", _gap(logits[slots], outputs["draft_logits"][slots]))
    if "confidence_pred" in outputs and model.confidence_head is not None:
        confidence = model.confidence_head(hidden, embedded if model.config.confidence_with_markov else None)
        errors.worst("logits", _gap(confidence[slots].detach(), outputs["confidence_pred"][slots]))
    drawn = [row[keep] for row, keep in zip(anchors, kept, strict=True)]
    plan = BlockPlan.make(batch.supervision, drawn, model.config.max_draft, model.config.loss_decay_gamma)
    terms = model(batch.planned(plan))
    _compare_terms(terms, train["terms"], errors)
    _compare_gradients(model, terms, train, errors)


def _compare_terms(terms: LossTerms, reference: dict[str, float], errors: CaseErrors) -> None:
    named = {**terms.metrics, **terms.terms}
    for ours, theirs in (("ce", "ce"), ("l1", "l1"), ("confidence", "confidence")):
        total, weight = reference.get(f"{theirs}_loss_num", 0.0), reference.get(f"{theirs}_loss_den", 0.0)
        if weight and ours in named:
            errors.worst("loss", _relative(float(named[ours].value().detach()), total / weight))


def _compare_gradients(model: DraftModel, terms: LossTerms, train: dict[str, Any], errors: CaseErrors) -> None:
    model.zero_grad(set_to_none=True)
    loss = terms.loss()
    loss.backward()
    errors.worst("loss", _relative(float(loss.detach()), train["total_loss"]))
    for name, parameter in model.named_parameters():
        if name in train["grads"]:
            norm = train["grads"][name]["norm"]
            found = 0.0 if parameter.grad is None else float(parameter.grad.norm())
            errors.worst("gradient", abs(found - norm) / max(norm, 1e-12))


def _check_steps(
    model: Any, train: dict[str, Any], inputs: dict[str, Tensor], outputs: dict[str, Tensor], errors: CaseErrors
) -> None:
    """The released mask is off by two and its lengths include the padding, so both are passed in."""
    mask, real = inputs["loss_mask"].bool(), inputs["attention_mask"].sum(dim=1)
    B, S = mask.shape
    batch = _batch(inputs, torch.full((B,), S))
    steps = [int(key[3:]) for key in train if key.startswith("ttt")]
    hidden = model.train_hidden(batch.features, batch.input_ids, torch.arange(S).expand(B, S), max(steps), S)
    for j in range(max(steps)):
        if f"draft_logits_step{j}" in outputs:
            inside = torch.arange(S) < (real - j)[:, None]
            logits = model.frozen.logits(model.norm(hidden[j][inside])).detach()
            errors.worst("logits", _gap(logits, outputs[f"draft_logits_step{j}"][inside]))
    mask = mask & (torch.arange(S) < real[:, None] - 1)
    for count in steps:
        reference = train[f"ttt{count}"]
        slots = torch.zeros(count, B, S, dtype=torch.bool)
        for j in range(count):
            slots[j, :, : S - j] = mask[:, j:]
        plan = TTTPlan.make(slots, batch.supervision.lengths, model.config.step_loss_decay)
        _compare_gradients(model, model(batch.planned(plan)), reference, errors)


def check_decoding(case: Path) -> CaseErrors:
    """Greedy decodings of one case: output ids, proposals, proposal and acceptance lengths, run by run."""
    reference = read_json(case / "results.json", EvaluationError)
    folder = reference.get("target_dir", f"../infer_target_{reference['kind'].split('_')[0]}")
    target = load_target(case / folder, torch.float32)
    model = load_draft(case / "draft", target)
    errors = CaseErrors(case.name)
    for run in reference["runs"]:
        settings = DecodeSettings(
            max_new_tokens=reference["max_new_tokens"],
            stop_token_ids=tuple(run["stop_token_ids"] or ()),
            confidence_threshold=run["confidence_threshold"],
            release_counting=True,
        )
        capacity = len(run["prompt"]) + reference["max_new_tokens"] + model.config.max_draft + 2
        found = generate(target, model.algorithm.drafter(model, 1, capacity), [run["prompt"]], settings)[0]
        equal = run["prompt"] + found.output_ids == run["output_ids"]
        equal &= found.acceptance_lengths == run["acceptance_lengths"]
        lengths = [one.length for one in found.rounds]
        equal &= lengths == run["proposal_lengths"]
        pairs = zip(found.proposals, lengths, run["proposals"], strict=False)
        equal &= all(list(mine) == theirs["verify_input_ids"][: count + 1] for mine, count, theirs in pairs)
        errors.worst("decoding", (errors.decoding or 0.0) + (not equal))
    return errors


def _gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max()) if found.numel() else 0.0


def _relative(found: float, wanted: float) -> float:
    return abs(found - wanted) / max(1.0, abs(wanted))


def table(results: list[CaseErrors]) -> str:
    """The errors as a Markdown table, one row per case."""
    rows = []
    for result in results:
        errors = ["" if value is None else f"{value:.1e}" for value in (result.logits, result.loss, result.gradient)]
        counts = ["" if value is None else f"{value:.0f}" for value in (result.index, result.decoding)]
        holds = "equal" if result.holds else "NOT EQUAL"
        rows.append([result.name, *errors, *counts, holds, result.convention])
    columns = ["case", "logits", "losses", "gradient norms", "indices that differ", "decoding: runs that differ", ""]
    return Table([*columns, "convention"], rows).markdown()
