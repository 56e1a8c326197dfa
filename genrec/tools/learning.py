"""The training loop of the tools that are small neural networks (EBR, CAPTS): resumable, deterministic, ours.

AdamW with warm-up and a cosine, an exponential average of the weights as the result, the average that measures best
kept. All randomness comes from (seed, step), so a run that was killed and is started again ends with the same weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from genrec.state import State

WARMUP = 50  # steps
FLOOR = 0.05  # of the peak learning rate, at the end
CLIP = 1.0  # norm of the gradient
AVERAGE = 0.99  # decay of the weights' average; from the start less, as steps / (steps + 9)
SAVE_SECONDS = 30.0


@dataclass(frozen=True)
class Schedule:
    """steps: of the whole run. check: steps between measurements. patience: measurements without a gain that end it, 0
    for none."""

    steps: int
    check: int
    learning_rate: float
    weight_decay: float
    patience: int
    seed: int


@dataclass(frozen=True)
class Learned:
    """How a run went: the best measurement (None without one), its step, the steps that were run, and the processor
    seconds of one step, without measurements and checkpoints (mean over those of this process)."""

    best: float | None
    best_step: int
    steps: int
    step_seconds: float = 0.0


def learn(
    model: nn.Module,
    loss_at: Callable[[int], Tensor],
    schedule: Schedule,
    measure: Callable[[], float] | None = None,
    checkpoint: Path | None = None,
    identity: str = "",
    report: Callable[[str], None] = lambda _: None,
) -> Learned:
    """Trains `model` in place; leaves the averaged weights that measured best in it (the last ones without `measure`).

    loss_at: the loss of step n, in training mode. measure: a number to maximise, in eval mode. checkpoint: a file that
    a run of the same `identity` goes on from. Raises GenrecError where it holds another run.
    """
    run = _Run(model, schedule, checkpoint, identity)
    spent, since = 0.0, run.step
    while run.step < schedule.steps and not run.over:
        clock = time.process_time()
        for group in run.optimizer.param_groups:
            group["lr"] = rate(schedule, run.step)
        torch.manual_seed(schedule.seed * 1_000_003 + run.step)
        model.train()
        loss = loss_at(run.step)
        run.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(run.parameters, CLIP)
        run.optimizer.step()
        run.count_step(AVERAGE)
        spent += time.process_time() - clock
        if measure is not None and (run.step % schedule.check == 0 or run.step == schedule.steps):
            run.measured(measure)
            report(
                f"step {run.step:,} of {schedule.steps:,}, loss {loss.item():.3f}, held out {run.last:.4f} "
                f"(best {run.best:.4f}), {1000 * spent / (run.step - since):.0f} ms of processor time a step"
            )
        if checkpoint is not None and time.monotonic() - run.saved > SAVE_SECONDS:
            run.save(checkpoint)
    run.use(run.average if run.best is None else run.best_weights)
    model.eval()
    return Learned(run.best, run.best_step, run.step, spent / max(1, run.step - since))


def rate(schedule: Schedule, step: int) -> float:
    """Linear warm-up, then a cosine to FLOOR of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / max(1, schedule.steps)))
    return schedule.learning_rate * min(1.0, (step + 1) / WARMUP) * (FLOOR + (1 - FLOOR) * cosine)


class _Run(State):
    """Where the run stands: its measurements, and those of them in a row that were no gain (`misses`)."""

    def __init__(self, model: nn.Module, schedule: Schedule, checkpoint: Path | None, identity: str) -> None:
        super().__init__(model, schedule.learning_rate, schedule.weight_decay, identity)
        self.model, self.schedule = model, schedule
        self.best_step, self.misses, self.last = 0, 0, 0.0
        self.saved = time.monotonic()
        if checkpoint is not None and self.load(checkpoint):
            self.best_step, self.misses = int(self.meta["best_step"]), int(self.meta["misses"])

    @property
    def over(self) -> bool:
        """Whether the measurements stopped getting better."""
        return 0 < self.schedule.patience <= self.misses

    def measured(self, measure: Callable[[], float]) -> None:
        current = self.use(self.average)
        self.model.eval()
        with torch.no_grad():
            self.last = float(measure())
        self.use(current)
        if self.best is None or self.last >= self.best:  # of equals the later: it has learned more
            self.best, self.best_step, self.misses = self.last, self.step, 0
            self.best_weights = [a.clone() for a in self.average]
        else:
            self.misses += 1

    def save(self, path: Path) -> None:
        self.meta = {"best_step": str(self.best_step), "misses": str(self.misses)}
        super().save(path)
        self.saved = time.monotonic()
