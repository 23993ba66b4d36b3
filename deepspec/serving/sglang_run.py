"""An exported draft in SGLang's own model code, on a CPU: ``python -m deepspec.serving.sglang_run JOB.json OUT.json``.

It runs in the engine's environment and imports nothing of deepspec but its errors. The engine's server needs a GPU;
what runs here is its reading of the command line and of the draft's config, its draft class, and that class's
``load_weights`` and forward pass. Packages of GPU kernels are replaced by empty ones (``STUBS``), the attention kernel
by PyTorch's. JOB holds arguments (of the server), draft (folder), verify_mode (its SGLANG_RAGGED_VERIFY_MODE), states
(a safetensors file: ``embed``, ``head``, ``features.N`` of prompt N) and rows (of every prompt its tokens, and of every
round how many of them are committed). OUT gets what was read, which parameters and weights were not used once, and the
tokens and confidences of every round.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from deepspec.serving.engine_job import answer_job

STUBS = ("sgl_kernel", "tvm_ffi", "torchvision", "sentencepiece")  # imported on the way to the models, not used by them
DRAFTS = ("llama_eagle3", "dspark", "dflash")  # its modules of draft classes
TARGETS = ("llama", "qwen3", "qwen3_moe")
DEFAULTS = {"HF_HUB_OFFLINE": "1", "SGLANG_USE_CPU_ENGINE": "1"}

Drafted = tuple[list[int], list[float]]  # tokens, and the logits of their confidences where there is such a head


class Empty(ModuleType):
    """A package of GPU kernels: names can be imported and used as decorators, no more."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {}) if name[0].isupper() else Empty(f"{self.__name__}.{name}")

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if len(arguments) == 1 and callable(arguments[0]) and not named:
            return arguments[0]
        return lambda function: function


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last finder: gives an empty package for those of ``STUBS`` that the environment lacks."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.split(".")[0] not in STUBS:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        return Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


class Attention:
    """PyTorch's attention in the place of the engine's kernels and of its cache, one sequence."""

    def __init__(self) -> None:
        self.cache: dict[int, tuple[Any, Any]] = {}

    def set_kv_buffer(self, layer: Any, places: Any, keys: Any, values: Any, *scales: Any) -> None:
        """What a pool is asked to do: keep keys and values ``[tokens, heads, size]`` of a layer."""
        import torch

        old = self.cache.get(layer.layer_id)
        both = (keys, values) if old is None else (torch.cat([old[0], keys]), torch.cat([old[1], values]))
        self.cache[layer.layer_id] = both

    def forward(self, queries: Any, keys: Any, values: Any, layer: Any, *rest: Any, **named: Any) -> Any:
        """Attention of new tokens over all; causal where the layer says so."""
        import torch

        size, heads = layer.head_dim, layer.tp_k_head_num
        self.set_kv_buffer(layer, None, keys.view(-1, heads, size), values.view(-1, heads, size))
        keys, values = (one.transpose(0, 1) for one in self.cache[layer.layer_id])
        queries = queries.view(-1, layer.tp_q_head_num, size).transpose(0, 1)
        count, total = queries.shape[1], keys.shape[1]
        causal = torch.ones(count, total, dtype=torch.bool).tril(total - count)
        mask = causal if layer.attn_type.value == "decoder" else torch.ones_like(causal)
        out = torch.nn.functional.scaled_dot_product_attention(
            queries, keys, values, mask, scale=layer.scaling, enable_gqa=True
        )
        return out.transpose(0, 1).reshape(count, -1)


def entry(modules: tuple[str, ...], architectures: list[str]) -> Any:
    """The class of an architecture, from the ``EntryClass`` of its modules as the engine's registry takes it."""
    for name in modules:
        found = importlib.import_module(f"sglang.srt.models.{name}").EntryClass
        for one in found if isinstance(found, list) else [found]:
            if one.__name__ in architectures:
                return one
    raise ValueError(f"no class for {architectures}")


def missing_kernels() -> str:
    """Why its kernels cannot be imported here; empty where they can."""
    try:
        importlib.import_module("sgl_kernel")
    except ImportError as problem:
        return str(problem)
    return ""


def resolve(arguments: list[str]) -> tuple[Any, str]:
    """Its server arguments as resolved for a GPU, and what it answers to the same on a CPU (empty: nothing)."""
    from sglang.srt.server_args import prepare_server_args

    answer = ""
    try:
        prepare_server_args([*arguments, "--device", "cpu"]).resolve_once()
    except ValueError as problem:
        answer = str(problem)
    resolved = prepare_server_args([*arguments, "--device", "cuda", "--dtype", "float32"])
    resolved.resolve_once()
    return resolved, answer


def start(resolved: Any) -> None:
    """Publish the arguments and make process groups of one process."""
    from sglang.srt.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
    from sglang.srt.runtime_context import SpawnRanks, publish

    publish(resolved, role="test", ranks=SpawnRanks(world_rank=0))
    store = f"file://{os.path.abspath(sys.argv[2])}.store"
    Path(store.removeprefix("file://")).unlink(missing_ok=True)
    init_distributed_environment(world_size=1, rank=0, local_rank=0, backend="gloo", distributed_init_method=store)
    initialize_model_parallel(backend="gloo")


def read_config(resolved: Any, algorithm: str, hf_config: Any) -> dict[str, Any]:
    """What its own code reads of the draft's config and of the command line; layers are those whose output it takes."""
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_executor.model_runner_components.spec_aux_hidden_state import (
        resolve_spec_aux_hidden_state_config,
    )
    from sglang.srt.speculative.dflash_utils import parse_dflash_draft_config
    from sglang.srt.speculative.dspark_components.dspark_config import resolve_runtime_config
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    target, verified = ModelConfig.from_server_args(resolved), resolved_view(resolved).speculative_num_draft_tokens
    kind = SpeculativeAlgorithm.from_string(algorithm)
    capture = resolve_spec_aux_hidden_state_config(
        server_args=resolved, model_config=target, spec_algorithm=kind, is_draft_worker=False
    )
    taken = SimpleNamespace(layers_to_capture=[])
    taken.set_eagle3_layers_to_capture = partial(setattr, taken, "layers_to_capture")
    taken.set_dflash_layers_to_capture = taken.set_eagle3_layers_to_capture
    holder = SimpleNamespace(config=target.hf_config, model=taken, pp_group=SimpleNamespace(is_last_rank=True))
    model = entry(TARGETS, target.hf_config.architectures)
    read = {"drafts": int(verified) - 1}
    if algorithm == "EAGLE3":
        model.set_eagle3_layers_to_capture(holder, capture.eagle_aux_hidden_state_layer_ids)
    else:
        model.set_dflash_layers_to_capture(holder, capture.dflash_target_layer_ids)
        read["mask_token_id"] = parse_dflash_draft_config(draft_hf_config=hf_config).mask_token_id
    if algorithm == "DSPARK":
        runtime = resolve_runtime_config(
            draft_hf_config=hf_config, speculative_num_draft_tokens=verified, target_vocab_size=target.vocab_size
        )
        read |= {"drafts": runtime.gamma, "mask_token_id": runtime.mask_token_id}
    # it captures before a layer, so id i is the output of layer i - 1; the last layer's is never captured
    kept = [i - 1 for i in taken.layers_to_capture if i < target.num_hidden_layers]
    return read | {"target_layers": kept}


def load(model: Any, folder: str) -> dict[str, Any]:
    """Load the file with its own iterator and ``load_weights``; which parameters and weights were not used once."""
    import torch
    from sglang.srt.model_loader.weight_utils import default_weight_loader, safetensors_weights_iterator

    names: dict[int, str] = {}
    kept: list[tuple[str, Any]] = []
    used, written = Counter[str](), Counter[tuple[Any, ...]]()

    def watched(parameter: str, loader: Any) -> Any:
        def write(param: Any, tensor: Any, *shard: Any) -> None:
            used[names[id(tensor)]] += 1
            written[parameter, *shard] += 1
            loader(param, tensor, *shard)

        return write

    for name, parameter in model.named_parameters():
        parameter.data.fill_(float("nan"))
        parameter.weight_loader = watched(name, getattr(parameter, "weight_loader", default_weight_loader))
    for name, tensor in safetensors_weights_iterator(sorted(map(str, Path(folder).glob("*.safetensors")))):
        names[id(tensor)] = name
        kept.append((name, tensor))
    model.load_weights(iter(kept))
    unwritten = [name for name, parameter in model.named_parameters() if bool(torch.isnan(parameter).any())]
    twice = [str(key) for key, count in written.items() if count > 1] + [n for n, c in used.items() if c > 1]
    ids, shared = getattr(model, "hot_token_id", None), ["embed_tokens.weight", "lm_head.weight"]
    if hasattr(model, "set_embed"):  # an Eagle3's embedding is always the target's
        shared = ["model.embed_tokens.weight"] + ["lm_head.weight"] * model.load_lm_head_from_target
    return {
        "parameters": len(dict(model.named_parameters())), "weights": len(kept), "unwritten": unwritten, "twice": twice,
        "unused": sorted({name for name, _ in kept} - {*used}), "shared": shared,
        "vocabulary": None if ids is None else ids.tolist(),
    }  # fmt: skip


def share(model: Any, embed: Any, head: Any) -> None:
    """Give a draft the target's embedding and head, as its workers do."""
    import torch
    from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    modules = VocabParallelEmbedding(*embed.shape), ParallelLMHead(*head.shape)
    for module, weight in zip(modules, (embed, head), strict=True):
        module.weight.weight_loader(module.weight, weight)
    if hasattr(model, "set_embed"):
        if model.load_lm_head_from_target:
            model.set_embed_and_head(modules[0].weight, modules[1].weight)
        else:
            model.set_embed(torch.nn.Parameter(modules[0].weight.data, requires_grad=False))
    elif hasattr(model, "attach_shared_modules"):
        model.attach_shared_modules(embed_tokens=modules[0], lm_head=modules[1])
    else:  # its DFlash worker embeds and projects itself
        model.embed_tokens, model.lm_head = modules


def batch(states: Any = None) -> Any:
    """What a forward pass asks of the batch."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    return SimpleNamespace(
        forward_mode=ForwardMode.TARGET_VERIFY, mm_input_embeds=None, contains_mm_inputs=lambda: False,
        spec_info=SimpleNamespace(hidden_states=states),
    )  # fmt: skip


def draft_chain(model: Any, tokens: list[int], features: Any, count: int, mask: int | None) -> Drafted:
    """What an Eagle3 drafts after ``tokens``, whose last has no features yet."""
    import torch

    ids, place, states, drafted = torch.tensor(tokens[1:]), torch.arange(len(tokens) - 1), features, []
    for _ in range(count):
        out, (states,) = model.model(ids, place, batch(states))
        best = int((out[-1] @ model.lm_head.weight.T)[: model.config.draft_vocab_size].argmax())
        drafted.append(best if model.hot_token_id is None else int(model.hot_token_id[best]))
        ids, place, states = torch.tensor(drafted[-1:]), place[-1:] + 1, states[-1:]
    return drafted, []


def draft_block(model: Any, tokens: list[int], features: Any, count: int, mask: int | None) -> Drafted:
    """What a block drafter drafts after ``tokens``, whose last has no features yet."""
    import torch
    from sglang.srt.model_executor.forward_context import get_attn_backend

    context, place = model.project_target_hidden(features), torch.arange(len(features))
    for layer in model.layers:
        attention = layer.self_attn
        keys, values = attention.kv_proj_only(model.prepare_context_hidden_for_kv(layer, context))
        keys = attention.apply_k_rope(place, attention.apply_k_norm(keys))
        shape = (-1, attention.num_kv_heads, attention.head_dim)
        get_attn_backend().set_kv_buffer(attention.attn, None, keys.view(shape), values.view(shape))
    markov, from_anchor = getattr(model, "markov_head", None), getattr(model, "sample_from_anchor", False)
    slots = count if from_anchor else count + 1
    ids = torch.tensor([tokens[-1], *[mask] * (slots - 1)])
    out = model(ids, torch.arange(slots) + len(features), batch(), model.embed_tokens(ids)).hidden_states
    out = out[slots - count :]
    if markov is None:
        return (out @ model.lm_head.weight.T)[:, : model.lm_head.org_vocab_size].argmax(-1).tolist(), []
    base, seen = model.compute_base_logits(out)
    drafted, previous, state = [], torch.tensor(tokens[-1:]), markov.init_state(out[:1])
    for row, hidden in zip(base, out, strict=True):
        bias, state = markov.step_bias(previous, hidden_states=hidden[None], state=state)
        previous = (row + bias).argmax(-1)
        drafted.append(int(previous))
    if model.confidence_head is None:
        return drafted, []
    anchor, block = torch.tensor(tokens[-1:]), torch.tensor([drafted])
    _, logits = model.compute_confidence(anchor_tokens=anchor, draft_tokens=block, confidence_features=seen)
    return drafted, logits[0].tolist()


def check(job: dict[str, Any]) -> dict[str, Any]:
    """Run the job; see the module."""
    import torch

    importlib.import_module("transformers.image_utils")  # before the stubs: it must not find torchvision
    torch.cpu._is_amx_tile_supported = lambda: False  # its AMX kernels are in a package that is stubbed
    kernels = missing_kernels()
    sys.meta_path.append(Stubs())
    from safetensors.torch import load_file
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
    from sglang.srt.utils.hf_transformers_utils import get_config

    torch.set_grad_enabled(False)
    os.environ["SGLANG_RAGGED_VERIFY_MODE"] = job["verify_mode"]
    resolved, answer = resolve(job["arguments"])
    start(resolved)
    hf_config = get_config(job["draft"], trust_remote_code=False)
    model = entry(DRAFTS, hf_config.architectures)(hf_config)
    algorithm = job["arguments"][job["arguments"].index("--speculative-algorithm") + 1]
    read = read_config(resolved, algorithm, hf_config)
    loaded, given = load(model, job["draft"]), load_file(job["states"])
    share(model, given["embed"], given["head"])
    draft = draft_chain if algorithm == "EAGLE3" else draft_block
    rows: list[list[Any]] = []
    for number, row in enumerate(job["rows"]):
        rows.append([])
        for length in row["committed"]:
            features = given[f"features.{number}"][: length - 1]
            with forward_context(ForwardContext(attn_backend=Attention())):
                rows[-1].append(
                    draft(model, row["tokens"][:length], features, read["drafts"], read.get("mask_token_id"))
                )
    return {"class": type(model).__name__, "answer": answer or kernels, "read": read, "loaded": loaded, "rows": rows}


if __name__ == "__main__":
    answer_job(check, DEFAULTS)
