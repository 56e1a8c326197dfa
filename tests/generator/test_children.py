"""Logits of children: both ways of computing them against one plain loop, with gradients."""

from __future__ import annotations

import pytest
import torch

import genrec.generator.children as children
from genrec.generator.children import child_logits
from genrec.generator.layers import MASKED


def plain(vectors, first, count, hidden, nodes):
    rows = []
    for h, node in zip(hidden, nodes.tolist(), strict=True):
        start, n = int(first[node]), int(count[node])
        padding = h.new_full((int(count.max()) - n,), MASKED)
        rows.append(torch.cat([vectors[start : start + n] @ h, padding]))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("counts", "rows", "blocked"),
    [
        ([5], 7, False),
        ([6, 5, 7, 6], 40, True),
        ([1] * 40, 9, False),
        ([4, 5, 4], 50, True),
        ([1, 60, 2], 3, False),
        ([3, 1, 7, 2], 200, True),
    ],
)
def test_both_ways_equal_a_plain_loop(counts: list[int], rows: int, blocked: bool, monkeypatch) -> None:
    used = []
    real = children._by_blocks
    monkeypatch.setattr(children, "_by_blocks", lambda *a: used.append(1) or real(*a))
    torch.manual_seed(len(counts))
    count = torch.tensor(counts)
    first = count.cumsum(0) - count
    vectors = torch.randn(int(count.sum()), 8, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(rows, 8, dtype=torch.float64, requires_grad=True)
    nodes = torch.randint(0, len(counts), (rows,))
    ours, theirs = (f(vectors, first, count, hidden, nodes) for f in (child_logits, plain))
    torch.testing.assert_close(ours, theirs)
    assert bool(used) == blocked
    pull = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((x * pull).sum(), (vectors, hidden)) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)
