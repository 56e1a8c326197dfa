"""SARM's ranker and its arms (papers/tools.md 2.2, 2.3): what an item brings besides its identifier is a setting.

    none     identifiers, dense features and target attention over the history's identifiers: the base of all arms
    tags     + the item's categories;  sids  + its semantic ID;  text  + a frozen text vector
    learned  + two learned vectors in the place of the bank's: the serving graph of SARM without SARM, auxiliary loss
             or norms, so that it costs no more than it must
    anchor   + h_CLS, and with `target` h_TAR, and with `user_side` h_UIN: SARM

y = MMoE([h_CLS, h_TAR, h_UIN, h_rank]); h_UIN = mean(Transformer(h_CLS of the last m items)), from the bank, without
gradient; L = L_rec + lambda L_aux, L_aux the main task's BCE of MLP([h_CLS, h_TAR]). From the notes: these. Ours:
lambda 0.1, m, widths, the base's own history, feedback added to the user side as in the base, and items made unknown
at random in training (`unknown`), which a new item needs: a hidden item has neither identifier nor rates, for the
identity attention and the ranker alike, in all arms.

The bank holds h_CLS and h_TAR of every item and is all that scoring reads: `score` has no way to the encoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from genrec.errors import GenrecError, check_least
from genrec.tools.ranking.attention import Stack
from genrec.tools.ranking.heads import MMoE, blank
from genrec.tools.ranking.task import Batch, item_columns
from genrec.tools.sarm.encoder import STREAMS, AnchorEncoder, Block, IdentityAttention

SIDES = ("none", "tags", "sids", "text", "learned", "anchor")
LAYERS, HEADS = 4, 2  # of the anchor encoder, as in the paper; of the base's target attention


@dataclass(frozen=True)
class SARMModelConfig:
    """users, items, tasks, dense: sizes of the data; side: see the module's text; width: of the side's features (tags,
    text) or the codes of each level (sids); base_tokens, domain_tokens: vocabularies; stream: see encoder.py;
    history: whether the base attends to the history."""

    users: int
    items: int
    tasks: int
    dense: int
    side: str = "anchor"
    width: int = 0
    levels: int = 0
    base_tokens: int = 2
    domain_tokens: int = 2
    stream: str = "gate"
    target: bool = True
    user_side: bool = True
    frozen: bool = False
    history: bool = True
    d: int = 32
    n: int = 50
    m: int = 20
    dropout: float = 0.2
    unknown: float = 0.1
    blank: float = 0.5

    def __post_init__(self) -> None:
        if self.side not in SIDES or self.stream not in STREAMS:
            raise GenrecError(f"unknown side {self.side!r} or stream {self.stream!r}; there are: {SIDES} and {STREAMS}")
        check_least(self, dict.fromkeys(("users", "items", "tasks", "dense", "n", "m"), 1))
        if self.d < 2 or self.d % HEADS or self.m > self.n:
            raise GenrecError(f"d is {self.d}, m {self.m}: d must be a multiple of {HEADS}, and m at most n ({self.n})")
        for name in ("dropout", "unknown", "blank"):
            if not 0 <= getattr(self, name) < 1:
                raise GenrecError(f"{name} is {getattr(self, name)}; it must be at least 0 and less than 1")


@dataclass(frozen=True)
class Bank:
    """The memory bank, a row per item and one of zeros at the end for padding. ids: int64 [R + 1], the identifier's row
    in the model's table (the last one for an item it does not know); cls, tar: [R + 1, d]."""

    ids: Tensor
    cls: Tensor
    tar: Tensor

    def __len__(self) -> int:
        return len(self.ids) - 1

    def to(self, device: torch.device | str) -> Bank:
        return Bank(*(t.to(device) for t in vars(self).values()))

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.ids, self.cls, self.tar))


class SARMModel(nn.Module):
    """See the module's text. `encode` makes the bank's rows; `score` reads them."""

    features: Tensor
    of_item: Tensor

    def __init__(self, config: SARMModelConfig, features: np.ndarray | None = None) -> None:
        """features: of the side, [items, width] float (tags, text) or [items, levels] int (sids)."""
        super().__init__()
        c = self.config = config
        self.user, self.item = nn.Embedding(c.users + 1, c.d), nn.Embedding(c.items + 1, c.d)
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=0.05)
        self.drop = nn.Dropout(c.dropout)
        known = torch.zeros(c.dense, dtype=torch.bool)
        known[item_columns(c.tasks)] = True
        self.register_buffer("of_item", known, persistent=False)
        width = 2 * c.d + c.dense
        if c.history:
            self.stack = Stack(c.d, 1, HEADS, c.n, c.tasks)
            width += self.stack.out * c.d
        if c.side in ("tags", "sids", "text"):
            shape = (c.items, c.levels if c.side == "sids" else c.width)
            kind = torch.int64 if c.side == "sids" else torch.float32
            found = torch.zeros(shape, dtype=kind) if features is None else torch.from_numpy(features).to(kind)
            if tuple(found.shape) != shape:
                raise ValueError(f"features must be {shape}, not {tuple(found.shape)}")
            self.register_buffer("features", torch.cat([found, torch.zeros(1, shape[1], dtype=kind)]))
            if c.side == "sids":
                codes = [nn.Embedding(c.width, c.d) for _ in range(c.levels)]
                for table in codes:
                    nn.init.normal_(table.weight, std=0.05)  # as of the identifiers
            self.side: nn.Module = nn.ModuleList(codes) if c.side == "sids" else nn.Linear(c.width, c.d)
            self.side_norm = nn.LayerNorm(c.d)  # as h_CLS has, so that no arm differs in scale
            width += c.d
        if c.side in ("learned", "anchor"):
            width += c.d * (1 + c.target + c.user_side)
            if c.user_side:
                self.user_layer, self.user_norm = Block(c.d), nn.LayerNorm(c.d)
                self.told = nn.Linear(c.tasks, c.d, bias=False)
        if c.side == "learned":
            self.table = nn.Embedding(c.items + 1, 2 * c.d)
            nn.init.normal_(self.table.weight, std=0.05)
        if c.side == "anchor":
            self.encoder = AnchorEncoder(c.base_tokens, c.domain_tokens, c.d, LAYERS, c.stream)
            self.identity = IdentityAttention(c.d)
            self.aux = nn.Sequential(nn.Linear(2 * c.d, 64), nn.ReLU(), nn.Linear(64, 1))
            if c.frozen:
                self.encoder.requires_grad_(False)
        self.heads = MMoE(width, c.tasks)

    @property
    def device(self) -> torch.device:
        return self.item.weight.device

    def encode(self, base: Tensor, domain: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Anchors int [K, T] of items with the table's rows ids [K] -> h_CLS, h_TAR [K, d] (zeros where there is no
        target attention), shares [K, 1 + T], values [K, 1 + T, d]. Away from the request."""
        outputs, mask = self.encoder(base, domain)
        return self.identify(outputs, mask, ids)

    def identify(self, outputs: Tensor, mask: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same, of the encoder's outputs."""
        tar, shares, values = self.identity(self.item(ids), outputs, mask)
        return outputs[:, 0], tar if self.config.target else torch.zeros_like(tar), shares, values

    def score(
        self,
        batch: Batch,
        bank: Bank,
        cls: Tensor | None = None,
        tar: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, C, T]. In training, cls, tar: [B, C, d] of the candidates in the place of the bank's; hidden: bool
        [items + 1], the items that are unknown in this step."""
        ids, dense = bank.ids[batch.item], batch.dense
        if hidden is not None:
            gone = hidden[batch.item]
            ids = torch.where(gone, self.config.items, ids)
            dense = dense.masked_fill(gone[..., None] & self.of_item, 0)
        shown = blank(dense.new_ones(len(batch), 1, 1), self.config.blank, self.training)
        x = self.drop(self.item(ids))
        parts = [self.drop(self.user(batch.user))[:, None].expand_as(x), x, dense]
        if self.config.history:
            past = self.drop(self.item(bank.ids[batch.history]))
            memory = self.stack.memory(past, batch.feedback, None, None)
            parts.append(self.stack.targets(x, memory, batch.events >= 0)[0] * shown)
        return self.heads(torch.cat([*parts, *self.brings(batch, bank, ids, cls, tar, shown)], -1))

    def brings(
        self, batch: Batch, bank: Bank, ids: Tensor, cls: Tensor | None, tar: Tensor | None, shown: Tensor
    ) -> list[Tensor]:
        """What the side adds for each candidate, [B, C, d] each. shown: [B, 1, 1], 0 where the history is hidden."""
        c = self.config
        if c.side == "none":
            return []
        if c.side == "sids":
            assert isinstance(self.side, nn.ModuleList)
            codes = self.features[batch.item]
            found = torch.stack([e(codes[..., i]) for i, e in enumerate(self.side)]).sum(0)
            return [self.drop(self.side_norm(found))]
        if c.side in ("tags", "text"):
            return [self.drop(self.side_norm(self.side(self.features[batch.item])))]
        past = batch.history[:, -c.m :]
        if c.side == "learned":
            cls, tar = self.table(ids).chunk(2, -1)
            seen = self.table(bank.ids[past])[..., : c.d].detach()  # as the bank's
        else:
            cls = bank.cls[batch.item] if cls is None else cls
            tar = bank.tar[batch.item] if tar is None else tar
            seen = bank.cls[past]
        out = [self.drop(cls)]
        out += [self.drop(tar)] if c.target else []
        out += [self.drop(self.interest(seen, batch, cls)) * shown] if c.user_side else []
        return out

    def interest(self, seen: Tensor, batch: Batch, like: Tensor) -> Tensor:
        """h_UIN of each request, expanded to its candidates [B, C, d]: one layer over the last m items, with their
        feedback, and the mean of those that are there; zeros without any."""
        m = self.config.m
        there = batch.events[:, -m:] >= 0
        some = there.any(1, keepdim=True)
        found = self.user_layer(seen + self.told(batch.feedback[:, -m:]), there | ~some)
        mean = (found * there[..., None]).sum(1) / there.sum(1).clamp(min=1)[:, None]
        return (self.user_norm(mean) * some)[:, None].expand_as(like)

    def draw(self) -> Tensor:
        """Which items a step of training hides, bool [items + 1]: once for each item, so all that reads it agrees."""
        return torch.rand(self.config.items + 1, device=self.device) < self.config.unknown

    def auxiliary(self, cls: Tensor, tar: Tensor) -> Tensor:
        """The auxiliary head's logits [...] of the main task."""
        return self.aux(torch.cat([cls, tar], -1)).squeeze(-1)


def make_bank(model: SARMModel, base: np.ndarray, domain: np.ndarray, ids: np.ndarray, chunk: int = 256) -> Bank:
    """The bank of R items from their anchors' tokens [R, T] and the identifiers' rows [R] in the model's table."""
    c = model.config
    cls, tar = torch.zeros(len(ids) + 1, c.d), torch.zeros(len(ids) + 1, c.d)
    found = torch.from_numpy(np.append(ids, c.items).astype(np.int64))
    bank = Bank(found, cls, tar).to(model.device)
    if c.side == "anchor":
        fill_bank(model, bank, base, domain, np.arange(len(ids)), chunk)
    return bank


@torch.no_grad()
def fill_bank(
    model: SARMModel, bank: Bank, base: np.ndarray, domain: np.ndarray, rows: np.ndarray, chunk: int = 256
) -> None:
    """Encodes these rows anew with the current weights."""
    training = model.training
    model.eval()
    if len(rows):
        bank.cls[rows], bank.tar[rows] = encode_rows(model, base, domain, rows, bank.ids[rows], chunk)
    model.train(training)


def encode_rows(
    model: SARMModel, base: np.ndarray, domain: np.ndarray, rows: np.ndarray, ids: Tensor, chunk: int = 256
) -> tuple[Tensor, Tensor]:
    """h_CLS and h_TAR [K, d] of the items rows [K] with the table's rows ids [K]; texts of alike lengths together, to
    spare padding."""
    order = np.argsort((base[rows] != 0).sum(1), kind="stable")
    parts = []
    for at in np.split(order, range(chunk, len(order), chunk)):
        one, other = (torch.from_numpy(stream[rows[at]]).to(model.device) for stream in (base, domain))
        found = model.encode(one, other, ids[at])
        parts.append(found[:2])
    back = torch.from_numpy(np.argsort(order))
    return torch.cat([cls for cls, _ in parts])[back], torch.cat([tar for _, tar in parts])[back]
