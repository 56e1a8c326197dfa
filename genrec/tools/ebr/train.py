"""Fits EBR's encoder: which sequences and prompts make a batch, what is held out, when to stop.

A row is a sequence with the prompt of one cluster: every position whose next item is in that cluster is learned in one
causal pass. Every sequence also has a row without a prompt, from which the intent head learns at all positions. So a
step costs what SASRec's costs with as many rows (as the paper says), and an epoch has more rows. Without prompts the
one row teaches both. Only training events are read; the last one of some users is held out to decide when to stop.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genrec.data.dataset import Sequences
from genrec.tools.ebr.clusters import Clusters
from genrec.tools.ebr.config import EBRConfig
from genrec.tools.ebr.loss import Objective
from genrec.tools.ebr.model import Encoder
from genrec.tools.learning import Learned, Schedule, learn

SORTED = 16  # batches whose rows are sorted by length together: less padding, still mixed


@dataclass(frozen=True)
class HeldOut:
    """Requests out of the training events themselves: histories, and the rows that came next, int64 [n]."""

    histories: list[np.ndarray]
    targets: np.ndarray


class Batches:
    """Training rows of every step. prompts: whether clusters have rows of their own."""

    def __init__(self, train: Sequences, clusters: Clusters, config: EBRConfig) -> None:
        self.train, self.config, self.clusters = train, config, clusters
        self.prompts = config.prompt != "none"
        self.held_out, self.ends = hold_out(train, config)
        self._epoch: tuple[int, list[np.ndarray], np.ndarray] = (-1, [], np.zeros((0, 3)))
        self.per_epoch = len(self.batches_of(0)[0])

    def rows_of(self, epoch: int) -> np.ndarray:
        """int64 [R, 3]: first and one past the last event, and the prompt. Long sequences are cut into windows, at
        another place every epoch."""
        size, k = self.config.max_history + 1, len(self.clusters)
        phase = np.random.default_rng((self.config.seed, epoch)).integers(0, size - 1)
        found = []
        for start, end in zip(self.train.offsets[:-1].tolist(), self.ends.tolist(), strict=True):
            last = end
            if end - start > size:
                last = end - int(phase)  # the newest events are always in a full window
                found.append((end - size, end))
            while last - start > 1:
                found.append((max(start, last - size), last))
                last -= size - 1
        rows = []
        for a, b in dict.fromkeys(found):
            wanted = np.unique(self.clusters.of[self.train.items[a + 1 : b]]).tolist() if self.prompts else []
            rows += [(a, b, c) for c in [*wanted, k]]
        return np.array(rows, np.int64).reshape(-1, 3)

    def batches_of(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The epoch's batches as positions in its rows, and the rows."""
        if self._epoch[0] != epoch:
            rows, rng, size = self.rows_of(epoch), np.random.default_rng((self.config.seed, epoch, 1)), self.config.rows
            shuffled = rng.permutation(len(rows))
            lengths = (rows[:, 1] - rows[:, 0])[shuffled]
            chunk = np.arange(len(rows)) // (size * SORTED)
            shuffled = shuffled[np.lexsort((lengths, chunk))]
            cut = [shuffled[s : s + size] for s in range(0, len(shuffled), size)]
            self._epoch = (epoch, [cut[i] for i in rng.permutation(len(cut))], rows)
        return self._epoch[1:]

    def at(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """inputs, targets [B, T] (targets -1 where there is none), weights [B, T], prompts [B] of a step. Epochs are
        taken to have as many batches as the first one (windows move by a handful)."""
        batches, rows = self.batches_of(step // self.per_epoch)
        picked = rows[batches[step % self.per_epoch % len(batches)]]
        lengths = picked[:, 1] - picked[:, 0] - 1
        at = picked[:, :1] + np.arange(lengths.max())
        there = np.arange(lengths.max()) < lengths[:, None]
        at = np.where(there, at, picked[:, :1])
        inputs, targets = self.train.items[at], np.where(there, self.train.items[np.where(there, at + 1, at)], -1)
        weights = self.train.weights[np.where(there, at + 1, at)]
        arrays = (inputs.astype(np.int64), targets.astype(np.int64), weights.astype(np.float32), picked[:, 2])
        a, b, c, d = (torch.from_numpy(x) for x in arrays)
        return a, b, c, d


def hold_out(train: Sequences, config: EBRConfig) -> tuple[HeldOut, np.ndarray]:
    """The last training event of some users with 3 or more, and where each user's training then ends, int64 [U]."""
    ends = train.offsets[1:].copy()
    able = np.flatnonzero(train.lengths >= 3)
    n = min(config.held_out, len(able) // 10)
    chosen = np.sort(np.random.default_rng((config.seed, 7)).choice(able, n, replace=False)) if n else able[:0]
    ends[chosen] -= 1
    histories = [train.items[max(int(train.offsets[u]), int(ends[u]) - config.max_history) : ends[u]] for u in chosen]
    return HeldOut(histories, train.items[ends[chosen]].astype(np.int64)), ends


def loss_of(encoder: Encoder, objective: Objective, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """In-cluster softmax + intent cross-entropy, each a mean over its positions (weight 1 each, ours)."""
    inputs, targets, weights, prompts = batch
    k, prompted = encoder.clusters, encoder.config.prompt != "none"
    states = encoder(inputs, prompts)
    there = targets >= 0
    of = objective.cluster_of[targets.clamp(min=0)]
    learned = there & (of == prompts[:, None]) if prompted else there
    loss = objective(states[learned], targets[learned], weights[learned])
    asked = there & (prompts == k)[:, None]
    if encoder.intent is not None and asked.any():
        entropy = F.cross_entropy(encoder.intent(states[asked]), of[asked], reduction="none")
        loss = loss + (entropy * weights[asked]).sum() / weights[asked].sum().clamp(min=1e-9)
    return loss


def train_encoder(
    encoder: Encoder,
    train: Sequences,
    clusters: Clusters,
    measure: Callable[[HeldOut], float],
    checkpoint: Path | None = None,
    report: Callable[[str], None] = lambda _: None,
    judge: Callable[[], float] | None = None,
) -> Learned:
    """Trains in place. measure: a number to maximise over what is held out; judge: one that takes its place, nothing is
    held out then. Without either the run takes all its steps and keeps the last weights."""
    config = encoder.config
    batches = Batches(train, clusters, config if judge is None else replace(config, held_out=0))
    objective = Objective(encoder, clusters, np.bincount(train.items, minlength=len(clusters.of)))
    if not batches.per_epoch or not config.steps:
        encoder.eval()
        return Learned(None, 0, 0)
    schedule = Schedule(
        steps=config.steps,
        check=config.check,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        patience=config.patience,
        seed=config.seed,
    )
    about = {"events": train.events, "items": len(clusters.of), "judged": judge is not None}
    identity = json.dumps(asdict(config) | about, sort_keys=True)
    if judge is None and len(batches.held_out.targets):
        judge = partial(measure, batches.held_out)
    return learn(
        encoder,
        lambda step: loss_of(encoder, objective, batches.at(step)),
        schedule,
        judge,
        checkpoint,
        identity,
        report,
    )
