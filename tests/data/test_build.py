"""Events and items joined: order in time, ties, unknown items, and `pos` against the clock."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from genrec.contracts import MAX_ATTRIBUTES
from genrec.data import from_arrow
from genrec.data.columns import MAX_TEXT
from genrec.errors import GenrecError

ITEMS = pa.table({"item": ["a", "b", "c"], "title": ["A", "B", "C"]})


def test_sequences_are_sorted_and_ties_keep_the_order_of_the_file() -> None:
    data = from_arrow(
        pa.table(
            {
                "user": ["v", "u", "v", "u", "u", "v"],
                "item": ["c", "b", "a", "a", "c", "b"],
                "timestamp": [9, 5, 1, 5, 2, 9],
                "rating": [1.0, 2.0, 3.0, 4.0, 5.0, None],
            }
        ),
        ITEMS,
    )
    s = data.sequences
    assert s.users == ["v", "u"] and s.offsets.tolist() == [0, 3, 6] and s.offsets.dtype == np.int64
    assert s.items.tolist() == [0, 2, 1, 2, 1, 0] and s.items.dtype == np.int32
    assert s.times.tolist() == [1, 9, 9, 2, 5, 5] and s.times.dtype == np.float64
    assert s.ratings[:2].tolist() == [3.0, 1.0] and np.isnan(s.ratings[2])
    assert s.weights.tolist() == [1.0] * 6 and s.weights.dtype == np.float32


def test_pos_breaks_ties() -> None:
    data = from_arrow(
        pa.table({"user": ["u"] * 3, "item": list("abc"), "timestamp": [5, 5, 1], "pos": [2, 1, 0]}), ITEMS
    )
    assert data.sequences.items.tolist() == [2, 1, 0]


def test_timestamps_out_of_order_against_pos() -> None:
    table = pa.table(
        {"user": ["v", "u", "u", "u"], "item": list("abca"), "timestamp": [1, 7, 9, 8], "pos": [0, 0, 1, 2]}
    )
    with pytest.raises(
        GenrecError, match=r"interactions, row 4: timestamps out of order: user 'u' .*earlier pos of row 3"
    ):
        from_arrow(table, ITEMS)


def test_events_need_not_be_sorted() -> None:
    data = from_arrow(pa.table({"user": ["u"] * 3, "item": list("abc"), "timestamp": [3, 2, 1]}), ITEMS)
    assert data.sequences.items.tolist() == [2, 1, 0]


def test_item_that_the_catalogue_lacks() -> None:
    table = pa.table({"user": ["u"] * 3, "item": ["a", "x\u2060" + "y" * 100, "z"], "timestamp": [1, 2, 3]})
    with pytest.raises(GenrecError, match=r"interactions, row 2: item 'x.*\.\.\. is not in catalog \(2 such rows\)"):
        from_arrow(table, ITEMS)


def test_derived_catalogue_in_order_of_appearance() -> None:
    data = from_arrow(pa.table({"user": ["u", "u", "u"], "item": ["z", "a", "z"], "timestamp": [3, 2, 1]}))
    assert data.catalog.items == ["z", "a"] and data.catalog.titles == ["z", "a"]
    assert data.sequences.items.tolist() == [0, 1, 0]
    assert "derived" in data.notes["catalogue"] and "search" not in data.scenarios


def test_items_without_events_stay_in_the_catalogue() -> None:
    data = from_arrow(pa.table({"user": ["u"], "item": ["b"], "timestamp": [3]}), ITEMS)
    assert len(data.catalog) == 3 and data.sequences.items.tolist() == [1]


def test_empty_tables() -> None:
    empty = pa.table({"user": pa.array([], pa.string())})
    with pytest.raises(GenrecError, match="interactions: the table is empty"):
        from_arrow(empty)
    with pytest.raises(GenrecError, match="catalog: the table is empty"):
        from_arrow(pa.table({"user": ["u"], "item": ["b"], "timestamp": [3]}), empty)


EVENTS = pa.table({"user": ["v", "u", "w"], "item": ["a", "b", "c"], "timestamp": [1, 2, 3]})


def test_attributes_of_users_follow_their_sequences() -> None:
    users = pa.table(
        {
            "User ID": ["u", "x", "v", "w"],
            "Name": ["Ann", "Bob", "Cid", "Dan"],
            "Age": [30, 40, 30, 40],
            "Home Town": ["Oslo", "", "Oslo", ""],
            "url": ["here"] * 4,
        }
    )
    data = from_arrow(EVENTS, ITEMS, users=users)
    s = data.sequences
    assert s.users == ["v", "u", "w"]  # x has no events
    assert s.attributes == [(("age", "30"), ("home_town", "Oslo"))] * 2 + [(("age", "40"),)]
    assert data.notes["attributes"] == "age, home_town; left out: name; of 3 of 3 users"
    assert s.context(0).attributes == s.attributes_of(0) == s.keep(np.array([False, True, True])).attributes_of(0)
    assert from_arrow(EVENTS, ITEMS).sequences.context(0).attributes == ()


def test_a_user_that_is_there_twice() -> None:
    users = pa.table({"user": ["u", "v", "u"], "age": ["1", "1", "1"]})
    with pytest.raises(GenrecError, match=r"users: user 'u' is there twice, in row 1 and row 3; keep one"):
        from_arrow(EVENTS, ITEMS, users=users)
    with pytest.raises(GenrecError, match="users has no column 'user'"):
        from_arrow(EVENTS, ITEMS, users=pa.table({"age": ["1"]}))
    with pytest.raises(GenrecError, match="users: the table is empty"):
        from_arrow(EVENTS, ITEMS, users=pa.table({"user": pa.array([], pa.string())}))


def test_what_belongs_to_one_person_is_not_read() -> None:
    """Single values of a shared column neither, placeholders least of all; nested columns are left out."""
    n = 8
    users = pa.table(
        {
            "user": ["u", "v", "w"] + [f"x{i}" for i in range(n - 3)],
            "phone": ["n/a"] * (n - 1) + ["+47 555"],
            "town": ["Oslo"] * (n - 1) + ["Nowhere 7, by the lake"],
            "age": [24.0] * n,
            "address": [{"city": "Oslo"}] * n,
        }
    )
    data = from_arrow(EVENTS, ITEMS, users=users)
    assert data.sequences.attributes == [(("town", "Oslo"), ("age", "24"))] * 3
    assert data.notes["attributes"].startswith("town, age; left out: phone, address")
    alone = users.slice(n - 1).set_column(0, "user", [["u"]])
    assert from_arrow(EVENTS, ITEMS, users=alone).sequences.attributes == [()] * 3


def test_users_of_another_shop_and_a_column_in_two_spellings() -> None:
    others = pa.table({"id": ["1", "2"], "plan": ["free", "free"]})
    with pytest.raises(
        GenrecError, match=r"users: none of its users has events \(the first is '1', .* 'v'\); use the same"
    ):
        from_arrow(EVENTS, ITEMS, users=others)
    twice = pa.table({"user": ["u", "v"], "Age": ["1", "1"], "age": ["2", "2"]})
    with pytest.raises(GenrecError, match="users: the column 'age' is there twice, in other spellings; rename one"):
        from_arrow(EVENTS, ITEMS, users=twice)


def test_hostile_attributes_are_cleaned_and_bounded() -> None:
    plan = "a\u202e\nb" + "x" * 9999
    users = pa.table({"user": ["u", "v"], "plan": [plan] * 2, **{f"c{i}": ["y"] * 2 for i in range(20)}})
    found = from_arrow(EVENTS, ITEMS, users=users).sequences.attributes_of(1)
    assert len(found) == MAX_ATTRIBUTES
    assert found[0][1].startswith("a b") and len(found[0][1]) <= MAX_TEXT
