"""The fast thinker as a policy: log-probabilities of completions with gradients, and what to watch of it.

pi is the model's own distribution, normalised over the legal codes ("legal normalisation", see generator/model.py), in
rollouts, in pi and in pi_old alike. A completion is an item; its tokens are the codes of its semantic ID.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from genrec.generator.children import child_logits
from genrec.generator.model import GeneratorModel, History, Request, distances


def _outputs(model: GeneratorModel, history: History, request: Request, items: Tensor) -> Tensor:
    """Decoder outputs that predict each code of the items: [B, G, L, d]."""
    group = items.shape[1]
    distance = model.visible(history, request, distances(history)).expand(-1, group, -1)
    wide = replace(request, **{k: v.expand(-1, group, *v.shape[2:]) for k, v in vars(request).items()})
    return model.decode(history, wide, items.clamp(min=0), distance)


def log_probabilities(model: GeneratorModel, history: History, request: Request, items: Tensor) -> Tensor:
    """log pi of every code: float [B, G, L]. request: one of each user, Q = 1; items: rows [B, G], -1 where there is
    none (their numbers mean nothing)."""
    hidden = _outputs(model, history, request, items)
    found = model.log_likelihood(hidden.flatten(0, 1), items.clamp(min=0).flatten())
    return found.view(*items.shape, model.config.levels)


@dataclass(frozen=True)
class Probe:
    """Means over completions, one per level. entropy: of the next code, in nats. legality: the probability that the
    next code would be legal without the tree, the decoder's output being compared with all nodes of the level."""

    entropy: list[float]
    legality: list[float]


@torch.no_grad()
def probe(model: GeneratorModel, history: History, request: Request, items: Tensor) -> Probe:
    """Watches the policy along completions, rows [B, G]; -1 are left out."""
    there = items >= 0
    rows = items[there]
    hidden = _outputs(model, history, request, items)[there]
    entropy, legality = [], []
    for level in range(model.config.levels):
        vectors, nodes = model.node_vectors(level), model.path[rows, level]
        first, count = getattr(model, f"first_{level}"), getattr(model, f"count_{level}")
        below = child_logits(vectors, first, count, hidden[:, level], nodes).float()
        log_p = below.log_softmax(-1)
        every = (hidden[:, level] @ vectors.T).float().logsumexp(-1)
        entropy.append(float(-(log_p.exp() * log_p).sum(-1).mean()) if len(rows) else 0.0)
        legality.append(float((below.logsumexp(-1) - every).exp().mean()) if len(rows) else 0.0)
    return Probe(entropy, legality)
