from dataclasses import replace

import pyarrow as pa

from genrec.contracts import UserContext
from genrec.data.dataset import Catalog
from genrec.instructions.attributes import Attributes
from genrec.instructions.profile import profile_line, time_line
from genrec.instructions.targets import target

SATURDAY = 882_646_200.0  # 20 December 1997, 19:30 UTC
SCHEMA = {
    "properties": {
        "situation": {"maxLength": 80},
        "intents": {"items": {"maxLength": 40}, "maxItems": 3},
        "look_for": {"maxLength": 30},
    }
}
SHOP = Catalog(
    pa.table(
        {
            "item": list("abcdef"),
            "title": ["A", "B", "C", "D", "E", "F"],
            "category": [["Shop", "Tea"], ["Shop", "Tea"], ["Shop", "Jam, sweet"], ["Shop", "Tea"], ["Shop"], ["Shop"]],
            "brand": ["Low", "Low", "Low", "High", "High", ""],
            "about": ["one", "two", "three", "four", "five", "six"],
        }
    ),
    fields=("brand", "about"),
)
LABELS = Attributes(SHOP)


def test_labels_are_categories_and_fields_that_repeat() -> None:
    assert list(LABELS.values) == ["brand"] and LABELS.labels[2] == ("Shop", "Jam sweet", "Low")
    assert LABELS.rarity["Shop"] == 0 < LABELS.rarity["Tea"] < LABELS.rarity["Jam sweet"]
    assert LABELS.describe(0) == "Tea; Low" and LABELS.describe(5) == ""
    assert Attributes(Catalog(pa.table({"item": ["a"], "title": ["A"], "category": [[]]}))).labels == [()]


def test_profile_gives_attributes_then_statistics() -> None:
    context = UserContext(history=(0, 1, 2, 3), times=tuple(SATURDAY + 86_400 * d for d in (0, 1, 7, 8)))
    told = replace(context, attributes=(("age", "24"), ("", "student"), ("<|im_start|>", "")))
    line = "4 chosen in 4 days; mostly Tea 75%, Jam sweet 25%; brand Low 75%, High 25%; evenings; weekends"
    assert profile_line(context, LABELS) == line
    assert profile_line(told, LABELS) == f"age 24, student; {line}"
    assert profile_line(UserContext(), LABELS) == ""
    assert profile_line(UserContext(history=(5,)), LABELS) == "1 chosen"
    days = replace(context, times=(0.0, 86_400.0 * 3, 86_400.0 * 4, 86_400.0 * 5))  # day resolution; a Thursday first
    assert "evening" not in profile_line(days, LABELS) and "weekends" not in profile_line(days, LABELS)


def test_time_is_the_clocks_else_the_newest_events() -> None:
    assert time_line(UserContext(clock=SATURDAY)) == "Saturday evening, December"
    assert time_line(UserContext(history=(0,), times=(SATURDAY,))) == "Saturday evening, December"
    assert time_line(UserContext(clock=86_400.0 * 10_000)) == "Monday, May"
    assert time_line(UserContext(clock=1e30)) == time_line(UserContext()) == ""


def test_a_target_describes_the_next_items_nearest_and_rarest_first() -> None:
    context = UserContext(history=(3, 0))
    made = target(context, [2, 1, 4], "Tea, Jam sweet; Low", LABELS, SCHEMA)
    assert made is not None
    assert made.look_for == "Jam sweet, Tea, Low" and made.intents == ("back to Jam sweet", "more Tea")
    assert made.situation == "mostly Tea, lately Tea"
    again = target(context, [1, 4, 5], "Tea Low High", LABELS, SCHEMA)
    assert again is not None and again.look_for == "Tea, Low"


def test_a_target_names_only_what_the_prompt_shows_where_that_is_something() -> None:
    context = UserContext(history=(0,))
    shown = target(context, [2, 1], "Tea; brand High", LABELS, SCHEMA)
    assert shown is not None and shown.look_for == "Tea"
    hidden = target(context, [2], "Teapots", LABELS, SCHEMA)  # a part of a word is not the label
    assert hidden is not None and hidden.look_for == "Jam sweet"
    assert target(context, [5], "", LABELS, SCHEMA) is None and target(context, [], "", LABELS, SCHEMA) is None


def test_a_target_is_bounded() -> None:
    long = Catalog(pa.table({"item": ["a", "b"], "title": ["A", "B"], "category": [["x" * 39, "y" * 39], ["z"]]}))
    made = target(UserContext(history=(0,)), [0], "", Attributes(long), SCHEMA)
    assert made is not None and len(made.look_for) < 30 and all(len(i) < 40 for i in made.intents)
    assert len(made.situation) < 80
