"""llama.cpp on CPU (the package xllamacpp, a whole server): a target as GGUF, runs over prompts in own processes."""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspec.data.chat import Renderer
from deepspec.errors import DeepSpecError, DraftError, TargetError
from deepspec.export.forms.gguf import interleaved, layer_keys
from deepspec.export.gguf_file import package, tokenizer_keys, write_file
from deepspec.files import read_json, write_json
from deepspec.serving.base import EngineProcesses, Serving
from deepspec.serving.process import python_path, run, run_job, serve
from deepspec.targets import TargetSpec, load_spec, load_target, load_tokenizer

log = logging.getLogger(__name__)
PACKAGE = "xllamacpp>=2026.10"
MODEL_TYPES = ("qwen3", "llama")  # of the targets that are written here
BEGUN = re.compile(r"launch_slot_: id +\d+ \| task (\d+) \| processing task")
ROUND = re.compile(r"task (\d+) \| accepted +(\d+)/ *(\d+) draft tokens\s*$")
ENDS = ("eos", "eot", "eom")  # the engine's names of tokens that end an answer


@dataclass(frozen=True)
class LlamaCppServer(EngineProcesses):
    """The engine as processes; it needs no shim, and an environment only where this interpreter has no such package."""

    name = "llamacpp"
    formats = ("gguf",)

    @property
    def python(self) -> str:
        """The interpreter that has the package: this one, or that of its environment."""
        return sys.executable if importlib.util.find_spec("xllamacpp") else str(self.folder / "bin" / "python")

    @property
    def version(self) -> str:
        """Of the engine, from the last run."""
        last = max(self.work.glob("*.out.json"), key=lambda path: path.stat().st_mtime, default=None)
        return str(read_json(last)["version"]) if last else "xllamacpp"

    def check_target(self, spec: TargetSpec) -> None:
        """Refuse a target that is not written here.

        Raises:
            DraftError: another model type.
        """
        if spec.model_type not in MODEL_TYPES:
            problem, wanted = "this target is not written as GGUF here", f"one of {', '.join(MODEL_TYPES)}"
            raise DraftError(problem, file=spec.path, key="model_type", found=spec.model_type, wanted=wanted)

    def prepare(self) -> None:
        """Make its environment where it is missing.

        Raises:
            DeepSpecError: pip failed; its last error is named.
        """
        if not Path(self.python).exists():
            log.info("installing %s into %s (once)", PACKAGE, self.folder)
            run([sys.executable, "-m", "venv", str(self.folder)], self.work / "install.log")
            run([self.python, "-m", "pip", "install", "-q", PACKAGE], self.work / "install.log")

    def serving(
        self, name: str, target: str, how: Serving, speculative: Mapping[str, Any] | None = None, form: str = ""
    ) -> AbstractContextManager[str]:
        """See the base class. In float32 its arithmetic is exact and of one thread, otherwise the engine's own."""
        spec = load_spec(target)
        file = self.work / f"target-{how.dtype}.gguf"
        if not file.is_file():
            stops = Renderer(load_tokenizer(target), spec).stop_token_ids
            write_target(Path(target), file, stops, "fp32" if how.dtype == "float32" else "bf16")
        positions = how.positions or spec.config["max_position_embeddings"]
        job = {
            "target": str(file.resolve()), "speculative_config": None if speculative is None else dict(speculative),
            "requests": how.requests, "max_model_len": positions, "quick": how.dtype != "float32",
        }  # fmt: skip
        write_json(self.work / f"{name}.json", job)
        command = [self.python, "-m", "deepspec.serving.llamacpp_serve", str(self.work / f"{name}.json")]
        environment = {"PYTHONPATH": python_path(self.work), **self.environment}
        return serve(command, self.work / f"{name}.log", environment, self.timeout)

    def generate(self, name: str, job: Mapping[str, Any], form: str = "") -> dict[str, Any]:
        """One run in its own process of what :mod:`deepspec.serving.llamacpp_run` takes, ``target`` being a folder.

        Raises:
            DeepSpecError: it failed; ``found`` is the last error in its log.
        """
        target = self.work / "target.gguf"
        self.work.mkdir(parents=True, exist_ok=True)
        if not target.is_file():
            write_target(Path(job["target"]), target, job["stop_token_ids"])
        command = [self.python, "-m", "deepspec.serving.llamacpp_run"]
        environment = {"LLAMA_TRACE": "1", **self.environment}
        asked = {**job, "target": str(target.resolve())}
        for _ in range(2):
            result, output = run_job(command, self.work, name, asked, environment, self.timeout)
            traced = rounds_of(output.read_text(errors="replace"))
            if len(traced) == len(result["rows"]):
                for row, rounds in zip(result["rows"], traced, strict=True):
                    row["rounds"] = rounds
                return result
            log.warning("%s: the trace lacks a request: its lines were written over one another", output)
        wanted = f"{len(result['rows'])} requests"
        raise DeepSpecError("the engine's trace is not whole", file=output, found=len(traced), wanted=wanted)


def rounds_of(text: str) -> list[list[tuple[int, int]]]:
    """(drafted, accepted) of every round of every request, in the order of the trace in a server's log."""
    tasks: dict[str, list[tuple[int, int]]] = {}
    for line in text.splitlines():
        if match := BEGUN.search(line):
            tasks[match[1]] = []
        elif match := ROUND.search(line):
            tasks[match[1]].append((int(match[3]), int(match[2])))
    return list(tasks.values())


def write_target(folder: Path, output: Path, stop_token_ids: Sequence[int] = (), dtype: str = "fp32") -> None:
    """Write a Qwen3 or Llama target as GGUF, for tests: the engine's own converter is what users take.

    Args:
        folder: of the target.
        output: the file.
        stop_token_ids: at which the engine ends an answer, at most three.
        dtype: of the matrices; see :mod:`deepspec.export.gguf_file`.

    Raises:
        TargetError: its positions are scaled, which these keys do not say.
    """
    import torch

    spec = load_spec(str(folder))
    if (rope := spec.shape.rope.kind) != "default":
        remedy = "convert it with llama.cpp's own convert_hf_to_gguf.py"
        raise TargetError("only plain positions are written", file=folder, key="rope_type", found=rope, remedy=remedy)
    config, shape, arch = spec.config, spec.shape, spec.family.name
    named = layer_keys(shape, spec.num_layers) | {"vocab_size": spec.vocab_size}
    keys = {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in named.items()}
    keys |= tokenizer_keys(str(folder), spec.model_type, spec.vocab_size)
    keys |= {f"tokenizer.ggml.{end}_token_id": int(t) for end, t in zip(ENDS, stop_token_ids, strict=False)}
    gguf = package()
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), spec.num_layers)
    state = {}
    for name, tensor in load_target(str(folder), torch.float32).model.state_dict().items():
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = interleaved(tensor, shape.num_heads if "q_proj" in name else shape.num_kv_heads)
        if name != "lm_head.weight" or not config.get("tie_word_embeddings"):
            state[names.get_name(name, try_suffixes=(".weight", ".bias"))] = tensor
    write_file(output, keys, state, dtype)
