"""MARM as a tool: a multi-layer ranker whose past states come from a cache (papers/tools.md 3.2, 7.3).

Fit: one or several chronological passes; every event is scored with cached states, trained on, and its own states are
written back. Serve: candidates read the same cache and write nothing; `observe` takes what was really shown, scores it
and writes its states back, so the cache goes on growing from feedback as in training.

Facts of the paper: cached results turn self-attention into target attention per layer; the four steps (sequence,
lookup, multi-layer target attention, write-back); one cache for training and serving. Ours: everything with a number.
Open in the paper: what exactly is cached, how layers feed the ranker, whether the learner sees more than one pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from genrec import io
from genrec.contracts import UserContext
from genrec.device import fastest_device
from genrec.errors import GenrecError, check_least
from genrec.tools.marm.cache import StateCache
from genrec.tools.marm.memory import CachedStates, cache_for
from genrec.tools.ranking.models import RankerConfig, RankerModel
from genrec.tools.ranking.reward import ranking_reward
from genrec.tools.ranking.task import Batch, Task
from genrec.tools.ranking.tool import Profile, load_about, load_weights, masked, save_model, scored
from genrec.tools.ranking.train import Report, TrainConfig, make_ranker, train, true_states

CACHE = "states.cache"


@dataclass(frozen=True)
class MARMConfig:
    """Sizes of the model and its cache. Ours, and not tuned yet (docs/ranking-tools.md)."""

    layers: int = field(default=3, metadata={"help": "layers (1: long DIN, nothing is cached)"})
    events: int = field(default=100, metadata={"help": "newest events that a request reads"})
    d: int = field(default=32, metadata={"help": "width"})
    heads: int = field(default=2, metadata={"help": "attention heads"})
    top: int = field(default=0, metadata={"help": "events that each layer's own search keeps (0: all)"})
    users: int = field(default=0, metadata={"help": "users the cache holds, the longest unseen leave (0: all)"})

    def __post_init__(self) -> None:
        check_least(self, {"users": 0})


@dataclass(frozen=True)
class Reason:
    """Why a candidate got its score. item: its row; score; events: (place in the history, row, share of attention), the
    most attended first; read: share of the history's states that the cache held; sentence: the same for people."""

    item: int
    score: float
    events: tuple[tuple[int, int, float], ...]
    read: float
    sentence: str


class MARM:
    """See the module's text. Implements genrec.contracts.Ranker."""

    name = "marm"

    def __init__(self, model: RankerModel, profile: Profile, memory: CachedStates | None) -> None:
        self.model, self.profile, self.memory = model.eval(), profile, memory

    @classmethod
    def fit(
        cls,
        task: Task,
        config: MARMConfig | None = None,
        training: TrainConfig | None = None,
        report: Report = lambda _: None,
    ) -> Self:
        """Trains on the task's training events; the cache then holds the training and validation events."""
        config, training = config or MARMConfig(), training or TrainConfig()
        sizes = {"layers": config.layers, "n": config.events, "d": config.d, "heads": config.heads, "top": config.top}
        model = make_ranker(task, "attention", training.seed, **sizes)
        memory = None
        if config.layers > 1:
            cache = StateCache(cache_for(model.config, config.users or task.users))
            memory = CachedStates(cache, task.samples.sequences.users)
        model.to(fastest_device())
        train(model, task, training, memory, report)
        return cls(model.to("cpu"), Profile.of(task), memory)  # a request at a time is quick there

    def rates(self, contexts: list[UserContext], items: np.ndarray) -> np.ndarray:
        """Predicted rates of every label, float32 [B, C, T]; items: rows [B, C], -1 as padding. Writes nothing."""
        if not contexts:
            return np.zeros((0, *np.shape(items)[1:], len(self.profile.names)), np.float32)
        with torch.no_grad():
            logits, _ = self._forward(self.profile.batch(contexts, items, self.model.config.n))
        return scored(logits)

    def score(
        self, contexts: list[UserContext], items: np.ndarray, weights: Mapping[str, float] | None = None
    ) -> np.ndarray:
        """float32 [B, C]: the reward of the predicted rates (the main label's where no weights are given)."""
        return masked(ranking_reward(self.rates(contexts, items), self.profile.names, weights), items)

    def observe(self, contexts: list[UserContext], items: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
        """What was really shown, rows [B], in the order of time, one of a user at once: its rates [B, T], and its
        states are written back. labels: what the users then said, float [B, T], 1 yes, 0 no, NaN unknown; later
        requests read it as the feedback of these events (None: not known). Raises GenrecError for a user given twice
        and for labels of another shape."""
        users = [c.user for c in contexts]
        if len(set(users)) < len(users):
            raise GenrecError("a user is there twice; observe one event of a user at a time")
        if labels is not None and np.shape(labels) != (len(contexts), len(self.profile.names)):
            raise GenrecError(f"labels must be [{len(contexts)}, {len(self.profile.names)}], not {np.shape(labels)}")
        batch = self.profile.batch(contexts, np.asarray(items)[:, None], self.model.config.n)
        with torch.no_grad():
            logits, states = self._forward(batch)
        if self.memory is not None:
            self.memory.write(batch, states[:, 0])
        if labels is not None:
            for context, row, said in zip(contexts, items, labels, strict=True):
                self.profile.tell(context, int(row), said)
        return scored(logits)[:, 0]

    def explain(self, context: UserContext, items: np.ndarray, most: int = 3) -> list[Reason]:
        """A reason for each candidate row of one request, [C]."""
        items = np.asarray(items, np.int64)[None]
        batch = self.profile.batch([context], items, self.model.config.n)
        scores = self.score([context], items)[0]
        with torch.no_grad():
            cached, present = self.memory.read(batch) if self.memory else (None, None)
            level0 = self.model.item(batch.history)
            known = self.model.stack.memory(level0, batch.feedback, cached, present)
            weights = self.model.stack.weights(self.model.item(batch.item), known, batch.events >= 0)[0].mean(1).numpy()
        there = batch.events[0].numpy() >= 0
        read = 1.0 if present is None else float(present[0].numpy()[there].mean()) if there.any() else 0.0
        out = []
        for c, row in enumerate(items[0].tolist()):
            best = [int(j) for j in np.argsort(-weights[c]) if there[j] and weights[c, j] > 0][:most]
            events = tuple((int(batch.events[0, j]), int(batch.history[0, j]), float(weights[c, j])) for j in best)
            out.append(Reason(row, float(scores[c]), events, read, self._sentence(row, float(scores[c]), events)))
        return out

    def _sentence(self, row: int, score: float, events: tuple[tuple[int, int, float], ...]) -> str:
        titles, label = self.profile.titles, self.profile.names[0]
        if row < 0:
            return "No item stands here."
        said = f"{titles[row]}: {label} {score:.0%}"
        looked = "; ".join(f"{titles[r]} ({share:.0%} of the attention)" for _, r, share in events)
        return f"{said}, read from {looked}." if looked else f"{said}, without any history to read."

    def _forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model(batch, *(self.memory.read(batch) if self.memory else (None, None)))

    def save(self, folder: Path) -> None:
        """Writes model, profile and the cache as it is."""
        io.check_writable(folder)
        version = save_model(folder, self.name, self.model, {})
        self.profile.save(folder)
        if self.memory is not None:
            kept = self.memory.cache
            (folder / CACHE).unlink(missing_ok=True)
            with StateCache(dataclasses.replace(kept.config, model=version), folder / CACHE) as cache:
                cache.restore(kept.snapshot())

    @classmethod
    def load(cls, folder: Path, write: bool = False) -> Self:
        """What `save` wrote. write: whether this process will `observe`; one may. Raises GenrecError for what is
        missing, damaged or of another model."""
        folder = Path(folder)
        about = load_about(folder, cls.name)
        try:
            model = RankerModel(RankerConfig(**about["config"]))
        except TypeError as error:
            raise GenrecError(f"{folder / 'tool.json'} is of another version ({error}); fit the tool again") from None
        load_weights(folder, model)
        profile = Profile.load(folder)
        if model.config.layers == 1:
            return cls(model, profile, None)
        sizes = StateCache.describe(folder / CACHE)
        cache = StateCache(dataclasses.replace(sizes, model=about["version"]), folder / CACHE, write)
        return cls(model, profile, CachedStates(cache, profile.users))

    def staleness(self, task: Task, upto: int) -> dict[str, Any]:
        """How far the cached states are from those of the current weights: per level the mean cosine and the relative
        error |cached - true| / |true|, over the events that are there; and the share of the last n events that are."""
        assert self.memory is not None
        s, n = task.samples.sequences, self.model.config.n
        true = true_states(self.model, task, upto)
        ends = s.offsets[:-1] + np.bincount(s.user_of[task.part <= upto], minlength=len(s))
        places = ends[:, None] - n + np.arange(n)
        there = places >= s.offsets[:-1, None]
        at = np.where(there, places, 0)
        states, present = self.memory.cache.read(
            self.memory.keys[:-1], np.where(there, at - s.offsets[:-1, None], -1), np.where(there, s.items[at], -1)
        )
        a, b = states[present].astype(np.float32), true[at[present]]
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        cosine = ((a * b).sum(-1) / np.maximum(norms, 1e-9)).mean(0)
        error = (np.linalg.norm(a - b, axis=-1) / np.maximum(np.linalg.norm(b, axis=-1), 1e-9)).mean(0)
        return {
            "cosine": [round(float(x), 5) for x in cosine],
            "relative_error": [round(float(x), 5) for x in error],
            "present": round(float(present.sum() / max(1, there.sum())), 5),
        }

    def refresh(self, task: Task, upto: int, report: Callable[[str], None] = lambda _: None) -> None:
        """Writes the states of the current weights for all events of the parts up to `upto`: no state is stale then."""
        assert self.memory is not None
        s = task.samples.sequences
        true = true_states(self.model, task, upto)
        at = np.flatnonzero(task.part <= upto)
        users = s.user_of[at]
        self.memory.cache.write(self.memory.keys[users], at - s.offsets[users], s.items[at], true[at])
        report(f"marm: {len(at):,} states made anew")
