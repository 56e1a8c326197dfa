"""The rankers that MARM and SARM are compared with, in one form: `model(batch, cached, present)` gives logits [B, C, T]
and states [B, C, L - 1, d] to cache.

    rates      logistic regression on the dense features
    mmoe       identifiers of user and item and the dense features, into MMoE; no history
    din        DIN (Zhou et al. 2018): an activation unit over the same history, unnormalised, as published
    attention  the stack of attention.py: with one layer target attention; with more MARM, or, trained over whole
               sequences with gradients through every layer, the full causal transformer
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genrec.errors import GenrecError, check_least
from genrec.tools.ranking.attention import Stack
from genrec.tools.ranking.heads import MMoE, blank
from genrec.tools.ranking.task import Batch

KINDS = ("rates", "mmoe", "din", "attention")
UNIT = 36  # hidden width of DIN's activation unit, as published


@dataclass(frozen=True)
class RankerConfig:
    """A ranker. users, items, tasks, dense: sizes of the data; d: width; n: events of history; layers, heads, top: of
    the stack; dropout: of what the heads read beside the dense features; unknown: share of the identifiers hidden from
    the heads in training, so that the vector of the unknown item is learned."""

    kind: str
    users: int
    items: int
    tasks: int
    dense: int
    d: int = 32
    n: int = 100
    layers: int = 1
    heads: int = 2
    top: int = 0
    dropout: float = 0.2
    unknown: float = 0.02
    blank: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise GenrecError(f"unknown ranker {self.kind!r}; there are: {', '.join(KINDS)}")
        check_least(self, dict.fromkeys(("users", "items", "tasks", "dense", "d", "n", "layers", "heads"), 1))
        if self.d % self.heads:
            raise GenrecError(f"d is {self.d}; it must be a multiple of the {self.heads} heads")
        if self.top < 0:
            raise GenrecError(f"top is {self.top}; it must be at least 0")
        for name in ("dropout", "unknown", "blank"):
            if not 0 <= getattr(self, name) < 1:
                raise GenrecError(f"{name} is {getattr(self, name)}; it must be at least 0 and less than 1")


class RankerModel(nn.Module):
    """See the module's text. Rows of the tables past the last user and item stand for unknown ones."""

    def __init__(self, config: RankerConfig) -> None:
        super().__init__()
        c = self.config = config
        if c.kind == "rates":
            self.linear = nn.Linear(c.dense, c.tasks)
            return
        self.user, self.item = nn.Embedding(c.users + 1, c.d), nn.Embedding(c.items + 1, c.d)
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=0.05)
        self.drop = nn.Dropout(c.dropout)
        width = 2 * c.d + c.dense
        if c.kind == "din":
            self.feedback = nn.Linear(c.tasks, c.d, bias=False)
            self.unit = nn.Sequential(nn.Linear(4 * c.d, UNIT), nn.PReLU(), nn.Linear(UNIT, 1))
            width += c.d
        if c.kind == "attention":
            self.stack = Stack(c.d, c.layers, c.heads, c.n, c.tasks, c.top)
            width += self.stack.out * c.d
        self.heads = MMoE(width, c.tasks)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def hidden(self, rows: Tensor) -> Tensor:
        """Item rows, some of them made unknown in training."""
        if not self.training or not self.config.unknown:
            return rows
        return torch.where(torch.rand(rows.shape, device=rows.device) < self.config.unknown, self.config.items, rows)

    def forward(
        self, batch: Batch, cached: Tensor | None = None, present: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, C, T], and states for the cache. cached, present: see Stack.memory."""
        none = batch.dense.new_zeros(*batch.item.shape, 0, self.config.d)
        if self.config.kind == "rates":
            return self.linear(batch.dense), none
        if self.config.kind == "mmoe":
            return self.read(batch.user, batch.item, batch.dense), none
        x, level0, there = self.item(batch.item), self.item(batch.history), batch.events >= 0
        if self.config.kind == "din":
            found = self.activate(x, level0 + self.feedback(batch.feedback), there)
            return self.read(batch.user, batch.item, batch.dense, found), none
        found, states, _ = self.stack.targets(x, self.stack.memory(level0, batch.feedback, cached, present), there)
        return self.read(batch.user, batch.item, batch.dense, found), states

    def read(self, user: Tensor, item: Tensor, dense: Tensor, *found: Tensor) -> Tensor:
        """Logits [B, C, T] of the heads. Everything random happens here, so a state to cache is what it will be at a
        request. found: what the history brought, [B, C, width]."""
        x = self.item(self.hidden(item))
        parts = [self.user(user)[:, None].expand_as(x), x]
        parts += [blank(f, self.config.blank, self.training) for f in found]
        return self.heads(torch.cat([*map(self.drop, parts), dense], -1))

    def activate(self, x: Tensor, events: Tensor, there: Tensor) -> Tensor:
        """DIN's weighted sum of the history, [B, C, d], over the root of its length."""
        q = x[:, :, None].expand(-1, -1, events.shape[1], -1)
        k = events[:, None].expand_as(q)
        weights = self.unit(torch.cat([q, k, q - k, q * k], -1)).squeeze(-1) * there[:, None]
        size = there.sum(-1).clamp(min=1).float().sqrt()[:, None, None]
        return weights @ events / size

    def sequences(
        self, user: Tensor, item: Tensor, dense: Tensor, feedback: Tensor, known: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Whole sequences at once (kind attention): user [B], item [B, T], dense [B, T, F], feedback [B, T, tasks],
        known as of Stack.sequence -> logits [B, T, tasks], states [B, T, L - 1, d]."""
        found, states = self.stack.sequence(self.item(item), feedback, known)
        return self.read(user, item, dense, found), states
