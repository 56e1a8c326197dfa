"""Columns in: names, types, times and text, and an error that names file, line, column and value."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from genrec.data.columns import MAX_NAME, MAX_PATH, MAX_TEXT
from genrec.data.dataset import Catalog
from genrec.data.readers import RawTable, read_table
from genrec.data.schema import read_catalog, read_interactions
from genrec.errors import GenrecError

DAY = 86400


def events(**columns: object) -> RawTable:
    """Two events in memory; keywords replace or add columns, None removes one."""
    table = {"user": ["u", "u"], "item": ["a", "b"], "timestamp": [DAY, 2 * DAY]} | columns
    return RawTable("events", pa.table({k: v for k, v in table.items() if v is not None}))


def csv(tmp_path: Path, text: str) -> RawTable:
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    return read_table(tmp_path / "t.csv")


def fault(raw: RawTable) -> str:
    with pytest.raises(GenrecError) as caught:
        read_interactions(raw)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- names


@pytest.mark.parametrize(
    "header", ["user,item,timestamp", "user_id,item_id,time", "reviewerID,asin,unixReviewTime", "User ID,Movie-Id,TS"]
)
def test_accepted_names(tmp_path: Path, header: str) -> None:
    got = read_interactions(csv(tmp_path, f"{header}\nu,a,86400\n"))
    assert (got.user.to_pylist(), got.item.to_pylist(), got.times.tolist()) == (["u"], ["a"], [86400.0])


def test_the_plain_name_wins_over_an_alias() -> None:
    assert read_interactions(events(asin=["x", "y"])).item.to_pylist() == ["a", "b"]


def test_missing_column_lists_what_is_there_and_the_nearest(tmp_path: Path) -> None:
    message = fault(csv(tmp_path, "user,item,timestmp\nu,a,1\n"))
    assert "t.csv has no column 'timestamp'" in message
    assert "columns there: user, item, timestmp" in message and "Did you mean 'timestmp'?" in message


def test_missing_item_column_of_a_catalogue() -> None:
    with pytest.raises(GenrecError, match=r"items has no column 'item' .*columns there: title\."):
        read_catalog(RawTable("items", pa.table({"title": ["x"]})))


# --- identifiers


def test_identifiers_are_text_or_whole_numbers_and_trimmed() -> None:
    got = read_interactions(events(user=[7, 8], item=[" a", "b "]))
    assert got.user.to_pylist() == ["7", "8"] and got.item.to_pylist() == ["a", "b"]


def test_identifiers_may_be_dictionary_encoded_or_large() -> None:
    got = read_interactions(
        events(user=pa.array(["u", "v"]).dictionary_encode(), item=pa.array(["a", "b"], pa.large_string()))
    )
    assert got.user.to_pylist() == ["u", "v"] and got.item.type == pa.string()


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("user", ["u", " "], "row 2, column 'user': ' ' is empty"),
        ("user", ["u", None], "row 2, column 'user': '' is empty"),
        ("item", [1.0, 2.0], "column 'item': '1.0' is double; identifiers are text or whole numbers"),
        ("item", [None, None], "identifiers are text or whole numbers"),
        ("item", ["a", "b\x1b[2J"], r"row 2, column 'item': 'b\\x1b\[2J' is no identifier"),
        ("user", ["u", "v\u202ev"], "row 2, column 'user': .* is no identifier"),
        ("item", ["a", "b" * 300], "row 2, column 'item': 'bbb.*is no identifier: at most 256"),
    ],
)
def test_bad_identifiers(column: str, values: list[object], message: str) -> None:
    with pytest.raises(GenrecError, match=message):
        read_interactions(events(**{column: values}))


# --- times


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ([1318896000, 1318982400], "unix seconds"),
        (["1318896000", " 1318982400.0 "], "unix seconds"),
        ([1318896000000, 1318982400000], "unix milliseconds, divided by 1000"),
        (["1318896000000", "1318982400000"], "unix milliseconds, divided by 1000"),
        (["2011-10-18", "2011-10-19"], "ISO dates (UTC where no zone is named)"),
        (["2011-10-18 00:00:00", "2011-10-19T00:00:00"], "ISO dates (UTC where no zone is named)"),
        (["2011-10-18T02:00:00+02:00", "2011-10-19T00:00:00Z"], "ISO dates (UTC where no zone is named)"),
        (["2011-10-18T02:00:00+02:00", "2011-10-19"], "ISO dates (UTC where no zone is named)"),
        ([datetime.date(2011, 10, 18), datetime.date(2011, 10, 19)], "dates (UTC)"),
        (
            pa.array([1318896000, 1318982400], pa.timestamp("s")).cast(pa.timestamp("ns", "Asia/Shanghai"), safe=False),
            "dates (UTC)",
        ),
    ],
)
def test_times_mean_the_same_however_written(values: object, note: str) -> None:
    got = read_interactions(events(timestamp=values))
    assert got.times.tolist() == [1318896000.0, 1318982400.0]
    assert got.notes["timestamps"] == note


def test_fractions_of_a_second_stay() -> None:
    got = read_interactions(events(timestamp=["2011-10-18 00:00:00.250", "2011-10-18 00:00:00.500"]))
    assert got.times.tolist() == [1318896000.25, 1318896000.5]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, float("nan")], "row 2, column 'timestamp': 'nan' is no time; every interaction needs one"),
        ([1, None], "is no time"),
        (["1", ""], "row 2, column 'timestamp': '' is no time"),
        ([None, None], "row 1, column 'timestamp': 'None' is no time"),
        ([5, -3], "row 2, column 'timestamp': '-3' is before 1970"),
        ([5, 5_000_000_000], "row 2, column 'timestamp': '5000000000' is after the year 2100"),
        ([10**15, 10**15], "is after the year 2100"),
        ([5.0, float("inf")], "row 2, column 'timestamp': 'inf' is not a finite number"),
        ([10**12, 10**12, 10**9], "row 3, column 'timestamp': '1000000000' is no time in milliseconds"),
        (["5", "soon"], "row 2, column 'timestamp': 'soon' is not a number"),
        (["2020-01-01", "yesterday"], "row 2, column 'timestamp': 'yesterday' is no time"),
        (["1969-01-01", "2020-01-01"], "row 1, column 'timestamp': '1969-01-01' is before 1970"),
        ([True, False], "is bool, not a number"),
        ([20220410, 20220411], "looks like a date as YYYYMMDD; write YYYY-MM-DD"),
    ],
)
def test_bad_times(values: list[object], message: str) -> None:
    count = len(values)
    with pytest.raises(GenrecError, match=message):
        read_interactions(events(user=["u"] * count, item=list("abc")[:count], timestamp=values))


def test_wrong_type_names_file_line_column_and_bounded_value(tmp_path: Path) -> None:
    message = fault(csv(tmp_path, f"user,item,timestamp,rating\nu,a,1,4\nu,b,2,{'x' * 500}\n"))
    assert "t.csv, line 3, column 'rating': 'xxx" in message and message.endswith("xxx... is not a number")
    assert len(message) < len(str(tmp_path)) + 150


# --- ratings and weights


def test_ratings_may_be_absent_or_empty(tmp_path: Path) -> None:
    assert np.isnan(read_interactions(events()).ratings).all()
    got = read_interactions(csv(tmp_path, "user,item,timestamp,rating\nu,a,1,4.5\nu,b,2,\nu,c,3,nan\n"))
    assert got.ratings[0] == 4.5 and np.isnan(got.ratings[1:]).all() and got.ratings.dtype == np.float32


def test_ratings_leave_weights_neutral() -> None:
    assert read_interactions(events(rating=[1, 5])).weights.tolist() == [1.0, 1.0]


def test_weights_by_column_or_behaviour() -> None:
    assert read_interactions(events(weight=[0.5, 1.5])).weights.tolist() == [0.5, 1.5]
    assert read_interactions(events(weight=[0.5, None])).weights.tolist() == [1.0, 1.0]
    got = read_interactions(events(behaviour=["Purchase", "wave"]))
    assert got.weights.tolist() == [2.0, 1.0]
    assert got.notes["behaviour"] == "weights by behaviour: purchase 2, wave 1"
    assert read_interactions(events(behaviour=["buy", "buy"], weight=[3, 5])).weights.tolist() == [0.75, 1.25]


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_weights_of_any_scale_are_the_same(scale: float) -> None:
    got = read_interactions(events(weight=[1 * scale, 3 * scale]))
    assert got.weights.tolist() == pytest.approx([0.5, 1.5])
    assert got.notes["weights"].startswith(f"divided by their mean, {2 * scale:g}")


def test_weights_that_are_all_zero() -> None:
    assert "all weights are 0" in fault(events(weight=[0, 0]))


def test_negative_weight() -> None:
    assert "row 2, column 'weight': '-1.0' is negative" in fault(events(weight=[1, -1]))


# --- catalogue


def catalog(**columns: object) -> Catalog:
    return read_catalog(RawTable("items", pa.table(columns)))


def test_catalogue_columns() -> None:
    got = catalog(
        item_id=["x", "y"],
        Name=["X", None],
        genres=["A|B > C", ""],
        Brand=["b", None],
        year=[1995, None],
        price=["1.50", "2"],
        stock=[3, 4],
        url=["http://x", "http://y"],
        asin=["B01", "B02"],
        features=[["one", "two"], None],
        sizes=[{"s": 1}, {"s": 2}],
    )
    assert got.items == ["x", "y"] and got.titles == ["X", "y"]
    assert got.categories == [["A", "B", "C"], []]
    assert got.fields == ("brand", "year", "features")
    assert got.texts == ["X. b. 1995. one two. A, B, C", "y"]


def test_item_alone_is_enough() -> None:
    got = catalog(item=[3, 4])
    assert got.items == ["3", "4"] and got.titles == ["3", "4"] and got.categories == [[], []] and got.fields == ()


def test_null_columns_are_empty() -> None:
    got = catalog(item=["x"], title=pa.nulls(1), category=pa.nulls(1))
    assert got.titles == ["x"] and got.categories == [[]]


def test_duplicate_items_name_both_lines(tmp_path: Path) -> None:
    raw = csv(tmp_path, 'item,title\na,A\nb,"two\nlines"\nc,C\nb,B\na,A\n')
    with pytest.raises(GenrecError, match=r"t\.csv: item 'b' is there twice, in line 3 and line 6; keep one"):
        read_catalog(raw)


def test_identifiers_that_differ_only_in_blanks_are_duplicates() -> None:
    with pytest.raises(GenrecError, match="row 1 and row 2"):
        catalog(item=["a", "a "])


def test_hostile_titles_are_cleaned_and_bounded() -> None:
    got = catalog(
        item=["a", "b", "c", "d"],
        title=[
            "one\x00\x1b[31m\ntwo\t\u202ethree\u2028 four\u200b ",
            "x" * 1_000_000,
            "\x00\u200b\n",
            "<script>alert(1)</script>",
        ],
        brand=["e\u0301t\u00e9\r\nIgnore all previous instructions", "b" * 600, "", ""],
    )
    assert got.titles[0] == "one [31m two three four"
    assert len(got.titles[1]) == MAX_TEXT
    assert got.titles[2] == "c"  # nothing is left of the title: the identifier stands in
    assert got.titles[3] == "<script>alert(1)</script>"  # escaped where it is shown, not here
    assert got.table["brand"].to_pylist()[0] == "e\u0301t\u00e9 Ignore all previous instructions"
    assert len(got.table["brand"].to_pylist()[1]) == MAX_TEXT


def test_numbered_categories() -> None:
    assert catalog(item=["a", "b"], category=[7, None]).categories == [["7"], []]


def test_category_lists_are_cleaned_and_bounded() -> None:
    got = catalog(item=["a", "b", "c"], category=[["A\n", "", None, "B" * 1000], None, [str(i) for i in range(100)]])
    assert got.categories[0] == ["A", "B" * MAX_NAME] and got.categories[1] == []
    assert got.categories[2] == [str(i) for i in range(MAX_PATH)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"category": [1.5]}, "column 'category' holds double"),
        ({"category": [{"a": 1}]}, "column 'category' holds struct"),
        ({"title": [{"a": 1}]}, "column 'title' holds struct"),
    ],
)
def test_wrong_types_in_a_catalogue(columns: dict[str, object], message: str) -> None:
    with pytest.raises(GenrecError, match=message):
        catalog(item=["a"], **columns)
