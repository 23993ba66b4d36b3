"""Commands on the recipes that deepspec brings along: list, show, copy."""

from __future__ import annotations

from pathlib import Path

from deepspec.arguments import Parser
from deepspec.log import say
from deepspec.progress import made
from deepspec.recipe import load_recipe
from deepspec.recipe_files import copy_recipe, own_recipes, read_files
from deepspec.tables import Table


def list_recipes() -> None:
    """The recipes that deepspec brings along; each name is one that ``--recipe`` takes."""
    Parser(
        description=list_recipes.__doc__, example="", piped=True, following="deepspec recipes show NAME"
    ).parse_args()
    read = {name: read_files(name) for name in own_recipes()}  # checked, they would wait for torch
    rows = [[name, values["algorithm"], values["target"]["path"]] for name, values in read.items()]
    print(Table(["name", "algorithm", "target"], rows).text())


def show() -> None:
    """Every key of a recipe with its value, as YAML that is a recipe itself."""
    example = "dspark_qwen3_4b --set train.lr=3e-4"
    parser = Parser(description=show.__doc__, example=example, piped=True, following="deepspec recipes copy {recipe}")
    parser.add_argument("recipe", help="a name of `deepspec recipes list`, or a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key")
    given = parser.parse_args()
    print(load_recipe(given.recipe, given.set).to_yaml(), end="")


def copy() -> None:
    """Copy a recipe, the files that it extends and its DeepSpeed configuration, to change and train the copy.

    What the copy makes lies in the folder. A file that is there with other content is not overwritten.
    """
    following = "deepspec train --recipe {output}"
    parser = Parser(description=copy.__doc__, example="dspark_qwen3_4b drafts", following=following)
    parser.add_argument("name", help="a name of `deepspec recipes list`")
    parser.add_argument("folder", type=Path, nargs="?", default=Path(), help="where to; it is made")
    given = parser.parse_args()
    files = copy_recipe(given.name, given.folder)
    say("\n".join(map(str, files)))
    made(files[0])
