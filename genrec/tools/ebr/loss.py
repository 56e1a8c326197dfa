"""Conquer: the in-cluster sampled softmax of EBR, and the baselines that it is measured against.

From the paper (2302.02657): negatives come from the positive's own cluster. Ours: the softmax form; negatives are drawn
once per batch and cluster, in proportion to (events + 1)^0.75, with replacement, and each counts 1 / (N q) in the
partition sum (logQ correction; the positive counts itself, drawn copies of it do not). A cluster of at most N items is
summed up whole, so that the loss is exact there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genrec.tools.ebr.clusters import Clusters
from genrec.tools.ebr.model import Encoder

POWER = 0.75


@dataclass(frozen=True)
class Pool:
    """The items that negatives of one kind are drawn from: rows, int64 [n], and their probabilities, float32 [n]."""

    rows: Tensor
    q: Tensor

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Rows and the logarithm of what each counts in the partition sum: all of them where there are no more."""
        if len(self.rows) <= count:
            return self.rows, torch.zeros(len(self.rows))
        at = torch.multinomial(self.q, count, replacement=True)
        return self.rows[at], -torch.log(count * self.q[at])


def pool(rows: np.ndarray, counts: np.ndarray) -> Pool:
    """counts: training events of all items [N]."""
    q = (counts[rows] + 1.0) ** POWER
    return Pool(torch.from_numpy(rows).long(), torch.from_numpy(q / q.sum()).float())


class Objective:
    """The loss over the positions that are learned, for one division of the catalogue."""

    def __init__(self, encoder: Encoder, clusters: Clusters, counts: np.ndarray) -> None:
        self.encoder, self.config = encoder, encoder.config
        self.cluster_of = torch.from_numpy(clusters.of).long()
        self.inside = [pool(clusters.members(k), counts) for k in range(len(clusters))]
        self.everywhere = pool(np.arange(len(clusters.of)), counts)

    def __call__(self, e: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Mean over positions: e [P, d] user vectors, targets [P] rows, weights [P]."""
        if not len(targets):
            return e.sum() * 0.0
        if self.config.loss == "bce":
            losses = self.one_negative(e, targets)
        elif self.config.single and self.config.negatives_from == "catalogue":
            losses = self.sampled(e, targets, [self.everywhere.draw(self.config.negatives)])
        else:
            losses, weights = self.by_cluster(e, targets, weights)
        return (losses * weights).sum() / weights.sum().clamp(min=1e-9)

    def by_cluster(self, e: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Losses with negatives of each target's cluster, and the weights in their order. "mixed": half of the
        negatives are of the whole catalogue, so that the target's cluster counts twice in the partition sum."""
        count, shared = self.config.negatives, []
        if self.config.negatives_from == "mixed":
            count = max(1, count // 2)
            shared = [self.everywhere.draw(count)]
        of = self.cluster_of[targets]
        losses, order = [], []
        for k in of.unique().tolist():
            at = torch.nonzero(of == k)[:, 0]
            losses.append(self.sampled(e[at], targets[at], [self.inside[k].draw(count), *shared]))
            order.append(at)
        return torch.cat(losses), weights[torch.cat(order)]

    def sampled(self, e: Tensor, targets: Tensor, drawn: list[tuple[Tensor, Tensor]]) -> Tensor:
        """-log(exp(s+) / (exp(s+) + sum of exp(s-) / (N q))) of each position, [P]."""
        rows, log_count = (torch.cat(part) for part in zip(*drawn, strict=True))
        own = (e * self.encoder.vectors(targets)).sum(-1, keepdim=True)
        others = e @ self.encoder.vectors(rows).T + log_count
        others = others.masked_fill(rows == targets[:, None], -torch.inf)
        return torch.logsumexp(torch.cat([own, others], 1), 1) - own[:, 0]

    def one_negative(self, e: Tensor, targets: Tensor) -> Tensor:
        """SASRec's own: binary cross-entropy with one item drawn evenly from the catalogue."""
        other = torch.randint(len(self.cluster_of), targets.shape)
        scores = [(e * self.encoder.vectors(rows)).sum(-1) for rows in (targets, other)]
        return F.softplus(-scores[0]) + F.softplus(scores[1]) * (other != targets)
