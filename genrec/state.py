"""The state of a training run: weights, their average, the best ones, the optimiser, in one file.

What the training loops of the generator (`training.generator`, `training.policy`) and of the tools
(`genrec.tools.learning`) share. A checkpoint is whole or absent, and holds all that is needed to go on to the same
weights, randomness apart, which all take from (seed, step).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from genrec.errors import GenrecError
from genrec.io import atomic

CHECKPOINT = "checkpoint.safetensors"


@torch.no_grad()
def move_average(average: list[Tensor], parameters: list[Tensor], decay: float, step: int) -> None:
    """After step `step` (1, 2, ...): moves the exponential average of the weights, in place; less in the beginning."""
    torch._foreach_lerp_(average, parameters, 1 - min(decay, step / (step + 9)))


class State:
    """The model's parameters with AdamW, an exponential average of them, and the best average so far.

    step: optimiser steps done; best: what the best weights reached on validation, None before any was measured. meta:
    strings that are kept in the checkpoint besides. identity: of the run, where the file could be another's.
    """

    def __init__(self, model: nn.Module, learning_rate: float, weight_decay: float, identity: str = "") -> None:
        self.identity = identity
        self.names = [n for n, _ in model.named_parameters()]
        self.parameters: list[Tensor] = [p for _, p in model.named_parameters()]
        self.average = [p.detach().clone() for p in self.parameters]
        self.best_weights = [p.detach().clone() for p in self.parameters]
        matrices = [p for p in self.parameters if p.dim() > 1]
        vectors = [p for p in self.parameters if p.dim() <= 1]
        decayed = {"params": matrices, "weight_decay": weight_decay}
        groups = [g for g in (decayed, {"params": vectors, "weight_decay": 0.0}) if g["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)
        for p in self.parameters:  # moments exist from the start, so that a checkpoint always has them
            state = self.optimizer.state[p]
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        self.step = 0
        self.best: float | None = None
        self.meta: dict[str, str] = {}

    def count_step(self, average: float) -> None:
        """After each optimiser step: moves the average, whose decay is `average`, less in the beginning."""
        self.step += 1
        move_average(self.average, self.parameters, average, self.step)

    def use(self, weights: list[Tensor]) -> list[Tensor]:
        """Puts weights into the model and returns those that were there."""
        before = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            for p, w in zip(self.parameters, weights, strict=True):
                p.copy_(w)
        return before

    def save(self, path: Path) -> None:
        """Everything needed to go on, in one file that is whole or absent."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for i, (name, p) in enumerate(zip(self.names, self.parameters, strict=True)):
            state = self.optimizer.state[p]
            tensors |= {
                f"weight.{name}": p.detach(),
                f"average.{name}": self.average[i],
                f"best.{name}": self.best_weights[i],
                f"first.{name}": state["exp_avg"],
                f"second.{name}": state["exp_avg_sq"],
            }
        counts = [self.optimizer.state[p]["step"].cpu() for p in self.parameters]
        tensors["optimizer_steps"] = torch.stack(counts)  # its own: a step that was left out is none
        best = "" if self.best is None else repr(self.best)
        meta = self.meta | {"step": str(self.step), "best": best, "identity": self.identity}
        with atomic(path) as temporary:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata=meta)

    def load(self, path: Path) -> bool:
        """Goes back to the checkpoint; False where there is none. Raises GenrecError where it is another run's."""
        from safetensors import safe_open

        if not path.exists():
            return False
        with safe_open(path, "pt") as f, torch.no_grad():
            meta = f.metadata()
            if meta.get("identity", "") != self.identity:
                raise GenrecError(f"{path} holds a checkpoint of another configuration; remove it")
            counts = f.get_tensor("optimizer_steps")
            for i, (name, p) in enumerate(zip(self.names, self.parameters, strict=True)):
                state = self.optimizer.state[p]
                p.copy_(f.get_tensor(f"weight.{name}"))
                self.average[i].copy_(f.get_tensor(f"average.{name}"))
                self.best_weights[i].copy_(f.get_tensor(f"best.{name}"))
                state["exp_avg"].copy_(f.get_tensor(f"first.{name}"))
                state["exp_avg_sq"].copy_(f.get_tensor(f"second.{name}"))
                state["step"].copy_(counts[i])
            self.step = int(meta["step"])
            self.best = float(meta["best"]) if meta["best"] else None
            self.meta = {k: v for k, v in meta.items() if k not in ("step", "best", "identity")}
        return True
