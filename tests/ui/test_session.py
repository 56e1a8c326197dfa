"""What a visitor chooses, and the request it becomes."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest

from genrec.contracts import Instruction, UserContext
from genrec.data.dataset import Catalog, Dataset, Sequences
from genrec.errors import GenrecError
from genrec.recommender import Recommender
from ui.session import Form, Session, TitleIndex, ask, begin, chosen_weights, weights_given, with_stored

TITLES = ["Star Wars", "The Star", "Café Noir", "A starry night", "Wars of the Roses", "Bread"]
DATASET = Dataset(
    "shop",
    Catalog(pa.table({"item": [f"i{n}" for n in range(6)], "title": TITLES, "category": [["x"]] * 6})),
    Sequences(
        ["ann", "bob"],
        np.array([0, 3, 5]),
        np.array([0, 1, 3, 3, 4], np.int32),
        np.arange(5.0),
        np.ones(5, np.float32),
        np.ones(5, np.float32),
    ),
)
STORED = {("ann", "home"): "quiet films", ("ann", "discovery"): "odd films"}
CHOSEN = {"generator": 0.5, "ease": 0.1234, "markov": 0.0}


class Asked(Recommender):
    """A recommender whose recommend only notes what it is asked; contexts are made by the real code."""

    def __init__(self, embeddings: str = "") -> None:
        def get_many(keys: list[tuple[str, str]]) -> list[Instruction | None]:
            return [Instruction("", (), STORED[key]) if key in STORED else None for key in keys]

        def fusion(scenario: str) -> dict[str, dict[str, float]]:
            return {"fused": {"generator": 0.5, "ease": 0.1234} if scenario == "home" else {"markov": 1.0}}

        store = SimpleNamespace(get_many=get_many)
        tools = {"ease": None, "markov": None}
        parts = {"dataset": DATASET, "store": store, "fusion": fusion, "tools": tools, "rankers": {}}
        super().__init__(cast(Any, SimpleNamespace(**parts, config={"embeddings": embeddings})))

    def recommend(self, context: UserContext, k: int = 10, **given: Any) -> Any:
        return SimpleNamespace(context=context, k=k, **given)


RECOMMENDER = Asked()


def asked(form: Form) -> Any:
    shown = {n: round(w, 2) for n, w in chosen_weights(RECOMMENDER, form.scenario).items()}
    return ask(RECOMMENDER, replace(form, weights=form.weights or shown))


def test_a_user_starts_with_the_own_history_and_the_stored_instruction() -> None:
    ann = begin(RECOMMENDER, " ann ", "home")
    assert ann == Session("ann", (0, 1, 3), stored="quiet films")
    assert begin(RECOMMENDER, "ann", "discovery").stored == "odd films"
    assert begin(RECOMMENDER, "ann", "item").stored == "quiet films"  # of home, where the scenario has none
    assert begin(RECOMMENDER, "bob", "home") == Session("bob", (3, 4))
    assert begin(RECOMMENDER, None, "home") == begin(RECOMMENDER, " ", "home") == Session()
    with pytest.raises(GenrecError, match="unknown user 'eve'"):
        begin(RECOMMENDER, "eve", "home")


def test_a_bundle_that_cannot_read_text_offers_no_stored_instruction() -> None:
    assert begin(Asked(embeddings="own.npy"), "ann", "home").stored == ""


def test_editing_makes_the_history_nobodys() -> None:
    ann = begin(RECOMMENDER, "ann", "home")
    more = ann.add(5)
    assert more == Session("ann", (0, 1, 3, 5), edited=True)
    assert more.remove(0, 0).history == (1, 3, 5)
    assert ann.remove(1, 1) == Session("ann", (0, 3), edited=True)
    assert with_stored(RECOMMENDER, more, "home").stored == ""
    assert Session().add(2).add(2) == Session(None, (2, 2))


@pytest.mark.parametrize(("position", "row"), [(0, 1), (3, 0), (-1, 3), (99, 0)])
def test_a_removal_that_came_too_late_changes_nothing(position: int, row: int) -> None:
    ann = begin(RECOMMENDER, "ann", "home")
    assert ann.remove(position, row) is ann


@pytest.mark.parametrize(
    ("stored", "text", "query", "source"),
    [
        ("", "", "", "default"),
        ("", "  ", " ", "default"),
        ("", "tea", "", "given"),
        ("", "tea", "cups", "given"),
        ("", "", "cups", "query"),
        ("quiet", "quiet", "", "stored"),
        ("quiet", " quiet ", "", "stored"),
        ("quiet", "quiet", "cups", "query"),
        ("quiet", "loud", "cups", "given"),
        ("quiet", "", "", "default"),
    ],
)
def test_where_the_instruction_comes_from(stored: str, text: str, query: str, source: str) -> None:
    assert Form(Session(stored=stored), text, query).source == source


def test_the_box_follows_the_stored_instruction_only_while_it_holds_it() -> None:
    ann = begin(RECOMMENDER, "ann", "home")
    form = Form(ann, "quiet films", trigger="i0")
    assert form.follow(ann.add(5), "i5") == Form(ann.add(5), "", trigger="i5")
    assert replace(form, text="my own").follow(ann.add(5), "i5").text == "my own"
    assert Form(Session(), "").follow(ann, "i3").text == "quiet films"


def test_an_untouched_user_is_asked_for_by_name() -> None:
    trace = asked(Form(begin(RECOMMENDER, "ann", "home"), "quiet films", count=7))
    assert (trace.context.user, trace.context.history, trace.k) == ("ann", (0, 1, 3), 7)
    assert trace.context.times == (0.0, 1.0, 2.0)  # the data set's own events, not bare items
    assert trace.instruction is None and trace.weights is None


def test_an_edited_history_is_asked_for_as_items() -> None:
    trace = asked(Form(begin(RECOMMENDER, "ann", "home").add(5)))
    assert (trace.context.user, trace.context.history) == (None, (0, 1, 3, 5))


def test_a_typed_instruction_is_given_and_an_emptied_box_means_none() -> None:
    ann = begin(RECOMMENDER, "ann", "home")
    assert asked(Form(ann, "loud films")).instruction == "loud films"
    emptied = asked(Form(ann, ""))
    assert emptied.instruction is None and emptied.context.user is None and emptied.context.history == (0, 1, 3)
    searched = asked(Form(ann, "quiet films", query="cups"))
    assert searched.instruction is None and searched.context.query == "cups"


def test_the_trigger_counts_on_item_pages_only() -> None:
    ann = begin(RECOMMENDER, "ann", "item")
    assert asked(Form(ann, scenario="item", trigger="i0")).context.trigger == 0
    assert asked(Form(ann, scenario="item")).context.trigger == 3  # the last item
    assert asked(Form(ann, scenario="home", trigger="i0")).context.trigger is None


def test_text_that_is_too_long_is_refused_in_one_line() -> None:
    with pytest.raises(GenrecError, match="the instruction has 501 characters; at most 500"):
        asked(Form(Session(), "x" * 501))
    with pytest.raises(GenrecError, match="the search text has 501 characters"):
        asked(Form(Session(), query="x" * 501))


def test_without_gradio_the_page_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("ui.app", "ui.layout"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(GenrecError, match=r"gradio is not installed.*-e '\.\[ui\]'"):
        importlib.import_module("ui.app")


def test_weights_are_passed_on_when_a_slider_was_moved() -> None:
    assert chosen_weights(RECOMMENDER, "home") == CHOSEN
    assert chosen_weights(RECOMMENDER, "discovery") == {"generator": 0.0, "ease": 0.0, "markov": 1.0}
    shown = {"generator": 0.5, "ease": 0.12, "markov": 0.0}
    assert weights_given(shown, CHOSEN) is None
    assert weights_given(shown | {"markov": 1.0}, CHOSEN) == {"generator": 0.5, "ease": 0.1234, "markov": 1.0}
    with pytest.raises(GenrecError, match="every part has weight 0"):
        weights_given(dict.fromkeys(CHOSEN, 0.0), CHOSEN)


def test_title_search_finds_every_word_in_any_order_frequent_items_first() -> None:
    index = TitleIndex(DATASET)
    assert index.search("star") == [0, 3, 1]  # starts with it; then words start with it, the more frequent first
    assert index.search("wars star") == [0]
    assert index.search("cafe NOIR") == [2]
    assert index.search("ars") == [0, 4]
    assert index.search("star", limit=1) == [0]
    assert index.search("zzz") == index.search("  ") == []
    assert index.search("star " * 100_000) == [3, 0, 1]  # cut, and no title starts with all of that
