"""Instruction-Guided Retrieval: of a long history the decoder sees the newest events and those a request asks for.

OxygenREC (2512.22386; papers' notation): a query vector of the request and a vector of every history item,

    q = psi_q([phi_scn(I_s) ; g(I_r)])        h = psi_i([phi_item(v_h) ; g(x_h)])

the top K of the history by q.h, and X_enc = [profile ; recent ; retrieved] (the profile: profile.py). psi_i is shared
between history and target items, and g, the text adapter, between instruction and item text. The Q2I loss (Eq. 2) is
what trains q and h:

    L_Q2I = - mean_i q_i.t_i  +  lambda_r (-log(Var(Q) Var(T)))  +  lambda_d mean_{i != j} (q_i.q_j)^2

**Gradient path.** The top K is hard: nothing flows from the next-code loss into q or h. Only Q2I trains psi_q,
psi_i and, through t and q, the embeddings and the adapter; on the history side everything is detached (in the paper
its text encoder is).

Ours, where the paper is silent: q and t have unit length (so the first term is a cosine); **Var** is batch-wise: the
variance of each dimension over the batch, averaged over dimensions, with VARIANCE_FLOOR added; the side information of
an item is its text alone. Requests without instruction and trigger have nothing to ask with: for them the newest events
stand in for the retrieved ones, and they take no part in Q2I (their q would be one constant).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VARIANCE_FLOOR = 1e-4


class InstructionRetrieval(nn.Module):
    """psi_q and psi_i: two-layer perceptrons into one space of unit vectors, [..., 2 d] -> [..., width]."""

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.Linear(2 * d, d), nn.ReLU(), nn.Linear(d, width))
        self.item = nn.Sequential(nn.Linear(2 * d, d), nn.ReLU(), nn.Linear(d, width))

    def queries(self, scenario: Tensor, instruction: Tensor) -> Tensor:
        """q of requests: scenario token and adapted instruction, each [..., d] -> [..., width]."""
        return F.normalize(self.query(torch.cat([scenario, instruction], -1)), dim=-1)

    def items(self, own: Tensor, text: Tensor) -> Tensor:
        """h or t of items: code and item embeddings, and adapted text, each [..., d] -> [..., width]."""
        return F.normalize(self.item(torch.cat([own, text], -1)), dim=-1)


def keep(similarity: Tensor, distance: Tensor, asked: Tensor, recent: int, retrieved: int) -> Tensor:
    """Which history positions each request sees: bool [B, Q, T].

    similarity: q.h, [B, Q, T]; distance: int64 [B or 1, Q, T], events before the newest one (0), negative where a
    position must not be seen; asked: bool [B, Q], False where the newest events stand in for the retrieved ones.
    """
    older = distance >= recent
    score = torch.where(asked.unsqueeze(-1), similarity, -distance.to(similarity.dtype))
    score = score.masked_fill(~older, -torch.inf)
    k = min(retrieved, score.shape[-1])
    if k == 0:
        return (distance >= 0).expand_as(similarity) & ~older
    best = score.topk(k, -1)
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter(-1, best.indices, torch.isfinite(best.values))
    return chosen | ((distance >= 0) & ~older)


def q2i_loss(queries: Tensor, targets: Tensor, variance: float, decorrelation: float) -> Tensor:
    """Eq. 2 of OxygenREC, a scalar: queries and targets, unit vectors [P, width] of the same requests.

    variance, decorrelation: lambda_r and lambda_d. Fewer than two requests give zero: a batch of one has no variance.
    """
    n = len(queries)
    if n < 2:
        return queries.sum() * 0.0
    align = -(queries * targets).sum(-1).mean()
    spread = [torch.log(x.var(0, unbiased=False).mean() + VARIANCE_FLOOR) for x in (queries, targets)]
    # sum over i != j of (q_i.q_j)^2 is |Q'Q|^2 - sum_i |q_i|^4, in width^2 numbers instead of n^2
    gram = queries.T @ queries
    pairs = gram.square().sum() - queries.square().sum(-1).square().sum()
    return align - variance * (spread[0] + spread[1]) + decorrelation * pairs / (n * n - n)
