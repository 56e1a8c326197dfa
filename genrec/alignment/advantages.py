"""From the rewards of a group to advantages, and the target floor of SA-GCPO (OxygenREC 2512.22386, Eq. 4-9):

    A_i = (R_i - mean_j R_j) / std_j R_j                            over the G completions of one request
    Gamma(A_i, R*) = 0 where A_i > 0 and R_i < R*, else A_i         R*: the reward of what the user really chose

so a completion that is only better than its poor neighbours is not made likelier when what the user chose is worth
more.

Ours: the standard deviation is Bessel's plus EPSILON, as in TRL (the paper does not say); a reward that is missing
(NaN) leaves its completion out, advantage 0; a group with fewer than two rewards, or with equal ones, has advantages of
0; a request whose target has no reward (NaN) has no floor; an exact hit is never suppressed.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-4
EQUAL = 1e-6  # a spread that is rounding


def group_advantages(rewards: Tensor, divide: bool = True) -> Tensor:
    """rewards: float [B, G], NaN where missing -> advantages [B, G]. divide: by the group's deviation, as the paper."""
    there = torch.isfinite(rewards)
    count = there.sum(1, keepdim=True)
    mean = torch.where(there, rewards, 0.0).sum(1, keepdim=True) / count.clamp(min=1)
    off = torch.where(there, rewards - mean, 0.0)
    std = (off.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return torch.where((count > 1) & (std > EQUAL), off / (std + EPSILON if divide else 1.0), 0.0)


def suppressed(advantages: Tensor, rewards: Tensor, target: Tensor, hits: Tensor) -> Tensor:
    """bool [B, G]: the advantages that Gamma sets to 0. rewards: [B, G], without group terms such as diversity,
    which the target cannot have; target: R*, [B], NaN for none; hits: bool [B, G]."""
    below = rewards < target.unsqueeze(1)  # False where either is NaN
    return (advantages > 0) & below & ~hits
