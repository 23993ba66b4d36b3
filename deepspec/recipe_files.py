"""The YAML files of a recipe as one mapping: read strictly, inherited, overridden, and their paths resolved.

A path means the same from any working directory: a relative one is looked for beside the file that states it, then in
the folders above up to its project (the nearest folder that holds ``deepspeed_configs`` or ``.git``), then in the
working directory. What a run makes (``output``) lies in the project. A path on the command line is the working
directory's.

deepspec's own recipes are at the top of its checkout, and in an installed package under ``deepspec/share``. One of them
may be given by its name alone (``dspark_qwen3_4b``): it then belongs to no project, and what it makes lies in the
working directory. That is so too for whatever is in ``deepspec/share``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from deepspec.errors import RecipeError, nearest, system_error
from deepspec.files import check_readable, write_bytes
from deepspec.sections import relocate

DEEPSPEED = "deepspeed_configs/zero1_bf16.json"  # the default of train.deepspeed
MARKS = ("deepspeed_configs", ".git")  # what the root of a project holds
_PACKAGE = Path(__file__).parent
SHARE = _PACKAGE / "share" if (_PACKAGE / "share").is_dir() else _PACKAGE.parent  # holds the two folders below
RECIPES, CONFIGS = SHARE / "recipes", SHARE / "deepspeed_configs"  # of deepspec itself; any recipe may name a config
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

    Args:
        path: the YAML file, or the name of a recipe of deepspec's own; see :func:`recipe_file`.
        overrides: in their order.

    Raises:
        RecipeError: a file that is missing or no mapping, values without end, or a text that is no override.
    """
    file = recipe_file(path)
    folder, own = Path(os.path.abspath(file)).parent, file != Path(path)
    values = dict(_read_file(file, (), {}, own))
    try:
        for text in overrides:
            _override(values, text, folder, own)
    except RecipeError as error:
        raise relocate(error, file=path) from None
    train = values.get("train")
    if train is None or (isinstance(train, Mapping) and train.get("deepspeed") is None):
        values["train"] = {**(train or {}), "deepspeed": find("train.deepspeed", DEEPSPEED, folder, own=own)}
    if values.get(OUTPUT) is None and isinstance(values.get("name"), str):
        values[OUTPUT] = find(OUTPUT, f"runs/{values['name']}", folder, own=own)
    return values


def recipe_file(given: str | Path) -> Path:
    """The file that ``given`` names: a path; or where none is there, the name of a recipe of deepspec's own.

    Raises:
        RecipeError: a name, no path, that is neither.
    """
    path = Path(given)
    if path.suffix in (".yaml", ".yml") or len(path.parts) != 1 or path.is_file():
        return path
    names = own_recipes()
    if path.name not in names:
        remedy = f"name a YAML file, or one of deepspec's own: {nearest(path.name, names)}"
        raise RecipeError("no such recipe file", file=given, remedy=remedy)
    return RECIPES / f"{given}.yaml"


def own_recipes() -> list[str]:
    """The names of deepspec's own recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def copy_recipe(name: str, folder: str | Path) -> list[Path]:
    """Copy a recipe of deepspec's own and what it names (``extends``, ``train.deepspeed``) into ``folder``.

    The copy means what the original means, and what it makes lies in ``folder``. A file that is there with the same
    content stays.

    Returns:
        The recipe's file, then the other ones.

    Raises:
        RecipeError: no such recipe, or a file of other content is in the way; nothing is written then.
    """
    if name not in own_recipes():
        raise RecipeError("no such recipe", key=name, remedy=nearest(name, own_recipes()))
    known: dict[str, dict[str, Any]] = {}
    file = RECIPES / f"{name}.yaml"
    values = _read_file(file, (), known, own=True)
    config = Path(values.get("train", {}).get("deepspeed") or SHARE / DEEPSPEED)
    others = [Path(os.path.relpath(one, os.path.realpath(RECIPES))) for one in known if one != os.path.realpath(file)]
    copies = {Path(folder) / file.name: file, **{Path(folder) / one: RECIPES / one for one in sorted(others)}}
    copies[Path(folder) / CONFIGS.name / config.name] = config
    for copy, original in copies.items():
        if os.path.lexists(copy) and not (copy.is_file() and copy.read_bytes() == original.read_bytes()):
            remedy = "name another folder, or move the file"
            raise RecipeError("the file exists, and is another one", file=copy, remedy=remedy)
    for copy, original in copies.items():
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(copy, original.read_bytes())
    return list(copies)


def find(key: str, text: str, folder: Path, here: bool = True, own: bool = False) -> str:
    """Where the value ``text`` of the path key ``key`` points to, stated in a file of ``folder``.

    Args:
        key: one of INPUTS, NAMES or OUTPUT; ``extends`` counts as an input.
        text: a path, a URL, or a name.
        folder: absolute.
        here: whether the working directory counts too.
        own: a recipe of deepspec's own was named: files beside it belong to no project.

    Returns:
        ``text`` itself where it means the same from the working directory, or is no relative path; else an absolute
        path.
    """
    if os.path.isabs(text) or "://" in text or not text:
        return text
    ours = folder.is_relative_to(RECIPES)
    root = None if own and ours else project_of(folder)
    candidates = [] if key == OUTPUT else [folder]
    if root is not None and key != OUTPUT:
        candidates += [one for one in folder.parents if one == root or root in one.parents]
    candidates += [Path.cwd()] if here and key != OUTPUT else []
    if key == "train.deepspeed":
        candidates.insert(1 if ours else len(candidates), SHARE)
    there = next((one for one in candidates if os.path.lexists(one / text)), None)
    if there is None and key in NAMES:
        return text
    path = os.path.abspath((there or root or Path.cwd()) / text)
    return text if path == os.path.abspath(text) else path


def project_of(folder: Path) -> Path | None:
    """The nearest folder at or above ``folder`` that is the root of a project; None outside of one.

    An installed package is none, whatever it is installed in.
    """
    if folder.is_relative_to(_PACKAGE):
        return None
    return next((one for one in (folder, *folder.parents) if any((one / mark).exists() for mark in MARKS)), None)


def locate(values: dict[str, Any], folder: Path, own: bool = False) -> dict[str, Any]:
    """``values`` as a file in ``folder`` states them, relative paths resolved; ``own`` as in :func:`find`."""
    return _with_paths(values, lambda key, text: find(key, text, folder, own=own))


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


def _read_file(path: Path, above: tuple[str, ...], known: dict[str, dict[str, Any]], own: bool) -> dict[str, Any]:
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
        found = near if os.path.exists(near) else Path(find("extends", base, folder, own=own))
        merged = _merge(merged, _read_file(found if os.path.exists(found) else near, (*above, real), known, own))
    known[real] = _merge(merged, locate(values, folder, own))
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


def _override(values: dict[str, Any], text: str, folder: Path, own: bool) -> None:
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
    nested = _with_paths(nested, lambda key, path: _typed(key, path, folder, own))
    for name in sections:
        nested = nested[name]
    values[last] = nested[last]


def _typed(key: str, path: str, folder: Path, own: bool) -> str:
    """A path from the command line: the working directory's, unless it is only found from the recipe's folder."""
    if key == OUTPUT or os.path.lexists(path):
        return path
    found = find(key, path, folder, own=own)
    return found if os.path.lexists(found) else path
