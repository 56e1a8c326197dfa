"""The sequence encoder of EBR, shared by all clusters, and the clusters' prompts.

From the paper (2302.02657): the backbone is SASRec's causal transformer; cluster k has a trainable prompt t_k, which
multiplies every token, e_u^k = Transformer([s_1 * t_k, ..., s_n * t_k]) (Hadamard product), or, as the variant it found
weak, is put before the sequence. Ours: pre-norm, prompts that start at 1 (the identity; the parameter is what is added
to it, so that weight decay leads back to 1), an un-prompted pass that feeds the intent head, item vectors that add a
projection of the item's words to its identifier's embedding.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genrec.tools.ebr.config import EBRConfig


class Block(nn.Module):
    """Causal self-attention and a feed-forward network, pre-norm, [B, T, d] -> [B, T, d]."""

    def __init__(self, d: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.p = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2).chunk(3, 1)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + drop(self.out(seen.transpose(1, 2).flatten(2)), self.p, self.training)
        return x + drop(self.down(F.gelu(self.up(self.norm2(x)))), self.p, self.training)


def drop(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout with one mask per sequence and feature, shared by its positions (Gal and Ghahramani 2016): far fewer
    random numbers than one per entry."""
    if not training or not p:
        return x
    keep = torch.rand(x.shape[0], 1, x.shape[2], device=x.device) >= p
    return x * (keep.to(x.dtype) / (1 - p))


class Encoder(nn.Module):
    """Histories to user vectors. content: float32 [N, C], fixed vectors of the items' words (C may be 0)."""

    content: Tensor

    def __init__(self, config: EBRConfig, content: np.ndarray, clusters: int) -> None:
        super().__init__()
        self.config, d = config, config.width
        self.register_buffer("content", torch.from_numpy(content).float(), persistent=False)
        self.items = nn.Embedding(len(content), d)
        self.words = nn.Linear(content.shape[1], d, bias=False) if content.shape[1] else None
        self.positions = nn.Embedding(config.max_history + 1, d)
        self.blocks = nn.ModuleList(Block(d, config.heads, config.dropout) for _ in range(config.layers))
        self.norm = nn.LayerNorm(d)
        self.prompts = None
        if config.prompt == "hadamard":
            self.prompts = nn.Parameter(torch.zeros(clusters, d))  # from the identity
        elif config.prompt == "prefix":  # no prompt is a token of its own: a norm of zeros has no useful gradient
            self.prompts = nn.Parameter(torch.empty(clusters + 1, d).normal_(std=0.02))
        self.intent = None if config.single else nn.Linear(d, clusters)
        for table in (self.items, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.clusters = clusters

    def vectors(self, rows: Tensor) -> Tensor:
        """Item vectors, which are both what goes in and what is scored: [..., d]."""
        found = self.items(rows)
        return found if self.words is None else found + self.words(self.content[rows])

    def prompt(self, clusters: Tensor) -> Tensor:
        """The prompt of each of these clusters [B], [B, 1, d]; as a Hadamard product it is what sets it apart from no
        prompt, which is zero."""
        assert self.prompts is not None
        table = F.pad(self.prompts, (0, 0, 0, 1)) if self.config.prompt == "hadamard" else self.prompts
        return table[clusters].unsqueeze(1)

    def forward(self, rows: Tensor, prompts: Tensor) -> Tensor:
        """User vectors after every event, [B, T, d]. rows: [B, T] catalogue rows, padded at the end with any; prompts:
        [B] cluster numbers, or `clusters` for none."""
        return self.encode(self.vectors(rows), prompts)

    def encode(self, x: Tensor, prompts: Tensor) -> Tensor:
        """The same from item vectors [B, T, d]."""
        prefix = self.config.prompt == "prefix"
        x = x * self.config.width**0.5
        x = x + self.positions.weight[: x.shape[1]]
        if self.config.prompt == "hadamard":
            x = x * (1 + self.prompt(prompts))
        elif prefix:
            x = torch.cat([self.config.width**0.5 * self.prompt(prompts), x], 1)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 1:] if prefix else x)
