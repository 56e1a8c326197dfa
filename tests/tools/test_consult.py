"""What the tools say together, and who may say it about whom."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from genrec.contracts import UserContext
from genrec.data.dataset import Sequences
from genrec.tools import FLOORS, Markov, Popularity
from genrec.tools.consult import TOGETHER, as_evidence, propose, propose_apart
from genrec.tools.fusion import fuse
from tests.tools.small_world import TITLES, TRAIN, catalog, contexts, sequences

TOOLS = {"markov": Markov().fit(TRAIN, catalog()), "popularity": Popularity().fit(TRAIN, catalog())}
WEIGHTS = {"markov": 2.0, "popularity": 0.5}


def test_proposals_are_the_best_of_the_fusion_without_the_history() -> None:
    asked = contexts([0, 1], [2], [5, 4])
    rows, sums = propose(TOOLS, WEIGHTS, asked, 3)
    total = fuse({name: tool.score_all(asked) for name, tool in TOOLS.items()}, WEIGHTS)
    for b, context in enumerate(asked):
        total[b, list(context.history)] = -np.inf
        there = rows[b] >= 0
        assert there.any() and not set(rows[b][there]) & set(context.history)
        np.testing.assert_allclose(sums[b][there], np.sort(total[b])[::-1][: there.sum()], rtol=1e-5)
        assert (np.diff(sums[b][there]) <= 0).all()


def test_nobody_speaks_without_a_weight_and_lists_are_padded() -> None:
    rows, sums = propose(TOOLS, {"markov": 0.0}, contexts([0]), 4)
    assert (rows == -1).all() and np.isneginf(sums).all()
    rows, _ = propose(TOOLS, WEIGHTS, contexts([0, 1, 2]), 10)
    assert rows.shape == (1, 10) and (rows[0][-7:] == -1).all()
    said = as_evidence(catalog(), *propose(TOOLS, {}, contexts([0]), 4))
    assert said[0].sentence == "" and not len(said[0].items)


def test_only_the_newest_events_are_read_and_all_count_as_had() -> None:
    long, short = contexts([3, 4, 0, 1]), contexts([0, 1])
    read, _ = propose(TOOLS, WEIGHTS, long, 6, read=2)
    whole, _ = propose(TOOLS, WEIGHTS, short, 6)
    assert [r for r in read[0] if r >= 0] == [r for r in whole[0] if r >= 0 and r not in (3, 4)]


def test_the_evidence_names_the_best_titles() -> None:
    rows, sums = propose(TOOLS, WEIGHTS, contexts([0, 1]), 4)
    (said,) = as_evidence(catalog(), rows, sums)
    assert said.tool == TOGETHER and said.items.tolist() == [r for r in rows[0] if r >= 0]
    assert said.sentence == f"Taken together, the tools propose {'; '.join(TITLES[r] for r in said.items[:3])}."


def test_what_a_user_did_changes_nothing_that_is_said_about_that_user() -> None:
    """The tools that speak about a user were fitted on the others: other events of the user's own, the same words."""
    rng = np.random.default_rng(0)
    train = sequences(*[rng.permutation(6)[: rng.integers(3, 6)].tolist() for _ in range(24)])
    kinds, weights = {n: FLOORS[n] for n in ("markov", "ease", "itemknn")}, {"markov": 1.0, "ease": 1.0, "itemknn": 1.0}
    user = 7
    context = UserContext(history=(int(train.items[train.offsets[user]]),))

    def said(data: Sequences) -> np.ndarray:
        return propose_apart(data, catalog(), kinds, weights, np.array([user]), lambda _: context, 4)[0]

    items = train.items.copy()
    mine = slice(int(train.offsets[user]), int(train.offsets[user + 1]))
    items[mine] = items[mine][::-1]
    changed = replace(train, items=items)
    assert (said(train) == said(changed)).all() and (said(train) >= 0).any()
    others = replace(train, items=(train.items + 1) % 6)
    assert (said(train) != said(others)).any()
