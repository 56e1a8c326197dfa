"""A stack of target-attention layers that reads a history in two ways with the same weights.

`targets`: candidates against given states of the past, layer by layer (MARM, papers/tools.md 3.2 and 7.3; with one
layer it is DIN's idea with softmax attention). `sequence`: a whole sequence at once, as a causal transformer. Position
i attends to the n events before it, not to itself nor to events of its own moment, in both, so with exact states the
two give the same numbers.

Layer l: o = MHA(q = norm(h), K = V = norm(S^l + feedback)); h <- h + o; h <- h + FFN(norm(h)). The ranker reads o of
every layer; nothing reads the last h, so the last layer has no feed-forward (with one, and h read too, validation GAUC
on ML-100K is no better: .670, without .674). Pre-norm, the learned empty key (what attends to nothing, as with an empty
history, finds it) and the bias by distance are ours; so is feedback that joins at reading: it is not known yet when the
state of an event is made, and it is when the event is history.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

MASKED = -1e9
EXACT = 4  # distances with a bias of their own; beyond, one for each doubling
BUCKETS = 20


def distance_buckets(distance: Tensor) -> Tensor:
    """int64 bucket of each distance 1, 2, ... in events."""
    far = EXACT - 1 + (torch.log2(distance.clamp(min=1).double()) - math.log2(EXACT) + 1e-9).floor().long() + 1
    return torch.where(distance <= EXACT, distance - 1, far).clamp(0, BUCKETS - 1)


class Layer(nn.Module):
    """One layer, as in the module's text. missing: what is added to an event's embedding where its state is missing;
    last: without a feed-forward."""

    def __init__(self, d: int, heads: int, last: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_kv = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.kv, self.o = (nn.Linear(d, k * d, bias=False) for k in (1, 2, 1))
        hidden = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.ReLU(), nn.Linear(4 * d, d))
        self.feed: nn.Sequential | None = None if last else hidden
        self.empty: Tensor = nn.Parameter(torch.zeros(d))
        self.missing: Tensor = nn.Parameter(torch.zeros(d))
        # Heads begin from looking at the newest events alone to looking everywhere alike.
        steps = torch.linspace(3, 0, heads)[:, None] * torch.log2(1 + torch.arange(BUCKETS).float())
        self.near: Tensor = nn.Parameter(-steps)

    def split(self, x: Tensor) -> Tensor:
        """[B, T, d] -> [B, H, T, d / H]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def seen(self, memory: Tensor) -> Tensor:
        """What is attended to, [B, 1 + n, d], of memory [B, n, d]; the empty one first."""
        return self.norm_kv(torch.cat([self.empty.expand(len(memory), 1, -1), memory], 1))

    def bias(self, buckets: Tensor) -> Tensor:
        """[H, ..., 1 + n] of buckets of distances [..., n]; the empty key has none."""
        return nn.functional.pad(self.near[:, buckets], (1, 0))

    def logits(self, x: Tensor, seen: Tensor, bias: Tensor) -> Tensor:
        """Attention logits [B, H, C, 1 + n] of queries x [B, C, d]; bias [B or 1, H or 1, C or 1, 1 + n].

        q (W s)' = (q W) s': the product of candidates and W costs C d^2, that of the history and W n d^2, but then each
        head has a query of width d. So few candidates take the projection, as in training, where there is one."""
        q, weight = self.split(self.q(self.norm_q(x))), self.kv.weight[: x.shape[-1]]
        if self.few(x):
            wide = q @ weight.unflatten(0, (self.heads, -1))
            found = (wide.flatten(1, 2) @ seen.mT).unflatten(1, (self.heads, -1))
        else:
            found = q @ self.split(seen @ weight.T).mT
        return found / math.sqrt(q.shape[-1]) + bias

    def attend(self, x: Tensor, seen: Tensor, bias: Tensor) -> Tensor:
        """o of queries x [B, C, d]."""
        if self.few(x):
            shares, weight = torch.softmax(self.logits(x, seen, bias), -1), self.kv.weight[x.shape[-1] :]
            wide = (shares.flatten(1, 2) @ seen).unflatten(1, (self.heads, -1))
            found = wide @ weight.unflatten(0, (self.heads, -1)).mT
        else:
            q, (keys, values) = self.q(self.norm_q(x)), self.kv(seen).chunk(2, -1)
            q, keys, values = self.split(q), self.split(keys), self.split(values)
            found = nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=bias)
        return self.o(found.transpose(1, 2).flatten(2))

    def few(self, x: Tensor) -> bool:
        """Whether wide queries are cheaper than projected keys, C (H - 1) < d."""
        return x.shape[1] * (self.heads - 1) < x.shape[2]

    def forward(self, x: Tensor, seen: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """(o, the next h), each [B, C, d]; of the last layer h + o."""
        o = self.attend(x, seen, bias)
        x = x + o
        return o, x if self.feed is None else x + self.feed(x)


class Stack(nn.Module):
    """L layers of width d over at most n events. tasks: of the feedback. top: events that each layer keeps of its own
    search (0: all), the newest first among equals: the per-layer GSU of papers/tools.md 3.2, exact here."""

    buckets: Tensor

    def __init__(self, d: int, layers: int, heads: int, n: int, tasks: int, top: int = 0) -> None:
        super().__init__()
        self.n, self.top = n, top
        self.register_buffer("buckets", distance_buckets(torch.arange(n + 1)).clamp(min=0), persistent=False)
        self.blocks = nn.ModuleList(Layer(d, heads, last=at == layers - 1) for at in range(layers))
        self.feedback = nn.Linear(tasks, d, bias=False)

    @property
    def layers(self) -> list[Layer]:
        return list(cast("Iterable[Layer]", self.blocks))

    @property
    def out(self) -> int:
        """Width of what comes out, in units of d: o of each layer."""
        return len(self.layers)

    def memory(self, level0: Tensor, feedback: Tensor, cached: Tensor | None, present: Tensor | None) -> list[Tensor]:
        """What each layer attends to, [B, n, d] each. level0: embeddings [B, n, d]; feedback [B, n, T]; cached: states
        [B, n, L - 1, d] of the levels above, no gradient; present: bool [B, n], false where there is no state (then the
        embedding and a learned vector stand in); None: nowhere."""
        told = self.feedback(feedback)
        out = [level0 + told]
        for at, layer in enumerate(self.layers[1:]):
            state = level0.detach() + layer.missing
            if cached is not None and present is not None:
                state = torch.where(present[..., None], cached[:, :, at], state)
            out.append(state + told)
        return out

    def targets(self, x: Tensor, memory: list[Tensor], there: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Candidates x [B, C, d] against the memory of a request, the newest event last; there: bool [B, n].

        Returns what the ranker reads, [B, C, L d]; the states of the levels 1 to L - 1, [B, C, L - 1, d]; and the
        biases of each layer, for `weights`.
        """
        n = memory[0].shape[1]
        masked = nn.functional.pad(~there, (1, 0))[:, None, None] * MASKED
        buckets = self.buckets[1 : n + 1].flip(0)
        outs, states, biases = [], [], []
        for layer, known in zip(self.layers, memory, strict=True):
            seen = layer.seen(known)
            bias = layer.bias(buckets)[None, :, None] + masked
            if 0 < self.top < n:
                bias = bias + self.unchosen(layer.logits(x, seen, bias))
            biases.append(bias)
            o, x = layer(x, seen, bias)
            outs.append(o)
            states.append(x)
        return torch.cat(outs, -1), self._kept(x, states[:-1]), biases

    def unchosen(self, logits: Tensor) -> Tensor:
        """MASKED where an event is not among the `top` of its candidate by the sum over heads of exp-free logits;
        [B, 1, C, 1 + n]. The empty key always stays."""
        mean = logits.detach().mean(1)[..., 1:]
        least = mean.topk(self.top, -1).values[..., -1:]
        return nn.functional.pad((mean < least) * MASKED, (1, 0))[:, None]

    def sequence(self, x: Tensor, feedback: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Whole sequences x [B, T, d], oldest first, as a causal transformer: (ranker's input [B, T, L d], states
        [B, T, L - 1, d]). known: int64 [B, T], how many events of its sequence each one may read (None: all before it).
        Positions beyond a shorter sequence may hold anything: nothing attends forward."""
        outs, states = [], []
        for o, state in self._causal(x, feedback, known, self.layers):
            outs.append(o)
            states.append(state)
        return torch.cat(outs, -1), self._kept(x, states[:-1])

    def states(self, x: Tensor, feedback: Tensor, known: Tensor | None = None) -> Tensor:
        """The states of `sequence` alone, [B, T, L - 1, d], by the first L - 1 layers."""
        return self._kept(x, [h for _, h in self._causal(x, feedback, known, self.layers[:-1])])

    def _causal(
        self, x: Tensor, feedback: Tensor, known: Tensor | None, layers: list[Layer]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """o and the next h of each layer; without any, no mask is made either."""
        if not layers:
            return
        steps = torch.arange(x.shape[1], device=x.device)
        distance = steps[:, None] - steps
        allowed = ((distance >= 1) & (distance <= self.n))[None]
        if known is not None:
            allowed = allowed & (steps < known[..., None])
        masked = nn.functional.pad(~allowed, (1, 0))[:, None] * MASKED
        buckets = self.buckets[distance.clamp(0, self.n)]
        told = self.feedback(feedback)
        for layer in layers:
            seen = layer.seen(x + told)
            bias = layer.bias(buckets)[None] + masked
            if 0 < self.top < self.n:
                bias = bias + self.unchosen(layer.logits(x, seen, bias))
            o, x = layer(x, seen, bias)
            yield o, x

    @staticmethod
    def _kept(x: Tensor, states: list[Tensor]) -> Tensor:
        return torch.stack(states, 2) if states else x.new_zeros(*x.shape[:2], 0, x.shape[2])

    @torch.no_grad()
    def weights(self, x: Tensor, memory: list[Tensor], there: Tensor) -> Tensor:
        """How much each candidate attends to each event, mean over heads, [B, C, L, n]; rows sum to 1 less what goes to
        the empty key."""
        _, states, biases = self.targets(x, memory, there)
        inputs = [x, *states.unbind(2)]
        found = [
            torch.softmax(layer.logits(h, layer.seen(known), bias), -1).mean(1)[..., 1:]
            for layer, known, h, bias in zip(self.layers, memory, inputs, biases, strict=True)
        ]
        return torch.stack(found, 2)
