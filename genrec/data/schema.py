"""What a catalogue and a table of interactions must hold, under which names, and the check that they do.

Catalogue: `item` (required, unique), `title`, `category` (a list, or text split at "|" or ">"); every further
text column becomes a text field of the item. Left out: addresses, other identifiers, columns of numbers alone
(`year` apart), nested columns. Interactions: `user`, `item`, `timestamp` (required), `rating`, `behaviour`,
`weight`, `pos` (the order within a user, which breaks ties in time). Other columns are ignored. Weights may be of any
scale: they are divided by their mean, so that 1 is neutral everywhere. Users: `user` (required, unique); every further
column of values that users share is an attribute, so names and addresses fall out. They must be known before the
events: nothing can tell that a column was counted from the very events that are to be predicted.

Accepted names are in CATALOG and INTERACTIONS, in any case, with spaces or hyphens for underscores; where
several are there the first in the list wins.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from genrec.contracts import MAX_ATTRIBUTES
from genrec.data.columns import NUMBER, categories, identifiers, numbers, texts, timestamps
from genrec.data.dataset import Catalog
from genrec.data.readers import RawTable, nearest
from genrec.errors import GenrecError

ITEM_NAMES = (
    "item", "item_id", "itemid", "iid", "asin", "parent_asin", "product", "product_id", "productid",
    "movie_id", "movieid", "video_id", "videoid", "article_id", "sku",
)  # fmt: skip
CATALOG: dict[str, tuple[str, ...]] = {
    "item": (*ITEM_NAMES, "id"),
    "title": ("title", "name", "item_name", "product_name", "product_title", "movie_title"),
    "category": ("category", "categories", "category_path", "genre", "genres"),
}
INTERACTIONS: dict[str, tuple[str, ...]] = {
    "user": ("user", "user_id", "userid", "uid", "reviewerid", "reviewer_id", "customer", "customer_id", "visitor_id"),
    "item": ITEM_NAMES,
    "timestamp": (
        "timestamp", "time", "ts", "unixreviewtime", "unix_time", "time_ms", "timestamp_ms", "event_time",
        "datetime", "created_at", "date",
    ),
    "rating": ("rating", "ratings", "stars", "score", "overall"),
    "behaviour": ("behaviour", "behavior", "event", "event_type", "action"),
    "weight": ("weight", "event_weight"),
    "pos": ("pos",),
}  # fmt: skip
USERS = {"user": (*INTERACTIONS["user"], "id")}
REPEATED = 2  # users who must share a value of an attribute
NOTHING = {"", "-", "?", "n/a", "na", "nan", "none", "null", "unknown"}  # what stands for no value
WHOLE = re.compile(r"^(-?\d+)\.0$")
NOT_TEXT = {"url", "link", "image", "images", "image_url", "imurl", "img", "thumbnail"}

# Behaviours without a weight column. Click, cart and order: OxygenREC-v2, second hand (papers/oxygenrec.md 1.6);
# the rest is ours. An unknown behaviour is neutral.
BEHAVIOUR_WEIGHTS = {
    "view": 1.0,
    "click": 1.2,
    "cart": 1.5,
    "add_to_cart": 1.5,
    "addtocart": 1.5,
    "order": 2.0,
    "buy": 2.0,
    "purchase": 2.0,
    "transaction": 2.0,
}


@dataclass(frozen=True)
class Interactions:
    """Checked events in the order of the file: user and item text [M]; times float64 unix seconds [M];
    ratings float32 [M], NaN where none; weights float32 [M]; pos float64 [M] or None; notes: what was assumed."""

    raw: RawTable
    user: pa.Array
    item: pa.Array
    times: np.ndarray
    ratings: np.ndarray
    weights: np.ndarray
    pos: np.ndarray | None
    notes: dict[str, str] = field(default_factory=dict)


def read_interactions(raw: RawTable) -> Interactions:
    """Checks a table of events. Raises GenrecError naming table, row and column of the first fault."""
    columns = {name: find_column(raw, name, INTERACTIONS) for name in INTERACTIONS}
    user, item, timestamp = (
        columns[name] or missing(raw, name, INTERACTIONS) for name in ("user", "item", "timestamp")
    )
    times, note = timestamps(raw, timestamp)
    count = raw.table.num_rows
    ratings = numbers(raw, columns["rating"]) if columns["rating"] else np.full(count, np.nan)
    notes = {"timestamps": note}
    weights = np.ones(count)
    if columns["weight"]:
        given = numbers(raw, columns["weight"])
        if (bad := np.flatnonzero(given < 0)).size:
            raise raw.error(int(bad[0]), columns["weight"], given[bad[0]], "is negative; weights are 0 or more")
        mean = float(np.nanmean(given)) if not np.isnan(given).all() else 1.0
        if mean == 0:
            raise GenrecError(f"{raw.name}, column {columns['weight']!r}: all weights are 0; one must be above 0")
        weights = np.where(np.isnan(given), 1.0, given / mean)
        notes["weights"] = f"divided by their mean, {mean:g}: 1 is neutral; empty ones are neutral"
    elif columns["behaviour"]:
        weights, notes["behaviour"] = _behaviour_weights(raw, columns["behaviour"])
    return Interactions(
        raw,
        identifiers(raw, user),
        identifiers(raw, item),
        times,
        ratings.astype(np.float32),
        weights.astype(np.float32),
        numbers(raw, columns["pos"]) if columns["pos"] else None,
        notes,
    )


def read_users(raw: RawTable) -> tuple[dict[str, tuple[tuple[str, str], ...]], str]:
    """user -> its attributes, and which columns they are, in words.

    A value counts where REPEATED users or more share it, and a column where most of its values do: what belongs to one
    person is not read. Raises GenrecError; a user or a column that is there twice is an error.
    """
    user = find_column(raw, "user", USERS) or missing(raw, "user", USERS)
    ids = _unique(raw, user, "user")
    columns: dict[str, list[str]] = {}
    left = []
    for name in raw.table.column_names:
        key = normalised(name)
        if name == user or key in NOT_TEXT or key in USERS["user"]:
            continue
        if key in columns:
            raise GenrecError(f"{raw.name}: the column {key!r} is there twice, in other spellings; rename one")
        if pa.types.is_nested(raw.table[name].type):
            left.append(key)
            continue
        values = [attribute(key, text)[1] for text in texts(raw, name).to_pylist()]
        counts = Counter(v for v in values if v)
        shared = {v for v, n in counts.items() if n >= REPEATED}
        if len(columns) < MAX_ATTRIBUTES and shared and 2 * sum(counts[v] for v in shared) >= counts.total():
            columns[key] = [v if v in shared else "" for v in values]
        else:
            left.append(key)
    known = {
        u: tuple((name, values[row]) for name, values in columns.items() if values[row])
        for row, u in enumerate(ids.to_pylist())
    }
    note = ", ".join(columns) or "no column is an attribute"
    return known, note + (f"; left out: {', '.join(name[:40] for name in left[:20])}" if left else "")


def attribute(name: str, value: str) -> tuple[str, str]:
    """An attribute of a user as it is compared: the name as columns are, a whole number without ".0", "" for none."""
    value = WHOLE.sub(r"\1", value.strip())
    return normalised(name), "" if value.casefold() in NOTHING else value


def _unique(raw: RawTable, column: str, what: str) -> pa.Array:
    """A column of identifiers. Raises GenrecError where one is there twice, naming both places."""
    ids = identifiers(raw, column)
    codes = ids.dictionary_encode()
    if len(codes.dictionary) < len(ids):  # codes count up by first appearance, until one repeats
        second = int(np.argmax(codes.indices.to_numpy() != np.arange(len(ids))))
        first = int(codes.indices[second].as_py())
        raise GenrecError(
            f"{raw.name}: {what} {ids[second].as_py()!r} is there twice, in {raw.where(first)} and "
            f"{raw.where(second)}; keep one"
        )
    return ids


def read_catalog(raw: RawTable) -> Catalog:
    """Checks a table of items. Raises GenrecError; two rows for one item are an error that names both."""
    item = find_column(raw, "item", CATALOG) or missing(raw, "item", CATALOG)
    title = find_column(raw, "title", CATALOG)
    category = find_column(raw, "category", CATALOG)
    ids = _unique(raw, item, "item")
    count = raw.table.num_rows
    columns: dict[str, pa.Array] = {
        "item": ids,
        "title": texts(raw, title) if title else pa.array([""] * count, pa.string()),
        "category": categories(raw, category) if category else pa.array([[]] * count, pa.list_(pa.string())),
    }
    fields = []
    for name in raw.table.column_names:
        key = normalised(name)
        if name in (item, title, category) or key in columns or key in NOT_TEXT or key in CATALOG["item"]:
            continue
        if _is_text(raw.table[name], year=key == "year"):
            columns[key] = texts(raw, name)
            fields.append(key)
    return Catalog(pa.table(columns), tuple(fields))


def normalised(name: str) -> str:
    """A column name as it is compared: lower case, underscores."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def find_column(raw: RawTable, wanted: str, names: dict[str, tuple[str, ...]]) -> str | None:
    """The table's own name for a wanted column, or None."""
    there = {normalised(c): c for c in reversed(raw.table.column_names)}
    return next((there[alias] for alias in names[wanted] if alias in there), None)


def missing(raw: RawTable, wanted: str, names: dict[str, tuple[str, ...]]) -> NoReturn:
    """Raises the error for a required column that no accepted name matches."""
    there = raw.table.column_names
    hint = next((h for alias in names[wanted] if (h := nearest(alias, [normalised(c) for c in there]))), "")
    raise GenrecError(
        f"{raw.name} has no column {wanted!r} (accepted names: {', '.join(names[wanted])}); "
        f"columns there: {', '.join(c[:60] for c in there[:30])}.{hint}"
    )


def _is_text(column: pa.ChunkedArray, year: bool) -> bool:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    elif year and (pa.types.is_integer(kind) or pa.types.is_string(kind)):
        return True
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        return False
    if kind != column.type:
        return True
    filled = column.filter(pc.greater(pc.utf8_length(column), 0))
    return len(filled) > 0 and not pc.all(pc.match_substring_regex(filled, NUMBER)).as_py()


def _behaviour_weights(raw: RawTable, column: str) -> tuple[np.ndarray, str]:
    names = pc.utf8_lower(texts(raw, column)).dictionary_encode()
    known = names.dictionary.to_pylist()
    table = np.array([BEHAVIOUR_WEIGHTS.get(name.replace(" ", "_"), 1.0) for name in known])
    note = ", ".join(f"{name[:40]} {weight:g}" for name, weight in list(zip(known, table, strict=True))[:20])
    return table[names.indices.to_numpy()], f"weights by behaviour: {note}"
