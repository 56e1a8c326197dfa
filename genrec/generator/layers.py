"""Transformer blocks of the fast thinker: pre-norm, with a learned bias per head and distance in history."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MASKED = -1e9


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
        return self.o(x.transpose(-2, -3).flatten(-2))

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.kv(memory).chunk(2, -1)
        return self.split(keys), self.split(values)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        return self.join(F.scaled_dot_product_attention(self.split(self.q(x)), keys, values, attn_mask=bias))


class FeedForward(nn.Module):
    """d -> d_ff -> d with ReLU and no biases, as in T5, on a normalised input."""

    def __init__(self, d: int, d_ff: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d, bias=False)
        self.up, self.down = nn.Linear(d, d_ff, bias=False), nn.Linear(d_ff, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(self.norm(x))))


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


@dataclass
class LayerState:
    """What one decoder layer remembers during a search for B users.

    cross: keys and values of the history, [B, H, T, dh]. prefix: of [BOS, scenario, instruction], [B, H, 3, dh].
    beam: of the codes so far, [B, W, codes so far, d], or None before the first code.
    """

    cross: tuple[Tensor, Tensor]
    prefix: tuple[Tensor, Tensor]
    beam: tuple[Tensor, Tensor] | None = None

    def reorder(self, parent: Tensor) -> None:
        """Keep, for every new beam, the past of the beam it grew from: parent, int64 [B, W]."""
        if self.beam is not None:
            offset = torch.arange(len(parent), device=parent.device)[:, None] * self.beam[0].shape[1]
            k, v = (t.flatten(0, 1).index_select(0, (parent + offset).flatten()) for t in self.beam)
            self.beam = (k.unflatten(0, parent.shape), v.unflatten(0, parent.shape))


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

    def step(self, x: Tensor, state: LayerState, bias: Tensor) -> Tensor:
        """One more code for W beams per user: x [B, W, d], the beams as query positions; bias [B, H, 1, T]."""
        attention = self.self_attention
        y = self.self_norm(x)
        q = attention.q(y)
        k, v = attention.kv(y).unsqueeze(2).chunk(2, -1)  # [B, W, 1, d]
        if state.beam is not None:
            k, v = torch.cat([state.beam[0], k], 2), torch.cat([state.beam[1], v], 2)
        state.beam = (k, v)
        heads = (attention.heads, -1)
        to_prefix = attention.split(q) @ state.prefix[0].transpose(-1, -2)  # [B, H, W, 3]
        to_codes = (q.unsqueeze(2) * k).unflatten(-1, heads).sum(-1).permute(0, 3, 1, 2)  # [B, H, W, codes so far]
        scale = (q.shape[-1] // attention.heads) ** -0.5
        weight = F.softmax(torch.cat([to_prefix, to_codes], -1) * scale, -1)
        n = to_prefix.shape[-1]
        of_codes = (weight[..., n:].permute(0, 2, 3, 1).unsqueeze(-1) * v.unflatten(-1, heads)).sum(2)
        of_prefix = (weight[..., :n] @ state.prefix[1]).transpose(1, 2)  # both [B, W, H, dh]
        x = x + attention.o((of_prefix + of_codes).flatten(-2))
        x = x + self.cross_attention(self.cross_norm(x), *state.cross, bias)
        return x + self.feed_forward(x)
