"""Prompts from the text that ships with Python: its functions and its language reference.

What is read depends on the Python that runs, and so do the prompts; the provenance of the prompts names its version.
"""

from __future__ import annotations

import importlib
import inspect
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

MODULES = (
    "argparse", "array", "asyncio", "base64", "bisect", "calendar", "cmath", "codecs", "collections",
    "configparser", "contextlib", "copy", "csv", "dataclasses", "datetime", "decimal", "difflib", "email", "enum",
    "fileinput", "fnmatch", "fractions", "functools", "getpass", "glob", "gzip", "hashlib", "heapq", "hmac", "html",
    "http.client", "inspect", "io", "ipaddress", "itertools", "json", "locale", "logging", "lzma", "math", "mimetypes",
    "operator", "os", "os.path", "pathlib", "pickle", "platform", "pprint", "queue", "random", "re", "sched", "secrets",
    "shelve", "shlex", "shutil", "signal", "smtplib", "socket", "sqlite3", "ssl", "statistics", "string", "struct",
    "subprocess", "sys", "tarfile", "tempfile", "textwrap", "threading", "time", "timeit", "tokenize", "traceback",
    "types", "typing", "unicodedata", "unittest", "urllib.parse", "urllib.request", "uuid", "warnings", "weakref",
    "xml.etree.ElementTree", "zipfile", "zlib",
)  # fmt: skip
FUNCTION_ASKS = (
    "What does {module}.{name} do in Python?",
    "Show me a short example of {module}.{name} in Python.",
    "Explain the Python function {module}.{name}{signature}.",
    "When would I use {module}.{name} in a Python program?",
    "Write a Python function called {name}. Its documentation says: {line}",
    "In Python's documentation of {module}.{name} I read: {line} What does that mean?",
)
PASSAGE_ASKS = (
    "Summarize this passage in one sentence:\n\n{passage}",
    "Explain this text in simple words:\n\n{passage}",
    "What is the main point of the following text?\n\n{passage}",
    "Rewrite this so that a beginner understands it:\n\n{passage}",
    "Write a question that this text answers:\n\n{passage}",
)
PASSAGE_WORDS = (25, 70)  # shortest and longest passage


def function_prompts(seed: int) -> list[str]:
    """One prompt for every public function and class of MODULES that has documentation, in shuffled order."""
    rng = random.Random(f"deepspec real functions {seed}")
    found = {f"{module}.{name}": (module, name, thing) for module, name, thing in _documented()}
    prompts = []
    for _, (module, name, thing) in sorted(found.items()):
        line = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
        ask = rng.choice(FUNCTION_ASKS if 20 <= len(line) <= 200 else FUNCTION_ASKS[:4])
        prompts.append(ask.format(module=module, name=name, signature=_signature(thing), line=line))
    rng.shuffle(prompts)
    return prompts


def _documented() -> Iterator[tuple[str, str, Callable[..., Any]]]:
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in sorted(getattr(module, "__all__", None) or dir(module)):
            thing = getattr(module, name, None)
            if not name.startswith("_") and callable(thing) and inspect.getdoc(thing):
                yield module_name, name, thing


def _signature(thing: Callable[..., Any]) -> str:
    """The signature where it says more than the name and is short; "" for builtins that tell none."""
    try:
        text = str(inspect.signature(thing))
    except (TypeError, ValueError):
        return ""
    return text if 2 < len(text) <= 80 and " at 0x" not in text else ""


def passage_prompts(seed: int) -> list[str]:
    """One prompt for every paragraph of fitting length of Python's language reference, shuffled."""
    rng = random.Random(f"deepspec real passages {seed}")
    prompts = [rng.choice(PASSAGE_ASKS).format(passage=passage) for passage in _passages()]
    rng.shuffle(prompts)
    return prompts


def _passages() -> list[str]:
    from pydoc_data.topics import topics

    documents = [topics[name] for name in sorted(topics)]
    found: dict[str, None] = {}
    for document in documents:
        for paragraph in re.split(r"\n\s*\n", document):
            passage = " ".join(paragraph.split())
            fits = PASSAGE_WORDS[0] <= len(passage.split()) <= PASSAGE_WORDS[1]
            # prose alone: tables, grammars and code hold few sentences
            if fits and passage[:1].isupper() and passage.endswith(".") and "::=" not in passage and "|" not in passage:
                found.setdefault(passage.replace("*", "").replace("``", "`"))
    return list(found)
