"""A new family of layers is one file and one registry row: the file is written here, and nothing else is touched."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from deepspec import registry
from deepspec.registry import ALGORITHMS
from deepspec.testing.drafter import DrafterSuite

TOY = '''
"""Mistral's targets; the layers of a draft have norms around attention and MLP, and on queries, keys and values."""

from deepspec.families.base import Family, copy_config, read_flat_shape

TOY = Family(
    name="toy",
    model_types=("mistral",),
    class_prefix="Toy",
    draft_model_type="mistral",
    read_shape=read_flat_shape,
    draft_config=copy_config,
    head_norm=True,
    value_norm=True,
    sandwich=True,
    thinking_keyword=None,
    tiny_config={"sliding_window": None},
)
'''


@pytest.fixture(scope="module", autouse=True)
def _row(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The file in a folder that Python imports from, and its row."""
    folder = tmp_path_factory.mktemp("family")
    (folder / "toy_family.py").write_text(TOY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setitem(registry.FAMILIES, "toy", "toy_family:TOY")
        yield
        sys.modules.pop("toy_family", None)


class TestToyFamily(DrafterSuite):
    algorithms, families = ("dspark",), ("toy",)


@pytest.mark.slow
class TestToyFamilyOfOtherDrafters(DrafterSuite):
    algorithms, families = tuple(name for name in ALGORITHMS if name != "dspark"), ("toy",)
