"""Multi-task heads: MMoE (Ma et al. 2018), the base of SARM's ranker (papers/tools.md 2.2) and ours for all rankers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MMoE(nn.Module):
    """Experts shared by all tasks, a gate and a small tower per task: [..., width] -> logits [..., tasks].

    experts 4 as in papers/tools.md 7.2; widths are ours.
    """

    def __init__(self, width: int, tasks: int, experts: int = 4, hidden: int = 64, out: int = 32) -> None:
        super().__init__()
        self.experts, self.tasks = experts, tasks
        self.up = nn.Linear(width, experts * hidden)
        self.down = nn.Parameter(torch.empty(experts, hidden, out).normal_(std=hidden**-0.5))
        self.gates = nn.Linear(width, tasks * experts)
        self.towers = nn.Parameter(torch.empty(tasks, out).normal_(std=out**-0.5))
        self.bias = nn.Parameter(torch.zeros(tasks))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x)).unflatten(-1, (self.experts, -1))
        said = torch.relu(torch.einsum("...eh,eho->...eo", hidden, self.down))
        gates = torch.softmax(self.gates(x).unflatten(-1, (self.tasks, self.experts)), -1)
        return ((gates @ said) * self.towers).sum(-1) + self.bias


def blank(found: Tensor, share: float, training: bool) -> Tensor:
    """What the history brought, [B, C, width]: in training zeros for a share of the requests, so that the heads learn
    to do without it and do not learn users by heart from their histories."""
    if not training or not share:
        return found
    return found * (torch.rand(len(found), 1, 1, device=found.device) >= share)


def bce(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the known labels of the binary cross-entropy, summed over the tasks; [..., T], NaN unknown."""
    known = ~labels.isnan()
    each = nn.functional.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none") * known
    return (each.flatten(0, -2).sum(0) / known.flatten(0, -2).sum(0).clamp(min=1)).sum()
