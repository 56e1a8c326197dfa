"""Tools that steer the beam: a distribution over items, read at every step of decoding as a product of experts.

Ours, not the papers'. The fused scores of the tools become probabilities of their best items; summed over
semantic-ID prefixes they say how likely each next code is. The generator adds its own logits and decides, from
its hidden state, how far to trust the prior at each level: logits + trust * log prior. It is trained with priors
of tools that were not fitted on the position (teacher.py), so it learns what the tools do not know already.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DEPTH = 64  # items of a prior
TEMPERATURES = (0.15, 0.25, 0.4, 0.6, 0.8, 1.0, 1.4, 2.0, 3.0, 5.0, 8.0)
SPREADS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Calibration:
    """How scores become a prior. temperature: of the softmax over the best items. spread: share of the mass that
    lies evenly on the catalogue, about as often as the wanted item is none of the best."""

    temperature: float
    spread: float


@dataclass(frozen=True)
class Prior:
    """items: int64 rows [..., K], -1 where padded; mass: float [..., K], adding up to 1 - spread (the rest lies
    evenly on the catalogue), or to 0 where the tools are silent: the generator then speaks alone."""

    items: Tensor
    mass: Tensor

    def to(self, device: torch.device | str) -> Prior:
        return Prior(self.items.to(device), self.mass.to(device))


def make_prior(items: np.ndarray, scores: np.ndarray, calibration: Calibration) -> Prior:
    """From the tools' best items [..., K] (-1 padded) and their fused scores: softmax(score / temperature)."""
    rows = torch.from_numpy(np.asarray(items)).long()
    logits = torch.from_numpy(np.asarray(scores, np.float32)) / calibration.temperature
    real = (rows >= 0) & torch.isfinite(logits)
    mass = torch.softmax(logits.masked_fill(~real, -1e9), -1).masked_fill(~real, 0.0) * (1 - calibration.spread)
    return Prior(rows.masked_fill(~real, -1), mass)


def best_items(scores: np.ndarray, k: int = DEPTH) -> tuple[np.ndarray, np.ndarray]:
    """The k best rows of scores [B, N] (-inf is left out) and their scores: int32 and float32 [B, k], -1 padded."""
    k = min(k, scores.shape[1])
    best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    values = np.take_along_axis(scores, best, 1)
    order = np.argsort(-values, axis=1, kind="stable")
    best, values = np.take_along_axis(best, order, 1), np.take_along_axis(values, order, 1)
    return np.where(np.isfinite(values), best, -1).astype(np.int32), values.astype(np.float32)


def calibrate(items: np.ndarray, scores: np.ndarray, targets: np.ndarray, catalogue: int) -> Calibration:
    """The calibration under which the targets [B] are likeliest, given the best items [B, K] and their scores."""
    hit = torch.from_numpy(items == targets[:, None])
    best, highest = Calibration(1.0, 0.5), -np.inf
    for temperature in TEMPERATURES:
        mass = (make_prior(items, scores, Calibration(temperature, 0.0)).mass * hit).sum(1)
        for spread in SPREADS:
            likelihood = float(torch.log((1 - spread) * mass + spread / catalogue).mean())
            if likelihood > highest:
                best, highest = Calibration(temperature, spread), likelihood
    return best


def log_prior(
    prior: Prior, path: Tensor, level: int, nodes: Tensor, children: Tensor, leaves: Tensor, catalogue: int
) -> Tensor:
    """Log of the (unnormalised) prior mass below each child: [..., W, C] for nodes [..., W] of `level`.

    prior: [..., K]; path: int64 [N, levels + 1]; children: int64 [..., W, C] of those nodes, -1 padded; leaves:
    float [nodes of level + 1], items below each.
    """
    rows = prior.items.clamp(min=0)
    mass = prior.mass.masked_fill(prior.items < 0, 0.0).unsqueeze(-2)  # [..., 1, K]
    inside = path[rows, level].unsqueeze(-2) == nodes.unsqueeze(-1)  # [..., W, K]
    slot = path[rows, level + 1].unsqueeze(-2) - children[..., :1].clamp(min=0)
    slot = torch.where(inside, slot, 0)
    found = torch.zeros(children.shape, device=mass.device).scatter_add_(-1, slot, mass * inside)
    total = mass.sum(-1, keepdim=True)  # [..., 1, 1]
    even = (1 - total) * leaves[children.clamp(min=0)] / catalogue
    silent = (total == 0) | (children < 0)
    return torch.log(found + even).masked_fill(silent, 0.0)
