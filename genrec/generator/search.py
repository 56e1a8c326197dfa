"""Constrained beam search over semantic IDs, and exact scores of given items. Both walk the trie.

Legal by construction: a beam is a node of the tree, and only its children are ever scored, so an illegal or
duplicate item cannot appear. Filters act inside the search: a node without an allowed item below it is
never entered. Probabilities stay those of the unfiltered model ("legal normalisation", see model.py).

Cost per user, W beams and L levels: the encoder once, the prefix once, then L - 1 decoder steps whose W
beams are query positions of one attention over the user's history (keys and values computed once).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genrec.contracts import UserContext
from genrec.errors import GenrecError
from genrec.generator.layers import MASKED
from genrec.generator.model import GeneratorModel, History, Request, SearchState


@dataclass(frozen=True)
class Beam:
    """items: int64 rows [B, W], best first, -1 where fewer items are allowed; scores: float [B, W]
    log-probabilities, -inf there."""

    items: Tensor
    scores: Tensor


def make_history(contexts: Sequence[UserContext], max_history: int) -> History:
    """The newest max_history events of each context, padded at the end."""
    kept = [c.history[-max_history:] for c in contexts]
    width = max(1, *(len(k) for k in kept))
    rows = torch.full((len(contexts), width), -1)
    gaps, weights = torch.full((len(contexts), width), -1.0), torch.ones(len(contexts), width)
    for i, (context, items) in enumerate(zip(contexts, kept, strict=True)):
        n = len(items)
        if not n:
            continue
        rows[i, :n] = torch.tensor(items)
        if context.times:
            times = np.asarray(context.times[-n:], np.float64)
            gaps[i, :n] = torch.from_numpy(np.diff(times, prepend=times[0])).float()
        if context.weights:
            weights[i, :n] = torch.tensor(context.weights[-n:])
    return History(rows, gaps, weights)


def make_request(
    model: GeneratorModel, contexts: Sequence[UserContext], instructions: np.ndarray | None = None
) -> Request:
    """Scenario, trigger and instruction of each context; instructions: float [B, text_dim], NaN rows for none."""
    names = {name: i for i, name in enumerate(model.config.scenarios)}
    unknown = next((c.scenario for c in contexts if c.scenario not in names), None)
    if unknown is not None:
        raise GenrecError(f"unknown scenario {unknown!r}; this model knows: {', '.join(names)}")
    scenario = torch.tensor([[names[c.scenario]] for c in contexts])
    trigger = torch.tensor([[-1 if c.trigger is None else c.trigger] for c in contexts])
    vectors = torch.zeros(len(contexts), 1, model.config.text_dim)
    given = torch.zeros(len(contexts), 1, dtype=torch.bool)
    if instructions is not None:
        raw = torch.from_numpy(np.asarray(instructions, np.float32))
        given = ~torch.isnan(raw).any(1, keepdim=True)
        vectors = torch.where(given, raw, 0.0).unsqueeze(1)
    return Request(scenario, trigger, vectors, given)


@dataclass(frozen=True)
class Followed:
    """The beams that the decoder must still follow: a node with a single item below it leads there with
    probability 1, whatever the decoder says.

    beams: int64 [B, V], those of each user, the first ones repeated where another user has more. place: int64 [B, W],
    where in `beams` each beam stands, and anywhere for those that are decided.
    """

    beams: Tensor
    place: Tensor

    @classmethod
    def among(cls, model: GeneratorModel, level: int, nodes: Tensor) -> Followed:
        """nodes: int64 [B, W] of a level."""
        start = getattr(model, f"leaf_start_{level}")
        open_ = start[nodes + 1] - start[nodes] > 1
        most = max(1, int(open_.sum(1).max()))
        return cls((~open_).int().argsort(dim=1, stable=True)[:, :most], (open_.cumsum(1) - 1).clamp(min=0))

    def step(self, model: GeneratorModel, state: SearchState, level: int, nodes: Tensor, past: Tensor) -> Tensor:
        """Feed the codes of `nodes`, of `level` + 1: the decoder's outputs [B, W, d], arbitrary where decided.

        past: int64 [B, W], where the beam that each one grew from stood among those followed before.
        """
        for layer in state.layers:
            layer.reorder(past.gather(1, self.beams))
        codes = getattr(model, f"node_code_{level}")[nodes.gather(1, self.beams)]
        hidden = model.advance(state, level, codes)
        return hidden.gather(1, self.place.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


@torch.no_grad()
def beam_search(
    model: GeneratorModel, history: History, request: Request, width: int, allowed: Tensor | None = None
) -> Beam:
    """The best `width` items of each of B users. allowed: bool [B, N], all items when None.

    With width at least the number of nodes on every level this is exhaustive scoring.
    """
    state = model.begin(history, request)
    hidden = state.hidden
    batch = hidden.shape[0]
    nodes = torch.zeros(batch, 1, dtype=torch.long, device=hidden.device)
    scores, place = torch.zeros(batch, 1, device=hidden.device), nodes
    if allowed is not None:  # allowed leaves before each leaf
        before = F.pad(allowed[:, model.leaf_items].cumsum(1, dtype=torch.int32), (1, 0))
    for level in range(model.config.levels):
        values = model.child_scores(level, hidden, nodes) + scores.unsqueeze(-1)  # [B, W, C]
        first, width_here = getattr(model, f"first_{level}"), values.shape[-1]
        if allowed is not None:
            start = getattr(model, f"leaf_start_{level + 1}")
            child = first[nodes].unsqueeze(-1) + torch.arange(width_here, device=nodes.device)
            child = child.clamp(max=len(start) - 2).flatten(1)
            legal = before.gather(1, start[child + 1]) > before.gather(1, start[child])
            values = values.masked_fill(~legal.view_as(values), MASKED)
        scores, choice = values.flatten(1).topk(min(width, values[0].numel()), 1)
        parent = choice // width_here
        dead = scores <= MASKED / 2
        nodes = (first[nodes].gather(1, parent) + choice % width_here).masked_fill(dead, 0)
        if level < model.config.levels - 1:
            followed = Followed.among(model, level + 1, nodes)
            hidden = followed.step(model, state, level, nodes, place.gather(1, parent))
            place = followed.place
    items = model.leaf_items[nodes].masked_fill(dead, -1)
    return Beam(items, scores.masked_fill(dead, -torch.inf))


@torch.no_grad()
def score_items(model: GeneratorModel, history: History, request: Request, items: Tensor) -> Tensor:
    """Exact log-probabilities of given items, int64 rows [B, M], -1 where padded -> float [B, M], -inf there."""
    rows = items.clamp(min=0)
    state = model.begin(history, request)
    hidden = state.hidden.expand(-1, rows.shape[1], -1)
    total, place = torch.zeros(rows.shape, device=rows.device), torch.zeros_like(rows)
    for level in range(model.config.levels):
        above, node = model.path[rows, level], model.path[rows, level + 1]
        values = model.child_scores(level, hidden, above)
        slot = node - getattr(model, f"first_{level}")[above]
        total = total + values.gather(-1, slot.unsqueeze(-1))[..., 0]
        if level < model.config.levels - 1:
            followed = Followed.among(model, level + 1, node)
            hidden = followed.step(model, state, level, node, place)
            place = followed.place
    return total.masked_fill(items < 0, -torch.inf)
