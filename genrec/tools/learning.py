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
from typing import Any

import torch
from torch import Tensor, nn

from genrec.errors import GenrecError
from genrec.io import atomic

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
        run.step += 1
        with torch.no_grad():
            torch._foreach_lerp_(run.average, run.parameters, 1 - min(AVERAGE, run.step / (run.step + 9)))
        spent += time.process_time() - clock
        if measure is not None and (run.step % schedule.check == 0 or run.step == schedule.steps):
            run.measured(measure)
            report(
                f"step {run.step:,} of {schedule.steps:,}, loss {loss.item():.3f}, held out {run.last:.4f} "
                f"(best {run.best:.4f}), {1000 * spent / (run.step - since):.0f} ms of processor time a step"
            )
        if checkpoint is not None and time.monotonic() - run.saved > SAVE_SECONDS:
            run.save(checkpoint, identity)
    run.use(run.average if run.best is None else run.best_weights)
    model.eval()
    return Learned(run.best, run.best_step, run.step, spent / max(1, run.step - since))


def rate(schedule: Schedule, step: int) -> float:
    """Linear warm-up, then a cosine to FLOOR of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / max(1, schedule.steps)))
    return schedule.learning_rate * min(1.0, (step + 1) / WARMUP) * (FLOOR + (1 - FLOOR) * cosine)


class _Run:
    """Model, optimiser, averages, and where the run stands."""

    def __init__(self, model: nn.Module, schedule: Schedule, checkpoint: Path | None, identity: str) -> None:
        self.model, self.schedule = model, schedule
        self.names = [n for n, _ in model.named_parameters()]
        self.parameters: list[Tensor] = [p for _, p in model.named_parameters()]
        self.average = [p.detach().clone() for p in self.parameters]
        self.best_weights = [p.detach().clone() for p in self.parameters]
        matrices = [p for p in self.parameters if p.dim() > 1]
        vectors = [p for p in self.parameters if p.dim() <= 1]
        decay = {"params": matrices, "weight_decay": schedule.weight_decay}
        groups = [g for g in (decay, {"params": vectors, "weight_decay": 0.0}) if g["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98), fused=True)
        for p in self.parameters:  # moments exist from the start, so that a checkpoint always has them
            zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.optimizer.state[p] |= {"step": torch.zeros(()), **zeros}
        self.step, self.best_step, self.misses, self.last = 0, 0, 0, 0.0
        self.best: float | None = None
        self.saved = time.monotonic()
        if checkpoint is not None and checkpoint.exists():
            self.load(checkpoint, identity)

    @property
    def over(self) -> bool:
        """Whether the measurements stopped getting better."""
        return 0 < self.schedule.patience <= self.misses

    def use(self, weights: list[Tensor]) -> list[Tensor]:
        """Puts weights into the model and returns those that were there."""
        before = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            for p, w in zip(self.parameters, weights, strict=True):
                p.copy_(w)
        return before

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

    def save(self, path: Path, identity: str) -> None:
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for i, (name, p) in enumerate(zip(self.names, self.parameters, strict=True)):
            state: dict[str, Any] = self.optimizer.state[p]
            tensors |= {
                f"weight.{name}": p.detach(),
                f"average.{name}": self.average[i],
                f"best.{name}": self.best_weights[i],
                f"first.{name}": state["exp_avg"],
                f"second.{name}": state["exp_avg_sq"],
            }
        stand = {"step": self.step, "best_step": self.best_step, "misses": self.misses}
        about = {k: str(v) for k, v in stand.items()} | {"identity": identity}
        about["best"] = "" if self.best is None else repr(self.best)
        with atomic(path) as temporary:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata=about)
        self.saved = time.monotonic()

    def load(self, path: Path, identity: str) -> None:
        from safetensors import safe_open

        with safe_open(path, "pt") as f, torch.no_grad():
            about = f.metadata()
            if about.get("identity") != identity:
                raise GenrecError(f"{path} holds a checkpoint of another configuration; remove it")
            for i, (name, p) in enumerate(zip(self.names, self.parameters, strict=True)):
                state = self.optimizer.state[p]
                p.copy_(f.get_tensor(f"weight.{name}"))
                self.average[i].copy_(f.get_tensor(f"average.{name}"))
                self.best_weights[i].copy_(f.get_tensor(f"best.{name}"))
                state["exp_avg"].copy_(f.get_tensor(f"first.{name}"))
                state["exp_avg_sq"].copy_(f.get_tensor(f"second.{name}"))
                state["step"].fill_(int(about["step"]))
        self.step, self.best_step = int(about["step"]), int(about["best_step"])
        self.misses, self.best = int(about["misses"]), float(about["best"]) if about["best"] else None
