"""The shape of a static draft tree, and who sees whom in it.

Node 0 is the newest committed token, the root. Every node of depth d has as many children as the shape says for d: the
draft's likeliest tokens after it. Nodes are numbered depth by depth, the children of a node side by side; a tree of one
child a depth is the chain that the draft would propose without a tree.

In a cache the nodes of a row stand one behind the other from the root's place on, so a node's *place* is not its
*position*: that is the root's plus the node's depth.

M nodes with the root, D depths, R rows, S places in view.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Tree:
    """A static tree.

    Args:
        children: of every node, by depth: ``(4, 2, 1)`` is four tokens, two after each, one after each of those.
        device: of the tensors.
    """

    def __init__(self, children: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.children = tuple(children)
        parents, depths, level = [0], [0], [0]
        for depth, width in enumerate(self.children, 1):
            first = len(parents)
            parents += [node for node in level for _ in range(width)]
            level = list(range(first, len(parents)))
            depths += [depth] * len(level)
        self.depths = np.array(depths)  # [M]
        paths = [[0] * (len(self.children) + 1)]
        for node in range(1, len(parents)):
            paths.append([*paths[parents[node]][: depths[node]], *[node] * (len(self.children) + 1 - depths[node])])
        self.paths = np.array(paths)  # [M, D + 1] the nodes from the root to each; behind it the node itself
        self.parent = torch.tensor(parents, device=device)  # [M]; the root's is itself
        self.depth = torch.tensor(depths, device=device)  # [M]
        self.path = torch.tensor(paths, device=device)  # [M, D + 1]
        self.lineage = torch.zeros(len(self), len(self), dtype=torch.bool, device=device)
        self.lineage.scatter_(1, self.path, True)  # [M, M] a node's own row: its ancestors and itself

    def __len__(self) -> int:
        return len(self.depths)

    def level(self, depth: int) -> slice:
        """The nodes of one depth."""
        first, last = np.searchsorted(self.depths, [depth, depth + 1])
        return slice(int(first), int(last))

    def visible(self, root_R: Tensor, nodes: slice, reach: int, window: int | None = None) -> Tensor:
        """Which of the first S = ``reach`` places the ``nodes`` see, [R, nodes, S] bool.

        That is everything before the root's place ``root_R`` [R], their ancestors and themselves; with ``window``,
        nothing that is so many positions back.
        """
        places = torch.arange(reach, device=root_R.device)
        node = places - root_R[:, None]  # [R, S]
        before, known = node < 0, node.clamp(0, len(self) - 1)
        inside = (node >= 0) & (node < len(self))
        related = self.lineage[nodes][:, known].transpose(0, 1)  # [R, nodes, S]
        sees = before[:, None] | (inside[:, None] & related)
        if window is None:
            return sees
        position = torch.where(inside, root_R[:, None] + self.depth[known], places)
        own = root_R[:, None] + self.depth[nodes]  # [R, nodes]
        return sees & (position[:, None] > own[..., None] - window)
