"""CAPTS as a tool: value triggers on every channel, route under one quota, add up what the lists hold (2602.12564).

    from genrec.tools.capts import CAPTS
    capts = CAPTS().fit(split.train, catalog)
    (found,) = capts.steered(quota=12).retrieve([context], 100)

A fit cuts the training events at a moment: tables of the earlier ones, replay over the later ones, the network; then
tables of all of them, which the network reads from then on. Score of an item (ours): the sum over routed pairs that
list it of the pair's value / log2(2 + its place in the list).
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from genrec.contracts import Evidence, UserContext
from genrec.data.dataset import Catalog, Sequences
from genrec.errors import GenrecError
from genrec.evaluation.protocol import seen_rows
from genrec.tools.base import Tool, short_title
from genrec.tools.capts.channels import Channels, fit_channels
from genrec.tools.capts.config import CAPTSConfig
from genrec.tools.capts.policies import Route, Values, policy_of, retrieved, routes, union_recall
from genrec.tools.capts.requests import (
    Replay,
    Triggers,
    attribute,
    labels_of,
    look_ahead,
    on_trigger,
    triggers_of,
)
from genrec.tools.ebr.vectors import content_vectors

if TYPE_CHECKING:
    import torch

    from genrec.tools.capts.model import CATR

WORDS = 64  # dimensions of the items' content vectors
MOST = 20_000  # requests of the replay
WATCHED = 1000  # of them at most, of users that are not learned from, that decide when to stop
CUT = 50  # K of the union recall that decides
ROUTING = ("policy", "quota", "discount", "eta", "least", "most")  # settings that a request may change


class CAPTS(Tool):
    """See the module. network is None where the training events leave nothing to look ahead into."""

    name = "capts"
    sentence = "{seen}: {found}."
    config_type = CAPTSConfig
    quick: ClassVar[bool] = False
    config: CAPTSConfig
    channels: Channels
    content: np.ndarray
    network: CATR | None = None

    def steered(self, **changes: Any) -> Self:
        """The same tool with other routing: policy, quota, discount, eta, least or most pairs per channel."""
        if unknown := set(changes) - set(ROUTING):
            raise GenrecError(f"{min(unknown)} is settled by the fit; a request may change {', '.join(ROUTING)}")
        other = copy.copy(self)
        other.config = dataclasses.replace(self.config, **changes)
        return other

    # -- fit -----------------------------------------------------------------------------------------

    def fit(self, train: Sequences, catalog: Catalog) -> Self:
        """Tables of the past, replay, network, tables of everything. With `work` set its parts are kept there."""
        self.titles = [short_title(t) for t in catalog.titles]
        self.content = content_vectors(catalog, WORDS).astype(np.float16).astype(np.float32)  # as it will be stored
        self.network = None
        if train.events:
            cut = float(np.quantile(train.times, self.config.past, method="higher"))
            past = train.keep(train.times < cut)
            replay = look_ahead(train, cut, self.config, MOST)
            if len(replay) and past.events:
                self.say(f"{len(replay):,} requests look ahead")
                before = self._tables(past, catalog, "past")
                self.learn(replay, before)
        self.channels = self._tables(train, catalog, "all")
        return self

    def _tables(self, train: Sequences, catalog: Catalog, name: str) -> Channels:
        work = None if self.work is None else Path(self.work) / name
        return fit_channels(train, catalog, self.config, work, self.say)

    def learn(self, replay: Replay, channels: Channels) -> None:
        """Fits the network on what the lists of `channels` would have brought."""
        import torch

        from genrec.tools.capts.model import CATR, catr_loss
        from genrec.tools.learning import Schedule, learn

        config, rng = self.config, np.random.default_rng((self.config.seed, 11))
        users = np.unique(replay.users)
        aside = rng.permutation(users)[: len(users) // 10]
        watched = np.flatnonzero(np.isin(replay.users, aside))
        learned = np.flatnonzero(~np.isin(replay.users, aside))
        if not len(learned) or not config.epochs:
            return
        triggers = triggers_of(replay.contexts, config)
        pairs = (triggers.rows[watched] >= 0).sum(axis=1) * len(config.channels)
        if (pairs > config.quota).any():  # elsewhere all pairs are asked, whatever they are worth
            watched = watched[pairs > config.quota]
        watched = np.sort(rng.permutation(watched)[:WATCHED])
        label, unique, there = self.labels(replay, triggers, channels)
        by_length = learned[np.argsort((triggers.rows[learned] >= 0).sum(axis=1), kind="stable")]
        batches = np.array_split(by_length, -(-len(by_length) // config.rows))
        torch.manual_seed(config.seed)
        network = CATR(self.content.shape[1], len(config.channels), config.width)
        self.network = network

        def loss_at(step: int) -> torch.Tensor:
            order = np.random.default_rng((config.seed, step // len(batches))).permutation(len(batches))
            at = batches[order[step % len(batches)]]
            mine = triggers.take(at)
            out = network(*self._inputs(mine, channels))
            wanted, alone, known = (torch.from_numpy(x[at, : mine.rows.shape[1]]) for x in (label, unique, there))
            return catr_loss(out, wanted.float(), alone.float(), known, config.calibration, config.uniqueness)

        def measure() -> float:
            mine = triggers.take(watched)
            contexts = [replay.contexts[i] for i in watched]
            found = routes(mine, self.values(mine, channels), channels, self.content, config)
            return float(
                np.mean(
                    [
                        union_recall(self._fetch(c, t, r, CUT, channels), f[f >= 0])
                        for c, t, r, f in zip(contexts, mine.rows, found, replay.futures[watched], strict=True)
                    ]
                )
            )

        steps = config.epochs * len(batches)
        schedule = Schedule(
            steps, len(batches), config.learning_rate, config.weight_decay, config.patience, config.seed
        )
        identity = json.dumps({**asdict(config), "requests": len(replay)}, sort_keys=True)
        checkpoint = None if self.work is None else Path(self.work) / "catr.safetensors"
        self.learned = learn(
            network, loss_at, schedule, measure if len(watched) else None, checkpoint, identity, self.say
        )

    def labels(
        self, replay: Replay, triggers: Triggers, channels: Channels
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of every pair of the replay whether it brings something, whether alone, and whether it is learned from: bool
        [B, n, C]."""
        config, values, alone, there = self.config, [], [], []
        for start in range(0, len(replay), config.rows):
            at = slice(start, start + config.rows)
            some = Triggers(triggers.rows[at], triggers.about[at], triggers.seen[at])
            lists = some.lists(channels, config.depth)
            value, unique = attribute(lists, replay.futures[at], replay.gains[at], config.credit)
            values.append(value)
            alone.append(unique)
            there.append(lists[..., 0] >= 0)
        value, unique, learned = (np.concatenate(x) for x in (values, alone, there))
        if config.supervision == "trigger":
            feedback, known = (x[..., None] for x in on_trigger(triggers))
            return np.broadcast_to(feedback, value.shape), unique, learned & known
        return labels_of(value, config.threshold), unique, learned

    def _inputs(self, triggers: Triggers, channels: Channels) -> tuple[torch.Tensor, ...]:
        import torch

        at = np.maximum(triggers.rows, 0)
        there = triggers.rows >= 0
        arrays = (self.content[at], triggers.about, channels.features[at], there)
        content, about, features, mask = (torch.from_numpy(a) for a in arrays)
        return content, about, features, mask

    # -- route ---------------------------------------------------------------------------------------

    def values(self, triggers: Triggers, channels: Channels | None = None) -> Values | None:
        """What the network says of every pair; None without a network."""
        import torch

        if self.network is None:
            return None
        with torch.inference_mode():
            out = self.network(*self._inputs(triggers, self.channels if channels is None else channels))
            value, unique, alone = (torch.sigmoid(x).numpy() for x in (out.calibrated, out.uniqueness, out.trigger))
        return Values(value, unique, alone)

    def route(self, contexts: list[UserContext]) -> tuple[Triggers, Values | None, list[Route]]:
        """The triggers of the requests, their values, and the pairs that are asked."""
        triggers = triggers_of(contexts, self.config)
        values = self.values(triggers)
        return triggers, values, routes(triggers, values, self.channels, self.content, self.config)

    def _fetch(
        self, context: UserContext, rows: np.ndarray, found: Route, k: int, channels: Channels | None = None
    ) -> list[np.ndarray]:
        seen = np.array(seen_rows(context), np.int64)
        return retrieved(found.pairs, rows, channels or self.channels, seen, k, self.config.quota)

    def fetch(self, contexts: list[UserContext], k: int) -> list[list[np.ndarray]]:
        """For every request what each pair brings when k items may be fetched in all (see `policies.retrieved`)."""
        triggers, _, found = self.route(contexts)
        return [self._fetch(c, t, r, k) for c, t, r in zip(contexts, triggers.rows, found, strict=True)]

    def score_all(self, contexts: list[UserContext]) -> np.ndarray:
        """float32 [B, N]; all zero for an empty history."""
        out = np.zeros((len(contexts), len(self.titles)), np.float32)
        triggers, _, found = self.route(contexts)
        fade = (1 / np.log2(2 + np.arange(self.channels.rows.shape[2]))).astype(np.float32)
        for b, one in enumerate(found):
            for (h, c), weight in zip(one.pairs, one.weights, strict=True):
                rows = self.channels.rows[triggers.rows[b, h], c]
                there = rows >= 0
                out[b, rows[there]] += weight * fade[there]
        return out

    def evidence(self, context: UserContext, scores: np.ndarray, k: int) -> Evidence:
        """As every tool's, with the pairs that were asked."""
        plain = super().evidence(context, scores, k)
        triggers, values, (found,) = self.route([context])
        pairs = []
        for (h, c), weight in zip(found.pairs, found.weights, strict=True):
            row = int(triggers.rows[0, h])
            listed = np.isin(plain.items, self.channels.rows[row, c])
            pairs.append(
                {
                    "trigger": self.titles[row],
                    "row": row,
                    "channel": self.channels.names[c],
                    "value": round(float(weight), 4),
                    "unique": None if values is None else round(float(values.uniqueness[0, h, c]), 4),
                    "items": int(listed.sum()),
                }
            )
        details: dict[str, Any] = {
            "policy": policy_of(self.config, values),
            "quota": self.config.quota,
            "channels": list(self.channels.names),
            "routes": pairs,
        }
        text = plain.sentence if not len(plain.items) else _sentence(pairs, [self.titles[r] for r in plain.items[:3]])
        return dataclasses.replace(plain, sentence=text, details=details)

    # -- files ---------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, np.ndarray]:
        t = self.channels
        out = {"rows": t.rows, "scores": t.scores, "counts": t.counts, "content": self.content.astype(np.float16)}
        if self.network is not None:
            out |= {f"network.{name}": p.numpy() for name, p in self.network.state_dict().items()}
        return out

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        import torch

        from genrec.tools.capts.model import CATR

        rows, scores = arrays["rows"], arrays["scores"]
        if rows.shape != scores.shape or rows.shape[:2] != (len(self.titles), len(self.config.channels)):
            raise ValueError("tables, titles and channels do not fit together")
        self.channels = Channels(self.config.channels, rows, scores, arrays["counts"])
        self.content = arrays["content"].astype(np.float32)
        state = {
            name.removeprefix("network."): torch.from_numpy(a)
            for name, a in arrays.items()
            if name.startswith("network.")
        }
        if state:
            self.network = CATR(self.content.shape[1], len(self.config.channels), self.config.width)
            try:
                self.network.load_state_dict(state)
            except RuntimeError as error:
                raise ValueError(str(error).splitlines()[0]) from None
            self.network.eval()


def _sentence(pairs: Sequence[dict[str, Any]], found: list[str]) -> str:
    """One plain sentence: the triggers that were asked, best first, on which channels, and what they led to."""
    asked: dict[str, list[str]] = {}
    for pair in pairs:
        asked.setdefault(pair["trigger"], []).append(pair["channel"])
    said = [f"{title} (by {', '.join(channels)})" for title, channels in list(asked.items())[:2]]
    rest = f" and {len(asked) - 2} more" if len(asked) > 2 else ""
    return f"What leads on best from this history is {' and '.join(said)}{rest}: {'; '.join(found)}."
