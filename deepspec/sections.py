"""One strict reader from a YAML mapping to a frozen dataclass, for every section of a recipe.

Cross-field rules are in a section's ``__post_init__`` and raise :class:`~deepspec.errors.RecipeError` with ``key=`` a
field's name. Nothing is ignored or guessed: an unknown key, a missing key and a wrong type each raise and name the key,
the value found and what is wanted.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

from deepspec.errors import RecipeError, nearest

T = TypeVar("T")


def parse_section(cls: type[T], mapping: Mapping[str, Any] | None, where: str) -> T:
    """Read ``mapping`` into the dataclass ``cls``.

    Field types understood: bool, int, float, str, dict, ``Literal``, ``X | None``, ``tuple[X, ...]`` (from a YAML list)
    and other dataclasses (from a nested mapping).

    Args:
        cls: a dataclass type.
        mapping: the section as YAML gave it; None (an empty section) counts as no keys.
        where: the section's key in the recipe, such as ``train``; "" for the top.

    Raises:
        RecipeError: an unknown or missing key, a wrong type, or a rule of ``cls`` that does not hold.
    """
    if mapping is None:
        mapping = {}
    if not isinstance(mapping, Mapping):
        raise RecipeError("not a section", key=where, found=mapping, wanted="a mapping of keys to values")
    known = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in mapping:
        if key not in known:
            raise RecipeError("unknown key", key=_join(where, key), remedy=nearest(str(key), known))
    values = {key: read_value(hints[key], value, _join(where, key)) for key, value in mapping.items()}
    for name, field in known.items():
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise RecipeError("missing key", key=_join(where, name), wanted=describe(hints[name]))
    try:
        return cls(**values)
    except RecipeError as error:
        raise relocate(error, key=_join(where, error.key)) from None


def read_value(kind: Any, value: Any, where: str) -> Any:
    """``value`` as the type ``kind``, without guessing.

    An int is taken for a float, and a string such as ``3e-4`` too (YAML 1.1 reads it as a string); one value for a list
    of it.

    Raises:
        RecipeError: ``value`` is of another type.
    """
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        return _read_union(kind, value, where)
    if origin is Literal:
        options = typing.get_args(kind)
        if value in options and isinstance(value, bool) == any(isinstance(o, bool) for o in options):
            return value
    elif origin is tuple:
        inner = typing.get_args(kind)[0]
        if isinstance(value, list | tuple):
            return tuple(read_value(inner, one, f"{where}[{i}]") for i, one in enumerate(value))
        if isinstance(value, str | int | float):  # one value is read as a list of it
            return (read_value(inner, value, where),)
    elif dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else parse_section(kind, value, where)  # type: ignore[arg-type]
    elif kind is Any or (kind in (dict, dict[str, Any]) and isinstance(value, Mapping)):
        return value
    elif origin is dict and isinstance(value, Mapping):
        inner = typing.get_args(kind)[1]
        return {read_value(str, key, where): read_value(inner, one, _join(where, key)) for key, one in value.items()}
    elif kind is float:
        number = _float(value)
        if number is not None:
            return number
    elif kind in (bool, int, str) and type(value) is kind and _is_usable(value):
        return value
    raise RecipeError("wrong type or value", key=where, found=value, wanted=describe(kind))


def _read_union(kind: Any, value: Any, where: str) -> Any:
    options = [option for option in typing.get_args(kind) if option is not type(None)]
    if value is None and len(options) < len(typing.get_args(kind)):
        return None
    sections = [option for option in options if dataclasses.is_dataclass(option)]
    if len(sections) == 1 and (len(options) == 1 or isinstance(value, Mapping)):  # its own message names the inner key
        return read_value(sections[0], value, where)
    if len(options) == 1 and isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
        return read_value(options[0], value, where)  # likewise of a list of sections
    for option in options:
        try:
            return read_value(option, value, where)
        except RecipeError:
            continue
    raise RecipeError("wrong type or value", key=where, found=value, wanted=describe(kind))


def _is_usable(value: bool | int | str) -> bool:
    """Whether files and file names can hold a text (no NUL, no half of a surrogate pair), and 64 bits a number."""
    if isinstance(value, str):
        return "\0" not in value and not any("\ud800" <= sign <= "\udfff" for sign in value)
    return -(2**63) <= value < 2**63


def _float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def describe(kind: Any) -> str:
    """A type in a user's words: ``one of 'a', 'b'``, ``a list of int``, ``float or null``."""
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if option is type(None) else describe(option) for option in typing.get_args(kind))
    if origin is Literal:
        return "one of " + ", ".join(repr(option) for option in typing.get_args(kind))
    if origin is tuple:
        return f"a list of {describe(typing.get_args(kind)[0])}"
    if origin is dict or kind is dict or dataclasses.is_dataclass(kind):
        return "a mapping"
    return getattr(kind, "__name__", str(kind))


def section_to_dict(section: Any) -> Any:
    """The YAML/JSON value of a section: dataclasses become dicts, tuples lists."""
    if dataclasses.is_dataclass(section) and not isinstance(section, type):
        fields = [field for field in dataclasses.fields(section) if field.init]
        return {field.name: section_to_dict(getattr(section, field.name)) for field in fields}
    if isinstance(section, Mapping):
        return {key: section_to_dict(value) for key, value in section.items()}
    if isinstance(section, list | tuple):
        return [section_to_dict(value) for value in section]
    return section


def relocate(error: RecipeError, **changes: Any) -> RecipeError:
    """The same error with ``file`` or ``key`` filled in."""
    fields = {name: getattr(error, name) for name in ("file", "key", "found", "wanted", "remedy")}
    return RecipeError(error.problem, **{**fields, **changes})


def _join(where: str, key: object) -> str:
    return ".".join(str(part) for part in (where, key) if part not in ("", None))
