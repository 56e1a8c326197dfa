"""What CAPTS looks at: the triggers of each request, what is known of them, and the look-ahead replay of the VAM.

From the paper (2602.12564): a trigger is credited with the later engagement that items retrieved from it generate, on
each channel, by offline replay over a future window, as a binary label. Ours: window, list depth, credit and the
features. A request of the replay is a moment just before an event of the later slice of the training data; tables are
of the earlier slice, so no list has seen what it is credited for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from genrec.contracts import UserContext
from genrec.data.dataset import Sequences
from genrec.tools.base import events
from genrec.tools.capts.channels import Channels
from genrec.tools.capts.config import CAPTSConfig

DAY = 86400.0
READ = 100  # newest events of a history
FUTURE = 20  # next events of a request that are looked at, at most
ABOUT = 6  # features of a trigger


@dataclass(frozen=True)
class Triggers:
    """B requests with up to n triggers each, newest first. rows: int64 [B, n], -1 padded; about: float32 [B, n, ABOUT]:
    log place from the end, log days before the newest event, weight over the user's mean, repeats, log number of
    triggers, and whether it is of the newest day."""

    rows: np.ndarray
    about: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, at: np.ndarray) -> Triggers:
        """The requests at these positions, cut to the longest of them."""
        width = max(1, int((self.rows[at] >= 0).sum(axis=1).max(initial=0)))
        return Triggers(self.rows[at, :width], self.about[at, :width])

    def lists(self, channels: Channels, depth: int) -> np.ndarray:
        """int32 [B, n, C, depth]: what each trigger retrieves, -1 where there is nothing."""
        return np.where(self.rows[..., None, None] >= 0, channels.rows[np.maximum(self.rows, 0), :, :depth], -1)


def triggers_of(contexts: list[UserContext], config: CAPTSConfig) -> Triggers:
    """The newest different items of each context (the trigger of the request is the newest), at most
    `config.triggers`."""
    found, about, width = [], [], 1
    for context in contexts:
        rows, weights = events(context)
        times = list(context.times) + [context.times[-1]] * (len(rows) - len(context.times)) if context.times else []
        mean = sum(weights) / len(weights) if weights and sum(weights) > 0 else 1.0
        last: dict[int, int] = {}
        for place in range(len(rows) - 1, -1, -1):
            last.setdefault(rows[place], place)
            if len(last) == config.triggers:
                break
        repeats = {row: rows.count(row) for row in last} if len(last) < len(rows) else {}
        newest = times[-1] if times else 0.0
        found.append(list(last))
        about.append(
            [
                (
                    np.log1p(i),
                    np.log1p(max(0.0, newest - times[p]) / DAY) if times else 0.0,
                    weights[p] / mean,
                    np.log(repeats.get(row, 1)),
                    np.log1p(len(last)),
                    float(bool(times) and times[p] // DAY == newest // DAY),
                )
                for i, (row, p) in enumerate(last.items())
            ]
        )
        width = max(width, len(last))
    rows_array = np.full((len(contexts), width), -1, np.int64)
    about_array = np.zeros((len(contexts), width, ABOUT), np.float32)
    for b, (mine, said) in enumerate(zip(found, about, strict=True)):
        rows_array[b, : len(mine)] = mine
        if mine:
            about_array[b, : len(mine)] = said
    return Triggers(rows_array, about_array)


@dataclass(frozen=True)
class Replay:
    """Requests with what came after: contexts [B]; futures: rows int64 [B, F], -1 padded, without items of the history;
    gains: float32 [B, F], what each is worth; users: int64 [B]."""

    contexts: list[UserContext]
    futures: np.ndarray
    gains: np.ndarray
    users: np.ndarray

    def __len__(self) -> int:
        return len(self.contexts)


def look_ahead(train: Sequences, cut: float, config: CAPTSConfig, most: int = 20_000) -> Replay:
    """Requests just before events at or after `cut` (unix seconds) that have one before them, at most `most`, drawn at
    random; futures reach `window` days from there, at most FUTURE events. The newest READ events are the history."""
    contexts, futures, gains, users = [], [], [], []
    asked = np.flatnonzero(train.times >= cut)
    asked = asked[asked > train.offsets[train.user_of[asked]]]
    asked = np.sort(np.random.default_rng((config.seed, 5)).permutation(asked)[:most])
    for event in asked.tolist():
        u = int(train.user_of[event])
        start, end = int(train.offsets[u]), int(train.offsets[u + 1])
        later = slice(event, min(end, event + FUTURE))
        inside = train.times[later] <= train.times[event] + config.window * DAY
        history = slice(max(start, event - READ), event)
        fresh = inside & ~np.isin(train.items[later], train.items[start:event])
        rows, first = np.unique(train.items[later][fresh], return_index=True)
        if not len(rows):
            continue
        contexts.append(
            UserContext(
                tuple(train.items[history].tolist()),
                tuple(train.times[history].tolist()),
                tuple(train.weights[history].tolist()),
                user=train.users[u],
            )
        )
        futures.append(rows)
        gains.append(train.weights[later][fresh][first])
        users.append(u)
    return Replay(contexts, _padded(futures, -1, np.int64), _padded(gains, 0, np.float32), np.array(users, np.int64))


def _padded(lists: list[np.ndarray], value: float, kind: type) -> np.ndarray:
    out: np.ndarray = np.full((len(lists), max(map(len, lists), default=1)), value, kind)
    for b, values in enumerate(lists):
        out[b, : len(values)] = values
    return out


def attribute(
    lists: np.ndarray, futures: np.ndarray, gains: np.ndarray, credit: str = "full"
) -> tuple[np.ndarray, np.ndarray]:
    """The Value Attribution Module: value float32 [B, n, C] and unique bool [B, n, C].

    lists: [B, n, C, L]; futures, gains: [B, F]. value: the sum of what the listed future items are worth, in full or
    split evenly among the pairs of the request that list them. unique: some credited item is in no list of any other
    channel, whichever of the user's triggers it starts from.
    """
    b, n, c, _ = lists.shape
    hit = np.zeros((b, n, c, futures.shape[1]), bool)
    for f in range(futures.shape[1]):
        wanted = futures[:, f][:, None, None, None]
        hit[..., f] = ((lists == wanted) & (wanted >= 0)).any(axis=3)
    pairs = hit.sum(axis=(1, 2))
    worth = gains / np.maximum(pairs, 1) if credit == "split" else gains
    value = (hit * worth[:, None, None, :]).sum(axis=3)
    on = hit.any(axis=1)  # [B, C, F]
    alone = on & (on.sum(axis=1, keepdims=True) == 1)
    return value.astype(np.float32), (hit & alone[:, None]).any(axis=3)


def on_trigger(triggers: Triggers) -> np.ndarray:
    """The control's labels, bool [B, n]: feedback on the trigger itself. Where weights differ: above the user's mean.
    Where they are all alike there is no graded feedback; the stand-in is that the user went on within the day (the
    trigger shares its day with the one after it)."""
    graded = np.abs(triggers.about[..., 2] - 1) > 1e-6
    graded_user = (graded & (triggers.rows >= 0)).any(axis=1, keepdims=True)
    gap = triggers.about[..., 1]
    went_on = np.zeros(triggers.rows.shape, bool)
    went_on[:, 1:] = np.abs(np.expm1(gap[:, 1:]) - np.expm1(gap[:, :-1])) < 1
    return np.where(graded_user, triggers.about[..., 2] > 1, went_on) & (triggers.rows >= 0)
