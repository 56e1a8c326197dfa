"""Trains the fast thinker: next-code loss, weighted by behaviour, over every position of every sequence.

    python -m training.generator --help

Source: OxygenREC (2512.22386) for the loss (next-token, behaviour-weighted) and the decoder's prefix. Ours:
AdamW with warm-up and cosine decay, an exponential average of the weights as the result, and the average
that ranks best on validation kept. A checkpoint is written every `checkpoint_seconds`; all randomness comes
from (seed, step), so a killed run that is started again ends with the same weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from genrec.errors import GenrecError, check_least
from genrec.generator.batches import Batch, TrainingData
from genrec.generator.igr import q2i_loss
from genrec.generator.model import GeneratorModel
from genrec.io import read_json, write_json
from genrec.state import CHECKPOINT, State

# lambda_r and lambda_d of Eq. 2: the paper does not say. With .01 for both, as in the one public re-implementation,
# the cosine wins over the spread: nearly all of q and t becomes one shared direction (seen in a fit of ML-100K).
Q2I_VARIANCE, Q2I_DECORRELATION = 0.5, 1.0
TAUGHT = 0.6  # of a run: what follows on the users' own choices is what the tools do not know yet (docs/results)


@dataclass(frozen=True)
class TrainingConfig:
    """epochs: passes over the data. positions: padded positions per batch. learning_rate, weight_decay, warmup
    (steps), clip (gradient norm): the optimiser. average: decay of the weights' moving average.
    evaluations: validation checks over the run. seed: of everything random. bf16: autocast in bfloat16.
    q2i: weight of the Q2I loss where the model retrieves (lambda of Eq. 3; the paper does not say). teaching: share of
    the targets that tools propose, where the data has proposals and for the first part of the run (`teaching`)."""

    epochs: int = 20
    positions: int = 2048
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 100
    clip: float = 1.0
    average: float = 0.998
    evaluations: int = 8
    seed: int = 0
    bf16: bool = False
    q2i: float = 0.2
    teaching: float = 0.0

    def __post_init__(self) -> None:
        check_least(self, {"epochs": 1, "positions": 1, "evaluations": 1})


@dataclass(frozen=True)
class Progress:
    """What a run reports as it goes. loss: mean negative log-likelihood per code level since the last report."""

    step: int
    steps: int
    epoch: int
    loss: tuple[float, ...]
    validation: float | None
    best: float | None
    positions_per_second: float


def loss_of(model: GeneratorModel, batch: Batch, q2i: float = 0.0) -> tuple[Tensor, Tensor]:
    """Eq. 3 of OxygenREC, next-code loss + q2i * Q2I loss (a scalar), and the former's unweighted mean per level.

    The next-code loss is behaviour-weighted. Q2I is taken over the requests that ask, with instruction or trigger, and
    what was chosen there, whatever tools proposed.
    """
    length = batch.history.rows.shape[1]
    steps = torch.arange(length, device=model.device)
    distance = model.visible(batch.history, batch.request, (steps[:, None] - steps)[None])
    hidden = model.decode(batch.history, batch.request, batch.targets.clamp(min=0), distance)
    real = batch.targets >= 0
    likelihood = model.log_likelihood(hidden[real], batch.targets[real])
    weight = batch.weights[real]
    loss = -(likelihood.sum(1) * weight).sum() / weight.sum().clamp(min=1e-6)
    if q2i and model.config.retrieved:
        asking = real & (batch.request.instructed | (batch.request.trigger >= 0))
        queries = model.queries(batch.request)[asking]
        loss = loss + q2i * q2i_loss(
            queries, model.retrieval_items(batch.chosen[asking]), Q2I_VARIANCE, Q2I_DECORRELATION
        )
    return loss, -likelihood.detach().mean(0)


def learning_rate(config: TrainingConfig, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to 2 % of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))
    return config.learning_rate * min(1.0, (step + 1) / config.warmup) * (0.02 + 0.98 * cosine)


def teaching(config: TrainingConfig, step: int, steps: int) -> float:
    """The share of targets that tools propose at this step: all of it for TAUGHT of the run, then none."""
    return config.teaching if step < TAUGHT * steps else 0.0


class Run(State):
    """One training run: the model, the optimiser, the averaged weights, and where it stands."""

    def __init__(self, model: GeneratorModel, data: TrainingData, config: TrainingConfig) -> None:
        super().__init__(model, config.learning_rate, config.weight_decay)
        self.model = model
        self.data, self.config = data, config
        counts = [len(data.epoch(self._size(e), config.positions, config.seed, e)) for e in range(config.epochs)]
        self.ends = torch.tensor(counts).cumsum(0).tolist()
        self.steps = int(self.ends[-1])
        self._epoch: tuple[int, list] = (-1, [])

    def _size(self, epoch: int) -> int:
        """Events per training window. A model that retrieves learns to in long ones, and in every other epoch from
        pieces of what a request sees: more users a batch, cut anew each time, which long windows are not."""
        model = self.model.config
        return model.recent + model.retrieved if model.retrieved and epoch % 2 == 0 else model.max_history

    def position(self) -> tuple[int, int]:
        """The epoch of the current step, and the batch within it."""
        epoch = next(e for e, end in enumerate(self.ends) if self.step < end)
        return epoch, self.step - (self.ends[epoch - 1] if epoch else 0)

    def train_step(self) -> tuple[Tensor, int]:
        """One optimiser step; returns the loss per level [levels] and the positions trained."""
        config = self.config
        epoch, index = self.position()
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self.data.epoch(self._size(epoch), config.positions, config.seed, epoch))
        seed = config.seed * 1_000_003 + self.step
        batch = self.data.batch(self._epoch[1][index], seed, teaching(config, self.step, self.steps))
        device = self.model.device
        batch = batch.to(device)
        torch.manual_seed(seed)
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step, self.steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            loss, levels = loss_of(self.model, batch, config.q2i)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, config.clip)
        self.optimizer.step()
        self.count_step(config.average)
        return levels, int((batch.targets >= 0).sum())


def train(
    model: GeneratorModel,
    data: TrainingData,
    config: TrainingConfig,
    folder: Path,
    evaluate: Callable[[GeneratorModel], float],
    report: Callable[[Progress], None] = lambda _: None,
    checkpoint_seconds: float = 30.0,
) -> GeneratorModel:
    """Trains `model` in place and leaves the best averaged weights in it, in eval mode.

    folder: for the checkpoint; a run of the same config found there goes on, another one is an error.
    evaluate: a number to maximise, measured on validation requests `config.evaluations` times.
    """
    run = Run(model, data, config)
    folder.mkdir(parents=True, exist_ok=True)
    identity = {"training": asdict(config), "model": model.config.to_diff_dict(), "events": data.train.events}
    if run.load(folder / CHECKPOINT):
        if read_json(folder / "run.json") != identity:
            raise GenrecError(f"{folder} holds a checkpoint of another configuration; remove it or use another folder")
    else:
        write_json(folder / "run.json", identity)
    checks = {max(1, round(run.steps * (i + 1) / config.evaluations)) for i in range(config.evaluations)}
    since, saved = time.monotonic(), time.monotonic()
    losses, positions = [], 0
    while run.step < run.steps:
        epoch = run.position()[0]
        levels, count = run.train_step()
        losses.append(levels)
        positions += count
        validation = None
        if run.step in checks:
            current = run.use(run.average)
            model.eval()
            validation = evaluate(model)
            run.use(current)
            if run.best is None or validation > run.best:
                run.best = validation
                run.best_weights = [a.clone() for a in run.average]
        if validation is not None or len(losses) == 20:
            loss = tuple(torch.stack(losses).mean(0).tolist())
            rate = positions / max(1e-9, time.monotonic() - since)
            report(Progress(run.step, run.steps, epoch, loss, validation, run.best, rate))
            losses, positions, since = [], 0, time.monotonic()
        if time.monotonic() - saved > checkpoint_seconds or validation is not None:
            run.save(folder / CHECKPOINT)
            saved = time.monotonic()
    run.use(run.best_weights)
    return model.eval()
