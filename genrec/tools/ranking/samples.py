"""The ranking task: what users were shown, in time, with one label or several for each exposure.

`load_samples` takes labels out of a data source. A label is a rule such as "high=rating>=4", "long_view" or
"like=label": a name, the column it is read from, and the smallest value that counts as yes (without one: above 0).

MovieLens has no impressions, so a rated film is the exposure, and the labels (ours) are thresholds of the rating, as
shares of the highest: `high` (4 of 5) is a liked film; `through`, 3 of 5, stands for one watched to its end, because
who leaves a film does not give it a middling mark; `top`, 5 of 5, is the rare strong signal, as a share or a follow is.
They are nested, so what a model learns about one it can use for the others; they are no watch times.

Splits (ours): `per_user` asks for each user's last events, which keeps every user in the test; `by_time` cuts by the
clock, which is what a live system sees and leaves few users with both kinds of labels on small sets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genrec.data.build import event_order
from genrec.data.columns import numbers
from genrec.data.dataset import Catalog, Dataset, Sequences
from genrec.data.readers import read_table
from genrec.data.schema import normalised, read_interactions
from genrec.data.sources import EVENT_FILES, load_dataset, one_file
from genrec.errors import GenrecError

TRAIN, VALIDATION, TEST = 0, 1, 2
RATED = ("high=rating>=4", "through=rating>=3", "top=rating>=5")  # of 5; scaled to the highest rating of the data
RULE = re.compile(r"^(?:(?P<name>[\w-]+)=)?(?P<column>[\w .-]+?)(?:>=(?P<least>-?\d+(?:\.\d+)?))?$")


@dataclass(frozen=True)
class Samples:
    """Exposures in time. labels: float32 [M, T], 1 yes, 0 no, NaN unknown, one row per event of `sequences`; names of
    the T labels, the first is the main one."""

    name: str
    catalog: Catalog
    sequences: Sequences
    labels: np.ndarray
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.labels.shape != (self.sequences.events, len(self.names)) or not self.names:
            raise ValueError(f"labels {self.labels.shape} for {self.sequences.events} events and {self.names}")


@dataclass(frozen=True)
class Rule:
    """How a label is read: yes where the column is at least `least`, or above 0 where that is None."""

    name: str
    column: str
    least: float | None = None

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Out of "column", "name=column" or "name=column>=4". Raises GenrecError."""
        found = RULE.match(text.strip())
        if not found:
            raise GenrecError(f"{text!r} is no label; write COLUMN, NAME=COLUMN or NAME=COLUMN>=NUMBER")
        column = found["column"].strip()
        return cls(found["name"] or column, column, None if found["least"] is None else float(found["least"]))

    def of(self, values: np.ndarray) -> np.ndarray:
        """float32 labels of float values; NaN stays."""
        yes = values > 0 if self.least is None else values >= self.least
        return np.where(np.isnan(values), np.nan, yes).astype(np.float32)


def rated_samples(dataset: Dataset) -> Samples:
    """The samples of a data set with ratings: RATED, scaled to its highest rating; "high" alone where the ratings have
    two values. Raises GenrecError where no rating is high, or none is not."""
    ratings = dataset.sequences.ratings
    known = np.unique(ratings[~np.isnan(ratings)])
    rules = [Rule.parse(text) for text in RATED]
    if len(known) == 2:
        rules = [Rule("high", "rating", float(known[1]))]
    elif len(known):
        rules = [Rule(r.name, r.column, (r.least or 0) * float(known[-1]) / 5) for r in rules]
    if len(np.unique(rules[0].of(known))) < 2:
        raise GenrecError(
            f"{dataset.name} has no ratings of two kinds to rank by; rate events high and low, or have "
            "`genrec rank` read another column with --label"
        )
    labels = np.stack([r.of(ratings) for r in rules], axis=1)
    return Samples(dataset.name, dataset.catalog, dataset.sequences, labels, tuple(r.name for r in rules))


def load_samples(source: str | Path, labels: Sequence[str] = (), cache: Path | None = None) -> Samples:
    """The samples of a data source (see genrec.data.load_dataset). labels: rules; none takes the ratings.

    Raises GenrecError for a column that is missing or is no number, and for a label that is yes or no throughout.
    """
    dataset = load_dataset(source, cache)
    if not labels:
        return rated_samples(dataset)
    rules = [Rule.parse(text) for text in labels]
    if twice := [r.name for i, r in enumerate(rules) if r.name in [x.name for x in rules[:i]]]:
        raise GenrecError(f"label {twice[0]!r} is given twice; name each once")
    if all(normalised(r.column) == "rating" for r in rules):
        values = [dataset.sequences.ratings] * len(rules)
    else:
        values = _columns(Path(source), rules)
    found = np.stack([r.of(v) for r, v in zip(rules, values, strict=True)], axis=1)
    for rule, column in zip(rules, found.T, strict=True):
        if len(np.unique(column[~np.isnan(column)])) < 2:
            raise GenrecError(f"label {rule.name!r} of {source} is the same for every event; there is nothing to rank")
    return Samples(dataset.name, dataset.catalog, dataset.sequences, found, tuple(r.name for r in rules))


def per_user(samples: Samples, validation: float = 0.1, test: float = 0.2) -> np.ndarray:
    """int8 [M]: TRAIN, VALIDATION or TEST; each user's last share of events is the test, the share before it the
    validation. Who has too few events for one of each trains alone."""
    _check_shares(validation, test)
    s = samples.sequences
    n = s.lengths[s.user_of]
    place = np.arange(s.events) - s.offsets[s.user_of]
    asked, chosen = np.floor(n * test), np.floor(n * validation)
    part = np.full(s.events, TRAIN, np.int8)
    part[place >= n - asked - chosen] = VALIDATION
    part[place >= n - asked] = TEST
    part[(asked < 1) | (chosen < 1)] = TRAIN
    return part


def by_time(samples: Samples, validation: float = 0.1, test: float = 0.2) -> np.ndarray:
    """int8 [M] by the clock: events of one moment stay together, so shares are approximate."""
    _check_shares(validation, test)
    times = samples.sequences.times
    cuts = np.quantile(times, [1 - validation - test, 1 - test], method="higher")
    return np.searchsorted(cuts, times, side="right").astype(np.int8)


SPLITS = {"per-user": per_user, "by-time": by_time}


def no_test(samples: Samples, validation: float = 0.1) -> np.ndarray:
    """int8 [M] for a ranker that is measured elsewhere: each user's last share of events is the validation, one event
    at least; the rest is trained on. Who has one or two events trains alone."""
    s = samples.sequences
    n = s.lengths[s.user_of]
    asked = np.where(n > 2, np.maximum(1, np.floor(n * validation)), 0)
    return np.where(np.arange(s.events) - s.offsets[s.user_of] >= n - asked, VALIDATION, TRAIN).astype(np.int8)


def _check_shares(validation: float, test: float) -> None:
    if not (validation > 0 and test > 0 and validation + test < 1):
        raise ValueError(f"validation {validation} and test {test} must be positive and leave something to train on")


def _columns(source: Path, rules: Sequence[Rule]) -> list[np.ndarray]:
    """The values of each rule's column, in the order of the data set's events."""
    path = one_file(source, EVENT_FILES) if source.is_dir() else source
    if path is None or not path.is_file():
        raise GenrecError(f"labels by column need a file of interactions; {source} is none and holds none")
    raw = read_table(path)
    columns = {normalised(c): c for c in reversed(raw.table.column_names)}
    if unknown := [r.column for r in rules if normalised(r.column) not in columns]:
        raise GenrecError(f"{path} has no column {unknown[0]!r}; there is: {', '.join(raw.table.column_names)}")
    order = event_order(read_interactions(raw))
    return [numbers(raw, columns[normalised(r.column)])[order] for r in rules]
