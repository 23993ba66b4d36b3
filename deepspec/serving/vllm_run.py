"""A generation run of vLLM in its own environment: ``python -m deepspec.serving.vllm_run JOB.json OUT.json``.

It imports nothing of deepspec but its errors, so the engine's environment needs none of our packages (PYTHONPATH names
the checkout). JOB holds target, speculative_config (or null), prompts (token ids), max_tokens; OUT gets the tokens and,
of every draft-verify round, how many tokens were drafted and accepted.
"""

from __future__ import annotations

import os
import time
from typing import Any

from deepspec.serving.engine_job import answer_job

DEFAULTS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in process, so that the scheduler's counts can be read
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; unset the engine takes most of the memory
}


def watch_rounds(engine: Any) -> list[tuple[int, int]]:
    """A list that fills with (drafted, accepted) of every round, as the scheduler counts them."""
    rounds: list[tuple[int, int]] = []
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    count = scheduler.make_spec_decoding_stats

    def counted(
        spec_decoding_stats: Any, num_draft_tokens: int, num_accepted_tokens: int, *rest: Any, **named: Any
    ) -> Any:
        rounds.append((num_draft_tokens, num_accepted_tokens))  # called by name: the names are the engine's
        return count(spec_decoding_stats, num_draft_tokens, num_accepted_tokens, *rest, **named)

    scheduler.make_spec_decoding_stats = counted
    return rounds


def take_any_mask() -> None:
    """Let Triton's interpreter, which stands in for a GPU, take masks that are not of its own boolean type.

    The engine's walk over the candidates of a selector makes such a mask; Triton's compiler takes it.
    """
    import numpy as np
    from triton.runtime import interpreter

    def of_bools(method: Any, place: int) -> Any:
        def call(builder: Any, *arguments: Any, **named: Any) -> Any:
            mask = arguments[place]
            mask = interpreter.TensorHandle(np.asarray(mask.data).astype(bool), mask.dtype)
            return method(builder, *arguments[:place], mask, *arguments[place + 1 :], **named)

        return call

    builder = interpreter.InterpreterBuilder
    builder.create_masked_load = of_bools(builder.create_masked_load, 1)
    builder.create_masked_store = of_bools(builder.create_masked_store, 2)


def generate(job: dict[str, Any]) -> dict[str, Any]:
    """Run the job; see the module."""
    import vllm

    if os.environ.get("TRITON_INTERPRET") == "1":
        take_any_mask()
    start = time.perf_counter()
    engine = vllm.LLM(
        model=job["target"],
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=job["max_model_len"],
        max_num_seqs=4,
        enforce_eager=True,
        speculative_config=job["speculative_config"],
        disable_log_stats=False,
        enable_prefix_caching=False,
    )
    ready = time.perf_counter() - start
    rounds = watch_rounds(engine) if job["speculative_config"] else []
    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=job["max_tokens"], stop_token_ids=job["stop_token_ids"], detokenize=False
    )
    rows = []
    for prompt in job["prompts"]:
        rounds.clear()
        answer = engine.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)[0].outputs[0]
        rows.append({"tokens": list(answer.token_ids), "rounds": list(rounds)})
    return {"version": vllm.__version__, "ready_s": ready, "seconds": time.perf_counter() - start, "rows": rows}


if __name__ == "__main__":
    answer_job(generate, DEFAULTS)
