"""Who is asked what, and that training never sees it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from genrec.data import Dataset, chronological, day_slices, from_arrow, k_core, leave_one_out, rolling
from genrec.data.dataset import EvalSet, Sequences
from genrec.errors import GenrecError

DAY = 86400


def data(*users: list[tuple[str, float]]) -> Dataset:
    """One data set; per user a list of (item, days since 1970)."""
    rows = [(f"u{u}", item, day * DAY) for u, events in enumerate(users) for item, day in events]
    table = pa.table({n: list(c) for n, c in zip(("user", "item", "timestamp"), zip(*rows, strict=True), strict=True)})
    return from_arrow(table, pa.table({"item": list("abcdefgh")}))


def letters(rows: object) -> str:
    return "".join("abcdefgh"[int(r)] for r in rows)  # type: ignore[attr-defined]


def asked(evalset: EvalSet) -> list[tuple[str | None, str, str]]:
    targets = letters(evalset.targets)
    return [(c.user, letters(c.history), t) for c, t in zip(evalset.contexts, targets, strict=True)]


def trained(train: Sequences) -> list[str]:
    return [letters(train.items[a:b]) for a, b in zip(train.offsets, train.offsets[1:], strict=False)]


U0 = [("a", 1), ("b", 2), ("c", 2.5), ("d", 9.99), ("e", 10.0)]
U1 = [("a", 3), ("b", 4)]
U2 = [("f", 5), ("a", 5.1), ("g", 5.2)]


def test_leave_one_out() -> None:
    split = leave_one_out(data(U0, U1, U2))
    assert trained(split.train) == ["abc", "ab", "f"]
    assert split.train.users == ["u0", "u1", "u2"]
    assert asked(split.validation) == [("u0", "abc", "d"), ("u2", "f", "a")]
    assert asked(split.test) == [("u0", "abcd", "e"), ("u2", "fa", "g")]
    assert split.test.users.tolist() == [0, 2]
    assert split.test.same_day.tolist() == [False, True]  # 9.99 and 10.0 are two UTC days
    assert split.validation.same_day.tolist() == [False, True]
    assert "1 users with fewer than 3 events are training only" in split.note
    assert "fewer" not in leave_one_out(data(U0)).note


def test_a_split_that_asks_nobody_is_refused() -> None:
    short = data(U1, [("c", 1), ("d", 9)])
    with pytest.raises(GenrecError, match="leave-one-out needs users with 3 events"):
        leave_one_out(short)
    with pytest.raises(GenrecError, match="rolling over 10 positions needs users with 12 events"):
        rolling(data(U0))
    newcomers = data([("a", 1), ("b", 2)], [("c", 3)], [("d", 4)], [("e", 5)])
    with pytest.raises(GenrecError, match="a chronological split asks users who have events before"):
        chronological(newcomers, 0.2, 0.2)


def test_contexts_hold_times_and_weights_and_no_clock() -> None:
    context = leave_one_out(data(U0)).test.contexts[0]
    assert context.times == (1 * DAY, 2 * DAY, 2.5 * DAY, 9.99 * DAY)
    assert context.weights == (1.0,) * 4
    assert (context.scenario, context.clock, context.trigger, context.query) == ("home", None, None, None)


def test_rolling() -> None:
    split = rolling(data(U0, U1, U2), last=2)
    assert trained(split.train) == ["ab", "ab", "fag"]
    assert asked(split.validation) == [("u0", "ab", "c")]
    assert asked(split.test) == [("u0", "abc", "d"), ("u0", "abcd", "e")]
    assert split.test.users.tolist() == [0, 0]
    assert split.validation.same_day.tolist() == [True] and split.test.same_day.tolist() == [False, False]
    assert "2 users with fewer than 4 events are training only" in split.note


def test_rolling_needs_long_users() -> None:
    with pytest.raises(GenrecError, match="needs users with 12 events"):
        rolling(data(U0))
    with pytest.raises(ValueError, match="at least 1"):
        rolling(data(U0), last=0)


def test_chronological() -> None:
    many = data([(c, d) for d, c in enumerate("abcdefgh", start=1)], [("a", 6.5), ("b", 8.0)])
    split = chronological(many, validation=0.2, test=0.2)
    assert trained(split.train) == ["abcdef", ""]
    assert split.train.users == ["u0", "u1"]
    # u1's first event (day 6.5) has nothing before it; the two events of day 8 stay together in the test
    assert asked(split.validation) == [("u0", "abcdef", "g")]
    assert asked(split.test) == [("u0", "abcdefg", "h"), ("u1", "a", "b")]
    assert "1 events that are their user's first are not asked for" in split.note
    assert split.train.times.max() < 7 * DAY


@pytest.mark.parametrize("shares", [(0.0, 0.1), (0.5, 0.5), (-0.1, 0.1)])
def test_chronological_shares(shares: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="leave something to train on"):
        chronological(data(U0), *shares)


def test_chronological_needs_time() -> None:
    with pytest.raises(GenrecError, match="too few different timestamps"):
        chronological(data([("a", 1), ("b", 1), ("c", 1)]))


def test_every_split_and_core_keeps_who_the_users_are() -> None:
    dataset = data(*[[(item, d) for d, item in enumerate("abcdefgh", u)] for u in range(3)], [("a", 1)])
    plans = [(("plan", name),) for name in ("free", "paid", "free", "none")]
    dataset = replace(dataset, sequences=replace(dataset.sequences, attributes=plans))
    for split in (leave_one_out(dataset), rolling(dataset, 3), chronological(dataset)):
        for asked_for in (split.validation, split.test):
            assert [c.attributes for c in asked_for.contexts] == [plans[int(c.user[1:])] for c in asked_for.contexts]
        assert split.train.attributes == plans
    core = k_core(dataset, 3).sequences
    assert core.users == ["u0", "u1", "u2"] and core.attributes == plans[:3]


def random_data(seed: int) -> Dataset:
    rng = np.random.default_rng(seed)
    n = 400
    table = pa.table(
        {
            "user": [f"u{u}" for u in rng.integers(0, 25, n)],
            "item": [f"i{i}" for i in rng.integers(0, 40, n)],
            "timestamp": rng.integers(0, 60, n) * 20000,
        }
    )
    return from_arrow(table)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("make", [leave_one_out, rolling, chronological])
def test_nothing_leaks(make: object, seed: int) -> None:
    """Events are split without loss, histories are whole, and no wanted event is in the training sequences."""
    whole = random_data(seed)
    split = make(whole)  # type: ignore[operator]
    s, train = whole.sequences, split.train
    taken = {(u, p) for e in (split.validation, split.test) for u, p in positions(e)}
    for u, user in enumerate(s.users):
        assert train.users[u] == user
        events = list(
            zip(s.times[s.offsets[u] : s.offsets[u + 1]], s.items[s.offsets[u] : s.offsets[u + 1]], strict=True)
        )
        kept = list(zip(*(x[train.offsets[u] : train.offsets[u + 1]] for x in (train.times, train.items)), strict=True))
        wanted = [p for v, p in taken if v == u]
        assert kept == events[: len(kept)]  # a prefix
        assert all(p >= len(kept) for p in wanted)
        if make is not chronological:
            assert len(kept) + len(wanted) == len(events)
    for evalset in (split.validation, split.test):
        for (u, p), context, target in zip(positions(evalset), evalset.contexts, evalset.targets, strict=True):
            start = s.offsets[u]
            assert context.user == s.users[u]
            assert list(context.history) == s.items[start : start + p].tolist()
            assert list(context.times) == s.times[start : start + p].tolist()
            assert target == s.items[start + p]


def positions(evalset: EvalSet) -> list[tuple[int, int]]:
    return [(int(u), len(c.history)) for u, c in zip(evalset.users, evalset.contexts, strict=True)]


def test_day_slices_part_the_requests() -> None:
    test = leave_one_out(data(U0, U1, U2)).test
    slices = day_slices(test)
    assert asked(slices["same-day"]) == [("u2", "fa", "g")]
    assert asked(slices["different-day"]) == [("u0", "abcd", "e")]
    assert slices["same-day"].name == "leave-one-out test, same-day"


def test_k_core_is_repeated_until_it_holds() -> None:
    # d falls with one event, then u2 with one left, then c, then nothing more
    whole = data([("a", 1), ("b", 2)], [("b", 1), ("a", 3)], [("c", 1), ("d", 2)], [("c", 1), ("a", 2), ("b", 3)])
    core = k_core(whole, 2)
    assert core.catalog.items == ["a", "b"] and core.sequences.users == ["u0", "u1", "u3"]
    assert trained(core.sequences) == ["ab", "ba", "ab"]
    assert core.notes["k-core"] == "2"
    counts = np.bincount(core.sequences.items)
    assert counts.min() >= 2 and core.sequences.lengths.min() >= 2
    assert k_core(core, 2).sequences.items.tolist() == core.sequences.items.tolist()


def test_empty_k_core() -> None:
    with pytest.raises(GenrecError, match="no 9-core"):
        k_core(data(U0, U1), 9)
