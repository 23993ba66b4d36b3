"""What a person feels: SmolLM2-135M in llama.cpp with and without a draft, bf16, one thread, greedy.

``make real && python benchmarks/bench_llamacpp.py [--prompts 12]``; of the first only the target is read. The draft is
made once: a DSpark of two layers with norms on the heads (llama.cpp takes no other block drafter), trained on greedy
answers of the target to prompts of the domain of ``make finetune``. Then other prompts of the domain are answered
without a draft and with it, ``--spec-draft-n-max`` and ``--spec-draft-p-min`` swept (a round ends where the draft is
less sure of a token than that), every run in a process of its own and in turn. The server keeps the start that prompts
share, as it does by default. An answer that is not plain decoding's is explained at its first difference: tied where
the two tokens' logits lie within the rounding of bf16 (``deepspec.evaluate.ties``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from bars import Bars, at_least, write_bars
from start import Benchmark, tell

from deepspec.arguments import COUNT
from deepspec.data.chat import Renderer
from deepspec.demos.runner import Runner
from deepspec.demos.stages import PYTHON, Stage, answers, cache, train
from deepspec.errors import DraftError, run_main
from deepspec.evaluate.ties import first_difference
from deepspec.export.convert import ExportOptions, export_draft
from deepspec.progress import Progress
from deepspec.serving.llamacpp import LlamaCppServer, write_target
from deepspec.tables import Table
from deepspec.targets import Target, load_spec, load_target, load_tokenizer

TARGET, WORK = Path("build/real/target"), Path("build/llamacpp")
PROMPTS, ANSWERS, CACHE = WORK / "prompts", WORK / "answers.jsonl", WORK / "cache"
TRAINED, HELD_OUT = 1200, 48  # prompts
STEPS, MAX_TOKENS = 800, 96
RECIPE = "dspark_smollm2_135m"
DRAFT = ("draft.layers.family=qwen3", "draft.num_layers=2", "draft.draft_vocab_size=2048")
SWEEP = {  # type of the draft's weights -> (n-max, p-min)
    "bf16": ((3, 0.0), (5, 0.0), (7, 0.0), (7, 0.5)), "q8_0": ((5, 0.0), (7, 0.0)),
}  # fmt: skip
ROUNDS = 4  # of all runs, in turn


def main() -> int:
    """Make the draft where it is missing, serve, compare."""
    bars = "the best n-max gives 1.2x the tokens per CPU second of plain decoding, and the same text or ties"
    parser = Benchmark(__doc__, bars=bars, takes="an hour for the draft, once, and nine minutes for the runs")
    parser.add_argument("--prompts", type=COUNT, default=12, help="of the domain's held-out ones")
    given = parser.parse_args()
    if not (TARGET / "config.json").is_file():
        raise DraftError("is missing", file=TARGET / "config.json", remedy="run make real first, as far as its target")
    Runner(stages(), WORK / "logs", 2).run()
    server = LlamaCppServer(WORK, Path(".venv-llamacpp"))
    server.prepare()
    job = questions(given.prompts)
    if not (WORK / "target.gguf").is_file():
        write_target(TARGET, WORK / "target.gguf", job["stop_token_ids"], "bf16")
    runs: dict[str, dict[str, Any] | None] = {"none": None}
    for dtype, sweep in SWEEP.items():
        folder = WORK / f"draft-{dtype}"
        if not (folder / "draft.gguf").is_file():
            export_draft(WORK / "draft", folder, ExportOptions("gguf", dtype=dtype))
        for most, sure in sweep:
            runs[f"{dtype}, n-max {most}, p-min {sure}"] = speculative(folder, most, sure)
    return report(measured(server, job, runs), job["prompts"], given.json)


def stages() -> list[Stage]:
    """The domain's prompts, the target's greedy answers, their hidden states, and a draft trained on them."""
    write = (PYTHON, "-m", "deepspec.demos.smollm2", "domain", "--train", str(TRAINED), "--held-out", str(HELD_OUT))
    overrides = (*DRAFT, f"data.cache=[{CACHE}]", f"output={WORK / 'run'}", f"train.max_steps={STEPS}")
    return [
        Stage("prompts", (*write, "--output", str(PROMPTS)), PROMPTS / "train.jsonl.manifest.json"),
        answers("answers", RECIPE, PROMPTS / "train.jsonl", ANSWERS, ("prompts",), ("regenerate.temperature=0",)),
        cache("cache", RECIPE, ANSWERS, CACHE, ("answers",)),
        *train("draft", RECIPE, WORK / "draft", ("cache",), 2, overrides),
    ]


def questions(count: int) -> dict[str, Any]:
    """The job without its draft."""
    renderer = Renderer(load_tokenizer(str(TARGET)), load_spec(str(TARGET)))
    lines = (PROMPTS / "domain.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    texts = [json.loads(line)["turns"][0] for line in lines]
    prompts = [list(renderer.prompt([{"role": "user", "content": text}])) for text in texts]
    room = max(map(len, prompts)) + MAX_TOKENS + 16
    return {
        "target": str(TARGET.resolve()), "prompts": prompts, "max_tokens": MAX_TOKENS, "speculative_config": None,
        "stop_token_ids": list(renderer.stop_token_ids), "max_model_len": -(-room // 128) * 128,
        "cache_prompt": True,
    }  # fmt: skip


def speculative(folder: Path, most: int, sure: float) -> dict[str, Any]:
    """How the server runs the draft in ``folder``: ``most`` tokens a round, none after one less ``sure``."""
    return {"draft": str((folder / "draft.gguf").resolve()), "type": "draft-dspark", "n_max": most, "p_min": sure}


def measured(server: LlamaCppServer, job: dict[str, Any], runs: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The answers of every run, :data:`ROUNDS` times, all runs in turn."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    progress = Progress("llama.cpp", ROUNDS * len(runs), noun="runs")
    for _ in range(ROUNDS):
        for name, wanted in runs.items():
            words = name.replace(", ", "-").replace(" ", "-")
            found[name].append(server.generate(words, {**job, "speculative_config": wanted}))
            progress.add(1)
    progress.finish()
    return found


def tokens(run: dict[str, Any]) -> int:
    """Of all answers."""
    return sum(len(row["tokens"]) for row in run["rows"])


def rate(runs: list[dict[str, Any]], seconds: str) -> float:
    """Tokens a second of the least disturbed run."""
    return max(tokens(run) / (run[seconds] - (run["ready_s"] if seconds == "seconds" else 0.0)) for run in runs)


class Ties:
    """Whether answers that differ from plain decoding's do so within bf16 rounding; each difference is told once."""

    def __init__(self, prompts: list[list[int]], plain: list[list[int]]) -> None:
        self.prompts, self.plain = prompts, plain
        self.known: dict[tuple[int, ...], bool] = {}
        self.target: Target | None = None

    def share(self, rows: list[dict[str, Any]]) -> tuple[int, int]:
        """How many answers are equal, and how many equal or tied."""
        equal = sum(row["tokens"] == text for row, text in zip(rows, self.plain, strict=True))
        return equal, sum(self.tied(number, row["tokens"]) for number, row in enumerate(rows))

    def tied(self, number: int, found: list[int]) -> bool:
        """Whether an answer is plain decoding's, or another within rounding."""
        if found == self.plain[number]:
            return True
        key = (number, *found)
        if key not in self.known:
            self.target = self.target or load_target(TARGET, torch.bfloat16)
            one = first_difference(self.target, [self.prompts[number]], [self.plain[number]], [found])
            self.known[key] = one is not None and one.tied
            tell(f"answer {number}: {one}")
        return self.known[key]


def report(found: dict[str, list[dict[str, Any]]], prompts: list[list[int]], output: Path | None) -> int:
    """The table and the bars."""
    plain = found["none"]
    ties = Ties(prompts, [row["tokens"] for row in plain[0]["rows"]])
    rows, best, same = [], 0.0, 0
    for name, runs in found.items():
        gain, wall = (rate(runs, one) / rate(plain, one) for one in ("cpu_seconds", "seconds"))
        equal, tied = ties.share(runs[0]["rows"])
        accepted = [taken + 1 for row in runs[0]["rows"] for _, taken in row["rounds"]] or [1]
        length = sum(accepted) / len(accepted)
        cells = (f"{length:.2f}", f"{rate(runs, 'cpu_seconds'):.1f}", f"{gain:.2f}x", f"{wall:.2f}x")
        rows.append([name, *cells, f"{equal}, {tied} of {len(prompts)}"])
        if name != "none" and gain > best:
            best, same = gain, tied
    head = ["draft", "accepted length", "tokens per CPU second", "of plain, CPU", "of plain, wall-clock",
            "text equal, equal or tied"]  # fmt: skip
    print(f"{plain[0]['version']}, SmolLM2-135M bf16, one thread, T=0\n\n{Table(head, rows).markdown()}")
    bars: Bars = {
        "tokens per CPU second, the best n-max of plain": at_least(best, 1.2),
        "answers equal to plain decoding's there, or tied within bf16 rounding": at_least(same, len(prompts)),
    }
    write_bars(output, bars)
    return int(not all(bar["holds"] for bar in bars.values()))


if __name__ == "__main__":
    run_main(main)
