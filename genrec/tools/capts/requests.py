"""What CAPTS looks at: the triggers of each request, what is known of them, and the look-ahead replay of the VAM.

From the paper (2602.12564): a trigger is credited with the later engagement that items retrieved from it generate, on
each channel, by offline replay over a future window, as a binary label. Ours: window, list depth, credit, threshold and
the features. The replay asks as the shop will be asked: at a few moments of the later slice of the training data, for
every user with a history; tables are of the earlier slice, so no list has seen what it is credited for.
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
FUTURE = 50  # next events of a request that are looked at, at most
MOMENTS = 3  # of the replay
ABOUT = 6  # features of a trigger


@dataclass(frozen=True)
class Triggers:
    """B requests with up to n triggers each, newest first. rows: int64 [B, n], -1 padded; about: float32 [B, n, ABOUT]:
    log place from the end, log days before the newest event, weight over the user's mean, repeats, log number of
    triggers, and whether it is of the newest day. seen: rows that are not retrieved again, one array per request; ()
    where nothing is left out."""

    rows: np.ndarray
    about: np.ndarray
    seen: tuple[np.ndarray, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, at: np.ndarray) -> Triggers:
        """The requests at these positions, cut to the longest of them."""
        width = max(1, int((self.rows[at] >= 0).sum(axis=1).max(initial=0)))
        seen = tuple(self.seen[i] for i in at) if self.seen else ()
        return Triggers(self.rows[at, :width], self.about[at, :width], seen)

    def lists(self, channels: Channels, depth: int) -> np.ndarray:
        """int32 [B, n, C, depth]: what each trigger retrieves, the first unseen rows of its lists, -1 where there is
        nothing."""
        nothing = np.zeros(0, np.int64)
        out = np.full((*self.rows.shape, len(channels.names), depth), -1, np.int32)
        for b, rows in enumerate(self.rows):
            mine = rows[rows >= 0]
            out[b, : len(mine)] = unseen(channels, mine, self.seen[b] if self.seen else nothing, depth)
        return out


def unseen(channels: Channels, rows: np.ndarray, seen: np.ndarray, depth: int) -> np.ndarray:
    """The first `depth` rows of the triggers' lists that are not among `seen`, int32 [n, C, depth], -1 padded."""
    table = channels.rows[rows]
    old = np.zeros(len(channels.rows) + 1, bool)
    old[seen], old[-1] = True, True  # -1, the padding, reads the last one
    new = ~old[table]
    place = np.cumsum(new, axis=2) - 1
    keep = new & (place < depth)
    out = np.full((*table.shape[:2], depth), -1, np.int32)
    h, c, _ = np.nonzero(keep)
    out[h, c, place[keep]] = table[keep]
    return out


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
    return Triggers(rows_array, about_array, tuple(np.unique(np.array(events(c)[0], np.int64)) for c in contexts))


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


def moments_of(cut: float, end: float, window: float) -> np.ndarray:
    """Up to MOMENTS moments from `cut` on, unix seconds, at the start of days, as far apart as whole windows of so many
    days allow; where none fits before `end`, the cut alone."""
    spread = np.linspace(cut, max(cut, end - window * DAY), MOMENTS)
    return np.unique(np.maximum(cut, np.floor(spread / DAY) * DAY))


def look_ahead(train: Sequences, cut: float, config: CAPTSConfig, most: int = 20_000) -> Replay:
    """At moments from `cut` (unix seconds) on, every user with a history and something new in the `window` days after,
    at most FUTURE events of it; at most `most` requests, drawn at random. The newest READ events are the history."""
    contexts, futures, gains, users = [], [], [], []
    end = (np.floor(train.times.max(initial=cut) / DAY) + 1) * DAY
    asked: list[tuple[int, int, int]] = []
    for moment in moments_of(cut, end, config.window):
        before, inside = train.times < moment, train.times < moment + config.window * DAY
        first, last = (
            train.offsets[:-1] + np.bincount(train.user_of[m], minlength=len(train)) for m in (before, inside)
        )
        able = np.flatnonzero((first > train.offsets[:-1]) & (last > first))
        asked += list(zip(able.tolist(), first[able].tolist(), last[able].tolist(), strict=True))
    drawn = np.sort(np.random.default_rng((config.seed, 5)).permutation(len(asked))[:most])
    for u, event, until in (asked[i] for i in drawn):
        start, later = int(train.offsets[u]), slice(event, min(until, event + FUTURE))
        history = slice(max(start, event - READ), event)
        fresh = ~np.isin(train.items[later], train.items[start:event])
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


def labels_of(value: np.ndarray, threshold: float) -> np.ndarray:
    """bool [B, n, C]: value above tau of its channel, the quantile `threshold` of the channel's positive values; tau is
    0 for threshold 0 and for a channel without any. value: of all requests of the replay together, [B, n, C]."""
    tau = np.zeros(value.shape[2], np.float32)
    for c in range(value.shape[2]) if threshold else ():
        positive = value[..., c][value[..., c] > 0]
        tau[c] = np.quantile(positive, threshold) if len(positive) else 0.0
    return value > tau


def on_trigger(triggers: Triggers) -> tuple[np.ndarray, np.ndarray]:
    """The control's labels and where there is one, bool [B, n]: feedback on the trigger itself. Where weights differ:
    above the user's mean. Where they are all alike there is no graded feedback; the stand-in is that the user went on
    within the day (the trigger shares its day with the one after it), which nobody knows yet of the newest."""
    there = triggers.rows >= 0
    graded_user = ((np.abs(triggers.about[..., 2] - 1) > 1e-6) & there).any(axis=1, keepdims=True)
    gap = triggers.about[..., 1]
    went_on = np.zeros(there.shape, bool)
    went_on[:, 1:] = np.abs(np.expm1(gap[:, 1:]) - np.expm1(gap[:, :-1])) < 0.99  # float32 keeps days to .001
    known = np.ones(there.shape, bool)
    known[:, 0] = graded_user[:, 0]
    return np.where(graded_user, triggers.about[..., 2] > 1, went_on) & there & known, there & known
