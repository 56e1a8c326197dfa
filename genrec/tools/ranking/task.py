"""Samples as tensors: batches in time, histories, and the dense features that every ranker sees.

Dense features (ours), all from before the exposure: the user's own rate of each label, the item's rate of each label,
both as log-odds less those of the whole training set and shrunk towards it by PRIOR samples; the logs of the numbers
behind them; the log of the seconds since the user's last event. Counts, gap and history are of events at an earlier
time, an item's counts of training events alone; so no feature knows the future or a label that is asked for. The user's
own earlier test events count once they are past, with their labels, as in a live system and alike for all rankers.

History feedback is +1, -1 or 0 (unknown) per label.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from genrec.contracts import UserContext
from genrec.tools.ranking.samples import SPLITS, TRAIN, Samples

PRIOR = 10.0


def item_columns(tasks: int) -> list[int]:
    """Which of the dense features tell of the item: its rates, and their number."""
    return [*range(tasks, 2 * tasks), 2 * tasks + 1]


@dataclass(frozen=True)
class Batch:
    """B requests of C candidates over n history slots, the newest in the last one. A slot of an event of the
    exposure's own moment is empty.

    user: int64 [B], U for an unknown one; item: int64 [B, C], N for padding; dense: [B, C, F]; history: int64 [B, n], N
    where empty; feedback: [B, n, T]; events: int64 [B, n], the place of each event in its user's sequence, -1 where
    empty; place: int64 [B], that of the exposure itself; labels: [B, C, T] with NaN.
    """

    user: Tensor
    item: Tensor
    dense: Tensor
    history: Tensor
    feedback: Tensor
    events: Tensor
    place: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.user)

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(t.to(device) for t in vars(self).values()))


@dataclass(frozen=True)
class Rates:
    """What is counted: prior [T], the share of yes in training; per item its yes [N, T] and known labels [N, T]; gap:
    the median of the seconds since a user's last event, for requests that do not say what time it is."""

    prior: np.ndarray
    item_yes: np.ndarray
    item_known: np.ndarray
    gap: float = 0.0

    def dense(
        self, yes: np.ndarray, known: np.ndarray, item_yes: np.ndarray, item_known: np.ndarray, gap: np.ndarray
    ) -> np.ndarray:
        """float32 [..., 2 T + 3] out of counts [..., T] of user and item and seconds [...]."""
        base = np.log(self.prior / (1 - self.prior))

        def odds(y: np.ndarray, n: np.ndarray) -> np.ndarray:
            rate = (y + PRIOR * self.prior) / (n + PRIOR)
            return np.log(rate / (1 - rate)) - base

        sizes = [np.log1p(n.max(-1, keepdims=True)) / 5 for n in (known, item_known)]
        parts = [odds(yes, known), odds(item_yes, item_known), *sizes, np.log1p(np.maximum(gap, 0))[..., None] / 10]
        return np.concatenate(parts, axis=-1).astype(np.float32)


@dataclass(frozen=True)
class Task:
    """Samples with their split. part: int8 [M] as genrec.tools.ranking.samples has it."""

    samples: Samples
    part: np.ndarray

    @classmethod
    def make(cls, samples: Samples, split: str = "per-user") -> Task:
        return cls(samples, SPLITS[split](samples))

    @property
    def items(self) -> int:
        return len(self.samples.catalog)

    @property
    def users(self) -> int:
        return len(self.samples.sequences)

    @property
    def tasks(self) -> int:
        return len(self.samples.names)

    @property
    def width(self) -> int:
        """F, of the dense features."""
        return 2 * self.tasks + 3

    @cached_property
    def feedback(self) -> np.ndarray:
        """float32 [M, T]: 1 yes, -1 no, 0 unknown."""
        return np.nan_to_num(2 * self.samples.labels - 1).astype(np.float32)

    @cached_property
    def known(self) -> np.ndarray:
        """int64 [M]: the position that ends what each exposure may know of its user: the first event of its own moment.
        A file may list what happened in one second by label, so the order there must say nothing."""
        s = self.samples.sequences
        new = np.ones(s.events, bool)
        new[1:] = (np.diff(s.user_of) != 0) | (np.diff(s.times) != 0)
        return np.maximum.accumulate(np.where(new, np.arange(s.events), 0))

    @cached_property
    def exposures(self) -> np.ndarray:
        """Training events per item, int64 [N]."""
        return np.bincount(self.samples.sequences.items[self.part == TRAIN], minlength=self.items)

    @cached_property
    def rates(self) -> Rates:
        """Of the training events."""
        s, train = self.samples.sequences, self.part == TRAIN
        y, known = np.nan_to_num(self.samples.labels[train]), ~np.isnan(self.samples.labels[train])
        prior = np.clip(y.sum(0) / np.maximum(known.sum(0), 1), 1e-4, 1 - 1e-4)
        rows = s.items[train]

        def count(values: np.ndarray) -> np.ndarray:
            return np.stack([np.bincount(rows, weights=v, minlength=self.items) for v in values.T], axis=1)

        between = self.gap[train & (self.gap > 0)]
        return Rates(prior, count(y), count(known.astype(float)), float(np.median(between)) if len(between) else 0.0)

    @cached_property
    def gap(self) -> np.ndarray:
        """float64 [M]: seconds since the user's last event of an earlier moment, 0 without one."""
        s = self.samples.sequences
        return np.where(self.known > s.offsets[s.user_of], s.times - s.times[self.known - 1], 0.0)

    @cached_property
    def dense(self) -> np.ndarray:
        """float32 [M, F]."""
        s = self.samples.sequences
        known = ~np.isnan(self.samples.labels)
        yes = np.nan_to_num(self.samples.labels) * known
        both = np.concatenate([yes, known], axis=1)
        own = _between(both, s.offsets[s.user_of], self.known)
        order = np.lexsort((s.times, s.items))
        row, when = s.items[order], s.times[order]
        new_item = np.concatenate([[True], row[1:] != row[:-1]])
        new_time = new_item | np.concatenate([[True], when[1:] != when[:-1]])
        first = np.maximum.accumulate(np.where(new_time, np.arange(len(row)), 0))
        start = np.maximum.accumulate(np.where(new_item, np.arange(len(row)), 0))
        total = np.concatenate(
            [np.zeros((1, both.shape[1])), np.cumsum((both * (self.part == TRAIN)[:, None])[order], 0)]
        )
        of_item = np.empty_like(both)
        of_item[order] = total[first] - total[start]
        t = self.tasks
        return self.rates.dense(own[:, :t], own[:, t:], of_item[:, :t], of_item[:, t:], self.gap)

    def batch(self, positions: np.ndarray, n: int) -> Batch:
        """The exposures at flat positions [B], one candidate each, with at most n events of history."""
        s = self.samples.sequences
        users = s.user_of[positions]
        start = s.offsets[users]
        at = positions[:, None] - n + np.arange(n)
        there = (at >= start[:, None]) & (at < self.known[positions][:, None])
        at = np.where(there, at, 0)
        return Batch(
            user=torch.from_numpy(users),
            item=torch.from_numpy(s.items[positions].astype(np.int64))[:, None],
            dense=torch.from_numpy(self.dense[positions])[:, None],
            history=torch.from_numpy(np.where(there, s.items[at], self.items).astype(np.int64)),
            feedback=torch.from_numpy(self.feedback[at] * there[..., None]),
            events=torch.from_numpy(np.where(there, at - start[:, None], -1)),
            place=torch.from_numpy(positions - start),
            labels=torch.from_numpy(self.samples.labels[positions])[:, None],
        )


def stream(task: Task, positions: np.ndarray, size: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Batches of at most `size` positions, one of a user in each and every user's in order of time, so that an event is
    scored before it is read.

    Users stand one behind another in lanes: the longest first into the shortest lane, then in random order inside each;
    batch t is the t-th event of every lane. No more lanes than let the longest user end with the others, so batches
    are full to the end. Users do not see each other's events, so their common order in time is given up.
    """
    if size < 1:
        raise ValueError(f"size {size} must be at least 1")
    rng = np.random.default_rng(seed)
    positions = np.sort(np.asarray(positions, np.int64))
    if not len(positions):
        return
    events = np.split(positions, np.flatnonzero(np.diff(task.samples.sequences.user_of[positions])) + 1)  # per user
    lengths = np.array([len(e) for e in events])
    mixed = rng.permutation(len(events))
    lanes: list[list[int]] = [[] for _ in range(max(1, min(size, len(positions) // int(lengths.max()))))]
    ends = [(0, lane) for lane in range(len(lanes))]
    for u in mixed[np.argsort(-lengths[mixed], kind="stable")].tolist():
        end, lane = heapq.heappop(ends)
        lanes[lane].append(u)
        heapq.heappush(ends, (end + int(lengths[u]), lane))
    rows = [np.concatenate([events[u] for u in rng.permutation(lane)]) for lane in lanes]
    step = np.concatenate([np.arange(len(row)) for row in rows])
    order = np.argsort(step, kind="stable")
    yield from np.split(np.concatenate(rows)[order], np.flatnonzero(np.diff(step[order])) + 1)


def request_batch(
    contexts: list[UserContext],
    items: np.ndarray,
    n: int,
    rates: Rates,
    users: list[int],
    feedback: list[np.ndarray],
    users_known: int,
) -> Batch:
    """Requests as they come in: contexts [B], candidate rows int [B, C] with -1 as padding. users: each context's
    number, users_known for a stranger; feedback: of each whole history, float [len(history), T]."""
    count, tasks = len(rates.item_yes), len(rates.prior)
    history = np.full((len(contexts), n), count, np.int64)
    events = np.full((len(contexts), n), -1, np.int64)
    told = np.zeros((len(contexts), n, tasks), np.float32)
    own = np.zeros((len(contexts), 2 * tasks))
    gap = np.zeros(len(contexts))
    for b, (context, said) in enumerate(zip(contexts, feedback, strict=True)):
        length = len(context.history)
        kept = min(length, n)
        if kept:
            history[b, n - kept :] = context.history[length - kept :]
            events[b, n - kept :] = np.arange(length - kept, length)
            told[b, n - kept :] = said[length - kept :]
            own[b] = np.concatenate([(said > 0).sum(0), (said != 0).sum(0)])
        if context.clock is not None and context.times:
            gap[b] = context.clock - context.times[-1]
        elif length:
            gap[b] = rates.gap
    rows = np.maximum(items, 0)
    wide = (*items.shape, tasks)
    dense = rates.dense(
        np.broadcast_to(own[:, None, :tasks], wide),
        np.broadcast_to(own[:, None, tasks:], wide),
        rates.item_yes[rows],
        rates.item_known[rows],
        np.broadcast_to(gap[:, None], items.shape),
    )
    return Batch(
        user=torch.tensor([u if 0 <= u < users_known else users_known for u in users], dtype=torch.int64),
        item=torch.from_numpy(np.where(items < 0, count, items).astype(np.int64)),
        dense=torch.from_numpy(dense),
        history=torch.from_numpy(history),
        feedback=torch.from_numpy(told),
        events=torch.from_numpy(events),
        place=torch.tensor([len(c.history) for c in contexts], dtype=torch.int64),
        labels=torch.full(wide, float("nan")),
    )


def _between(values: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Sums of values [M, K] over the events from each start [M] up to, and without, each end [M]."""
    total = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values, axis=0)])
    return np.asarray(total[end] - total[start])
