"""The page's HTML: everything shown, nothing untrusted let through, bars and dots where the numbers say."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest

from genrec.contracts import Evidence, Instruction, Recommended, Trace, UserContext
from genrec.data.dataset import Catalog, Dataset, Sequences
from ui import render
from ui.session import Session
from ui.text import plain, safe
from ui.trace import beam, evidence, instruction, request, scores, ticks, timings, trace_view

HOSTILE = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\" onmouseover='alert(1)' x=\""]
HOSTILE += ["</td></table>", "${alert(1)} {{constructor}}"]
TAGS = {"div", "h1", "h2", "h3", "h4", "p", "span", "b", "i", "ul", "ol", "li", "table", "thead", "tbody", "tr"}
TAGS |= {"th", "td", "code", "button", "section", "article", "small", "dl", "dt", "dd", "blockquote"}
ATTRIBUTES = {"class", "style", "title", "role", "type", "aria-label", "aria-hidden", "data-row", "data-position"}


class Reader(HTMLParser):
    """Checks that HTML is balanced and holds known elements and attributes only; keeps its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS, tag
        for name, value in attrs:
            assert name in ATTRIBUTES, name
            if name == "style":
                assert re.fullmatch(r"(width|left):-?\d+\.\d\d%", value or ""), value
        self.open.append(tag)
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, css: str = "") -> list[dict[str, str | None]]:
        return [a for t, a in self.seen if t == tag and set(css.split()) <= set((a.get("class") or "").split())]


def catalog_of(titles: list[str], categories: list[list[str]] | None = None) -> Catalog:
    columns = {"item": [f"i{n}" for n in range(len(titles))], "title": titles}
    return Catalog(pa.table(columns | {"category": categories or [["Films", "Drama"]] * len(titles)}))


CATALOG = catalog_of([f"Film {n}" for n in range(6)])


def recommended(row: int, title: str, **parts: float) -> Recommended:
    return Recommended(row, f"i{row}", title, sum(WEIGHTS[n] * v for n, v in parts.items()), (1, 2, row), parts)


WEIGHTS = {"generator": 0.5, "ease": 2.0}
TRACE = Trace(
    UserContext(history=(0, 1), user="u1", scenario="item", trigger=1, query="quiet films"),
    Instruction("an evening alone", ("drama", "calm"), "quiet drama", "because", "a-model", "v1-abc", "f" * 64, 1.7e9),
    "stored",
    (
        Evidence("popularity", np.array([2], np.int32), np.array([7.0], np.float32), "Many chose Film 2."),
        Evidence("ease", np.array([3, 5], np.int32), np.array([0.5, 0.25], np.float32), "EASE says Film 3."),
    ),
    ((3, -1.0), (4, -2.5), (2, -4.0)),
    WEIGHTS,
    (
        recommended(3, "Film 3", generator=-1.0, ease=2.0),
        recommended(2, "Film 2", generator=-4.0, ease=1.5),
        recommended(4, "Film 4", generator=-2.5, ease=0.5),
    ),
    {"tools": 0.002, "generator": 0.006},
)


def test_safe_text_is_escaped_bounded_and_one_line() -> None:
    assert safe("<b>&\"'") == "&lt;b&gt;&amp;&quot;&#x27;"
    assert len(plain("x" * 10_000)) == 140
    assert plain("a\n\tb\x00\x1b[31m\u202ec") == "a b [31m c"


def test_contributions_are_weighted_from_the_lowest_and_keep_score_differences() -> None:
    rows = render.contributions(TRACE)
    assert rows[0] == {"generator": 1.5, "ease": 3.0}
    assert [list(r) for r in rows] == [["generator", "ease"]] * 3
    assert min(r["generator"] for r in rows) == 0.0 and min(r["ease"] for r in rows) == 0.0
    sums, totals = [sum(r.values()) for r in rows], [r.score for r in TRACE.recommended]
    assert np.allclose(np.diff(sums), np.diff(totals))


def test_list_shows_rank_title_category_semantic_id_score_and_weights() -> None:
    page = Reader(render.recommendations(TRACE, CATALOG))
    for shown in ("Film 3", "Films · Drama", "1·2·3", "3.50", "user u1", "item", "stored", "generator", "0.5", "ease"):
        assert shown in page.text
    assert [page.text.index(f"Film {n}") for n in (3, 2, 4)] == sorted(page.text.index(f"Film {n}") for n in (3, 2, 4))
    assert "popularity" not in page.text  # it took no part in the fusion
    assert len(page.all("tr", "rec")) == 3


def test_bar_widths_follow_the_contributions() -> None:
    page = Reader(render.recommendations(TRACE, CATALOG))
    widths = [float((a["style"] or "")[6:-1]) for a in page.all("i") if a.get("style")]
    rows = render.contributions(TRACE)
    longest = max(sum(r.values()) for r in rows)
    assert widths == pytest.approx([100 * v / longest for r in rows for v in r.values() if v > 0], abs=0.01)
    assert {a["aria-label"] for a in page.all("span", "bar")} >= {"generator +1.50, ease +3.00"}


def test_a_part_has_one_colour_everywhere_and_colours_repeat_after_the_last() -> None:
    names = [f"p{i}" for i in range(10)]
    assert render.colour(names, "p0") == render.colour(names, "p8") == "c0"
    page, view = Reader(render.recommendations(TRACE, CATALOG)), Reader(evidence(TRACE, CATALOG))
    assert len(page.all("i", "swatch c2")) == 1 and len(view.all("i", "swatch c2")) == 1  # ease, the third part


def test_one_item_and_no_item() -> None:
    alone = replace(TRACE, recommended=TRACE.recommended[:1])
    page = Reader(render.recommendations(alone, CATALOG))
    assert "1 item for" in page.text and not [a for a in page.all("i") if a.get("style")]
    nothing = replace(TRACE, recommended=())
    assert "Nothing to recommend" in Reader(render.recommendations(nothing, CATALOG)).text
    assert "Nothing was recommended" in Reader(trace_view(nothing, CATALOG)).text


def test_trace_holds_everything() -> None:
    text = Reader(trace_view(TRACE, CATALOG)).text
    for shown in (
        *("quiet drama", "an evening alone", "drama; calm", "because", "a-model", "v1-abc", "2023-11-14 22:13 UTC"),
        *("u1", "quiet films", "2 kept", "Film 0", "Film 1", "Many chose Film 2.", "EASE says Film 3.", "not fused"),
        *("-1.00", "-2.50", "-4.00", "× 0.5", "× 2", "2.0 ms", "6.0 ms", "8.0 ms in all"),
    ):
        assert shown in text, shown


@pytest.mark.parametrize("source", ["stored", "given", "query", "default"])
def test_the_source_of_the_instruction_is_named(source: str) -> None:
    trace = replace(TRACE, instruction_source=source, instruction=None if source == "default" else TRACE.instruction)
    text = Reader(instruction(trace)).text
    assert source in text and render.SOURCES[source] in text
    assert ("quiet drama" in text) == (source != "default")
    assert source in Reader(render.told(source)).text
    assert source in Reader(render.recommendations(trace, CATALOG)).text


def test_a_typed_instruction_shows_no_empty_provenance() -> None:
    page = Reader(instruction(replace(TRACE, instruction=Instruction("", (), "tea"), instruction_source="given")))
    assert page.text.endswith("tea") and not page.all("dt")
    odd = Instruction("", (), "tea", created=1e30)
    assert "unreadable" in Reader(instruction(replace(TRACE, instruction=odd))).text


def test_history_is_newest_first_and_bounded() -> None:
    long = replace(TRACE, context=UserContext(history=tuple(range(6)) * 20))
    page = Reader(request(long, CATALOG))
    assert "120 kept" in page.text and "and 90 earlier" in page.text
    assert page.text.index("Film 5") < page.text.index("Film 4")
    assert "An empty history" in Reader(request(replace(TRACE, context=UserContext()), CATALOG)).text


def test_beam_dots_stand_in_order_inside_the_axis_and_are_filled_where_recommended() -> None:
    trace = replace(TRACE, recommended=TRACE.recommended[:2])
    page = Reader(beam(trace, CATALOG))
    at = [float((a["style"] or "")[5:-1]) for a in page.all("i", "dot")]
    assert at == sorted(at, reverse=True) and min(at) > 0 and max(at) < 100
    assert at[0] - at[1] == pytest.approx(at[1] - at[2], abs=0.02)  # -1, -2.5, -4 are equally far apart
    assert len(page.all("i", "dot in")) == 2
    assert "took no part" in Reader(beam(replace(TRACE, beam=()), CATALOG)).text
    assert len(Reader(beam(replace(TRACE, beam=((3, -2.0),)), CATALOG)).all("i", "dot")) == 1


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-4.2, -0.9, [-4.0, -3.0, -2.0, -1.0]),
        (-0.05, 0.05, [-0.04, -0.02, 0.0, 0.02, 0.04]),
        (-8.6, 0.2, [-8.0, -6.0, -4.0, -2.0, 0.0]),
        (-2.0, -2.0, [-2.0]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


def test_scores_and_times() -> None:
    page = Reader(scores(TRACE))
    assert len(page.all("tr")) == 4 and "3.50" in page.text and "ease" in page.text
    assert "No times" in Reader(timings(replace(TRACE, seconds={}))).text
    assert len(Reader(timings(TRACE)).all("i")) == 2


def test_evidence_marks_what_was_recommended() -> None:
    page = Reader(evidence(TRACE, CATALOG))
    assert len(page.all("article")) == 2 and "#1" in page.text and "#2" in page.text and "#3" not in page.text
    assert "no tools" in Reader(evidence(replace(TRACE, evidence=()), CATALOG)).text


@pytest.mark.parametrize("bad", HOSTILE)
def test_hostile_text_is_shown_and_never_obeyed(bad: str) -> None:
    """Reader fails on any element or attribute that is not ours; the text must still be there, as text."""
    catalog = catalog_of([bad] * 6, [[bad]] * 6)
    context = UserContext(history=(0, 1), user=bad, scenario=bad, trigger=1, query=bad)
    told = Instruction(bad, (bad,), bad, bad, bad, bad, bad, 1.0)
    weights = {"generator": 1.0, bad: 1.0}
    items = tuple(Recommended(r, bad, bad, 1.0, (1,), {"generator": -1.0 * r, bad: 1.0 * r}) for r in (2, 3))
    found = Evidence(bad, np.array([2], np.int32), np.array([1.0], np.float32), bad)
    trace = Trace(context, told, bad, (found,), ((2, -1.0),), weights, items, {bad: 1.0})
    session = Session(bad, (0, 1), edited=True)
    dataset = Dataset(bad, catalog, Sequences([], np.zeros(1, np.int64), *(np.zeros(0, np.int32),) * 4))
    for html in (
        render.recommendations(trace, catalog),
        trace_view(trace, catalog),
        render.history_list(session, catalog),
        render.history_list(replace(session, edited=False), catalog),
        render.matches([0, 1], bad, catalog),
        render.matches([], bad, catalog),
        render.error(bad),
        render.told("stored", bad),
        render.header(dataset),
    ):
        assert bad in Reader(html).text


def test_long_text_is_cut_everywhere() -> None:
    long = "x" * 100_000
    catalog = catalog_of([long] * 6, [[long] * 50] * 6)
    told = Instruction(long, (long,) * 100, long, long, long, long, long, 1.0)
    items = (Recommended(2, long, long, 1.0, (1,), {"generator": -1.0}),)
    found = Evidence("ease", np.array([2], np.int32), np.array([1.0], np.float32), long)
    context = UserContext(history=(0, 1), user=long, query=long, trigger=0)
    trace = Trace(context, told, "given", (found,), ((2, -1.0),), WEIGHTS, items, {"tools": 1.0})
    assert len(render.recommendations(trace, catalog)) < 5_000
    assert len(trace_view(trace, catalog)) < 15_000
    assert len(render.history_list(Session(long, (0,)), catalog)) < 1_000
    assert len(render.error(long)) < 500


def test_history_list_names_whose_it_is_and_its_buttons_say_what_they_remove() -> None:
    own = Reader(render.history_list(Session("u1", (4, 5)), CATALOG))
    assert "History of user u1, 2 items" in own.text
    assert [(b["data-position"], b["data-row"]) for b in own.all("button")] == [("1", "5"), ("0", "4")]
    assert own.all("button")[0]["aria-label"] == "Remove Film 5"
    assert "Edited from user u1" in render.history_list(Session("u1", (4,), edited=True), CATALOG)
    assert "Your own history, 1 item," in render.history_list(Session(None, (4,)), CATALOG)
    assert "No history yet" in render.history_list(Session(), CATALOG)
    assert "and 20 earlier" in render.history_list(Session(None, (0,) * 120), CATALOG)


def test_matches_are_buttons_with_rows() -> None:
    page = Reader(render.matches([2, 0], "film", CATALOG))
    assert [b["data-row"] for b in page.all("button")] == ["2", "0"]
    assert render.matches([], "  ", CATALOG) == ""
    assert "No title has “zzz”" in render.matches([], "zzz", CATALOG)


def test_header_counts_the_data() -> None:
    events = Sequences(["a"], np.array([0, 2]), np.array([0, 1], np.int32), *(np.zeros(2),) * 3)
    assert "6 items, 1 user, 2 events" in Reader(render.header(Dataset("films", CATALOG, events))).text
