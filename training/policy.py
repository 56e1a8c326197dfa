"""The loop that aligns the generator: rollouts, rewards, several optimiser steps on them, validation, and the way back.

OxygenREC (2512.22386) gives the loss, its floor and the reward's parts. Ours, where it is silent:

- A batch of rollouts serves `updates` optimiser steps; the first is on-policy (its ratio is 1 and every gate inert),
  the gate works from the second on. pi_old is what the first step sees, so it costs nothing.
- Users take turns, so that long histories do not crowd out the others; the scenario of a position is drawn from those
  that its item qualifies for. Completions are drawn without replacement: a group without doubles.
- The policy has no dropout, in rollouts and in losses alike; the anchor (next-token loss on the users' own choices) has
  it.
- The ranker's reward is its score less beta (log pi_old - log pi0), pi0 being the start model (`ranking` anchored; see
  genrec.alignment.rewards). Advantages are not divided by their group's deviation then: where the policy is at the
  optimum all rewards of a group are equal, and a division would blow up the rest. Instead each scenario's rewards are
  divided by the weight of the ranking in them (`unit`): a point of its score and a nat of drift count alike in all.
- The last completions of a beam make room for the target and the ranker's best (`injected`). At that optimum the
  gradient is 0 whatever was completed, so completions need not be drawn from pi.
- The result is an average of the weights. The untouched model is the first candidate. Guard "best": the average that
  ranks validation best is kept, so alignment never ends below its start there; "harm": the last one is, unless the
  interval of its difference to the start lies below zero. After `patience` validations of which none was kept the run
  ends. A step whose gradient is not finite is left out and logged.

A checkpoint is written between batches of rollouts, and all randomness comes from (seed, batch): a killed run that is
started again ends with the same weights.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genrec.alignment.advantages import group_advantages, suppressed
from genrec.alignment.judges import Bench
from genrec.alignment.losses import LOSSES, Loss, gate_weight
from genrec.alignment.policy import log_probabilities, probe
from genrec.alignment.rewards import RANKING, Rewards, ScenarioWeights, inject, judge
from genrec.candidates import allowed_items
from genrec.contracts import HOME, UserContext
from genrec.errors import GenrecError
from genrec.generator.batches import Batch, TrainingData
from genrec.generator.model import GeneratorModel, History, Request
from genrec.generator.search import beam_search, make_history, make_request, score_items
from genrec.io import read_json, write_json, write_text
from genrec.state import CHECKPOINT, State
from training.align_config import FLOORED, AlignConfig
from training.generator import loss_of

RATIOS = (0.0, 0.25, 0.5, 0.8, 0.95, 1.05, 1.25, 2.0, 4.0)  # lower edges of the histogram of ratios
GATES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.99)  # of how far the gates are open
WARMUP, CLIP, WEIGHT_DECAY = 20, 1.0, 0.01
LEAST_UNIT = 0.05
WATCHED = 16  # requests of a batch that the probe looks at
Evaluate = Callable[[GeneratorModel], dict[str, float]]  # on validation: "ndcg"; "high" of its difference to the start


@dataclass(frozen=True)
class Positions:
    """The requests that training may be asked: positions of events of `data.train` that have one before.

    fold: int64 [U], the users' folds; queries: float32 [N, D], a query for each item, NaN rows for none, or None.
    """

    data: TrainingData
    fold: np.ndarray
    queries: np.ndarray | None

    def draw(self, n: int, shares: dict[str, float], rng: np.random.Generator) -> tuple[list[UserContext], np.ndarray]:
        """n contexts, and the positions int64 [n] of the events that they want. shares: of the scenarios; one that the
        data lacks leaves its share to the others, and a position that does not qualify for the one drawn is home's."""
        s = self.data.train
        able = np.flatnonzero(s.lengths > 1)
        users = able[rng.permutation(len(able))[:n]] if n <= len(able) else rng.choice(able, n)
        positions = s.offsets[users] + rng.integers(1, s.lengths[users])
        tasks = {t.name: t for t in self.data.tasks}
        names = [n for n in shares if shares[n] and (n == HOME or n in tasks)] or [HOME]
        chances = np.array([shares.get(name, 0.0) or 1.0 for name in names])
        drawn = rng.choice(len(names), len(users), p=chances / chances.sum())
        contexts = []
        for u, event, pick in zip(users.tolist(), positions.tolist(), drawn.tolist(), strict=True):
            context = s.context(u, event - int(s.offsets[u]))
            task = tasks.get(names[pick])
            if task is not None and task.mask[event]:
                trigger = context.history[-1] if task.trigger else None
                context = replace(context, scenario=task.name, trigger=trigger)
            contexts.append(context)
        return contexts, positions

    def asked(self, contexts: list[UserContext], wanted: np.ndarray) -> np.ndarray | None:
        """The queries of those contexts that are searches: float32 [B, D], NaN rows for the others."""
        if self.queries is None:
            return None
        searches = {t.name for t in self.data.tasks if t.query}
        mine = np.array([c.scenario in searches for c in contexts])
        return np.where(mine[:, None], self.queries[wanted], np.nan).astype(np.float32)

    def told(self, events: np.ndarray, queries: np.ndarray | None) -> np.ndarray | None:
        """What each request tells the generator: its query, else the instruction that its position follows.
        float32 [B, D], NaN rows for the learned default; None where nobody is told anything."""
        data = self.data
        if data.told is None or data.instructions is None or not len(data.instructions):
            return queries
        index = data.told[events]
        written = np.where((index >= 0)[:, None], data.instructions[np.maximum(index, 0)], np.nan).astype(np.float32)
        return written if queries is None else np.where(np.isnan(queries), written, queries)


@dataclass(frozen=True)
class Rollout:
    """A batch of rollouts: history, request [B, 1]; items: int64 [B, G], -1 where there is none; advantages: float
    [B, G], after the floor; rewards as they were given, without the cost of drift and undivided; zeroed: bool [B, G],
    what the floor took; drift: float [B, G], log pi_old - log pi0 in nats, zeros where it costs nothing."""

    history: History
    request: Request
    contexts: list[UserContext]
    items: Tensor
    advantages: Tensor
    rewards: Rewards
    zeroed: Tensor
    drift: np.ndarray
    seconds: dict[str, float]


class Aligner(State):
    """One alignment: the model, what judges it, and where it stands. texts: for each item the text of its query ("" for
    none), which the tools read; price: scenario -> beta, where the config leaves it open; q2i:
    weight of the Q2I loss in the anchor, where the model retrieves."""

    def __init__(
        self,
        model: GeneratorModel,
        positions: Positions,
        bench: Bench,
        weights: ScenarioWeights,
        config: AlignConfig,
        texts: list[str] | None = None,
        price: Callable[[str], float] = lambda _: 1.0,
        q2i: float = 0.2,
    ) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator(mixed_precision="bf16" if config.bf16 else "no")
        if self.accelerator.num_processes > 1:
            raise GenrecError("alignment runs in one process; start it without `accelerate launch --num_processes`")
        model.to(self.accelerator.device)
        super().__init__(model, config.learning_rate, WEIGHT_DECAY)
        self.model = model
        self.positions, self.bench, self.weights, self.config = positions, bench, weights, config
        self.texts, self.price, self.q2i = texts, price, q2i
        self.start = copy.deepcopy(model).requires_grad_(False).eval() if config.ranking == "anchored" else None
        self.loss = loss_function(config)
        self.meta = {"stale": "0", "kept": "0", "done": ""}
        self._epoch: tuple[int, list[np.ndarray]] = (0, self._windows(0))
        self._batches = len(self._epoch[1])

    def _windows(self, epoch: int) -> list[np.ndarray]:
        config, size = self.config, self.model.config.max_history
        return self.positions.data.epoch(size, config.anchor_positions, config.seed, epoch)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    # -- rollouts -----------------------------------------------------------------------------------

    def roll_out(self) -> Rollout:
        """Completions of newly drawn requests, judged. Random in (seed, batch) alone."""
        config, clock = self.config, time.perf_counter()
        seed = (config.seed, self.step // config.updates)
        rng = np.random.default_rng(seed)
        contexts, events = self.positions.draw(config.requests, self.weights.shares, rng)
        wanted = self.positions.data.train.items[events].astype(np.int64)
        queries = self.positions.asked(contexts, wanted)
        if queries is not None and self.texts is not None:
            found = ~np.isnan(queries).any(1)
            contexts = [
                replace(c, query=self.texts[w]) if told else c
                for c, w, told in zip(contexts, wanted.tolist(), found.tolist(), strict=True)
            ]
        allowed = allowed_items(contexts, len(self.model.path))
        history = make_history(contexts, self.model.config.max_history).to(self.device)
        request = make_request(self.model, contexts, self.positions.told(events, queries)).to(self.device)
        self.model.eval()
        noise = None
        if config.rollouts == "sampled":
            noise = torch.Generator(self.device).manual_seed(int(rng.integers(2**62)))
        with self.accelerator.autocast():
            beam = beam_search(
                self.model, history, request, config.group, torch.from_numpy(allowed).to(self.device), noise
            )
        items: np.ndarray = beam.items.cpu().numpy()
        seconds = {"rollout": time.perf_counter() - clock}
        clock = time.perf_counter()
        fold = self.positions.fold[self.positions.data.train.user_of[events]]
        context = self.bench.context(contexts, wanted, fold, allowed, queries)
        if config.rollouts == "beam":
            items = inject(items, context, config.injected)
        given = charged = judge(items, context, self.weights, scored=self.start is not None)
        if config.shuffled:
            given = charged = given.shuffled(items >= 0, rng)
        drift: np.ndarray = np.zeros((len(items), items.shape[1] + 1))
        if self.start is not None:
            drift = self.drift(history, request, np.concatenate([items, wanted[:, None]], 1))
            price = np.array([[config.beta or self.price(c.scenario)] for c in contexts])
            weight = self.weights.of([c.scenario for c in contexts], RANKING)
            charged = given.less(weight * price * drift).times(1 / unit(weight))
        advantages, zeroed = advantages_of(charged, items, config)
        seconds["reward"] = time.perf_counter() - clock
        to = self.device
        completions = torch.from_numpy(items).to(to)
        return Rollout(
            history, request, contexts, completions, advantages.to(to), given, zeroed.to(to), drift[:, :-1], seconds
        )

    def drift(self, history: History, request: Request, items: np.ndarray) -> np.ndarray:
        """log pi - log pi0 of items, rows [B, M]: float64, 0 where there is none."""
        rows, models = torch.from_numpy(items).to(self.device), (self.model, self.start)
        with self.accelerator.autocast():
            now, then = (score_items(m, history, request, rows).double() for m in models if m is not None)
        return torch.where(rows >= 0, now - then, 0.0).cpu().numpy()

    # -- updates ------------------------------------------------------------------------------------

    def anchor_batch(self) -> Batch:
        """The next batch of windows in which every position predicts what the user really chose."""
        config, data = self.config, self.positions.data
        epoch, index = divmod(self.step, self._batches)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._windows(epoch))
        windows = self._epoch[1][index % len(self._epoch[1])]  # an epoch may have a batch less than the first
        return data.batch(windows, config.seed * 1_000_003 + self.step, config.teaching).to(self.device)

    def update(self, rollout: Rollout, old: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        """One optimiser step on a batch of rollouts; old: log pi_old [B, G, L], None in the first step, which makes it.
        Returns it, and what is to be said of the step."""
        config, mask = self.config, (rollout.items >= 0).unsqueeze(-1)
        rate = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(config.seed * 1_000_003 + self.step)
        self.model.eval()
        with self.accelerator.autocast():
            with torch.set_grad_enabled(config.policy > 0 or not config.anchor):
                new = log_probabilities(self.model, rollout.history, rollout.request, rollout.items)
            old = new.detach() if old is None else old
            mask = mask.expand_as(new)
            policy = self.loss(new.flatten(0, 1), old.flatten(0, 1), rollout.advantages.flatten(), mask.flatten(0, 1))
            anchor = policy.new_zeros(())
            if config.anchor:
                self.model.train()
                anchor = loss_of(self.model, self.anchor_batch(), self.q2i)[0]
        self.optimizer.zero_grad()
        whole = config.policy * policy + config.anchor * anchor
        said = {"policy_loss": float(policy.detach()), "anchor_loss": float(anchor.detach()), "learning_rate": rate}
        self.accelerator.backward(whole)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, CLIP))
        said |= {"gradient_norm": norm, "skipped": not np.isfinite(norm)}
        if np.isfinite(norm):
            self.optimizer.step()
        self.count_step(config.average)
        said |= ratios_of(new.detach(), old, rollout.advantages, mask, config)
        return old, said

    # -- the run ------------------------------------------------------------------------------------

    def measured(self, evaluate: Evaluate) -> dict[str, float]:
        """Validation of the averaged weights; keeps them where the guard allows it."""
        current = self.use(self.average)
        self.model.eval()
        found = evaluate(self.model)
        self.use(current)
        better = self.best is None or found["ndcg"] > self.best
        if self.best is None or (better if self.config.guard == "best" else not found["high"] < 0):
            self.best, self.meta["stale"], self.meta["kept"] = found["ndcg"], "0", str(self.step)
            self.best_weights = [a.clone() for a in self.average]
        else:
            self.meta["stale"] = str(int(self.meta["stale"]) + 1)
        return found

    def run(self, folder: Path, evaluate: Evaluate, report: Callable[[dict[str, Any]], None]) -> GeneratorModel:
        """Aligns the model in place and leaves the kept weights in it, in eval mode.

        folder: for the checkpoint and log.jsonl, a line per batch of rollouts (docs/alignment.md says what is in it); a
        run of the same settings found there goes on, another one is an error.
        """
        config = self.config
        identity = {k: v for k, v in config.as_dict().items() if k not in ("bundle", "out", "checkpoint_seconds")}
        identity |= {
            "model": self.model.config.to_diff_dict(),
            "rewards": self.weights.weights,
            "shares": self.weights.shares,
        }
        lines: list[str] = []
        if self.load(folder / CHECKPOINT):
            if read_json(folder / "run.json") != identity:
                raise GenrecError(f"{folder} holds an alignment of other settings; remove it or use another folder")
            written = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
            lines = [line for line in written if line and json.loads(line)["step"] <= self.step]
        else:
            write_json(folder / "run.json", identity)
            first = self.measured(evaluate)
            self.log(lines, folder, {"step": 0, "validation": first, "best": self.best, "kept": 0}, report)
            self.save(folder / CHECKPOINT)
        saved, ended = time.monotonic(), bool(self.meta["done"])
        while self.step < config.steps and not ended:
            rollout = self.roll_out()
            line, old = self.describe(rollout), None
            clock, before = time.perf_counter(), self.step
            said: dict[str, Any] = {}
            for _ in range(min(config.updates, config.steps - self.step)):
                old, said = self.update(rollout, old)
            line |= said | {"step": self.step}
            line["seconds"] = rollout.seconds | {"update": time.perf_counter() - clock}
            if self.step // config.evaluate_steps > before // config.evaluate_steps or self.step >= config.steps:
                clock = time.perf_counter()
                line["validation"] = self.measured(evaluate)
                line |= {"best": self.best, "kept": int(self.meta["kept"])}
                line["seconds"] |= {"validation": time.perf_counter() - clock}
                ended = 0 < config.patience <= int(self.meta["stale"])
                self.meta["done"] = "early" if ended else ""
            self.log(lines, folder, line, report)
            if "validation" in line or time.monotonic() - saved > config.checkpoint_seconds:
                self.save(folder / CHECKPOINT)
                saved = time.monotonic()
        self.use(self.best_weights)
        return self.model.eval()

    def log(
        self, lines: list[str], folder: Path, line: dict[str, Any], report: Callable[[dict[str, Any]], None]
    ) -> None:
        """Keeps one line; the file is whole at any time."""
        lines.append(json.dumps(rounded(line), allow_nan=False))
        write_text(folder / "log.jsonl", "\n".join(lines) + "\n")
        report(line)

    def describe(self, rollout: Rollout) -> dict[str, Any]:
        """What a batch of rollouts is like: see docs/alignment.md for the fields."""
        given, there = rollout.rewards, (rollout.items >= 0).cpu().numpy()
        advantages, zeroed = rollout.advantages.cpu().numpy(), rollout.zeroed.cpu().numpy()
        positive = (advantages > 0) | zeroed
        watched = torch.arange(min(WATCHED, len(rollout.items)), device=self.device)
        with self.accelerator.autocast():
            seen = probe(self.model, rollout.history.of(watched), rollout.request.of(watched), rollout.items[watched])
        scenarios = np.array([c.scenario for c in rollout.contexts])
        rewards = {
            name: mean(given.total[scenarios == name], there[scenarios == name]) for name in np.unique(scenarios)
        }
        return {
            "reward": mean(given.total, there),
            "reward_by_part": {name: mean(part, there) for name, part in given.parts.items()},
            "reward_by_scenario": rewards,
            "drift": mean(rollout.drift, there),
            "completions": int(there.sum()),
            "hits": int(given.hits.sum()),
            "floor": float(np.nanmean(given.floor)) if np.isfinite(given.floor).any() else None,
            "without_floor": int(np.isnan(given.floor).sum()),
            "suppressed": float(zeroed.sum() / max(positive.sum(), 1)),
            "groups_without_positive": float((~(advantages > 0).any(1)).mean()),
            "groups_of_equal_rewards": float((~advantages.astype(bool).any(1) & ~zeroed.any(1)).mean()),
            "entropy": seen.entropy,
            "legality": seen.legality,
        }


def unit(weight: np.ndarray) -> np.ndarray:
    """What rewards are divided by where the ranking has this weight: itself, at least LEAST_UNIT, lest what is left of
    the reward grow without bound; 1 where the scenario has no ranking, and so no price of drift either."""
    return np.where(weight > 0, np.maximum(weight, LEAST_UNIT), 1.0)


def learning_rate(config: AlignConfig, step: int) -> float:
    """Linear warm-up, then a cosine to 0 at the last step."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / config.steps)))
    return config.learning_rate * min(1.0, (step + 1) / WARMUP) * cosine


def loss_function(config: AlignConfig) -> Loss:
    """The policy loss of a config; sa-gcpo and sapo have its temperatures."""
    if config.loss in (FLOORED, "sapo"):
        taus = {"positive": config.temperature_positive, "negative": config.temperature_negative}
        return partial(LOSSES[config.loss], **taus)
    return LOSSES[config.loss]


def advantages_of(given: Rewards, items: np.ndarray, config: AlignConfig) -> tuple[Tensor, Tensor]:
    """Advantages [B, G] after the floor, where there is one, and what it took, bool [B, G]."""
    total = torch.from_numpy(np.where(items >= 0, given.total, np.nan))
    advantages = group_advantages(total, divide=config.ranking == "place")
    if config.loss != FLOORED or not config.floor:
        return advantages, torch.zeros_like(advantages, dtype=torch.bool)
    own, floor, hits = (torch.from_numpy(x) for x in (given.own, given.floor, given.hits))
    zeroed = suppressed(advantages, own, floor, hits)
    return advantages.masked_fill(zeroed, 0.0), zeroed


def ratios_of(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, config: AlignConfig) -> dict[str, Any]:
    """Histograms of the ratios of a step, as shares of its tokens, and of how far SA-GCPO's gates are open at them."""
    ratio = (new - old).clamp(-20, 20).exp()
    tau = torch.where(advantages > 0, config.temperature_positive, config.temperature_negative).unsqueeze(-1)
    opened = gate_weight(ratio, tau)[mask].cpu().numpy()
    found = ratio[mask].cpu().numpy()
    return {
        "ratio_mean": float(found.mean()) if found.size else 1.0,
        "ratio_largest": float(found.max()) if found.size else 1.0,
        "ratio_histogram": histogram(found, RATIOS),
        "gate_histogram": histogram(opened, GATES),
    }


def histogram(values: np.ndarray, edges: tuple[float, ...]) -> list[float]:
    """The share of values from each edge to the next; the last one is open."""
    counts = np.histogram(values, [*edges, np.inf])[0]
    return [float(x) for x in counts / max(values.size, 1)]


def mean(values: np.ndarray, there: np.ndarray) -> float:
    """The mean where `there`; 0 where nothing is."""
    return float(values[there].mean()) if there.any() else 0.0


def rounded(value: Any) -> Any:
    """Floats to six digits, so that a line stays readable; what is not finite becomes null."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value
