"""The texts of the prompts: what people ask an assistant, Python's functions, and prose of its language reference.

What is read of Python depends on the Python that runs; the provenance of the prompts names its version.
"""

from __future__ import annotations

import importlib
import inspect
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

Texts = dict[str, Any]
TEXTS: Texts = yaml.safe_load(Path(__file__).with_name("prompts.yaml").read_text(encoding="utf-8"))
DOMAIN: Texts = yaml.safe_load(Path(__file__).with_name("finetune.yaml").read_text(encoding="utf-8"))
QUOTED = (20, 200)  # characters of a line of documentation that an ask may quote
PASSAGE_WORDS = (25, 70)  # shortest and longest passage
_GAP = re.compile(r"\{(\w+)\}")


def chat_prompts(seed: int, texts: Texts = TEXTS) -> Iterator[str]:
    """Endless prompts: the requests in shuffled rounds, their gaps filled at random."""
    rng = random.Random(f"deepspec real chat {seed}")
    asks = list(texts["asks"])
    while True:
        rng.shuffle(asks)
        for ask in asks:
            yield _GAP.sub(lambda gap: str(rng.choice(texts["tables"][gap[1]])), ask)


def function_prompts(seed: int) -> list[str]:
    """One prompt for every documented public function and class of the modules, in shuffled order."""
    rng = random.Random(f"deepspec real functions {seed}")
    found = {f"{module}.{name}": (module, name, thing) for module, name, thing in _documented()}
    prompts, asks = [], TEXTS["function_asks"]
    for _, (module, name, thing) in sorted(found.items()):
        line = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
        ask = rng.choice(asks if QUOTED[0] <= len(line) <= QUOTED[1] else asks[:-2])
        prompts.append(ask.format(module=module, name=name, signature=_signature(thing), line=line))
    rng.shuffle(prompts)
    return prompts


def _documented() -> Iterator[tuple[str, str, Callable[..., Any]]]:
    for module_name in TEXTS["modules"]:
        module = importlib.import_module(module_name)
        for name in sorted(getattr(module, "__all__", None) or dir(module)):
            thing = getattr(module, name, None)
            if not name.startswith("_") and callable(thing) and inspect.getdoc(thing):
                yield module_name, name, thing


def _signature(thing: Callable[..., Any]) -> str:
    """The signature where it has parameters and is short; "" for builtins without one."""
    try:
        text = str(inspect.signature(thing))
    except (TypeError, ValueError):
        return ""
    return text if 2 < len(text) <= 80 and " at 0x" not in text else ""


def passage_prompts(seed: int) -> list[str]:
    """One prompt for every paragraph of fitting length of Python's language reference, shuffled."""
    rng = random.Random(f"deepspec real passages {seed}")
    prompts = [f"{rng.choice(TEXTS['passage_asks'])}\n\n{passage}" for passage in _passages()]
    rng.shuffle(prompts)
    return prompts


def _passages() -> list[str]:
    from pydoc_data.topics import topics

    found: dict[str, None] = {}
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            passage = " ".join(paragraph.split())
            fits = PASSAGE_WORDS[0] <= len(passage.split()) <= PASSAGE_WORDS[1]
            # prose alone: tables, grammars and code hold few sentences
            if fits and passage[:1].isupper() and passage.endswith(".") and "::=" not in passage and "|" not in passage:
                found.setdefault(passage.replace("*", "").replace("``", "`"))
    return list(found)
