"""The unified reward mapping: what a completion is worth in a scenario, as plain functions of (completions, context).

OxygenREC (2512.22386, reward mapping): R is a scenario-aware weighted sum of format, relevance, ranking and diversity.
Which quantities stand for them, and all weights (scenarios.toml), are ours: the paper discloses neither.

completions: int64 rows [B, G], G recommended items for each of B requests, -1 where there is none (an illegal semantic
ID). Every part is float32 [B, G] from 0 to 1, and 0 where the completion is -1. Where a part has nothing to go by
(no target, no query, no item in view) all of its group get the same 0, which no advantage notices.

The ranking part has another form for training, `score`: the ranker's score s itself, less (`Rewards.less`) what the
drift from the start model pi0 costs; then all is divided by the ranking's weight (`Rewards.times`). KL-regularised
reinforcement learning, max E[s] - beta KL(pi || pi0), has the optimum pi0 exp(s / beta): its order is that of
beta log pi0 + s, genrec's fused list, where beta is the generator's weight over the tools' (`price_of_drift`). That
form is ours.

The floor of SA-GCPO is the reward of the target as if it were a completion, without GROUP parts; a target that is not
legal (not in the catalogue, or had before) has none: NaN.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from genrec.candidates import GENERATOR
from genrec.errors import GenrecError

WEIGHTS = Path(__file__).with_name("scenarios.toml")


@dataclass(frozen=True)
class RewardContext:
    """What B requests are judged by.

    scenarios: their names [B]; targets: int64 rows [B], -1 where nothing is known; allowed: bool [B, N], what may be
    recommended; paths: int64 [N, L + 1], see genrec.tokenizer.trie; text: float32 unit vectors [N, D]; taste: float32
    unit vectors [F, N, K] (zeros for an item without events), satisfaction: float32 [F, N], each judged by users of
    other folds; fold: int64 [B]; scores: float32 [B, N], of the ranker; tail: bool [N]; queries: float32 unit vectors
    [B, D], NaN rows where there is none; triggers: int64 rows [B], -1 where no item is in view; liked: rows [B, G] ->
    the chance that each request's own user likes them, by a ranker of other folds; None: `satisfaction` says it.
    """

    scenarios: Sequence[str]
    targets: np.ndarray
    allowed: np.ndarray
    paths: np.ndarray
    text: np.ndarray
    taste: np.ndarray
    satisfaction: np.ndarray
    fold: np.ndarray
    scores: np.ndarray
    tail: np.ndarray
    queries: np.ndarray
    triggers: np.ndarray
    liked: Callable[[np.ndarray], np.ndarray] | None = None


def _legal(completions: np.ndarray, context: RewardContext) -> np.ndarray:
    rows = np.arange(len(completions))[:, None]
    return np.asarray((completions >= 0) & context.allowed[rows, np.maximum(completions, 0)])


def _gather(values: np.ndarray, completions: np.ndarray) -> np.ndarray:
    return np.asarray(np.where(completions >= 0, values, 0.0), np.float32)


def _wanted(completions: np.ndarray, context: RewardContext) -> np.ndarray:
    """bool [B, G]: there is a completion and something to compare it with."""
    return np.asarray((completions >= 0) & (context.targets >= 0)[:, None])


def format_part(completions: np.ndarray, context: RewardContext) -> np.ndarray:
    """1 for an item of the catalogue that may be recommended: legal, and not had before."""
    return _legal(completions, context).astype(np.float32)


def hit(completions: np.ndarray, context: RewardContext) -> np.ndarray:
    """1 for the target itself."""
    return np.asarray(_wanted(completions, context) & (completions == context.targets[:, None]), np.float32)


def prefix(completions: np.ndarray, context: RewardContext) -> np.ndarray:
    """The share of the leading codes that stand in the target's semantic ID too."""
    ours, wanted = (context.paths[np.maximum(x, 0), 1:] for x in (completions, context.targets))
    common = (ours == wanted[:, None]).mean(-1)  # equal nodes of a level: equal codes up to it
    return np.asarray(np.where(_wanted(completions, context), common, 0.0), np.float32)


def text(completions: np.ndarray, context: RewardContext) -> np.ndarray:
    """Cosine of the items' text embeddings; negative ones count 0."""
    vectors, wanted = (context.text[np.maximum(x, 0)] for x in (completions, context.targets))
    cosine = np.einsum("bgd,bd->bg", vectors, wanted)
    return np.asarray(np.where(_wanted(completions, context), cosine.clip(0, 1), 0.0), np.float32)


def collaborative(completions: np.ndarray, context: RewardContext) -> np.ndarray:
    """Cosine of the items in the space of who chose what, of users of other folds; negative ones count 0."""
    vectors = context.taste[context.fold[:, None], np.maximum(completions, 0)]
    wanted = context.taste[context.fold, np.maximum(context.targets, 0)]
    cosine = np.einsum("bgd,bd->bg", vectors, wanted)
    cosine = np.where(completions == context.targets[:, None], 1.0, cosine)  # also of an item nobody else has
    return np.asarray(np.where(_wanted(completions, context), cosine.clip(0, 1), 0.0), np.float32)


def ranking(completions: np.ndarray, context: RewardContext) -> np.ndarray:
    """1 / log2(2 + place), the place (from 0) among the items that may be recommended, by the ranker's scores. Equal
    scores share the best place."""
    scores = np.where(context.allowed, context.scores, -np.inf)
    ordered = -np.sort(-scores, axis=1)
    own = np.take_along_axis(scores, np.maximum(completions, 0), 1)
    place = np.stack([np.searchsorted(-o, -x, side="left") for o, x in zip(ordered, own, strict=True)])
    value = np.where(np.isfinite(own), 1 / np.log2(2 + place), 0.0)
    return _gather(value, completions)


def score(completions: np.ndarray, context: RewardContext) -> np.ndarray:
    """The ranker's score itself: of any size, in standard deviations over the catalogue."""
    return _gather(np.take_along_axis(context.scores, np.maximum(completions, 0), 1), completions)


def diversity(completions: np.ndarray, context: RewardContext) -> np.ndarray:
    """1 less the mean cosine of its text to the others of its group, 0 to 1; 0 in a group of one."""
    there = (completions >= 0).astype(np.float32)
    vectors = context.text[np.maximum(completions, 0)] * there[..., None]
    others = vectors.sum(1, keepdims=True) - vectors
    count = there.sum(1, keepdims=True) - there
    cosine = (vectors * others).sum(-1) / np.maximum(count, 1)
    return _gather(np.where(count > 0, (1 - cosine).clip(0, 1), 0.0), completions)


def tail(completions: np.ndarray, context: RewardContext) -> np.ndarray:
    """1 for an item of the long tail, as genrec.data.scenarios defines it."""
    return _gather(context.tail[np.maximum(completions, 0)], completions)


def satisfaction(completions: np.ndarray, context: RewardContext) -> np.ndarray:
    """The chance that the item is rated as a favourite: by this user where there is a ranker, else by users of other
    folds."""
    if context.liked is not None:
        return _gather(context.liked(completions), completions)
    return _gather(context.satisfaction[context.fold[:, None], np.maximum(completions, 0)], completions)


def query(completions: np.ndarray, context: RewardContext) -> np.ndarray:
    """Cosine of the item's text and the request's query; negative ones count 0."""
    asked = np.nan_to_num(context.queries)
    cosine = np.einsum("bgd,bd->bg", context.text[np.maximum(completions, 0)], asked)
    return _gather(cosine.clip(0, 1), completions)


def similar(completions: np.ndarray, context: RewardContext) -> np.ndarray:
    """Cosine of the item's text and that of the item in view; negative ones count 0."""
    vectors, seen = (context.text[np.maximum(x, 0)] for x in (completions, context.triggers))
    cosine = np.einsum("bgd,bd->bg", vectors, seen)
    return _gather(np.where((context.triggers >= 0)[:, None], cosine.clip(0, 1), 0.0), completions)


Part = Callable[[np.ndarray, RewardContext], np.ndarray]
PARTS: dict[str, Part] = {
    "format": format_part,
    "hit": hit,
    "prefix": prefix,
    "text": text,
    "collaborative": collaborative,
    "ranking": ranking,
    "diversity": diversity,
    "tail": tail,
    "satisfaction": satisfaction,
    "query": query,
    "similar": similar,
}
RANKING = "ranking"  # the part that `score` may stand for
GROUP = ("diversity",)  # parts that depend on the rest of the group
LEAST_PRICE = 1.5  # of drift; at .2, as one fused list had it, pi became an echo of the tools (docs/alignment.md)


@dataclass(frozen=True)
class ScenarioWeights:
    """scenario -> part -> weight, a scenario's adding up to 1; scenario -> its share of the requests, likewise."""

    weights: dict[str, dict[str, float]]
    shares: dict[str, float]

    @classmethod
    def load(cls, path: Path | str = "") -> ScenarioWeights:
        """From a file like scenarios.toml, which is the default. Raises GenrecError naming what is wrong in it."""
        path = Path(path) if path else WEIGHTS
        try:
            read: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise GenrecError(f"{path} cannot be read as reward weights ({error})") from None
        weights, shares = {}, {}
        for scenario, table in read.items():
            if not isinstance(table, dict):
                raise GenrecError(
                    f"{path}: {scenario!r} stands outside of a scenario; write it below [home] or another"
                )
            for name, value in table.items():
                if name not in (*PARTS, "share"):
                    raise GenrecError(f"{path}: [{scenario}] weighs {name!r}; there are: {', '.join(PARTS)} and share")
                if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
                    raise GenrecError(f"{path}: [{scenario}] {name} is {value!r}; it must be a number of 0 or more")
            parts = {name: float(w) for name, w in table.items() if name != "share" and w}
            if not parts:
                raise GenrecError(f"{path}: [{scenario}] weighs nothing; give at least one part a weight")
            whole = sum(parts.values())
            weights[scenario] = {name: w / whole for name, w in parts.items()}
            shares[scenario] = float(table.get("share", 0.0))
        whole = sum(shares.values())
        if not whole:
            raise GenrecError(f"{path}: no scenario has a share of the requests")
        return cls(weights, {name: share / whole for name, share in shares.items()})

    def of(self, scenarios: Sequence[str], part: str) -> np.ndarray:
        """The weight of one part in each request's scenario, float32 [B, 1]. Raises GenrecError for one unknown."""
        unknown = next((s for s in scenarios if s not in self.weights), None)
        if unknown is not None:
            raise GenrecError(f"no reward weights for the scenario {unknown!r}; there are: {', '.join(self.weights)}")
        return np.array([self.weights[s].get(part, 0.0) for s in scenarios], np.float32)[:, None]


@dataclass(frozen=True)
class Rewards:
    """total: float32 [B, G]; own: the same without GROUP parts; floor: [B], the target's own, NaN for none; hits: bool
    [B, G]; parts: name -> [B, G], unweighted, of format and the parts that some scenario of the batch weighs."""

    total: np.ndarray
    own: np.ndarray
    floor: np.ndarray
    hits: np.ndarray
    parts: dict[str, np.ndarray]

    def less(self, costs: np.ndarray) -> Rewards:
        """With costs taken off, float [B, G + 1], the last column being the target's."""
        each, target = costs[:, :-1].astype(np.float32), costs[:, -1].astype(np.float32)
        return replace(self, total=self.total - each, own=self.own - each, floor=self.floor - target)

    def times(self, factors: np.ndarray) -> Rewards:
        """With each request's rewards and floor multiplied by factors above 0, float [B, 1]. Parts stay."""
        each = factors.astype(np.float32)
        return replace(self, total=self.total * each, own=self.own * each, floor=self.floor * each[:, 0])

    def shuffled(self, there: np.ndarray, rng: np.random.Generator) -> Rewards:
        """Each group's rewards dealt out anew among the completions that are there, bool [B, G]: what is rewarded is
        chance. Floor and parts stay."""
        order = np.tile(np.arange(there.shape[1]), (len(there), 1))
        for b in range(len(there)):
            mine = np.flatnonzero(there[b])
            order[b, mine] = rng.permutation(mine)
        total, own, hits = (np.take_along_axis(x, order, 1) for x in (self.total, self.own, self.hits))
        return replace(self, total=total, own=own, hits=hits)


def price_of_drift(fused: Mapping[str, float]) -> float:
    """beta, from weights of a fused list: the generator's over the sum of the tools', at least LEAST_PRICE; 1 without
    tools, which then say nothing anyhow."""
    tools = sum(w for name, w in fused.items() if name != GENERATOR)
    return max(LEAST_PRICE, fused.get(GENERATOR, 0.0) / tools) if tools else 1.0


def inject(completions: np.ndarray, context: RewardContext, most: int) -> np.ndarray:
    """The last `most` completions of each group make room for the target and the ranker's `most` - 1 best, [B, G],
    without doubles, legal items only. Where one is there already, the group keeps as many of its own."""
    kept = completions.shape[1] - most
    if most < 1:
        return completions
    if kept < 1:
        raise ValueError(f"{most} injected of a group of {completions.shape[1]}: at least one must stay")
    out: np.ndarray = np.full(completions.shape, -1, np.int64)
    best = np.argsort(-np.where(context.allowed, context.scores, -np.inf), axis=1, kind="stable")[:, : most - 1]
    for b, group in enumerate(completions):
        given = [*group[:kept], context.targets[b], *best[b], *group[kept:]]
        legal = dict.fromkeys(int(i) for i in given if i >= 0 and context.allowed[b, i])
        row = list(legal)[: completions.shape[1]]
        out[b, : len(row)] = row
    return out


def judge(completions: np.ndarray, context: RewardContext, weights: ScenarioWeights, scored: bool = False) -> Rewards:
    """The rewards of completions [B, G] and the floor of their requests. An empty group stays empty. scored: `score` is
    the ranking part."""
    legal = (context.targets >= 0) & _legal(context.targets[:, None], context)[:, 0]
    both = np.concatenate([completions, np.where(legal, context.targets, -1)[:, None]], 1)
    own: np.ndarray = np.zeros(both.shape, np.float32)
    grouped: np.ndarray = np.zeros(completions.shape, np.float32)
    parts = {"format": format_part(completions, context)}
    for name, part in PARTS.items():
        weight = weights.of(context.scenarios, name)
        if not weight.any():
            continue
        if name in GROUP:
            parts[name] = part(completions, context)
            grouped += weight * parts[name]
        else:
            value = (score if scored and name == RANKING else part)(both, context)
            parts[name] = value[:, :-1]
            own += weight * value
    floor = np.where(legal, own[:, -1], np.nan).astype(np.float32)
    return Rewards(own[:, :-1] + grouped, own[:, :-1], floor, hit(completions, context) > 0, parts)
