"""Logits of the children of tree nodes: the part of a decoder step that grows with the catalogue.

The children of a node are a run of consecutive rows of the next level's output vectors. Scoring them by a padded
gather would copy [rows, most children, d] numbers, most of them padding, and scoring all nodes of a level would
multiply by thousands of rows of which tens are wanted. Two exact ways remain, and the cheaper one is taken:

- by pairs: one vector per (row, child), for levels of many nodes with few children each;
- by blocks: rows of the same node packed together, so that its children's vectors are copied once per block of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genrec.generator.layers import MASKED


def child_logits(vectors: Tensor, first: Tensor, count: Tensor, hidden: Tensor, nodes: Tensor) -> Tensor:
    """Inner products of each row with the vectors of its node's children: float [R, C], MASKED past a node's own.

    vectors: [next nodes, d]; first, count: int64 [nodes], where each node's children start and how many they are
    (C is the most); hidden: [R, d]; nodes: int64 [R].
    """
    width = int(count.max())
    if len(first) == 1:
        return hidden @ vectors.T
    n = count[nodes]
    if len(first) < len(nodes) and int(n.sum()) > len(nodes) * width // 8:
        return _by_blocks(vectors, first, n, hidden, nodes, width)
    row = torch.arange(len(nodes), device=nodes.device).repeat_interleave(n)
    slot = torch.arange(len(row), device=nodes.device) - (n.cumsum(0) - n)[row]
    values = (hidden.index_select(0, row) * vectors.index_select(0, first[nodes][row] + slot)).sum(-1)
    return hidden.new_full((len(nodes), width), MASKED).index_put((row, slot), values)


def _by_blocks(vectors: Tensor, first: Tensor, n: Tensor, hidden: Tensor, nodes: Tensor, width: int) -> Tensor:
    order = nodes.argsort()
    present, group, size = nodes[order].unique_consecutive(return_inverse=True, return_counts=True)
    block = 16 if len(nodes) <= 16 * len(present) else 32  # rows: fewer copies of vectors against fuller blocks
    blocks = (size + block - 1) // block
    rank = torch.arange(len(nodes), device=nodes.device) - (size.cumsum(0) - size)[group]
    place = torch.empty_like(nodes)
    place[order] = (blocks.cumsum(0) - blocks)[group] * block + rank
    slot = torch.arange(width, device=nodes.device)
    owner = present.repeat_interleave(blocks)
    child = (first[owner][:, None] + slot).clamp(max=len(vectors) - 1)
    packed = hidden.new_zeros(len(owner) * block, hidden.shape[1]).index_copy(0, place, hidden)
    wanted = vectors.index_select(0, child.flatten()).view(len(owner), width, -1)
    values = torch.bmm(packed.view(len(owner), block, -1), wanted.transpose(1, 2)).flatten(0, 1)
    return values.index_select(0, place).masked_fill(slot >= n[:, None], MASKED)
