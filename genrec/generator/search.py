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
from genrec.generator.layers import MASKED, Grid
from genrec.generator.model import GeneratorModel, History, Request
from genrec.generator.profile import profiles

ROWS = 2560  # beams in one pass on a CPU: with more of them, what a layer reads and writes leaves the caches


@dataclass(frozen=True)
class Beam:
    """items: int64 rows [B, W], best first, -1 where fewer items are allowed; scores: float [B, W]
    log-probabilities, -inf there."""

    items: Tensor
    scores: Tensor


def make_history(contexts: Sequence[UserContext], max_history: int) -> History:
    """The newest max_history events of each context, padded at the end, and the users' attributes."""
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
    return History(rows, gaps, weights, profiles([c.attributes for c in contexts]))


def make_request(
    model: GeneratorModel, contexts: Sequence[UserContext], instructions: np.ndarray | None = None
) -> Request:
    """Scenario, trigger, instruction and newest event of each context; instructions: float [B, text_dim], NaN rows for
    none."""
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
    newest = torch.tensor([[c.history[-1] if c.history else -1] for c in contexts])
    return Request(scenario, trigger, vectors, given, newest)


def passes(history: History, beams: int) -> list[Tensor]:
    """The users to search at a time, int64 each: of similar history lengths, with at most ROWS beams on a CPU."""
    lengths = (history.rows >= 0).sum(1)
    users = ROWS // max(beams, history.rows.shape[1]) if lengths.device.type == "cpu" else len(lengths)
    return list(lengths.argsort(stable=True).tensor_split(-(-len(lengths) // max(1, users))))


class Walk:
    """Beams of B users on their way down the tree, and what the decoder says of the codes below them.

    A node with a single item below it leads there with probability 1, whatever the decoder says: it is decided, and
    the decoder follows the others only.

    nodes: int64 [B, W], of `level`. followed: int64 [R], the undecided ones as positions in nodes.flatten();
    hidden: [R, d], the decoder's outputs for them. row: int64 [B, W], where each undecided node is in `followed`.
    """

    def __init__(self, model: GeneratorModel, history: History, request: Request) -> None:
        self.model, self.state, self.level = model, model.begin(history, request), 0
        self.hidden = self.state.hidden
        self.followed = torch.arange(len(self.hidden), device=self.hidden.device)
        self.nodes, self.row = torch.zeros_like(self.followed)[:, None], self.followed[:, None]

    def scores(self) -> Tensor:
        """Log-probabilities of each node's children: [B, W, most children], MASKED past a node's own."""
        below = self.model.child_scores(self.level, self.hidden, self.nodes.flatten()[self.followed])
        if len(self.followed) == self.nodes.numel():
            return below.unflatten(0, self.nodes.shape)
        every = below.new_full((self.nodes.numel(), below.shape[1]), MASKED)
        every[:, 0] = 0.0
        return every.index_copy_(0, self.followed, below).unflatten(0, self.nodes.shape)

    def descend(self, parent: Tensor, nodes: Tensor) -> None:
        """Go on with new beams: the beams that they grow from, int64 [B, W], and their nodes one level down."""
        past, level = self.row.gather(1, parent).flatten(), self.level
        self.level, self.nodes = level + 1, nodes
        start = getattr(self.model, f"leaf_start_{self.level}")
        open_ = start[nodes + 1] - start[nodes] > 1
        self.followed = open_.flatten().nonzero()[:, 0]
        self.row = (open_.flatten().cumsum(0) - 1).clamp(min=0).view_as(nodes)
        if not len(self.followed):
            self.hidden = self.hidden[:0]
            return
        place = open_.cumsum(1) - 1
        users, beams = len(nodes), int(place.max()) + 1
        slots = (place + torch.arange(users, device=nodes.device)[:, None] * beams).flatten()[self.followed]
        grid = Grid(users, beams, slots if len(slots) < users * beams else None)
        codes = getattr(self.model, f"node_code_{level}")[nodes.flatten()[self.followed]]
        self.hidden = self.model.advance(self.state, level, codes, grid, past[self.followed])


def perturbed(scores: Tensor, above: Tensor, noise: torch.Generator) -> Tensor:
    """Keys of children whose largest are drawn like items without replacement: float [B, W, C].

    scores: log-probabilities from the root, [B, W, C], MASKED where there is no child; above: the keys of their nodes,
    [B, W]. Gumbel noise is added to the scores, on condition that the largest of a node's children is the node's own
    key (stochastic beam search: Kool et al. 2019, 1903.06059, in the stable form of its appendix B.3).
    """
    g = scores - torch.empty_like(scores).exponential_(generator=noise).log()
    top = g.max(-1, keepdim=True).values
    v = above.unsqueeze(-1) - g + torch.log1p(-torch.exp(g - top))
    keys = above.unsqueeze(-1) - v.clamp(min=0) - torch.log1p(torch.exp(-v.abs()))
    return keys.masked_fill(scores <= MASKED / 2, MASKED)


@torch.no_grad()
def beam_search(
    model: GeneratorModel,
    history: History,
    request: Request,
    width: int,
    allowed: Tensor | None = None,
    noise: torch.Generator | None = None,
) -> Beam:
    """The best `width` items of each of B users. allowed: bool [B, N], all items when None.

    With width at least the number of nodes on every level this is exhaustive scoring. noise: on the model's device; the
    items are then drawn from the model without replacement instead, in the order in which they were drawn; `scores`
    stay their log-probabilities. Where `allowed` leaves items out, a draw that would have led there is drawn again
    below the last allowed node.
    """
    parts = passes(history, width)
    if len(parts) > 1:
        found = [
            beam_search(model, history.of(p), request.of(p), width, None if allowed is None else allowed[p], noise)
            for p in parts
        ]
        back = torch.cat(parts).argsort()
        return Beam(torch.cat([f.items for f in found])[back], torch.cat([f.scores for f in found])[back])
    walk = Walk(model, history, request)
    scores = keys = torch.zeros(walk.nodes.shape, device=walk.nodes.device)
    if allowed is not None:  # how many allowed leaves lie before each leaf
        before = F.pad(allowed[:, model.leaf_items].cumsum(1, dtype=torch.int32), (1, 0))
    for level in range(model.config.levels):
        values = walk.scores() + scores.unsqueeze(-1)  # [B, W, C]
        start, width_here = getattr(model, f"first_{level}")[walk.nodes], values.shape[-1]
        if allowed is not None:
            leaf = getattr(model, f"leaf_start_{level + 1}")
            child = (start.unsqueeze(-1) + torch.arange(width_here, device=start.device)).flatten(1)
            child = child.clamp(max=len(leaf) - 2)
            legal = before.gather(1, leaf[child + 1]) > before.gather(1, leaf[child])
            values = values.masked_fill(~legal.view_as(values), MASKED)
        wanted = values if noise is None else perturbed(values, keys, noise)
        keys, choice = wanted.flatten(1).topk(min(width, values[0].numel()), 1)
        scores = values.flatten(1).gather(1, choice)
        parent = choice // width_here
        dead = scores <= MASKED / 2
        nodes = (start.gather(1, parent) + choice % width_here).masked_fill(dead, 0)
        if level < model.config.levels - 1:
            walk.descend(parent, nodes)
    items = model.leaf_items[nodes].masked_fill(dead, -1)
    return Beam(items, scores.masked_fill(dead, -torch.inf))


@torch.no_grad()
def score_items(model: GeneratorModel, history: History, request: Request, items: Tensor) -> Tensor:
    """Exact log-probabilities of given items, int64 rows [B, M], -1 where padded -> float [B, M], -inf there."""
    parts = passes(history, items.shape[1])
    if len(parts) > 1:
        found = [score_items(model, history.of(p), request.of(p), items[p]) for p in parts]
        return torch.cat(found)[torch.cat(parts).argsort()]
    rows = items.clamp(min=0)
    walk = Walk(model, history, request)
    total, parent = torch.zeros(rows.shape, device=rows.device), torch.zeros_like(rows)
    for level in range(model.config.levels):
        above, node = model.path[rows, level], model.path[rows, level + 1]
        slot = node - getattr(model, f"first_{level}")[above]
        total = total + walk.scores().expand(-1, rows.shape[1], -1).gather(-1, slot.unsqueeze(-1))[..., 0]
        if level < model.config.levels - 1:
            walk.descend(parent, node)
            parent = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    return total.masked_fill(items < 0, -torch.inf)
