"""The shape of a static draft tree, and which of its nodes see which.

Node 0 is the newest committed token, the root. Every node of depth d has as many children as the shape has for d: the
draft's likeliest tokens after it. Nodes are numbered depth by depth, the children of a node side by side; a tree of one
child a depth is the chain that the draft would propose without a tree. In a cache a row's nodes follow each other from
the root's slot on, so a node's *slot* is not its *position*: that is the root's plus the node's depth.

M nodes with the root, D depths, R rows, S slots in view.
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
        self.children, deepest = tuple(children), len(children)
        parents, depths, paths, level = [0], [0], [[0] * (deepest + 1)], [0]
        for depth, width in enumerate(self.children, 1):
            new = range(len(parents), len(parents) + len(level) * width)
            parents += [node for node in level for _ in range(width)]
            depths += [depth] * len(new)
            paths += [[*paths[parents[node]][:depth], *[node] * (deepest + 1 - depth)] for node in new]
            level = list(new)
        self.depths, self.paths = np.array(depths), np.array(paths)  # the same as ``depth`` and ``path``, on the CPU
        self.parent = torch.tensor(parents, device=device)  # [M]; the root's is itself
        self.depth = torch.tensor(depths, device=device)  # [M]
        self.path = torch.tensor(paths, device=device)  # [M, D + 1] the nodes from the root to each; then itself again
        self.lineage = torch.zeros(len(self), len(self), dtype=torch.bool, device=device)
        self.lineage.scatter_(1, self.path, True)  # [M, M] a node's own row: its ancestors and itself

    def __len__(self) -> int:
        return len(self.depths)

    def level(self, depth: int) -> slice:
        """The nodes of one depth."""
        first, last = np.searchsorted(self.depths, [depth, depth + 1])
        return slice(int(first), int(last))

    def visible(self, root_R: Tensor, nodes: slice, num_slots: int, window: int | None = None) -> Tensor:
        """Which of the first S = ``num_slots`` slots the ``nodes`` see, [R, nodes, S] bool.

        Everything before the root's slot ``root_R`` [R], their ancestors and themselves; with ``window``, nothing that
        is so many positions back.
        """
        slots = torch.arange(num_slots, device=root_R.device)
        node = slots - root_R[:, None]  # [R, S]
        before, known = node < 0, node.clamp(0, len(self) - 1)
        inside = (node >= 0) & (node < len(self))
        related = self.lineage[nodes][:, known].transpose(0, 1)  # [R, nodes, S]
        sees = before[:, None] | (inside[:, None] & related)
        if window is None:
            return sees
        position = torch.where(inside, root_R[:, None] + self.depth[known], slots)
        own = root_R[:, None] + self.depth[nodes]  # [R, nodes]
        return sees & (position[:, None] > own[..., None] - window)
