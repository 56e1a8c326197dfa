"""Checked events and items to a Dataset: identifiers become rows, events become one sequence per user.

The one order of time: ascending timestamp; equal timestamps of a user by the `pos` column where there is one,
else as in the file.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from genrec.data.dataset import Catalog, Dataset, Sequences
from genrec.data.readers import RawTable, shown
from genrec.data.scenarios import scenarios_for
from genrec.data.schema import Interactions, read_catalog, read_interactions, read_users
from genrec.errors import GenrecError


def build(name: str, interactions: RawTable, catalog: RawTable | None = None, users: RawTable | None = None) -> Dataset:
    """Checks the tables and joins them. Without a catalogue one is derived: the items in order of appearance,
    with no text. Raises GenrecError for every fault of the tables, and for items that the catalogue lacks; users
    without events are left out."""
    events = read_interactions(interactions)
    notes = dict(events.notes)
    if catalog is None:
        items = derived_catalog(events.item)
        notes["catalogue"] = "derived from the interactions: items have no text"
    else:
        items = read_catalog(catalog)
    sequences = build_sequences(events, items, "the catalogue" if catalog is None else catalog.name)
    if users is not None:
        known, note = read_users(users)
        there = sum(u in known for u in sequences.users)
        if not there:
            raise GenrecError(
                f"{users.name}: none of its users has events (the first is {shown(next(iter(known)))}, the first with "
                f"events {shown(sequences.users[0])}); use the same identifiers in both"
            )
        notes["attributes"] = f"{note}; of {there:,} of {len(sequences):,} users"
        sequences = replace(sequences, attributes=[known.get(u, ()) for u in sequences.users])
    dataset = Dataset(name, items, sequences, notes=notes)
    return replace(dataset, scenarios=tuple(s.name for s in scenarios_for(dataset)))


def derived_catalog(items: pa.Array) -> Catalog:
    """A catalogue of the distinct identifiers, in order of first appearance."""
    ids = pc.unique(items)
    empty = pa.array([[]] * len(ids), pa.list_(pa.string()))
    return Catalog(pa.table({"item": ids, "title": pa.array([""] * len(ids), pa.string()), "category": empty}))


def build_sequences(events: Interactions, catalog: Catalog, catalog_name: str) -> Sequences:
    """Sorts events into one sequence per user, users in order of first appearance."""
    raw = events.raw
    rows = pc.index_in(events.item, catalog.table["item"].combine_chunks())
    if rows.null_count:
        unknown = np.flatnonzero(rows.is_null().to_numpy(zero_copy_only=False))
        raise GenrecError(
            f"{raw.name}, {raw.where(int(unknown[0]))}: item {shown(events.item[int(unknown[0])].as_py())} is not in "
            f"{catalog_name} ({len(unknown)} such rows); add it there or remove these rows"
        )
    codes = events.user.dictionary_encode()
    user = codes.indices.to_numpy().astype(np.int64)
    order = event_order(events)
    counts = np.bincount(user, minlength=len(codes.dictionary))
    return Sequences(
        users=codes.dictionary.to_pylist(),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        items=rows.to_numpy().astype(np.int32)[order],
        times=events.times[order],
        weights=events.weights[order],
        ratings=events.ratings[order],
    )


def event_order(events: Interactions) -> np.ndarray:
    """The row of each event of the sequences, int64 [M]. Raises GenrecError where `pos` runs against the times."""
    user = events.user.dictionary_encode().indices.to_numpy().astype(np.int64)
    if events.pos is None:
        return np.lexsort((events.times, user))  # stable: ties keep the order of the file
    _check_positions(events, user)
    return np.lexsort((events.pos, events.times, user))


def _check_positions(events: Interactions, user: np.ndarray) -> None:
    """Raises when the order that `pos` states runs against the timestamps."""
    assert events.pos is not None
    order = np.lexsort((events.times, events.pos, user))
    times, users = events.times[order], user[order]
    wrong = np.flatnonzero((np.diff(times) < 0) & (users[1:] == users[:-1]))
    if wrong.size:
        before, row = order[wrong], order[wrong + 1]
        first = int(np.argmin(row))
        raw = events.raw
        raise GenrecError(
            f"{raw.name}, {raw.where(int(row[first]))}: timestamps out of order: user "
            f"{shown(events.user[int(row[first])].as_py())} has a later time at the earlier pos of "
            f"{raw.where(int(before[first]))}; mend pos or remove that column"
        )
