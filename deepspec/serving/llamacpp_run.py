"""A generation run of llama.cpp in a process of its own: ``python -m deepspec.serving.llamacpp_run JOB.json OUT.json``.

It imports nothing of deepspec but its errors. JOB holds target (a GGUF), speculative_config (draft, type, n_max, p_min;
or null), prompts (token ids), max_tokens, cache_prompt (keep the start that prompts share; by default not); OUT gets
the tokens. The engine's trace on stderr says of every draft-verify round how many tokens were drafted and accepted:
:func:`deepspec.serving.llamacpp.rounds_of` reads it.
"""

from __future__ import annotations

import json
import time
import urllib.request
from typing import Any

from deepspec.serving.engine_job import answer_job

TIMEOUT = 600  # seconds of one answer


def parameters(engine: Any, job: dict[str, Any]) -> Any:
    """Exact arithmetic: one thread, f32 states of attention, no flash attention; the engine's own with ``quick``."""
    given, exact = engine.CommonParams(), not job.get("quick")
    given.model.path = job["target"]
    given.n_ctx, given.n_parallel, given.warmup = job["max_model_len"], 1, False
    given.verbosity = 3  # the lines of the trace
    if exact:
        given.flash_attn_type = engine.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        _exact(engine, given)
    if wanted := job["speculative_config"]:
        kind = wanted["type"].upper().replace("-", "_")
        given.speculative.types = [getattr(engine.common_speculative_type, f"COMMON_SPECULATIVE_TYPE_{kind}")]
        draft = given.speculative.draft
        draft.mparams.path, draft.n_max, draft.p_min = wanted["draft"], wanted["n_max"], wanted.get("p_min", 0.0)
        if exact:
            _exact(engine, draft)
    return given


def _exact(engine: Any, part: Any) -> None:
    part.n_gpu_layers = 0
    part.cache_type_k = part.cache_type_v = engine.ggml_type.GGML_TYPE_F32
    part.cpuparams.n_threads = part.cpuparams_batch.n_threads = 1


def generate(job: dict[str, Any]) -> dict[str, Any]:
    """Run the job; see the module."""
    import xllamacpp

    start = time.perf_counter()
    server = xllamacpp.Server(parameters(xllamacpp, job))
    ready, begun = time.perf_counter() - start, time.process_time()
    rows = [_answer(server.listening_address, prompt, job) for prompt in job["prompts"]]
    seconds, worked = time.perf_counter() - start, time.process_time() - begun  # its threads are this process's
    version = f"xllamacpp {xllamacpp.__version__}"
    return {"version": version, "ready_s": ready, "seconds": seconds, "cpu_seconds": worked, "rows": rows}


def _answer(address: str, prompt: list[int], job: dict[str, Any]) -> dict[str, Any]:
    question = {
        "prompt": prompt, "n_predict": job["max_tokens"], "temperature": 0.0,
        "cache_prompt": job.get("cache_prompt", False), "return_tokens": True, "ignore_eos": not job["stop_token_ids"],
    }  # fmt: skip
    body, kind = json.dumps(question).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/completion", body, kind)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
        answer = json.load(reply)
    return {"tokens": answer["tokens"], "timings": answer["timings"]}


if __name__ == "__main__":
    answer_job(generate)
