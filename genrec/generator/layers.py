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
        return self.o(x.transpose(-2, -3).flatten(-2))

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
        spare = keys.shape[-2] - bias.shape[-1]
        bias = F.pad(bias, (0, spare), value=MASKED) if spare else bias
        return self.join(F.scaled_dot_product_attention(self.split(self.q(x)), keys, values, attn_mask=bias))


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


@dataclass
class LayerState:
    """What one decoder layer remembers during a search for B users.

    cross: keys and values of the history, [B, H, T, dh]. prefix: of [BOS, scenario, instruction], [B, H, 3, dh].
    codes: of each level's code so far, [B, W, d].
    """

    cross: tuple[Tensor, Tensor]
    prefix: tuple[Tensor, Tensor]
    codes: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def reorder(self, parent: Tensor) -> None:
        """Keep, for every new beam, the past of the beam it grew from: parent, int64 [B, W]."""
        if self.codes:
            offset = torch.arange(len(parent), device=parent.device)[:, None] * self.codes[0][0].shape[1]
            at = (parent + offset).flatten()
            self.codes = [
                tuple(t.flatten(0, 1).index_select(0, at).unflatten(0, parent.shape) for t in kv) for kv in self.codes
            ]


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

    def step(self, x: Tensor, q: Tensor, kv: Tensor, state: LayerState, bias: Tensor) -> Tensor:
        """One more code for W beams per user, the beams as query positions: x [B, W, d] with its queries, keys and
        values; bias [B, H, 1, T]. Returns [B, W, d]."""
        attention = self.self_attention
        heads = (attention.heads, -1)
        k, v = kv.chunk(2, -1)
        state.codes.append((k, v))
        # positions come first, so that the softmax over a handful of them runs along beams and heads
        to_prefix = (attention.split(q) @ state.prefix[0].transpose(-1, -2)).permute(3, 0, 2, 1)
        to_codes = [(q * k).unflatten(-1, heads).sum(-1) for k, _ in state.codes]
        scale = (q.shape[-1] // attention.heads) ** -0.5
        weight = F.softmax(torch.cat([to_prefix, torch.stack(to_codes)]) * scale, 0)  # [3 + codes so far, B, W, H]
        n = len(to_prefix)
        seen = (weight[:n].permute(1, 3, 2, 0) @ state.prefix[1]).transpose(1, 2)  # [B, W, H, dh]
        for w, (_, v) in zip(weight[n:], state.codes, strict=True):
            seen = seen + w.unsqueeze(-1) * v.unflatten(-1, heads)
        x = x + attention.o(seen.flatten(-2))
        x = x + self.cross_attention(self.cross_norm(x), *state.cross, bias)
        return x + self.feed_forward(x)
