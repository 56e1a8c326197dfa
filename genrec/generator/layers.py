"""Transformer blocks of the fast thinker: pre-norm, with a learned bias per head and distance in history."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MASKED = -1e9
LANES = 16  # a softmax over a number of keys that is no multiple of this takes up to ten times longer on a CPU


class LockedDropout(nn.Module):
    """Dropout with one mask per first-axis entry and feature, shared by the axes between (variational
    dropout, Gal and Ghahramani 2016): regularises like dropout and draws far fewer random numbers."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        shape = (x.shape[0], *([1] * (x.dim() - 2)), x.shape[-1])
        keep = torch.rand(shape, device=x.device) >= self.p
        return x * (keep.to(x.dtype) / (1 - self.p))


class Attention(nn.Module):
    """Multi-head attention; heads split as [B, H, T, d / H]."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.o = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.kv = nn.Linear(d, 2 * d, bias=False)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)

    def join(self, x: Tensor) -> Tensor:
        return x.transpose(-2, -3).flatten(-2)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of memory [B, T, d]; in searches with zeros up to a multiple of LANES positions, which
        `forward` masks (in training the copies would cost more than they save)."""
        kv = self.kv(memory)
        if not torch.is_grad_enabled():
            kv = F.pad(kv, (0, 0, 0, -memory.shape[-2] % LANES))
        keys, values = kv.chunk(2, -1)
        return self.split(keys), self.split(values)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """x: [..., Q, d]; keys, values: of `keys_values`; bias: [..., 1 or H, 1 or Q, T], added to the logits."""
        return self.o(self.attend(self.q(x), keys, values, bias))

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """As `forward`, without the projections of queries and outputs."""
        spare = keys.shape[-2] - bias.shape[-1]
        bias = F.pad(bias, (0, spare), value=MASKED) if spare else bias
        return self.join(F.scaled_dot_product_attention(self.split(q), keys, values, attn_mask=bias))


class FeedForward(nn.Module):
    """d -> d_ff -> d with ReLU and no biases, as in T5, on a normalised input."""

    def __init__(self, d: int, d_ff: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d, bias=False)
        self.up, self.down = nn.Linear(d, d_ff, bias=False), nn.Linear(d_ff, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(self.norm(x)), inplace=True))


class EncoderLayer(nn.Module):
    """Self-attention over the history, causal through the bias, and a feed-forward network."""

    def __init__(self, d: int, heads: int, d_ff: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d, bias=False)
        self.attention = Attention(d, heads)
        self.feed_forward = FeedForward(d, d_ff)
        self.drop = LockedDropout(dropout)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.drop(self.attention(y, *self.attention.keys_values(y), bias))
        return x + self.drop(self.feed_forward(x))


@dataclass(frozen=True)
class Grid:
    """Beams of B users as the R rows of one matrix, for products with weights, and as B x V places, for attention.

    slots: int64 [R], b * V + v of each row; None where all B x V places are taken.
    """

    users: int
    beams: int
    slots: Tensor | None

    def places(self, x: Tensor) -> Tensor:
        """[R, d] -> [B, V, d], zeros where no beam is."""
        if self.slots is not None:
            x = x.new_zeros(self.users * self.beams, x.shape[1]).index_copy_(0, self.slots, x)
        return x.view(self.users, self.beams, -1)

    def rows(self, x: Tensor) -> Tensor:
        """[B, V, d] -> [R, d]."""
        x = x.flatten(0, 1)
        return x if self.slots is None else x.index_select(0, self.slots)


@dataclass
class LayerState:
    """What one decoder layer remembers during a search for B users.

    cross: keys and values of the history, [B, H, T, dh]. prefix: of [BOS, scenario, instruction], [B, H, 3, dh].
    codes: keys and values of each level's code so far, [R, 2 d].
    """

    cross: tuple[Tensor, Tensor]
    prefix: tuple[Tensor, Tensor]
    codes: list[Tensor] = field(default_factory=list)


class DecoderLayer(nn.Module):
    """Self-attention over prefix and codes, cross-attention over the history, feed-forward network."""

    def __init__(self, d: int, heads: int, d_ff: int, dropout: float) -> None:
        super().__init__()
        self.self_norm, self.cross_norm = nn.LayerNorm(d, bias=False), nn.LayerNorm(d, bias=False)
        self.self_attention, self.cross_attention = Attention(d, heads), Attention(d, heads)
        self.feed_forward = FeedForward(d, d_ff)
        self.drop = LockedDropout(dropout)

    def forward(self, x: Tensor, causal: Tensor, cross: tuple[Tensor, Tensor], bias: Tensor, last: int) -> Tensor:
        """x: [B, Q, S, d], Q requests of B users with S tokens each; causal: [S, S]; bias: [B, H, Q, T].

        Returns the outputs of the `last` tokens, [B, Q, last, d].
        """
        y = self.self_norm(x)
        keys, values = self.self_attention.keys_values(y)
        x = x[:, :, -last:]
        x = x + self.drop(self.self_attention(y[:, :, -last:], keys, values, causal[-last:]))
        bias = bias.unsqueeze(3).expand(-1, -1, -1, last, -1).flatten(2, 3)
        y = self.cross_attention(self.cross_norm(x).flatten(1, 2), *cross, bias)
        x = x + self.drop(y.unflatten(1, (-1, last)))
        return x + self.drop(self.feed_forward(x))

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the self-attention makes of tokens x [..., d]: queries [..., d]; keys and values [..., 2 d]."""
        y = self.self_norm(x)
        return self.self_attention.q(y), self.self_attention.kv(y)

    def step(self, x: Tensor, q: Tensor, kv: Tensor, state: LayerState, grid: Grid, bias: Tensor) -> Tensor:
        """One more code of R beams: x [R, d] with its queries, keys and values; bias [B, H, 1, T]. Returns [R, d]."""
        attention, n = self.self_attention, state.prefix[0].shape[2]
        heads = (attention.heads, -1)
        state.codes.append(kv)
        past = [codes.chunk(2, -1) for codes in state.codes]
        # positions come first, so that the softmax over a handful of them runs along beams and heads
        to_prefix = attention.split(grid.places(q)) @ state.prefix[0].transpose(-1, -2)  # [B, H, V, 3]
        to_prefix = grid.rows(to_prefix.transpose(1, 2).flatten(2)).unflatten(-1, (-1, n)).movedim(-1, 0)
        to_codes = torch.stack([(q * k).unflatten(-1, heads).sum(-1) for k, _ in past])
        scale = (q.shape[-1] // attention.heads) ** -0.5
        weight = F.softmax(torch.cat([to_prefix, to_codes]) * scale, 0)  # [3 + codes so far, R, H]
        of_prefix = grid.places(weight[:n].movedim(0, -1).flatten(1)).unflatten(-1, (-1, n)).transpose(1, 2)
        seen = grid.rows(attention.join(of_prefix @ state.prefix[1])).unflatten(-1, heads)
        for w, (_, v) in zip(weight[n:], past, strict=True):
            seen = seen + w.unsqueeze(-1) * v.unflatten(-1, heads)
        x = x + attention.o(seen.flatten(-2))
        attention = self.cross_attention
        q = grid.places(attention.q(self.cross_norm(x)))
        x = x + attention.o(grid.rows(attention.attend(q, *state.cross, bias)))
        return x + self.feed_forward(x)
