"""Training SARM: every step encodes distinct items of its batch once, with gradients, and writes them to the bank.

Of more than `encoded` items a random part is encoded, and the others are read from the bank, where they are some steps
old; so a step costs the same whatever the batch. All rows are encoded anew after each pass (a row that no batch touched
would be stale), and once more for the pass that is kept; validation and test read the bank, as serving does. With a
frozen encoder its outputs are computed once. Everything is on the model's device.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from genrec.errors import check_least
from genrec.evaluation.auc import inside_or_over
from genrec.tools.ranking.heads import bce
from genrec.tools.ranking.samples import TRAIN, VALIDATION
from genrec.tools.ranking.task import Batch, Task
from genrec.tools.ranking.train import Averaged, Report, TrainConfig, positions_of
from genrec.tools.sarm.model import Bank, SARMModel, encode_rows, fill_bank, make_bank
from genrec.tools.sarm.tokens import Tokens


@dataclass(frozen=True)
class SARMTraining(TrainConfig):
    """As TrainConfig, and: aux, the weight of the auxiliary loss (lambda; ours, the paper's is not known); encoded, the
    most items that a step encodes (0: all; ours). An encoder learns longer than a table: with a patience of three
    passes luck ended its fits on ML-100K (docs/ranking-tools.md)."""

    epochs: int = field(default=40, metadata={"help": "most passes over the events"})
    patience: int = field(default=8, metadata={"help": "passes without a better validation GAUC before the end"})
    batch: int = field(default=1024, metadata={"help": "exposures per step"})
    learning_rate: float = field(default=8e-3, metadata={"help": "of Adam"})
    aux: float = field(default=0.1, metadata={"help": "weight of the auxiliary loss"})
    encoded: int = field(default=128, metadata={"help": "most items that a step encodes (0: all of its batch)"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, {"aux": 0, "encoded": 0})


@dataclass(frozen=True)
class Trained:
    """values: validation GAUC of each pass; seconds: wall time of the training steps alone."""

    bank: Bank
    values: list[float]
    seconds: float


class Trainer:
    """One training step at a time, with the optimizer's state and the average of the weights."""

    def __init__(self, model: SARMModel, bank: Bank, tokens: Tokens, config: SARMTraining) -> None:
        self.model, self.bank, self.tokens, self.config = model, bank, tokens, config
        self.averaged = Averaged(model, config.average)
        self.optimizer = torch.optim.Adam(
            [p for p in model.parameters() if p.requires_grad],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._frozen: tuple[Tensor, Tensor] | None = None
        if model.config.side == "anchor" and model.config.frozen:
            with torch.no_grad():
                base, domain = (torch.from_numpy(t).to(model.device) for t in (tokens.base, tokens.domain))
                self._frozen = model.encoder(base, domain)

    def step(self, batch: Batch) -> None:
        """Learns from a batch of one candidate each, and writes the bank's rows of the items that it encodes."""
        model, bank, aux = self.model, self.bank, self.config.aux
        batch = batch.to(model.device)
        hidden = model.draw()
        if model.config.side == "anchor":
            every, inverse = torch.unique(batch.item[:, 0], return_inverse=True)
            chosen = self.choose(hidden[every])
            rows = every[chosen]
            cls, tar = self.encode(rows, torch.where(hidden[rows], model.config.items, bank.ids[rows]))
            own = bank.cls[every].index_copy(0, chosen, cls)[inverse][:, None]
            mine = bank.tar[every].index_copy(0, chosen, tar)[inverse][:, None]
            loss = bce(model.score(batch, bank, own, mine, hidden), batch.labels)
            if aux:
                live = torch.zeros_like(every, dtype=torch.bool).index_fill(0, chosen, True)[inverse]
                labels = batch.labels[..., :1].masked_fill(~live[:, None, None], torch.nan)
                loss = loss + aux * bce(model.auxiliary(own, mine)[..., None], labels)
        else:
            loss = bce(model.score(batch, bank, hidden=hidden), batch.labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self.optimizer.step()
        self.averaged.follow(model)
        if model.config.side == "anchor":
            shown = ~hidden[rows]  # what a hidden item's h_TAR is, is not what it is at a request
            bank.cls[rows] = cls.detach()
            bank.tar[rows[shown]] = tar.detach()[shown]

    def choose(self, hidden: Tensor) -> Tensor:
        """Which of a batch's distinct items are encoded, int64 [K]: the hidden ones, whose h_TAR the bank does not
        have, and of the others as many as may be, at random."""
        most = self.config.encoded
        if not most or self._frozen is not None or len(hidden) <= most:
            return torch.arange(len(hidden), device=hidden.device)
        order = torch.argsort(torch.rand(len(hidden), device=hidden.device) - hidden.float())
        return order[: max(most, int(hidden.sum()))]

    def encode(self, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """h_CLS and h_TAR [K, d] of distinct items, with the identifiers' rows ids [K]."""
        if self._frozen is None:
            return encode_rows(self.model, self.tokens.base, self.tokens.domain, rows.cpu().numpy(), ids)
        outputs, mask = self._frozen
        cls, tar, _, _ = self.model.identify(outputs[rows], mask[rows], ids)
        return cls, tar


def train(
    model: SARMModel,
    task: Task,
    tokens: Tokens,
    config: SARMTraining,
    ids: np.ndarray | None = None,
    report: Report = lambda _: None,
) -> Trained:
    """Trains on the task's training events; the averaged weights after the pass that ranks the validation events best
    are kept.

    ids: int [N], each item's row in the model's table; the table's last row for an item that is to be unknown. None:
    its own for every item.
    """
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    ids = np.arange(task.items) if ids is None else ids
    bank = make_bank(model, tokens.base, tokens.domain, ids)
    trainer = Trainer(model, bank, tokens, config)
    positions = np.flatnonzero(task.part == TRAIN)
    values: list[float] = []
    best, seconds = copy.deepcopy(model.state_dict()), 0.0
    averaged = trainer.averaged.model
    for epoch in range(config.epochs):
        model.train()
        for at in shuffled_batches(positions, config.batch, rng):
            batch = task.batch(at, model.config.n)
            clock = time.perf_counter()
            trainer.step(batch)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds += time.perf_counter() - clock
        if model.config.side == "anchor":
            fill_bank(model, bank, tokens.base, tokens.domain, np.arange(task.items))
        at = positions_of(task, VALIDATION)
        found = predict(averaged, task, make_bank(averaged, tokens.base, tokens.domain, ids), at)[:, 0]
        measure, value = inside_or_over(task.samples.labels[at, 0], found, task.samples.sequences.user_of[at])
        values.append(value)
        report(f"sarm: {epoch + 1} of {config.epochs} passes, validation {measure} {value:.4f}")
        if int(np.argmax(values)) == epoch:
            best = copy.deepcopy(averaged.state_dict())
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
    batches = (task.batch(at, model.config.n).to(model.device) for at in parts)
    return np.concatenate([model.score(batch, bank)[:, 0].cpu().numpy() for batch in batches])
