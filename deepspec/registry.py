"""The registries: a name to the import path of its implementation.

Rows are lazy strings ``module:attribute``, so that importing deepspec imports no algorithm, and a new algorithm or
family is one file and one row.
"""

from __future__ import annotations

import importlib
from typing import Any

from deepspec.errors import DeepSpecError, nearest

ALGORITHMS = {
    "eagle3": "deepspec.algorithms.eagle3:EAGLE3",
    "p_eagle": "deepspec.algorithms.p_eagle:P_EAGLE",
    "dflash": "deepspec.algorithms.dflash:DFLASH",
    "dspark": "deepspec.algorithms.dspark:DSPARK",
    "dflash2": "deepspec.algorithms.dflash2:DFLASH2",
    "mtp": "deepspec.algorithms.mtp:MTP_ALGORITHM",
}

ENGINES = {  # an import without a format tries them in this order: the more specific layouts first
    "speculators": "deepspec.export.engines.speculators:SPECULATORS",
    "deepspec": "deepspec.export.engines.deepspec:DEEPSPEC",
    "zlab": "deepspec.export.engines.zlab:ZLAB",
    "vllm": "deepspec.export.engines.vllm:VLLM",
    "sglang": "deepspec.export.engines.sglang:SGLANG",
    "gguf": "deepspec.export.engines.gguf:GGUF",
    "native_mtp": "deepspec.export.engines.native:NATIVE",
}

SERVERS = {  # engines that run here, for the serve check
    "vllm": "deepspec.serving.vllm:VLLMServer",
    "llamacpp": "deepspec.serving.llamacpp:LlamaCppServer",
    "sglang": "deepspec.serving.sglang:SGLangServer",
}

CLIENTS = {  # engines whose running server is asked; the first that knows a server is taken
    "llamacpp": "deepspec.serving.llamacpp_client:LlamaCppClient",
    "vllm": "deepspec.serving.vllm_client:VLLMClient",
    "sglang": "deepspec.serving.sglang_client:SGLangClient",
}

FAMILIES = {
    "qwen3": "deepspec.families.qwen3:QWEN3",
    "llama": "deepspec.families.llama:LLAMA",
    "gemma4": "deepspec.families.gemma4:GEMMA4",
    "qwen3_5": "deepspec.families.qwen3_5:QWEN3_5",
}

DEFAULT_FAMILY = "llama"  # of the draft's layers for a target of no family

SOURCES = {
    "cache": "deepspec.sources.cache:CacheSource",
    "online": "deepspec.sources.online:OnlineSource",
    "served": "deepspec.sources.served:ServedSource",
}

FEATURE_SERVERS = {  # that training asks for hidden states; the first that knows a server is taken
    "stream": "deepspec.streaming.client:StreamClient",
    "extraction": "deepspec.streaming.client:ExtractionClient",
}


def lookup(kind: str, table: dict[str, str], name: str) -> Any:
    """The object that ``name`` means in ``table``.

    Raises:
        DeepSpecError: no row of that name; the message lists the known ones.
    """
    if name not in table:
        raise DeepSpecError(f"unknown {kind}", found=name, remedy=nearest(name, table))
    module, attribute = table[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def algorithm(name: str) -> Any:
    """The :class:`deepspec.algorithms.base.Algorithm` called ``name``."""
    return lookup("algorithm", ALGORITHMS, name)


def engine(name: str) -> Any:
    """The :class:`deepspec.export.engines.base.ExportEngine` called ``name``."""
    return lookup("engine", ENGINES, name)


def family(name: str) -> Any:
    """The :class:`deepspec.families.base.Family` called ``name``."""
    return lookup("family", FAMILIES, name)


def source(name: str) -> Any:
    """The class of the :class:`deepspec.sources.base.FeatureSource` called ``name``."""
    return lookup("feature source", SOURCES, name)


def client(name: str) -> Any:
    """The class of the :class:`deepspec.serving.client.EngineClient` called ``name``."""
    return lookup("engine", CLIENTS, name)


def feature_server(name: str) -> Any:
    """The class of the :class:`deepspec.streaming.client.FeatureClient` called ``name``."""
    return lookup("feature server", FEATURE_SERVERS, name)
