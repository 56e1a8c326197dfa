"""Scenarios as data: where a request comes from, what is known there, and which items count as wanted.

OxygenREC trains one model for all scenarios, told apart by a scenario instruction I_s = (scenario, trigger item)
(papers/oxygenrec.md 1.1). The paper's scenarios are pages of one shop; public data has no such field, so these
five are ours, defined for every data set from its own events:

| name       | given besides the history  | wanted                                                             |
|------------|----------------------------|--------------------------------------------------------------------|
| home       | nothing                    | the next item                                                      |
| item       | the item before, as trigger| the next item                                                      |
| search     | a query                    | the next item; the query is made from that item's own text         |
| favourites | nothing                    | the next item, where it is rated in the top fifth of the scale     |
| discovery  | nothing                    | the next item, where it is from the long tail                      |

A search query contains what is wanted, so its scores say how well a query is obeyed and never stand beside
next-item scores. Favourites exist where ratings exist: from four fifths of the
highest rating on (4 of 5 stars). The long tail is every item outside the head, and the head is the smallest set
of most frequent items that holds 80 % of the training events (equal counts: the lower row first); items
without any training event are tail.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from genrec.data.dataset import Catalog, Dataset, EvalSet, Sequences
from genrec.errors import GenrecError

HEAD_SHARE = 0.8  # of the training events
FAVOURITE_SHARE = 0.8  # of the highest rating
QUERY_WORDS = 3
QUERY_CHARACTERS = 60
CATEGORIES = 3
SMALL_WORDS = frozenset(["a", "an", "and", "at", "by", "for", "from", "in", "of", "on", "or", "the", "to", "with"])


@dataclass(frozen=True)
class Scenario:
    """One scenario. trigger: the request names an item; query: the request carries text; targets: which wanted
    items qualify."""

    name: str
    description: str
    trigger: bool = False
    query: bool = False
    targets: Literal["all", "favourites", "tail"] = "all"


SCENARIOS: dict[str, Scenario] = {
    s.name: s
    for s in (
        Scenario("home", "The start page: what the user takes next."),
        Scenario("item", "The page of the item taken last: what follows it.", trigger=True),
        Scenario("search", "A search: the next item, found by words of its own text.", query=True),
        Scenario("favourites", "What the user will rate highly next.", targets="favourites"),
        Scenario("discovery", "Something off the beaten track: the next item is from the long tail.", targets="tail"),
    )
}


def scenarios_for(dataset: Dataset) -> tuple[Scenario, ...]:
    """The scenarios a data set has: all, without favourites where no event is rated and without search where no
    item has text."""
    absent = set()
    if np.isnan(dataset.sequences.ratings).all():
        absent.add("favourites")
    if not any(queries(dataset.catalog)):
        absent.add("search")
    return tuple(s for s in SCENARIOS.values() if s.name not in absent)


def scenario(name: str, dataset: Dataset) -> Scenario:
    """The scenario of this name. Raises GenrecError with the names there are."""
    if name not in dataset.scenarios or name not in SCENARIOS:
        raise GenrecError(
            f"unknown scenario {name!r}: {dataset.name} has {', '.join(n for n in dataset.scenarios if n in SCENARIOS)}"
        )
    return SCENARIOS[name]


def favourite_from(sequences: Sequences) -> float:
    """The lowest rating of a favourite: four fifths of the highest; infinite where nothing is rated."""
    rated = sequences.ratings[~np.isnan(sequences.ratings)]
    return FAVOURITE_SHARE * float(rated.max()) if rated.size else float("inf")


def tail_items(train: Sequences, items: int) -> np.ndarray:
    """bool [items]: outside the smallest set of most frequent items that holds HEAD_SHARE of the training events."""
    counts = np.bincount(train.items, minlength=items)
    order = np.argsort(-counts, kind="stable")
    held = np.cumsum(counts[order])
    head = int(np.searchsorted(held, HEAD_SHARE * train.events)) + 1 if train.events else 0
    tail = np.ones(items, bool)
    tail[order[:head]] = False
    return tail


def target_mask(scenario: Scenario, train: Sequences, catalog: Catalog) -> np.ndarray:
    """bool [M]: the training events that this scenario may want. For generator training.

    item needs an event before, search an item with text.
    """
    mask = _qualifies(scenario, train, train, catalog)
    if scenario.trigger:
        mask[train.offsets[:-1][train.lengths > 0]] = False
    if scenario.query:
        mask &= np.array([bool(q) for q in queries(catalog)], bool)[train.items]
    return mask


def eval_set(evalset: EvalSet, scenario: Scenario, dataset: Dataset, train: Sequences) -> EvalSet:
    """The requests of a split as they are in one scenario: those that qualify, with its trigger or query.

    train: the split's training sequences, which alone decide head and tail. Histories must be whole, as
    genrec.data.splits makes them. Raises ValueError when they are not.
    """
    s = dataset.sequences
    positions = s.offsets[evalset.users] + np.array([len(c.history) for c in evalset.contexts], np.int64)
    whole = (positions < s.offsets[evalset.users + 1]).all()
    if not whole or not np.array_equal(s.items[positions], evalset.targets):
        raise ValueError("these requests do not hold whole histories of this data set")
    keep = _qualifies(scenario, s, train, dataset.catalog)[positions]
    if scenario.trigger:
        keep &= np.array([len(c.history) > 0 for c in evalset.contexts], bool)
    query = queries(dataset.catalog) if scenario.query else []
    if scenario.query:
        keep &= np.array([bool(query[t]) for t in evalset.targets], bool)
    kept = evalset.take(np.flatnonzero(keep))
    contexts = [
        replace(
            c,
            scenario=scenario.name,
            trigger=c.history[-1] if scenario.trigger else None,
            query=query[t] if scenario.query else None,
        )
        for c, t in zip(kept.contexts, kept.targets.tolist(), strict=True)
    ]
    return replace(kept, name=f"{evalset.name}, {scenario.name}", contexts=contexts)


def queries(catalog: Catalog) -> list[str]:
    """One search query per item, from its own text: the first QUERY_WORDS words of the title in lower case, single
    letters and SMALL_WORDS apart; else of the category path's end; "" where there is neither. At most
    QUERY_CHARACTERS."""
    out = []
    for title, path in zip(catalog.table["title"].to_pylist(), catalog.categories, strict=True):
        words = _words(title) or (_words(path[-1]) if path else [])
        out.append(" ".join(words[:QUERY_WORDS])[:QUERY_CHARACTERS])
    return out


def ways_to_ask(catalog: Catalog) -> list[list[str]]:
    """What people may type for each item, for training: its query (see `queries`), its title, and the CATEGORIES
    narrowest parts of its category path; distinct, at most QUERY_CHARACTERS each, empty for an item without text."""
    out = []
    titles = catalog.table["title"].to_pylist()
    for query, title, path in zip(queries(catalog), titles, catalog.categories, strict=True):
        texts = [query, (title or "").lower(), *(part.lower() for part in path[: -CATEGORIES - 1 : -1])]
        out.append(list(dict.fromkeys(t[:QUERY_CHARACTERS].strip() for t in texts if t.strip())))
    return out


def _words(text: str | None) -> list[str]:
    words = [w for w in re.findall(r"\w+(?:['’]\w+)?", (text or "").lower()) if len(w) > 1 or not w.isascii()]
    return [w for w in words if w not in SMALL_WORDS] or words


def _qualifies(scenario: Scenario, events: Sequences, train: Sequences, catalog: Catalog) -> np.ndarray:
    """bool [M] over `events`, by the kind of target; head, tail and the rating scale are those of `train`."""
    if scenario.targets == "favourites":
        return events.ratings >= favourite_from(train)
    if scenario.targets == "tail":
        return tail_items(train, len(catalog))[events.items]
    return np.ones(events.events, bool)
