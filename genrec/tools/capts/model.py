"""Channel-Adaptive Trigger Routing: the network that values every trigger on every channel (2602.12564, CATR).

From the paper (as third parties restate it): a shared encoder with target attention, per channel a value head and a
calibrator, a uniqueness head; a classification loss, a calibration loss and a uniqueness loss, trained together. Ours:
all forms and sizes. The network reads the items' words, where a trigger stands, and what the tables look like; never
the tables' items or vectors of another fit, so that it works on tables of later events than those it learned on.
`trigger` is one more head, blind to channels: PDN's TriggerNet, for that policy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genrec.tools.capts.requests import ABOUT

HIDDEN, HEADS, FEATURES, BINS = 32, 2, 5, 10


@dataclass(frozen=True)
class Valued:
    """value, uniqueness: logits [B, n, C]; calibrated: logits a value + b of the calibrated value, a > 0 and b per
    channel, blind to the network [B, n, C]; trigger: [B, n]."""

    value: Tensor
    calibrated: Tensor
    uniqueness: Tensor
    trigger: Tensor


class CATR(nn.Module):
    """words: dimensions of the items' content vectors; channels: C."""

    def __init__(self, words: int, channels: int, d: int) -> None:
        super().__init__()
        self.words, self.about = nn.Linear(words, d, bias=False), nn.Linear(ABOUT, d)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.query, self.kv = nn.Linear(d, d), nn.Linear(d, 2 * d)
        size = 2 * d + FEATURES * channels
        self.first = nn.Linear(size, 2 * channels * HIDDEN)  # a hidden layer per channel, of value and of uniqueness
        self.second = nn.Parameter(torch.randn(2, channels, HIDDEN) / HIDDEN**0.5)
        self.offset = nn.Parameter(torch.full((2, channels), -2.0))
        self.slope, self.shift = nn.Parameter(torch.full((channels,), 0.5413)), nn.Parameter(torch.zeros(channels))
        self.alone = nn.Sequential(nn.Linear(2 * d, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))

    def forward(self, content: Tensor, about: Tensor, features: Tensor, there: Tensor) -> Valued:
        """content: [B, n, words]; about: [B, n, ABOUT]; features: [B, n, C, FEATURES]; there: bool [B, n]."""
        x = self.words(content) + self.about(about)
        mask = torch.zeros(there.shape).masked_fill(~there, -1e9)[:, None, None]
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(attend(q, k, v, mask))
        x = x + self.down(F.relu(self.up(self.norm2(x))))
        x = self.norm3(x)
        k, v = self.kv(x).chunk(2, -1)
        z = attend(self.query(x), k, v, mask)  # target attention: the trigger asks the history
        both = torch.cat([x, z], -1)
        hidden = F.relu(self.first(torch.cat([both, features.flatten(2)], -1)))
        hidden = hidden.unflatten(-1, (2, -1, HIDDEN))
        value, uniqueness = ((hidden * self.second).sum(-1) + self.offset).unbind(2)
        calibrated = F.softplus(self.slope) * value.detach() + self.shift
        return Valued(value, calibrated, uniqueness, self.alone(both)[..., 0])


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """HEADS-headed attention, [B, n, d]; mask: added to the logits, [B, 1, 1, n]."""
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def catr_loss(
    out: Valued, label: Tensor, unique: Tensor, there: Tensor, calibration: float, uniqueness: float
) -> Tensor:
    """BCE(value) + calibration x sum over channels of squared gaps in bins + uniqueness x BCE(q) + BCE(trigger head).
    The gaps teach the calibrators alone: what else they could teach, the last layer of a value head learns anyway.
    q is learned where a pair brings something (ours): over all pairs it would be as rare as that, and route nothing.

    label, unique: float [B, n, C]; there: bool [B, n, C], pairs that have a list.
    """
    if not there.any():
        return out.value.sum() * 0.0
    wanted = label[there]
    loss = F.binary_cross_entropy_with_logits(out.value[there], wanted)
    if calibration:
        channel = torch.arange(label.shape[2]).expand_as(label)[there]
        loss = loss + calibration * calibration_gap(torch.sigmoid(out.calibrated[there]), wanted, channel)
    hit = there & (label > 0)
    if uniqueness and hit.any():
        loss = loss + uniqueness * F.binary_cross_entropy_with_logits(out.uniqueness[hit], unique[hit])
    some = there.any(-1)
    return loss + F.binary_cross_entropy_with_logits(out.trigger[some], label.amax(-1)[some])


def calibration_gap(p: Tensor, label: Tensor, channel: Tensor) -> Tensor:
    """The sum over channels of the mean over BINS bins (of equally many pairs) of (mean p - mean label)^2."""
    total = p.new_zeros(())
    for c in channel.unique().tolist():
        mine, wanted = p[channel == c], label[channel == c]
        order = mine.detach().argsort()
        gaps = [
            (mine[part].mean() - wanted[part].mean()) ** 2
            for part in order.tensor_split(min(BINS, len(order)))
            if len(part)
        ]
        total = total + torch.stack(gaps).mean()
    return total
