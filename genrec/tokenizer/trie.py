"""The tree of legal semantic IDs as dense tensors: what constrained beam search walks on.

Level 0 is the root, level L the items. Nodes of one level are numbered in lexicographic order of their
code prefix, so the children of a node are a run of consecutive numbers of the next level.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from genrec.errors import GenrecError


@dataclass(frozen=True)
class Trie:
    """The tree over N items with L codes each.

    path: int64 [N, L + 1], the node that each item passes at each level (path[:, 0] is 0).
    codes: per level 1..L the last code of each node, int64 [nodes].
    parents: per level 1..L the node of the level above, int64 [nodes].
    leaf_items: int64 [N], the catalogue row of each node of level L.
    """

    path: Tensor
    codes: tuple[Tensor, ...]
    parents: tuple[Tensor, ...]
    leaf_items: Tensor

    @classmethod
    def build(cls, codes: np.ndarray) -> Trie:
        """From codes, int [N, L], one distinct row per item. Raises GenrecError on duplicates."""
        n, levels = codes.shape
        order = np.lexsort(codes.T[::-1])
        ranked = codes[order]
        path = np.zeros((n, levels + 1), np.int64)
        node_codes, parents = [], []
        above = np.zeros(n, np.int64)
        for level in range(levels):
            new = np.ones(n, bool)
            new[1:] = (ranked[1:, : level + 1] != ranked[:-1, : level + 1]).any(1)
            here = np.cumsum(new) - 1
            path[order, level + 1] = here
            node_codes.append(torch.from_numpy(ranked[new, level].astype(np.int64)))
            parents.append(torch.from_numpy(above[new].astype(np.int64)))
            above = here
        if n and above[-1] != n - 1:
            raise GenrecError(f"{n - 1 - int(above[-1])} items share a semantic ID with another; IDs must be unique")
        return cls(torch.from_numpy(path), tuple(node_codes), tuple(parents), torch.from_numpy(order.astype(np.int64)))

    @property
    def levels(self) -> int:
        return len(self.codes)

    @property
    def items(self) -> int:
        return len(self.leaf_items)

    def size(self, level: int) -> int:
        """The number of nodes at a level (1 at level 0)."""
        return 1 if level == 0 else len(self.codes[level - 1])

    @cached_property
    def child_count(self) -> tuple[Tensor, ...]:
        """Per level 0..L-1: the number of children of each node."""
        return tuple(torch.bincount(self.parents[i], minlength=self.size(i)) for i in range(self.levels))

    @cached_property
    def child_start(self) -> tuple[Tensor, ...]:
        """Per level 0..L-1: the first child of each node."""
        return tuple(torch.cumsum(c, 0) - c for c in self.child_count)

    @cached_property
    def leaf_start(self) -> tuple[Tensor, ...]:
        """Per level 0..L: int64 [nodes + 1]; the leaves below node n are leaf_start[n] .. leaf_start[n + 1] - 1."""
        counts = [torch.bincount(self.path[:, i], minlength=self.size(i)) for i in range(self.levels + 1)]
        return tuple(torch.cat([c.new_zeros(1), c.cumsum(0)]) for c in counts)

    @cached_property
    def children(self) -> tuple[Tensor, ...]:
        """Per level 0..L-1: int64 [nodes, most children], padded with -1."""
        tables = []
        for count, start in zip(self.child_count, self.child_start, strict=True):
            slot = torch.arange(int(count.max()))
            tables.append(torch.where(slot < count[:, None], start[:, None] + slot, -1))
        return tuple(tables)

    def pooled(self, level: int, features: Tensor) -> Tensor:
        """The mean of item features [N, d] over the items below each node of a level: [nodes, d]."""
        node = self.path[:, level]
        total = torch.zeros(self.size(level), features.shape[1]).index_add_(0, node, features)
        return total / torch.bincount(node, minlength=self.size(level))[:, None]

    def node(self, prefix: tuple[int, ...]) -> int:
        """The node that a code prefix leads to. Raises GenrecError for an unknown prefix."""
        node = 0
        for level, code in enumerate(prefix):
            start, count = int(self.child_start[level][node]), int(self.child_count[level][node])
            match = (self.codes[level][start : start + count] == code).nonzero()
            if not len(match):
                raise GenrecError(f"no item has a semantic ID that starts with {prefix[: level + 1]}")
            node = start + int(match[0, 0])
        return node
