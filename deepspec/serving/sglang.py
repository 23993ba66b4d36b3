"""SGLang in an environment of its own, on a CPU: its server does not run there, its draft classes do.

An export is given to the engine's own code (:mod:`deepspec.serving.sglang_run`): its command line and config are read,
its draft class is loaded, and what that class drafts in every round of our decoding is compared with ours.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deepspec import registry
from deepspec.decoding.records import Generation
from deepspec.export.parts import EMBED, HEAD, DraftCheckpoint
from deepspec.serving.base import EngineProcesses
from deepspec.serving.process import run, run_job
from deepspec.targets import Target, TargetSpec

log = logging.getLogger(__name__)
ENGINE = "sglang==0.5.23"  # without what it asks for, which is CUDA's
PACKAGES = (  # of what it asks for, as much as its draft classes import
    "torch==2.13.0", "transformers==5.19.0", "msgspec", "orjson", "psutil", "pybase64", "requests", "pillow",
    "starlette", "pydantic", "triton", "pyzmq", "fastapi", "IPython", "aiohttp", "uvicorn", "uvloop", "setproctitle",
    "python-multipart", "openai==2.8.0", "partial_json_parser", "einops", "prometheus-client", "dill", "gguf",
    "compressed-tensors",
)  # fmt: skip
ALLOWED = 0.01  # share of drafted tokens that may differ: two candidates may be tied within rounding
CONFIDENCE = 1e-3  # of the logits of confidences, fp32


@dataclass(frozen=True)
class SGLangServer(EngineProcesses):
    """The engine as processes."""

    name = "sglang"
    formats = ("sglang",)
    loads_only = True

    @property
    def version(self) -> str:
        """Of the engine, from its metadata."""
        found = sorted(self.folder.glob("lib/python*/site-packages/sglang-*.dist-info"))
        return found[0].name.removesuffix(".dist-info") if found else ENGINE.replace("==", "-")

    def check_target(self, spec: TargetSpec) -> None:
        """It takes every target that its draft forms take."""

    def prepare(self) -> None:
        """Make its environment where it is missing.

        Raises:
            DeepSpecError: pip failed; its last error is named.
        """
        if any(self.folder.glob("lib/python*/site-packages/sglang/__init__.py")) or (self.folder / ".ready").exists():
            return
        output, pip = self.work / "install.log", [self.python, "-m", "pip", "install", "-q"]
        log.info("installing %s into %s (once)", ENGINE, self.folder)
        run([sys.executable, "-m", "venv", str(self.folder)], output)
        run([*pip, *PACKAGES], output)
        run([*pip, "--no-deps", ENGINE], output)

    def load(
        self, name: str, draft: DraftCheckpoint, folder: Path, served: Path, target: Target, ours: Sequence[Generation]
    ) -> tuple[str, str, str]:
        """Verdict, rounds drafted alike, and a note on a draft of our layout that was exported to ``folder``.

        Args:
            name: of the job.
            draft: in our layout.
            folder: of the export.
            served: folder of the target.
            target: the same in this process.
            ours: what we decode with the export.

        Raises:
            DeepSpecError: the engine's code failed; ``found`` is the last error in its log.
        """
        layers = sorted(draft.parsed.target_layers)
        states, rows = self.work / f"{name}.states.safetensors", [asked(one) for one in ours]
        command = registry.engine("sglang").command(draft, str(served.resolve()), str(folder.resolve()))
        job = {
            "arguments": shlex.split(command)[3:],
            "draft": str(folder.resolve()),
            "states": str(states.resolve()),
            "rows": rows,
            # in its static mode it has no confidence head
            "verify_mode": "cap-accept" if draft.config.get("enable_confidence_head") else "static",
        }
        write_states(states, target, layers, [row["tokens"] for row in rows])
        run_command = [self.python, "-m", "deepspec.serving.sglang_run"]
        answer, _ = run_job(run_command, self.work, name, job, self.environment, self.timeout)
        return verdict(answer, draft, ours)


def asked(generation: Generation) -> dict[str, list[int]]:
    """The tokens of a prompt and its output, and how many are committed before every round."""
    prompt, newest, committed = generation.request.prompt_ids, 0, []
    for one in generation.rounds:
        committed.append(len(prompt) + newest + 1)
        newest += one.emitted
    return {"tokens": [*prompt, *generation.output_ids], "committed": committed}


def write_states(path: Path, target: Target, layers: Sequence[int], texts: Sequence[Sequence[int]]) -> None:
    """The target's embedding ``embed`` and head ``head`` [V, D], and of every text ``features.N`` [S, layers x D]."""
    from safetensors.torch import save_file

    tensors = {"embed": target.embed_weight.detach().clone(), "head": target.head_weight.detach().clone()}
    for number, tokens in enumerate(texts):
        features = target.forward(torch.tensor([list(tokens)]), layers).features[0]
        tensors[f"features.{number}"] = features.detach().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def verdict(answer: Mapping[str, Any], draft: DraftCheckpoint, ours: Sequence[Generation]) -> tuple[str, str, str]:
    """What :meth:`SGLangServer.load` returns, of the answer of :mod:`deepspec.serving.sglang_run`."""
    loaded, read, parsed, faults = answer["loaded"], answer["read"], draft.parsed, []
    wanted = {"drafts": parsed.max_draft, "target_layers": sorted(parsed.target_layers)}
    if "mask_token_id" in read:
        wanted["mask_token_id"] = parsed.mask_token_id
    faults += [f"{key} read as {read[key]}, ours {value}" for key, value in wanted.items() if read[key] != value]
    faults += [f"never loaded: {name}" for name in loaded["unwritten"] if name not in loaded["shared"]]
    faults += [f"loaded twice: {name}" for name in loaded["twice"]]
    known = {EMBED, HEAD, "d2t", "t2d"} if loaded["shared"] else {"d2t", "t2d"}
    faults += [f"ignored: {name}" for name in loaded["unused"] if name not in known]
    tokens = draft.state["d2t"] + torch.arange(len(draft.state["d2t"])) if "d2t" in draft.state else None
    if loaded["vocabulary"] != (None if tokens is None else tokens.tolist()):
        faults.append("another vocabulary than ours")
    rounds = [
        (one, *there)
        for mine, theirs in zip(ours, answer["rows"], strict=True)
        for one, there in zip(mine.rounds, theirs, strict=True)
    ]
    pairs = [(list(one.sent), tokens[: len(one.sent)]) for one, tokens, _ in rounds]
    drafted = sum(len(mine) for mine, _ in pairs)
    alike = sum(a == b for mine, there in pairs for a, b in zip(mine, there, strict=True))
    if not drafted or alike < (1 - ALLOWED) * drafted:
        faults.append("it drafts other tokens than we do")
    scores = [
        (a, b)
        for (one, tokens, there), (mine, _) in zip(rounds, pairs, strict=True)
        if tokens == mine
        for a, b in zip(one.confidence, there, strict=True)
    ]
    worst = max((abs(a - b) for a, b in scores), default=0.0)
    if (not scores and draft.config.get("enable_confidence_head")) or worst > CONFIDENCE:
        faults.append(f"confidences differ by {worst:.1e}")
    note = f"{answer['class']}: {loaded['parameters']} parameters of {loaded['weights']} weights, drafted tokens equal "
    note += f"{alike}/{drafted}; its server was not run"
    if answer["answer"]:
        note += f": {answer['answer']}"
    equal = f"{sum(mine == there for mine, there in pairs)}/{len(pairs)}"
    return ("FAILED", equal, "; ".join([*faults, note])) if faults else ("loads", equal, note)
