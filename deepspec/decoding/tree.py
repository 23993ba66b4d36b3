"""Drafting a static tree instead of a chain: its setting, and the greedy walk that accepts a path of it.

At temperature 0 the target has one choice after every node. The longest path from the root whose every token is the
target's choice after the token before it is accepted, and then the target's choice after the path's last node: the
tokens that the target alone would commit. At other temperatures the children of a node would have to be sampled without
replacement and verified one after the other; a chain is drafted there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deepspec.decoding.records import DecodeSettings
from deepspec.decoding.verify import VerifyResult
from deepspec.errors import EvaluationError
from deepspec.nn.tree import Tree

if TYPE_CHECKING:
    from deepspec.algorithms.base import Drafter

MOST_NODES = 1024
WANTED = "children of every node by depth, for instance 4,2,1,1"


def parse_tree(text: str) -> tuple[int, ...]:
    """``"4,2,1,1"`` as (4, 2, 1, 1); an empty text, no tree, as ().

    Raises:
        EvaluationError: not such a list, or a tree of more than ``MOST_NODES`` drafted tokens.
    """
    if not text.strip():
        return ()
    try:
        children = tuple(int(part) for part in text.split(","))
    except ValueError:
        children = (0,)
    if min(children) < 1:
        raise EvaluationError("not a draft tree", key="tree", found=text, wanted=WANTED)
    if (nodes := count_nodes(children)) > MOST_NODES:
        raise EvaluationError(
            f"a draft tree of {nodes:,} tokens", key="tree", found=text, wanted=f"at most {MOST_NODES:,}",
            remedy="give fewer children",
        )  # fmt: skip
    return children


def count_nodes(children: Sequence[int]) -> int:
    """Drafted tokens of a tree, the root not counted."""
    total, level = 0, 1
    for width in children:
        level *= width
        total += level
    return total


def tree_of(settings: DecodeSettings, drafter: Any, with_policy: bool = False) -> Tree | None:
    """The tree that ``settings`` want, on the draft's device; None: a chain, or no drafter.

    Raises:
        EvaluationError: a tree that this temperature, policy or draft cannot use.
    """
    if not settings.tree or drafter is None:
        return None
    if settings.temperature > 0:
        raise EvaluationError(
            "a draft tree is verified greedily", key="tree", found=f"temperature {settings.temperature:g}",
            wanted="temperature 0", remedy="use --temperature 0, or leave --tree out",
        )  # fmt: skip
    if settings.confidence_threshold > 0 or with_policy:
        raise EvaluationError(
            "a draft tree is always verified completely", key="tree", found="a policy that cuts drafts",
            remedy="leave --tree out, or --confidence-threshold, or the policy",
        )  # fmt: skip
    if not drafter.max_children:
        raise EvaluationError(
            "this draft proposes all slots at once and has no tree", key="tree",
            found=type(drafter).__name__, wanted="a draft that goes token by token", remedy="leave --tree out",
        )  # fmt: skip
    return _fitting(settings.tree, drafter)


def _fitting(children: tuple[int, ...], drafter: Drafter) -> Tree:
    if len(children) > drafter.max_draft:
        raise EvaluationError(
            "the draft tree is deeper than the draft was trained to go", key="tree", found=children,
            wanted=f"at most {drafter.max_draft} depths", remedy="drop the last numbers",
        )  # fmt: skip
    if max(children) > drafter.max_children:
        raise EvaluationError(
            "more children than the draft has tokens", key="tree", found=children,
            wanted=f"at most {drafter.max_children}", remedy="give fewer children",
        )  # fmt: skip
    return Tree(children, drafter.model.device)


def walk(tree: Tree, choice: Tensor, tokens: Tensor) -> VerifyResult:
    """The longest path of the target's own choices, as ``VerifyResult(its last node, choice after it)``, [R] each.

    Args:
        tree: of M nodes.
        choice: [R, M], the target's choice after each node.
        tokens: [R, M]; siblings differ, so no two paths are accepted that do not contain each other.
    """
    right = tokens == choice[:, tree.parent]
    right[:, 0] = True  # the root is committed already
    accepted = (right[:, None] | ~tree.lineage).all(-1)  # [R, M] the node and all of its ancestors
    node = (accepted * torch.arange(len(tree), device=tokens.device)).amax(1)  # deeper nodes have larger numbers
    return VerifyResult(node, choice.gather(1, node[:, None]).squeeze(1))


def path_tokens(tree: Tree, node: int, drafted: Sequence[int], stops: Collection[int]) -> list[int]:
    """The tokens from the root (left out) to ``node``, cut after the first stop token, of all ``drafted`` [M - 1]."""

    tokens = []
    for step in tree.paths[node][1 : tree.depths[node] + 1]:
        tokens.append(drafted[step - 1])
        if tokens[-1] in stops:
            break
    return tokens
