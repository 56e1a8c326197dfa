"""Who is asked what, and what training may see: leave-one-out, rolling, chronological; k-core; day slices.

Every request's history is everything the user did before the wanted item (for a test item that includes the
validation item), and training never holds an event that a validation or test request wants.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from genrec.contracts import UserContext
from genrec.data.dataset import Catalog, Dataset, EvalSet, Sequences
from genrec.errors import GenrecError

DAY = 86400.0  # seconds


@dataclass(frozen=True)
class Split:
    """Training sequences (every user stays, perhaps with no event) and the requests to choose and to report on.

    note: one sentence that states the protocol and whom it leaves out, for the report.
    """

    train: Sequences
    validation: EvalSet
    test: EvalSet
    note: str = ""


def leave_one_out(dataset: Dataset) -> Split:
    """Test: each user's last item; validation: the one before; training: the rest.

    Users with fewer than three events have no requests: all their events are training.
    """
    s = dataset.sequences
    asked = s.lengths >= 3
    if not asked.any():
        raise GenrecError(f"leave-one-out needs users with 3 events; {dataset.name} has none")
    short = int((~asked).sum())
    note = "leave-one-out: last item test, the one before validation"
    if short:
        note += f"; {short} users with fewer than 3 events are training only"
    return Split(
        train=s.keep(~asked[s.user_of] | (_from_end(s) > 2)),
        validation=requests(s, s.offsets[1:][asked] - 2, "leave-one-out validation"),
        test=requests(s, s.offsets[1:][asked] - 1, "leave-one-out test"),
        note=note,
    )


def rolling(dataset: Dataset, last: int = 10) -> Split:
    """For statistical power on small sets. Test: each user's `last` last items, each wanted from everything before
    it; validation: the item before those; training: the rest, so a fit of its own.

    Users with fewer than last + 2 events have no requests: all their events are training.
    """
    if last < 1:
        raise ValueError(f"last must be at least 1, not {last}")
    s = dataset.sequences
    asked = s.lengths >= last + 2
    if not asked.any():
        raise GenrecError(f"rolling over {last} positions needs users with {last + 2} events; {dataset.name} has none")
    ends = s.offsets[1:][asked]
    short = int((~asked).sum())
    note = f"rolling: the last {last} items of each user are test, the one before them validation"
    if short:
        note += f"; {short} users with fewer than {last + 2} events are training only"
    return Split(
        train=s.keep(~asked[s.user_of] | (_from_end(s) > last + 1)),
        validation=requests(s, ends - last - 1, f"rolling-{last} validation"),
        test=requests(s, (ends[:, None] - np.arange(last, 0, -1)[None, :]).reshape(-1), f"rolling-{last} test"),
        note=note,
    )


def chronological(dataset: Dataset, validation: float = 0.1, test: float = 0.1) -> Split:
    """By the clock, over all users: the first events train, the next share is validation, the last share test.

    The two cuts fall on timestamps, so events of one moment stay together (shares are approximate). Events with
    nothing before them are not asked for.
    """
    if not (validation > 0 and test > 0 and validation + test < 1):
        raise ValueError(f"validation {validation} and test {test} must be positive and leave something to train on")
    s = dataset.sequences
    cuts = np.quantile(s.times, [1 - validation - test, 1 - test], method="higher")
    part = np.searchsorted(cuts, s.times, side="right")  # 0 train, 1 validation, 2 test
    if len(np.unique(part)) < 3:
        raise GenrecError(f"{dataset.name} has too few different timestamps for a chronological split")
    first = np.zeros(s.events, bool)
    first[s.offsets[:-1][s.lengths > 0]] = True
    if not ((part == 1) & ~first).any() or not ((part == 2) & ~first).any():
        raise GenrecError(
            f"a chronological split asks users who have events before; {dataset.name} has none in its last shares"
        )
    note = f"chronological: cuts at unix {cuts[0]:.0f} and {cuts[1]:.0f}"
    if cold := int((first & (part > 0)).sum()):
        note += f"; {cold} events that are their user's first are not asked for"
    return Split(
        train=s.keep(part == 0),
        validation=requests(s, np.flatnonzero((part == 1) & ~first), "chronological validation"),
        test=requests(s, np.flatnonzero((part == 2) & ~first), "chronological test"),
        note=note,
    )


def requests(sequences: Sequences, positions: np.ndarray, name: str) -> EvalSet:
    """The requests that want the events at these flat positions, int [B]; histories are all the events before."""
    s = sequences
    positions = np.asarray(positions, np.int64)
    users = s.user_of[positions]
    lengths = positions - s.offsets[users]
    before = np.maximum(positions - 1, 0)
    same_day = (lengths > 0) & (np.floor(s.times[positions] / DAY) == np.floor(s.times[before] / DAY))
    contexts: list[UserContext] = []
    items: tuple[int, ...] = ()
    times: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    attributes: tuple[tuple[str, str], ...] = ()
    last = -1
    for u, n in zip(users.tolist(), lengths.tolist(), strict=True):
        if u != last:  # one user's requests share the numbers of one list
            last, whole = u, slice(int(s.offsets[u]), int(s.offsets[u + 1]))
            items, times = tuple(s.items[whole].tolist()), tuple(s.times[whole].tolist())
            weights, attributes = tuple(s.weights[whole].tolist()), s.attributes_of(u)
        contexts.append(UserContext(items[:n], times[:n], weights[:n], s.users[u], attributes=attributes))
    return EvalSet(name, contexts, s.items[positions].astype(np.int32), users, same_day)


def day_slices(evalset: EvalSet) -> dict[str, EvalSet]:
    """The requests whose wanted item falls on the UTC day of the event before it, and the others.

    On Amazon 2014 the first are tied in time and sorted by identifier in the source, hence the easier; the
    others are the stable target.
    """
    return {
        name: replace(evalset.take(np.flatnonzero(mask)), name=f"{evalset.name}, {name}")
        for name, mask in (("same-day", evalset.same_day), ("different-day", ~evalset.same_day))
    }


def k_core(dataset: Dataset, k: int) -> Dataset:
    """The largest part where every user and every item has at least k events; other items leave the catalogue."""
    s = dataset.sequences
    alive = np.ones(s.events, bool)
    while True:
        users = np.bincount(s.user_of[alive], minlength=len(s)) >= k
        items = np.bincount(s.items[alive], minlength=len(dataset.catalog)) >= k
        keep = alive & users[s.user_of] & items[s.items]
        if keep.sum() == alive.sum():
            break
        alive = keep
    if not alive.any():
        raise GenrecError(f"{dataset.name} has no {k}-core: nothing is left; choose a smaller k")
    user_rows, item_rows = np.flatnonzero(users), np.flatnonzero(items)
    new_row = np.full(len(items), -1, np.int32)
    new_row[item_rows] = np.arange(len(item_rows), dtype=np.int32)
    kept = s.keep(alive)
    sequences = Sequences(
        [s.users[u] for u in user_rows],
        np.concatenate([[0], np.cumsum(kept.lengths[user_rows])]).astype(np.int64),
        new_row[kept.items],
        kept.times,
        kept.weights,
        kept.ratings,
        [s.attributes[u] for u in user_rows] if s.attributes else [],
    )
    catalog = Catalog(dataset.catalog.table.take(pa.array(item_rows)), dataset.catalog.fields)
    return replace(dataset, catalog=catalog, sequences=sequences, notes=dataset.notes | {"k-core": str(k)})


def _from_end(s: Sequences) -> np.ndarray:
    """1 for a user's last event, 2 for the one before, int64 [M]."""
    return s.offsets[1:][s.user_of] - np.arange(s.events)
