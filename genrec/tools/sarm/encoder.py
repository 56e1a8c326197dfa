"""The semantic anchor encoder of SARM (papers/tools.md 2.2): two token streams, a gate, a small encoder.

    k_i = W_K e'_i, v_i = W_V e'_i
    a_i = sigmoid(RMSNorm(h_i) . RMSNorm(k_i) / sqrt(d))       one number per position
    h'_i = h_i + a_i v_i
    [CLS] h'_1 ... h'_n -> 4 encoder layers, one head, rotary positions -> h_CLS = the output at [CLS]
    h_TAR = CrossAttention(q = embedding of the item's identifier, K = V = all outputs)

From the notes on the paper: all of the above. Ours: widths, pre-norm, and what the ablations put in the place of the
gate (`base`: h alone; `domain`: v alone).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from genrec.tools.sarm.tokens import PAD

STREAMS = ("base", "domain", "gate")


def rotate(x: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) on [..., T, d], d even: pair (i, i + d/2) turned by t / 10000^(2i/d)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] / 10_000 ** (torch.arange(half, device=x.device) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class Block(nn.Module):
    """One bidirectional layer with one head and rotary positions, pre-norm. positions: false for a set."""

    def __init__(self, d: int, positions: bool = True) -> None:
        super().__init__()
        self.positions = positions
        self.norm, self.norm_ff = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.o = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [K, T, d]; mask bool [K, T], true where there is something."""
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        q, k = (rotate(q), rotate(k)) if self.positions else (q, k)
        found = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
        x = x + self.o(found)
        return x + self.down(nn.functional.gelu(self.up(self.norm_ff(x))))


class Gate(nn.Module):
    """The dual-token gate."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.k, self.v = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.norm_h, self.norm_k = nn.RMSNorm(d), nn.RMSNorm(d)

    def forward(self, h: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """h, e [..., d] -> (h', a [...])."""
        a = torch.sigmoid((self.norm_h(h) * self.norm_k(self.k(e))).sum(-1) / math.sqrt(h.shape[-1]))
        return h + a[..., None] * self.v(e), a


class AnchorEncoder(nn.Module):
    """Token ids to h_CLS and all outputs."""

    def __init__(self, base: int, domain: int, d: int, layers: int = 4, stream: str = "gate") -> None:
        super().__init__()
        self.stream = stream
        self.base, self.domain = nn.Embedding(base, d, padding_idx=PAD), nn.Embedding(domain, d, padding_idx=PAD)
        for table in (self.base, self.domain):
            nn.init.normal_(table.weight, std=0.05)
        self.cls = nn.Parameter(0.05 * torch.randn(d))
        self.gate = Gate(d)
        self.blocks = nn.ModuleList(Block(d) for _ in range(layers))
        self.norm = nn.LayerNorm(d)

    def forward(self, base: Tensor, domain: Tensor) -> tuple[Tensor, Tensor]:
        """int [K, T] each -> outputs [K, 1 + T, d], the first of [CLS]; mask bool [K, 1 + T]."""
        width = max(1, int((base != PAD).any(0).sum()))
        base, domain = base[:, :width].long(), domain[:, :width].long()
        if self.stream == "gate":
            x, _ = self.gate(self.base(base), self.domain(domain))
        else:
            x = self.base(base) if self.stream == "base" else self.gate.v(self.domain(domain))
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1)
        mask = nn.functional.pad(base != PAD, (1, 0), value=True)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x), mask


class IdentityAttention(nn.Module):
    """The identity-aware vector: one head, q from the identifier's embedding."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(d, d, bias=False) for _ in range(3))

    def forward(self, identity: Tensor, outputs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """identity [K, d], outputs [K, T, d] -> h_TAR [K, d], shares [K, T] and values [K, T, d] with h_TAR = shares
        times values."""
        logits = (self.q(identity)[:, None] * self.k(outputs)).sum(-1) / math.sqrt(identity.shape[-1])
        shares = torch.softmax(logits.masked_fill(~mask, -1e9), -1)
        values = self.v(outputs)
        return (shares[..., None] * values).sum(1), shares, values
