"""Training and measuring rankers on streams of users: every event is scored before it can be read as history.

A ranker with a memory (MARM) reads cached states, is trained, and writes the states it scored with, for every real
exposure, in training, validation and test alike. The ranker computes on its device, the cache is the host's. One pass
over the stream is the papers' regime; with several, a pass begins with an empty memory, and the pass that ranks the
validation events best is kept with its memory. What is measured and kept is a moving average of the weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from genrec.errors import GenrecError, check_least
from genrec.evaluation.auc import inside_or_over
from genrec.state import move_average
from genrec.tools.ranking.heads import bce
from genrec.tools.ranking.models import RankerConfig, RankerModel
from genrec.tools.ranking.samples import TEST, TRAIN, VALIDATION
from genrec.tools.ranking.task import Batch, Task, stream

Report = Callable[[str], None]
Model = TypeVar("Model", bound=nn.Module)


class Memory(Protocol):
    """Cached states of past exposures, see genrec.tools.marm.memory. Batches and states are the host's."""

    def read(self, batch: Batch) -> tuple[Tensor, Tensor]: ...

    def write(self, batch: Batch, states: Tensor) -> None: ...

    def clear(self) -> None: ...

    def snapshot(self) -> Any: ...

    def restore(self, kept: Any) -> None: ...


@dataclass(frozen=True)
class TrainConfig:
    """How a ranker is trained. The defaults are ours: on ML-100K's validation a rate of .005 with a decay of 1e-4 and
    a longer patience gave more than .002 with 1e-5 (one fit each: GAUC .678 for .665 without history, DIN .682 for
    .672), and needs some nine passes; the average gives .002 to .004 more (one fit each of four rankers)."""

    epochs: int = field(default=25, metadata={"help": "most passes over the stream (1: a single one, as in MARM)"})
    batch: int = field(default=128, metadata={"help": "exposures per step"})
    learning_rate: float = field(default=5e-3, metadata={"help": "of Adam"})
    weight_decay: float = field(default=1e-4, metadata={"help": "of Adam"})
    patience: int = field(default=3, metadata={"help": "passes without a better validation GAUC before the end"})
    average: float = field(
        default=0.998, metadata={"help": "decay of the moving average of weights that is the result"}
    )
    inside: bool = field(default=True, metadata={"help": "judge passes by AUC inside users, not over all samples"})
    seed: int = field(default=0, metadata={"help": "of everything random"})

    def __post_init__(self) -> None:
        check_least(self, {"epochs": 1, "batch": 1, "patience": 1, "seed": 0})
        if not 0 < self.learning_rate < math.inf or not 0 <= self.weight_decay < math.inf:
            raise GenrecError(f"learning_rate {self.learning_rate} or weight_decay {self.weight_decay} is out of range")
        if not 0 <= self.average < 1:
            raise GenrecError(f"average is {self.average}; it must be at least 0 and less than 1")


class Averaged(Generic[Model]):
    """A copy of a model whose weights follow those in training as their moving average."""

    def __init__(self, model: Model, decay: float) -> None:
        self.model, self.decay, self.steps = copy.deepcopy(model), decay, 0

    def follow(self, model: Model) -> None:
        """After a step of `model`."""
        self.steps += 1
        move_average(list(self.model.parameters()), list(model.parameters()), self.decay, self.steps)


def make_ranker(task: Task, kind: str, seed: int, **sizes: Any) -> RankerModel:
    """A ranker with random weights, of the task's sizes."""
    torch.manual_seed(seed)
    return RankerModel(RankerConfig(kind, task.users, task.items, task.tasks, task.width, **sizes))


def positions_of(task: Task, part: int) -> np.ndarray:
    """Flat positions of a part with a known main label."""
    return np.flatnonzero((task.part == part) & ~np.isnan(task.samples.labels[:, 0]))


def train(
    model: RankerModel, task: Task, config: TrainConfig, memory: Memory | None = None, report: Report = lambda _: None
) -> list[float]:
    """Trains in the stream's order; returns the validation GAUC (see `inside_or_over`) of each pass. The best
    pass stays in model and memory, which then holds training and validation events."""
    torch.manual_seed(config.seed)
    optimizer = _optimizer(model, config)
    kept, averaged = _Best(), Averaged(model, config.average)
    positions = np.flatnonzero(task.part == TRAIN)
    for epoch in range(config.epochs):
        if memory is not None:
            memory.clear()
        model.train()
        for at in stream(task, positions, config.batch, config.seed + epoch):
            batch = task.batch(at, model.config.n)
            logits, states = _forward(model, batch, memory)
            _step(optimizer, bce(logits, batch.labels.to(model.device)))
            averaged.follow(model)
            if memory is not None:
                memory.write(batch, states[:, 0].detach().cpu())
        measure, value = validate(averaged.model, task, memory, config)
        if kept.over(averaged.model, value, memory, config.patience):
            break
        report(f"ranking: {epoch + 1} of {config.epochs} passes, validation {measure} {value:.4f}")
    kept.restore(model, memory)
    return kept.values


def validate(model: RankerModel, task: Task, memory: Memory | None, config: TrainConfig) -> tuple[str, float]:
    """How well the main label of the validation events is ranked, and by which measure."""
    at = np.flatnonzero(task.part == VALIDATION)
    scores = predict(model, task, at, config, memory)[:, 0]
    known = ~np.isnan(task.samples.labels[at, 0])
    return _judge(task, at[known], scores[known], config)


def _judge(task: Task, at: np.ndarray, scores: np.ndarray, config: TrainConfig) -> tuple[str, float]:
    """The measure of the main label at positions with a known one. Inside a short window a user's own rate so far tells
    of the label: each yes that is past is one fewer to come. Where no user differs from another, judge over all."""
    users = task.samples.sequences.user_of[at]
    return inside_or_over(task.samples.labels[at, 0], scores, users if config.inside else np.zeros_like(users))


@torch.no_grad()
def predict(
    model: RankerModel, task: Task, positions: np.ndarray, config: TrainConfig, memory: Memory | None = None
) -> np.ndarray:
    """Logits [len(positions), T] of exposures, in the order given; they are written back to the memory."""
    model.eval()
    out = np.zeros((task.samples.sequences.events, task.tasks), np.float32)
    for at in stream(task, positions, config.batch):
        batch = task.batch(at, model.config.n)
        logits, states = _forward(model, batch, memory)
        out[at] = logits[:, 0].cpu().numpy()
        if memory is not None:
            memory.write(batch, states[:, 0].cpu())
    return out[positions]


def train_sequences(
    model: RankerModel, task: Task, config: TrainConfig, report: Report = lambda _: None
) -> list[float]:
    """Trains the full causal transformer: whole sequences with gradients through all layers, about config.batch events
    a step (one user, where that one has more). A step's loss grows with its events, so that each event weighs alike."""
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    optimizer = _optimizer(model, config)
    kept, averaged = _Best(), Averaged(model, config.average)
    for epoch in range(config.epochs):
        model.train()
        for at in sequence_batches(task, TRAIN, config.batch, rng):
            logits, _ = model.sequences(*sequence_inputs(task, at, model.device))
            labels = torch.from_numpy(np.where((at >= 0)[..., None], task.samples.labels[at], np.nan))
            _step(optimizer, bce(logits, labels.to(model.device)) * (int((at >= 0).sum()) / config.batch))
            averaged.follow(model)
        scores = predict_sequences(averaged.model, task)
        at = positions_of(task, VALIDATION)
        measure, value = _judge(task, at, scores[at, 0], config)
        if kept.over(averaged.model, value, None, config.patience):
            break
        report(f"ranking: {epoch + 1} of {config.epochs} passes, validation {measure} {value:.4f}")
    kept.restore(model, None)
    return kept.values


@torch.no_grad()
def predict_sequences(model: RankerModel, task: Task, tokens: int = 8192) -> np.ndarray:
    """Logits [M, T] of every event by the causal transformer."""
    model.eval()
    out = np.zeros((task.samples.sequences.events, task.tasks), np.float32)
    for at in sequence_batches(task, TEST, tokens, None):
        logits, _ = model.sequences(*sequence_inputs(task, at, model.device))
        out[at[at >= 0]] = logits.cpu().numpy()[at >= 0]
    return out


@torch.no_grad()
def true_states(model: RankerModel, task: Task, upto: int = TEST, tokens: int = 8192) -> np.ndarray:
    """States of the current weights, float32 [M, L - 1, d], of every event of the parts up to `upto`."""
    model.eval()
    c = model.config
    out = np.zeros((task.samples.sequences.events, c.layers - 1, c.d), np.float32)
    for at in sequence_batches(task, upto, tokens, None):
        _, item, _, feedback, known = sequence_inputs(task, at, model.device)
        states = model.stack.states(model.item(item), feedback, known)
        out[at[at >= 0]] = states.cpu().numpy()[at >= 0]
    return out


def sequence_batches(task: Task, upto: int, tokens: int, rng: np.random.Generator | None) -> Iterator[np.ndarray]:
    """Flat positions int64 [B, T], -1 as padding, of whole users with their events of the parts up to `upto`; users of
    alike lengths together, the batches in random order where there is an rng."""
    s = task.samples.sequences
    lengths = np.bincount(s.user_of[task.part <= upto], minlength=len(s))
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    groups: list[np.ndarray] = []
    end = len(order)
    while end:
        size = max(1, tokens // int(lengths[order[end - 1]]))
        groups.append(order[max(0, end - size) : end])
        end = max(0, end - size)
    if rng is not None:
        rng.shuffle(groups)
    for users in groups:
        steps = np.arange(lengths[users].max())
        at = s.offsets[users][:, None] + steps
        yield np.where(steps < lengths[users][:, None], at, -1)


def sequence_inputs(
    task: Task, at: np.ndarray, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What RankerModel.sequences takes, of positions [B, T], on a device."""
    s = task.samples.sequences
    item = np.where(at >= 0, s.items[at], task.items).astype(np.int64)
    known = np.where(at >= 0, task.known[at] - s.offsets[s.user_of[at[:, :1]]], 0)

    def there(a: np.ndarray) -> Tensor:
        return torch.from_numpy(a).to(device)

    return there(s.user_of[at[:, 0]]), there(item), there(task.dense[at]), there(task.feedback[at]), there(known)


class _Best:
    """The best pass so far, with its weights and memory."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self._kept: tuple[Any, Any] | None = None

    def over(self, model: RankerModel, value: float, memory: Memory | None, patience: int) -> bool:
        """Takes note of a pass; whether `patience` passes have brought nothing better."""
        self.values.append(value)
        best = int(np.argmax(self.values))
        if best == len(self.values) - 1:
            self._kept = copy.deepcopy(model.state_dict()), memory.snapshot() if memory else None
        return len(self.values) - 1 - best >= patience

    def restore(self, model: RankerModel, memory: Memory | None) -> None:
        assert self._kept is not None
        model.load_state_dict(self._kept[0])
        model.eval()
        if memory is not None:
            memory.restore(self._kept[1])


def _forward(model: RankerModel, batch: Batch, memory: Memory | None) -> tuple[Tensor, Tensor]:
    """Logits and states of a batch with what the memory has of it."""
    past = () if memory is None else (t.to(model.device) for t in memory.read(batch))
    found: tuple[Tensor, Tensor] = model(batch.to(model.device), *past)
    return found


def _optimizer(model: RankerModel, config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
