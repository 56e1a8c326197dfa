"""Training SARM: every step encodes the distinct items of its batch once, with gradients, and writes them to the bank.

All rows are encoded anew at the start of a pass and after the last one (a row that no batch touched would be stale);
validation and test read the bank, as serving does.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from genrec.errors import GenrecError
from genrec.evaluation.auc import gauc
from genrec.tools.ranking.heads import bce
from genrec.tools.ranking.samples import TRAIN, VALIDATION
from genrec.tools.ranking.task import Task
from genrec.tools.ranking.train import Report, TrainConfig, positions_of
from genrec.tools.sarm.model import Bank, SARMModel, fill_bank, make_bank
from genrec.tools.sarm.tokens import Tokens


@dataclass(frozen=True)
class SARMTraining(TrainConfig):
    """As TrainConfig, and: aux, the weight of the auxiliary loss (lambda; ours, the paper's is not known)."""

    epochs: int = field(default=6, metadata={"help": "passes over the training events"})
    aux: float = field(default=0.1, metadata={"help": "weight of the auxiliary loss"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.aux < math.inf:
            raise GenrecError(f"aux is {self.aux}; it must be at least 0")


@dataclass(frozen=True)
class Trained:
    """values: validation GAUC of each pass; seconds: wall time of the training steps alone."""

    bank: Bank
    values: list[float]
    seconds: float


def train(
    model: SARMModel,
    task: Task,
    tokens: Tokens,
    config: SARMTraining,
    ids: np.ndarray | None = None,
    report: Report = lambda _: None,
) -> Trained:
    """Trains on the task's training events; the pass that ranks the validation events best is kept.

    ids: int [N], each item's row in the model's table; the table's last row for an item that is to be unknown. None:
    its own for every item.
    """
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    anchored = model.config.side == "anchor"
    ids = np.arange(task.items) if ids is None else ids
    bank = make_bank(model, tokens.base, tokens.domain, ids)
    optimizer = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], config.learning_rate, weight_decay=config.weight_decay
    )
    positions = np.flatnonzero(task.part == TRAIN)
    values: list[float] = []
    best, seconds = copy.deepcopy(model.state_dict()), 0.0
    for epoch in range(config.epochs):
        model.train()
        clock = time.perf_counter()
        for at in shuffled_batches(positions, config.batch, rng):
            batch = task.batch(at, model.config.n)
            if anchored:
                rows, inverse = torch.unique(batch.item[:, 0], return_inverse=True)
                where = rows.numpy()
                cls, tar, _, _ = model.encode(
                    torch.from_numpy(tokens.base[where]), torch.from_numpy(tokens.domain[where]),
                    model.hidden(bank.ids[rows]),
                )  # fmt: skip
                own, mine = cls[inverse][:, None], tar[inverse][:, None]
                loss = bce(model.score(batch, bank, own, mine), batch.labels)
                if config.aux:
                    loss = loss + config.aux * bce(model.auxiliary(own, mine)[..., None], batch.labels[..., :1])
            else:
                loss = bce(model.score(batch, bank), batch.labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if anchored:
                bank.cls[rows], bank.tar[rows] = cls.detach(), tar.detach()
        seconds += time.perf_counter() - clock
        if anchored:
            fill_bank(model, bank, tokens.base, tokens.domain, np.arange(task.items))
        at = positions_of(task, VALIDATION)
        found = predict(model, task, bank, at)[:, 0]
        value = gauc(task.samples.labels[at, 0], found, task.samples.sequences.user_of[at])
        values.append(0.5 if math.isnan(value) else value)
        report(f"sarm: {epoch + 1} of {config.epochs} passes, validation GAUC {values[-1]:.4f}")
        if int(np.argmax(values)) == epoch:
            best = copy.deepcopy(model.state_dict())
        elif epoch - int(np.argmax(values)) >= config.patience:
            break
    model.load_state_dict(best)
    model.eval()
    return Trained(make_bank(model, tokens.base, tokens.domain, ids), values, seconds)


def shuffled_batches(positions: np.ndarray, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """A pass in random order, as nothing is cached between events."""
    mixed = rng.permutation(positions)
    return np.split(mixed, range(size, len(mixed), size))


@torch.no_grad()
def predict(model: SARMModel, task: Task, bank: Bank, positions: np.ndarray, chunk: int = 512) -> np.ndarray:
    """Logits [len(positions), T] of exposures, from the bank."""
    model.eval()
    parts = np.split(positions, range(chunk, len(positions), chunk))
    return np.concatenate([model.score(task.batch(at, model.config.n), bank)[:, 0].numpy() for at in parts])
