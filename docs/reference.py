"""The reference pages of the site, made whenever it is built: recipe keys, commands, every module. A hook of mkdocs.

The text is the code's own: the comment beside a key, the help of a command, docstrings. CONTRIBUTING and CHANGELOG,
which lie above docs/, become pages too.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import os
import re
import textwrap
import typing
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from deepspec import recipe, registry
from deepspec.arguments import parser_of
from deepspec.cli import PROGRAM, VERBS, function_of
from deepspec.sections import describe, section_to_dict

ROOT = Path(__file__).resolve().parents[1]
ABOVE = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
NO_READERS = ("demos", "testing")  # they try what others read
Reads = dict[tuple[str, str], set[str]]  # (class, field) -> modules


def modules() -> dict[str, Path]:
    """Every module below deepspec by its name."""
    found = {}
    for path in sorted((ROOT / "deepspec").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return {name: path for name, path in found.items() if name not in ("deepspec", "deepspec.__main__")}


def sections(where: str, kind: type) -> Iterator[tuple[str, type]]:
    """``kind`` and every section within it."""
    yield where, kind
    for name, hint in typing.get_type_hints(kind).items():
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner) and isinstance(inner, type):
                yield from sections(f"{where}.{name}".strip("."), inner)


def comments(kind: type) -> dict[str, str]:
    """What stands behind each field of a dataclass, those of its bases included."""
    found: dict[str, str] = {}
    for cls in reversed(kind.__mro__[:-1]):
        text = textwrap.dedent(inspect.getsource(cls))
        for node in ast.parse(text).body[0].body:  # type: ignore[attr-defined]
            if isinstance(node, ast.AnnAssign):
                _, sign, comment = text.splitlines()[(node.end_lineno or 0) - 1].rpartition("  # ")
                if sign:
                    found[ast.unparse(node.target)] = comment
    return found


def readers(kinds: dict[str, type]) -> Reads:
    """The modules that read a field, by following the names that a recipe and its sections have in each function.

    Args:
        kinds: the part of a recipe ("" its top) -> the dataclass that it is read into.
    """
    inner = {("Recipe", name): kind.__name__ for name, kind in kinds.items() if "." not in name}
    for name, kind in kinds.items():
        if "." in name:
            inner[kinds[name.rpartition(".")[0]].__name__, name.rpartition(".")[2]] = kind.__name__
    drafts = {
        cls.__name__ for name in registry.ALGORITHMS for cls in registry.algorithm(name).config_class.__mro__[:-1]
    }
    found: Reads = defaultdict(set)
    for module, path in modules().items():
        if module.split(".")[1] in NO_READERS:
            continue
        for scope in ast.parse(path.read_text(encoding="utf-8")).body:
            known = _known(scope, {*inner.values(), "Recipe"}, inner)
            if isinstance(scope, ast.ClassDef) and scope.name in drafts:
                known["self"] = "draft"
            for node in ast.walk(scope):
                if isinstance(node, ast.Attribute) and (kind_name := _kind(node.value, known, inner)):
                    found[kind_name, node.attr].add(module)
    return found


def _known(scope: ast.AST, names: set[str], inner: dict[tuple[str, str], str]) -> dict[str, str]:
    """Expressions of a function or class that are a section, with its class: by annotation, or by assignment."""
    known = {"self": scope.name} if isinstance(scope, ast.ClassDef) and scope.name in names else {}
    for _ in range(2):  # a name may be given on
        for node in ast.walk(scope):
            pairs: list[tuple[ast.expr, ast.expr]] = []
            if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
                name = node.arg if isinstance(node, ast.arg) else ast.unparse(node.target)
                if (kind := ast.unparse(node.annotation).removesuffix(" | None")) in names:
                    known |= {name: kind, f"self.{name}": kind}
            elif isinstance(node, ast.Assign):
                pairs = [(node.targets[0], node.value)]
                if isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple):
                    pairs = list(zip(node.targets[0].elts, node.value.elts, strict=False))
            known |= {ast.unparse(to): kind for to, value in pairs if (kind := _kind(value, known, inner))}
    return known


def _kind(node: ast.expr, known: dict[str, str], inner: dict[tuple[str, str], str]) -> str:
    """The class of the section that an expression is: "draft" of any algorithm's config; "" where it is none."""
    if isinstance(node, ast.IfExp):
        return _kind(node.body, known, inner)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "cast":
        return _kind(node.args[1], known, inner)
    text = ast.unparse(node)
    if text in known:
        return known[text]
    if isinstance(node, ast.Attribute) and (kind := inner.get((_kind(node.value, known, inner), node.attr))):
        return kind
    name = text.split("(")[0].rpartition(".")[2]
    if name in ("recipe", "load_recipe", "recipe_at", "for_target"):
        return "Recipe"
    return "draft" if name in ("config", "parsed") else ""


def key_rows(where: str, kind: type, reads: Reads) -> Iterator[str]:
    """A row of the table for every key of a section."""
    hints, texts = typing.get_type_hints(kind), comments(kind)
    owner = {"": "Recipe", "draft": "draft"}.get(where, kind.__name__)
    for field in dataclasses.fields(kind):
        wanted = describe(hints[field.name])
        if not field.init or field.name == "target_layers" or (where == "" and wanted == "a mapping"):
            continue  # no key, or `target.layers`; a section of its own
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        shown = "required" if default is dataclasses.MISSING else f"`{json.dumps(section_to_dict(default))}`"
        found = reads[owner, field.name]
        named = sorted(found - {"deepspec.recipe"} or found)  # which checks every key
        places = ", ".join(f"[{name.removeprefix('deepspec.')}][{name}]" for name in named)
        meaning = texts.get(field.name, "").replace("None", "null").replace("False", "false")
        cells = (f"`{where}.{field.name}`".replace("`.", "`"), wanted, shown, meaning, places)
        yield f"| {' | '.join(cell.replace('|', '&#124;').replace('<', '&lt;') for cell in cells)} |"


def recipe_page() -> str:
    """Every key of a recipe: its type, default, meaning and readers."""
    kinds = dict(sections("", recipe._File))
    parts = [(name, name or "Top level", kind) for name, kind in kinds.items()]
    drafts = {name: registry.algorithm(name).config_class for name in registry.ALGORITHMS}
    parts += [("draft", f"draft: {name}", kind) for name, kind in drafts.items()]
    reads = readers(kinds)
    lines = [
        "# Recipe keys",
        "",
        "What a recipe may state ([how it is read](recipes.md)). A key that is left out has its",
    ]
    lines += ["default; `extends` at the top names the files that a recipe starts from."]
    head = ["| key | type | default | meaning | read by |", "|---|---|---|---|---|"]
    for where, title, kind in parts:
        lines += ["", f"## {title}", "", inspect.getdoc(kind) or "", "", *head, *key_rows(where, kind, reads)]
    return "\n".join(lines)


def command_page() -> str:
    """The help of every verb."""
    lines = ["# Command line", "", "What `deepspec VERB --help` prints ([how the verbs are used](commands.md))."]
    for verb, (_, text) in VERBS.items():
        with patch.dict(os.environ, COLUMNS="110"):  # argparse's width
            shown = parser_of(function_of(verb), f"{PROGRAM} {verb}").format_help()
        lines += ["", f"## {verb}", "", f"{text[0].upper()}{text[1:]}.", "", "```text", shown.rstrip(), "```"]
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """Every page that is made, by its name."""
    made: dict[str, str] = {name: (ROOT / name).read_text(encoding="utf-8") for name in ABOVE}
    made |= {"recipe-keys.md": recipe_page(), "command-line.md": command_page()}
    for module in modules():
        name = f"api/{module.split('.')[1]}.md"
        made[name] = made.get(name, f"# {Path(name).stem}\n") + f"\n::: {module}\n"
    return made


def on_config(config: Any) -> Any:
    """Put the made pages of modules into the menu."""
    reference = next(group["Reference"] for group in config.nav if "Reference" in group)
    reference.append({"Python": sorted({f"api/{name.split('.')[1]}.md" for name in modules()})})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the made pages to those of docs/."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links between docs/ and the files above it, as they are written for a checkout."""
    return re.sub(r"\]\((\.\./|docs/)", "](", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Names that docstrings mark as Sphinx reads them."""
    return re.sub(r":(?:attr|class|data|func|meth|mod):<code>~?", "<code>", html)
