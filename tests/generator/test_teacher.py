"""The tools that teach were not fitted on the user they speak about."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from genrec.data.dataset import Catalog, Sequences
from genrec.generator.batches import TrainingData
from genrec.generator.teacher import teach
from genrec.tools import Content, Markov


def data(sequences: list[list[int]], items: int) -> tuple[Sequences, Catalog]:
    import pyarrow as pa

    lengths = [len(s) for s in sequences]
    rows = np.array([i for s in sequences for i in s], np.int32)
    n = len(rows)
    train = Sequences(
        [f"u{i}" for i in range(len(sequences))],
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        rows,
        np.arange(n, dtype=np.float64),
        np.ones(n, np.float32),
        np.full(n, np.nan, np.float32),
    )
    table = pa.table(
        {
            "item": [str(i) for i in range(items)],
            "title": [f"word{i}" for i in range(items)],
            "category": pa.array([["all"]] * items, pa.list_(pa.string())),
        }
    )
    return train, Catalog(table)


def test_a_transition_that_only_one_user_made_is_not_taught_to_that_user() -> None:
    """0 -> 1 is common, 2 -> 3 is one user's own: proposing 3 to them would be telling the answer."""
    train, catalog = data([[0, 1]] * 20 + [[2, 3]], 5)
    taught = teach(train, catalog, {"markov": Markov}, {"markov": 1.0}, folds=4, depth=3)
    assert taught.shape == (42, 3) and taught.dtype == np.int32
    common = taught[1:40:2]
    assert (common[:, 0] == 1).all()
    assert 3 not in taught[41, :1]


def test_first_events_have_no_proposals_and_seen_items_are_left_out() -> None:
    train, catalog = data([[0, 1, 2, 0], [1, 2, 3], [0, 2, 1]], 5)
    taught = teach(train, catalog, {"content": Content, "markov": Markov}, {"content": 1.0, "markov": 1.0}, depth=5)
    assert (taught[train.offsets[:-1]] == -1).all()
    for u in range(3):
        for e in range(int(train.offsets[u]) + 1, int(train.offsets[u + 1])):
            seen = set(train.items[train.offsets[u] : e].tolist())
            assert not seen & set(taught[e].tolist())


def test_what_no_tool_speaks_of_is_not_proposed() -> None:
    """After 0 everybody took 1, and nobody took 2, 3 or 4: there is one proposal, not a list filled up by row."""
    train, catalog = data([[0, 1]] * 20, 5)
    said: list[tuple[int, int]] = []
    taught = teach(
        train, catalog, {"markov": Markov}, {"markov": 1.0}, depth=4, report=lambda done, of: said.append((done, of))
    )
    assert (taught[1::2] == [1, -1, -1, -1]).all()
    assert said[-1] == (20, 20)


def test_the_taught_share_of_targets_comes_from_the_proposals() -> None:
    train, _ = data([[0, 1, 2, 3]] * 300, 6)
    taught = np.full((train.events, 4), 5, np.int32)
    data_of = partial(TrainingData, train, (), {"home": 0}, None, 4)
    windows = np.stack([train.offsets[:-1], train.offsets[1:]], 1)
    plain = data_of().batch(windows, 0, teaching=0.5).targets
    assert (plain == 5).sum() == 0
    share = (data_of(taught=taught).batch(windows, 0, teaching=0.5).targets == 5).float().mean()
    assert 0.4 < share < 0.6
    assert torch.equal(data_of(taught=taught).batch(windows, 0, teaching=0.0).targets, plain)
    none = data_of(taught=np.full((train.events, 4), -1, np.int32))
    assert torch.equal(none.batch(windows, 0, teaching=1.0).targets, plain)
