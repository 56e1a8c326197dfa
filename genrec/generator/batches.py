"""Training batches: windows of users' sequences in which every position predicts the event after it.

Each epoch cuts long sequences at other places and assigns every position a scenario anew, all drawn from
(seed, epoch) alone: the batches of an epoch can be made again after a kill.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from genrec.data.dataset import Sequences
from genrec.errors import GenrecError
from genrec.generator.model import History, Request
from genrec.generator.profile import profiles

HOME = 0
UNTIMED = 0.1  # share of windows trained without times: a history given at the request may have none
UNKNOWN = 0.1  # share of windows trained without a profile, and of attributes left out: not all is known of everybody


@dataclass(frozen=True)
class ScenarioTask:
    """How training draws one scenario. mask: bool [M], the training events that may be its target; share: of
    the qualifying positions; trigger: the item before is the trigger; query: the target's query instructs."""

    name: str
    mask: np.ndarray
    share: float
    trigger: bool = False
    query: bool = False


@dataclass(frozen=True)
class Batch:
    """history [B, T] predicts targets, int64 rows [B, T], -1 where padded; weights: float [B, T], the behaviour
    weight of each target; request [B, T]; chosen: int64 rows [B, T], what the user chose there, which is the target
    unless tools proposed that."""

    history: History
    targets: Tensor
    weights: Tensor
    request: Request
    chosen: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return replace(self, **{name: value.to(device) for name, value in vars(self).items()})


@dataclass(frozen=True)
class TrainingData:
    """train: the sequences. tasks: the scenarios beside home, whose position in the model's list is
    `scenario_ids`. queries: float32 [N, V, text_dim], V ways to ask for each item, NaN rows where there is none.
    told: int32 [M], for every event as a target the row of `instructions`, float32 [K, text_dim], that its request
    follows in all other scenarios (-1: the learned default). instruction_dropout: share of instructed positions that
    get the learned default all the same. taught: int32
    [M, depth], the tools' proposals at each event (see teacher.py). pupils: scenario ids whose targets they may stand
    for (None: home's, whose id is that of no task)."""

    train: Sequences
    tasks: tuple[ScenarioTask, ...]
    scenario_ids: dict[str, int]
    queries: np.ndarray | None
    text_dim: int
    told: np.ndarray | None = None
    instructions: np.ndarray | None = None
    instruction_dropout: float = 0.1
    taught: np.ndarray | None = None
    pupils: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.train.events == 0 or int(self.train.lengths.max()) < 2:
            raise GenrecError("no user has two training events: there is nothing to learn a next item from")

    @cached_property
    def _profiles(self) -> Tensor | None:
        return profiles(self.train.attributes)

    def _profile(self, users: np.ndarray, seed: int) -> Tensor | None:
        """The buckets of these users, int64 [B, P], some of them hidden; of its own randomness."""
        if self._profiles is None:
            return None
        rng = np.random.default_rng((seed, 1))
        found = self._profiles[users]
        hidden = (rng.random((len(users), 1)) < UNKNOWN) | (rng.random(tuple(found.shape)) < UNKNOWN)
        return found.masked_fill(torch.from_numpy(hidden), -1)

    def windows(self, size: int, rng: np.random.Generator) -> np.ndarray:
        """int64 [windows, 2], start and end positions of at most size + 1 events, two or more each."""
        starts, ends = self.train.offsets[:-1], self.train.offsets[1:]
        long = ends - starts > size + 1
        pieces = [np.stack([starts[~long], ends[~long]], 1)]
        for start, end in zip(starts[long], ends[long], strict=True):
            cuts = np.arange(start + int(rng.integers(1, size + 1)), end, size)
            cuts = np.concatenate([[start], cuts])
            pieces.append(np.stack([cuts, np.minimum(np.append(cuts[1:] + 1, end), end)], 1))
        windows = np.concatenate(pieces)
        return windows[windows[:, 1] - windows[:, 0] >= 2]

    def epoch(self, size: int, positions: int, seed: int, epoch: int) -> list[np.ndarray]:
        """The epoch's batches as arrays of windows; each holds at most about `positions` padded positions."""
        rng = np.random.default_rng((seed, epoch))
        windows = self.windows(size, rng)
        lengths = windows[:, 1] - windows[:, 0] - 1
        order = np.lexsort((rng.random(len(windows)), lengths))
        batches, start = [], 0
        while start < len(order):
            end = start + 1
            while end < len(order) and lengths[order[end]] * (end + 1 - start) <= positions:
                end += 1
            batches.append(windows[order[start:end]])
            start = end
        return [batches[i] for i in rng.permutation(len(batches))]

    def batch(self, windows: np.ndarray, seed: int, teaching: float = 0.0) -> Batch:
        """Tensors of one batch; the scenario of each position is drawn with `seed`.

        teaching: share of home positions whose target is one of the tools' proposals instead, drawn with a chance
        falling as 1 / rank.
        """
        rng = np.random.default_rng(seed)
        s = self.train
        width = int((windows[:, 1] - windows[:, 0]).max()) - 1
        at = windows[:, :1] + np.arange(width)
        real = at < windows[:, 1:] - 1
        here, after = np.where(real, at, 0), np.where(real, at + 1, 0)
        rows = np.where(real, s.items[here], -1)
        chosen = np.where(real, s.items[after], -1)
        targets = chosen.copy()
        before = np.maximum(here - 1, 0)
        gaps = np.where(real & (np.arange(width) > 0), s.times[here] - s.times[before], 0)
        gaps[rng.random(len(windows)) < UNTIMED] = -1
        weights = np.where(real, s.weights[here], 1)
        scenario = np.zeros(at.shape, np.int64)
        trigger = np.full(at.shape, -1, np.int64)
        instruction = np.zeros((*at.shape, self.text_dim), np.float32)
        instructed = np.zeros(at.shape, bool)
        draw = rng.random(at.shape)
        for task in self.tasks:
            mine = (draw >= 0) & (draw < task.share) & real & task.mask[after]
            draw = np.where(mine, -1.0, draw - task.share)
            scenario[mine] = self.scenario_ids[task.name]
            if task.trigger:
                trigger[mine] = rows[mine]
            if task.query and self.queries is not None:
                wanted = targets[mine]
                vectors = self.queries[wanted, rng.integers(0, self.queries.shape[1], len(wanted))]
                usable = ~np.isnan(vectors).any(1) & (rng.random(len(wanted)) >= self.instruction_dropout)
                instruction[mine] = np.where(usable[:, None], vectors, 0)
                instructed[mine] = usable
        if self.told is not None and self.instructions is not None and len(self.instructions):
            index = np.where(real, self.told[after], -1)
            index[instructed | (rng.random(at.shape) < self.instruction_dropout)] = -1
            index[np.isin(scenario, [self.scenario_ids[t.name] for t in self.tasks if t.query])] = -1
            instruction[index >= 0] = self.instructions[index[index >= 0]]
            instructed |= index >= 0
        if self.taught is not None and teaching:
            able = draw >= 0 if self.pupils is None else np.isin(scenario, self.pupils)
            pupil = able & (rng.random(at.shape) < teaching) & real
            depth = self.taught.shape[1]
            chance = np.cumsum(1 / np.arange(1, depth + 1))
            rank = np.searchsorted(chance / chance[-1], rng.random(int(pupil.sum())))
            proposal = self.taught[after[pupil], rank]
            targets[pupil] = np.where(proposal >= 0, proposal, targets[pupil])
        return Batch(
            History(
                torch.from_numpy(rows).long(),
                torch.from_numpy(gaps).float(),
                torch.from_numpy(weights).float(),
                self._profile(s.user_of[windows[:, 0]], seed),
            ),
            torch.from_numpy(targets).long(),
            torch.from_numpy(np.where(real, s.weights[after], 0)).float(),
            Request(
                torch.from_numpy(scenario),
                torch.from_numpy(trigger),
                torch.from_numpy(instruction),
                torch.from_numpy(instructed),
                torch.from_numpy(rows).long(),
            ),
            torch.from_numpy(chosen).long(),
        )
