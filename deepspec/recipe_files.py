"""The YAML files of a recipe as one mapping: read strictly, inherited, overridden, and their paths resolved.

A path means the same from any working directory: a relative one is looked for beside the file that states it, then in
the folders above up to its project (the nearest folder that holds ``deepspeed_configs`` or ``.git``), then in the
working directory. What a run makes (``output``) lies in the project. A path on the command line is the working
directory's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from deepspec.errors import RecipeError, system_error
from deepspec.files import check_readable
from deepspec.sections import relocate

DEEPSPEED = "deepspeed_configs/zero1_bf16.json"  # the default of train.deepspeed
MARKS = ("deepspeed_configs", ".git")  # what the root of a project holds
CHECKOUT = Path(__file__).parents[1]  # of deepspec itself, whose deepspeed_configs any recipe may name
INPUTS = ("data.conversations", "data.cache", "data.server_storage", "train.deepspeed", "train.validation.path",
          "train.validation.sets")  # fmt: skip
NAMES = ("target.path", "data.prompts", "evaluate.tasks", "train.init.draft")  # a path where one is, else a name
OUTPUT = "output"
MOST_CHARACTERS = 1 << 18  # of a file: what is parsed takes a thousand times its memory
MOST_VALUES = 100_000  # of a file, its aliases written out
MOST_BASES = 100  # files that one file extends
DEEPEST = 20  # files that extend one another


def read_files(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The recipe's values: files merged, ``key.key=value`` texts set, paths resolved, the two default paths filled in.

    Raises:
        RecipeError: a file that is missing or no mapping, values without end, or a text that is no override.
    """
    folder = Path(os.path.abspath(path)).parent
    values = dict(_read_file(Path(path), (), {}))
    try:
        for text in overrides:
            _override(values, text, folder)
    except RecipeError as error:
        raise relocate(error, file=path) from None
    train = values.get("train")
    if train is None or (isinstance(train, Mapping) and train.get("deepspeed") is None):
        values["train"] = {**(train or {}), "deepspeed": find("train.deepspeed", DEEPSPEED, folder)}
    if values.get(OUTPUT) is None and isinstance(values.get("name"), str):
        values[OUTPUT] = find(OUTPUT, f"runs/{values['name']}", folder)
    return values


def find(key: str, text: str, folder: Path, here: bool = True) -> str:
    """Where the value ``text`` of the path key ``key`` points to, stated in a file of ``folder``.

    Args:
        key: one of INPUTS, NAMES or OUTPUT; ``extends`` counts as an input.
        text: a path, a URL, or a name.
        folder: absolute.
        here: whether the working directory counts too.

    Returns:
        ``text`` itself where it means the same from the working directory, or is no relative path; else an absolute
        path.
    """
    if os.path.isabs(text) or "://" in text or not text:
        return text
    root = project_of(folder)
    candidates = [] if key == OUTPUT else [folder]
    if root is not None and key != OUTPUT:
        candidates += [one for one in folder.parents if one == root or root in one.parents]
    candidates += [Path.cwd()] if here and key != OUTPUT else []
    candidates += [CHECKOUT] if key == "train.deepspeed" else []
    there = next((one for one in candidates if os.path.lexists(one / text)), None)
    if there is None and key in NAMES:
        return text
    path = os.path.abspath((there or root or Path.cwd()) / text)
    return text if path == os.path.abspath(text) else path


def project_of(folder: Path) -> Path | None:
    """The nearest folder at or above ``folder`` that is the root of a project; None outside of one."""
    return next((one for one in (folder, *folder.parents) if any((one / mark).exists() for mark in MARKS)), None)


def locate(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """``values`` as a file in ``folder`` states them, relative paths resolved."""
    return _with_paths(values, lambda key, text: find(key, text, folder))


def portable(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """``values`` to be written into ``folder``: a path that a reader could not find from there becomes absolute."""

    def written(key: str, text: str) -> str:
        if os.path.isabs(text) or "://" in text or (key in NAMES and not os.path.exists(text)):
            return text
        found = os.path.abspath(find(key, text, folder, here=False))
        stays = found == os.path.abspath(text) and project_of(folder) is not None
        return text if stays else os.path.abspath(text)

    folder = Path(os.path.abspath(folder))
    return _with_paths(values, written)


def _with_paths(values: dict[str, Any], change: Callable[[str, str], str]) -> dict[str, Any]:
    """A copy of ``values`` with ``change(key, text)`` instead of every path."""
    changed = dict(values)
    for key in (*INPUTS, *NAMES, OUTPUT):
        *sections, last = key.split(".")
        inner = changed
        for name in sections:
            if not isinstance(inner.get(name), dict):
                break
            inner[name] = dict(inner[name])
            inner = inner[name]
        else:
            given = inner.get(last)
            if isinstance(given, str):
                inner[last] = change(key, given)
            elif isinstance(given, list):
                inner[last] = [change(key, one) if isinstance(one, str) else one for one in given]
            elif isinstance(given, dict):
                inner[last] = {name: change(key, one) if isinstance(one, str) else one for name, one in given.items()}
    return changed


class _StrictLoader(yaml.SafeLoader):
    """YAML without silently dropped duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    raise RecipeError("key given twice", key=key, found=f"line {key_node.start_mark.line + 1}")
                seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        RecipeError: not YAML, a key given twice, a value that Python cannot hold, or aliases that expand to too much.
    """
    if len(text) > MOST_CHARACTERS:
        raise RecipeError("too long for a recipe", wanted=f"at most {MOST_CHARACTERS:,} characters")
    loader = None
    try:
        loader = _StrictLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _count(node, {}) > MOST_VALUES:
            raise RecipeError("too many values, aliases written out", wanted=f"at most {MOST_VALUES:,}")
        return loader.construct_document(node)
    except (yaml.YAMLError, UnicodeError) as error:
        raise RecipeError(f"not a YAML file ({' '.join(str(error).split())})") from None
    except RecursionError:
        raise RecipeError("not a YAML file that can be read: nested too deeply") from None
    except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:  # of `!!int x`, 2001-99-99
        raise RecipeError(f"a value that cannot be read ({' '.join(str(error).split())})") from None
    finally:
        if loader is not None:
            loader.dispose()


def _count(node: yaml.Node, counts: dict[int, int]) -> int:
    """Values of a node with its aliases written out."""
    if id(node) in counts:
        if not counts[id(node)]:
            raise RecipeError("an alias inside its own anchor")
        return counts[id(node)]
    counts[id(node)] = 0
    children: Iterator[yaml.Node] = iter(())
    if isinstance(node, yaml.SequenceNode):
        children = iter(node.value)
    elif isinstance(node, yaml.MappingNode):
        children = (one for pair in node.value for one in pair)
    total = 1 + sum(_count(one, counts) for one in children)
    counts[id(node)] = total
    return total


def _read_file(path: Path, above: tuple[str, ...], known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The file's mapping with its ``extends`` merged in; each file is read once."""
    real = os.path.realpath(path)
    if real in above:
        raise RecipeError("extends itself", file=path, key="extends")
    if len(above) > DEEPEST:
        raise RecipeError("too many files that extend one another", file=path, wanted=f"at most {DEEPEST}")
    if real in known:
        return known[real]
    check_readable(path, RecipeError)
    try:
        with open(path, encoding="utf-8") as handle:
            values = parse_yaml(handle.read(MOST_CHARACTERS + 1))
    except (FileNotFoundError, NotADirectoryError):
        raise RecipeError("no such recipe file", file=path) from None
    except OSError as problem:
        raise system_error(problem, path, RecipeError) or problem from None
    except ValueError as error:
        raise RecipeError(f"not a YAML file ({error})", file=path) from None
    except RecipeError as error:
        raise relocate(error, file=path) from None
    if not isinstance(values, dict):
        raise RecipeError("not a recipe", file=path, found=values, wanted="a mapping of sections")
    folder = Path(os.path.abspath(path)).parent
    merged: dict[str, Any] = {}
    for base in _bases(values.pop("extends", []), path):
        near = path.parent / base
        found = near if os.path.exists(near) else Path(find("extends", base, folder))
        merged = _merge(merged, _read_file(found if os.path.exists(found) else near, (*above, real), known))
    known[real] = _merge(merged, locate(values, folder))
    return known[real]


def _bases(given: Any, path: Path) -> list[str]:
    bases = [given] if isinstance(given, str) else given
    if not isinstance(bases, list) or not all(isinstance(one, str) and one and "\0" not in one for one in bases):
        raise RecipeError("not files", file=path, key="extends", found=given, wanted="a file or a list of files")
    if len(bases) > MOST_BASES:
        raise RecipeError("too many files", file=path, key="extends", wanted=f"at most {MOST_BASES}")
    return bases


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Sections merged key by key; lists and scalars replaced."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def _override(values: dict[str, Any], text: str, folder: Path) -> None:
    """Apply one ``section.key=value``; sections are copied, for they may be shared with another file or key."""
    dotted, sign, value = text.partition("=")
    if not sign or not dotted:
        raise RecipeError("not an override", key=text, wanted="key.key=value, such as train.lr=3e-4")
    *sections, last = dotted.split(".")
    for name in sections:
        inner = {} if values.get(name) is None else values[name]
        if not isinstance(inner, dict):
            raise RecipeError("not a section", key=dotted, found=name)
        values[name] = dict(inner)
        values = values[name]
    try:
        given = parse_yaml(value)
    except RecipeError as error:
        raise RecipeError(f"value is not YAML: {error.problem}", key=dotted, found=value) from None
    nested: Any = {last: given}
    for name in reversed(sections):
        nested = {name: nested}
    nested = _with_paths(nested, lambda key, path: _typed(key, path, folder))
    for name in sections:
        nested = nested[name]
    values[last] = nested[last]


def _typed(key: str, path: str, folder: Path) -> str:
    """A path from the command line: the working directory's, unless it is only found from the recipe's folder."""
    if key == OUTPUT or os.path.lexists(path):
        return path
    found = find(key, path, folder)
    return found if os.path.lexists(found) else path
