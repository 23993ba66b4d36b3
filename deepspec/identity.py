"""What a result depends on, as JSON values: of a target, its tokenizer, its chat template and its stop tokens.

Cache, training, regeneration, evaluation and export record an identity and compare it when they resume: one function
makes it, one compares two, and a difference is named with both values.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch

from deepspec.distributed import world_from_environment
from deepspec.targets import TargetSpec, load_tokenizer
from deepspec.targets.date import template_date, undated
from deepspec.targets.digests import COMPLETE, digest_like, weights_digest
from deepspec.targets.stored import weight_files

log = logging.getLogger(__name__)
NO_FORWARD = frozenset(  # fields of a config that change no hidden state; every other one is compared
    (
        *("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "auto_map", "use_cache"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
        *("initializer_range", "gradient_checkpointing", "output_hidden_states", "output_attentions", "return_dict"),
        *("id2label", "label2id", "problem_type", "_attn_implementation", "_attn_implementation_autoset"),
    )
)
UNCOMPARED = ("target.path", "target.revision", "target.reader")  # the same target may lie elsewhere
SHOWN = 100  # characters of a value in a record or a message; a longer one is a digest there


def identity_of(
    spec: TargetSpec, tokenizer: Any, stop_token_ids: Sequence[int] | None = None, served: bool = False
) -> dict[str, Any]:
    """The identity of a target and of all that decides its tokens.

    Args:
        spec: the target; its files give the weights' digest.
        tokenizer: the target's, with its chat template.
        stop_token_ids: where decoding stops; None where nothing is decoded (hidden states do not depend on them).
        served: it runs on a server, and its weights need not be on this machine (their digest is then None).

    Returns:
        ``target`` (path, revision, weights, hidden_size, config, reader), ``tokenizer`` (a value a part), ``template``,
        ``date`` and, if given, ``stop_tokens``.

    Raises:
        TargetError: weights that are not on this machine, or broken.
    """
    weights = not served or bool(weight_files(spec.path, spec.revision))
    identity: dict[str, Any] = {
        "target": {"weights": None} | target_fields(spec, weights),
        "tokenizer": tokenizer_fields(tokenizer),
        "template": template_digest(tokenizer),
        "date": template_date(tokenizer.chat_template),
    }
    return identity if stop_token_ids is None else identity | {"stop_tokens": list(stop_token_ids)}


def target_fields(spec: TargetSpec, weights: bool = True) -> dict[str, Any]:
    """The target's part of an identity; ``weights`` False leaves their digest out."""
    fields = {"path": spec.path, "revision": spec.revision, "hidden_size": spec.hidden_size, **config_fields(spec)}
    return {**fields, "weights": weights_digest(spec.path, spec.revision)} if weights else fields


def config_fields(spec: TargetSpec) -> dict[str, Any]:
    """``config``: every field that can change the forward, defaults included; ``reader``: whose defaults these are."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(spec.path, revision=spec.revision)
    text = config.get_text_config()
    fields = _plain_fields(text)
    if text is not config:  # a multi-modal one: fields beside its parts' own configs, such as tied embeddings
        fields["whole"] = {key: value for key, value in _plain_fields(config).items() if not key.endswith("_config")}
    return {"config": fields, "reader": f"transformers {transformers.__version__}"}


def _plain_fields(config: Any) -> dict[str, Any]:
    values = {key: value for key, value in config.to_dict().items() if key not in NO_FORWARD and value is not None}
    fields: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return fields


def tokenizer_fields(tokenizer: Any) -> dict[str, str]:
    """A tokenizer part by part: small parts as JSON, large ones as SHA-256."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model = parts.pop("model")
    parts |= {"vocabulary": model.pop("vocab", None), "merges": model.pop("merges", None), "model": model}
    parts |= {"special_tokens": tokenizer.special_tokens_map}
    of_a_call = ("version", "truncation", "padding")  # settings of the last call, and the file format's number
    return {key: _short_json(parts[key]) for key in sorted(parts) if key not in of_a_call}


def _short_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= SHOWN else hashlib.sha256(text.encode()).hexdigest()


def template_digest(tokenizer: Any) -> str:
    """SHA-256 of the chat template as the tokenizer has it."""
    return hashlib.sha256(json.dumps(undated(tokenizer.chat_template), sort_keys=True).encode()).hexdigest()


def vocabulary_digest(tokenizer: Any) -> str:
    """What records of before this version hold of a tokenizer: SHA-256 of its vocabulary and added tokens."""
    added = {str(i): str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    text = json.dumps([sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]), added], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# -- comparing ---------------------------------------------------------------------------------------------------------


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as ``{"target.weights": ...}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], sides: tuple[str, str]) -> list[str]:
    """One line for each field in which two records differ: ``target.weights: cache 12ab..., recipe 34cd...``.

    A target under another path but of the same weights is the same target. A config's field that another version of
    transformers does not know is not compared.

    Args:
        found: the older record.
        wanted: the present record; see :func:`as_recorded` for records of before.
        sides: what the two are called in the lines.
    """
    one, other = flatten(found), flatten(wanted)
    same_reader = one.get("target.reader") == other.get("target.reader")
    lines = []
    for key in sorted({*one, *other}):
        have, want = one.get(key), other.get(key)
        if have == want or key in UNCOMPARED:
            continue
        if key == "target.weights" and None in (have, want):  # on a server, without its files here
            continue
        if key.startswith("target.config.") and not same_reader and (key not in one or key not in other):
            continue
        lines.append(f"{key}: {sides[0]} {shown(have)}, {sides[1]} {shown(want)}")
    return lines


def shown(value: Any) -> str:
    """A value in a message: digests by their first letters, long values cut."""
    if isinstance(value, list) and value and isinstance(value[0], dict) and "sha256" in value[0]:  # sources
        return ", ".join(f"{one['name']} {shown(one['sha256'])}" for one in value)
    text = value if isinstance(value, str) else repr(value)
    if re.fullmatch(rf"({COMPLETE})?[0-9a-f]{{64}}", text):
        return text.removeprefix(COMPLETE)[:12] + "..."
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def as_recorded(
    found: Mapping[str, Any], wanted: Mapping[str, Any], dtype: torch.dtype, file: object
) -> dict[str, Any]:
    """``wanted`` as a record of before this version would hold it, so that the two can be compared.

    Older digests replace the new ones, and fields that ``found`` does not hold are left out; rank 0 warns in one line.

    Args:
        found: the record, old or new.
        wanted: the identity now.
        dtype: in which the target was loaded.
        file: of the record, for the line.
    """
    known, now, partly = found.get("target", {}), deepcopy(dict(wanted)), list[str]()
    weights = known.get("weights")
    target = now["target"]
    if weights is not None and target.get("weights") is not None and not weights.startswith(COMPLETE):
        target["weights"] = digest_like(weights, target["path"], dtype, target["revision"])
        partly.append("weights (a sample of each tensor)")
    if isinstance(found.get("tokenizer"), str) and "tokenizer" in now:
        now["tokenizer"] = vocabulary_digest(load_tokenizer(target["path"], target["revision"]))
        partly.append("tokenizer (its vocabulary)")
    missing = [f"target.{key}" for key in target if key not in known]
    now["target"] = {key: value for key, value in target.items() if key in known}
    missing += [key for key in ("tokenizer", "template", "date", "stop_tokens") if key in now and key not in found]
    now = {key: value for key, value in now.items() if key not in missing}
    missing = [key for key in missing if key != "target.reader" and not (key == "date" and wanted["date"] is None)]
    if (partly or missing) and world_from_environment().is_main:
        notes = [f"compared in part: {', '.join(partly)}"] * bool(partly)
        notes += [f"not compared: {', '.join(missing)}"] * bool(missing)
        log.warning("%s is of an earlier version; %s", file, "; ".join(notes))
    return now
