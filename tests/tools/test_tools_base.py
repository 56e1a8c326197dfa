"""What all tools share: histories as rows, evidence, sentences, files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy import sparse

from genrec.contracts import Retriever, UserContext
from genrec.data import from_arrow
from genrec.errors import GenrecError
from genrec.tools import EASE, FLOORS, ItemKNN, Markov, Popularity, Tool
from genrec.tools.base import half, history_matrix, interaction_matrix, keep_top, short_title
from tests.tools.small_world import TITLES, TRAIN, catalog, contexts, sequences


@pytest.fixture(params=list(FLOORS))
def tool(request: pytest.FixtureRequest) -> Tool:
    return FLOORS[request.param]().fit(TRAIN, catalog())


def test_the_five_floors_are_retrievers_under_their_names() -> None:
    assert list(FLOORS) == ["popularity", "itemknn", "ease", "markov", "content"]
    assert all(isinstance(t(), Retriever) and t.name == name for name, t in FLOORS.items())


def test_history_rows_fade_by_step_and_by_doubling() -> None:
    by_step = history_matrix(contexts([4, 2, 0]), 6, 0.5).toarray()
    assert by_step.tolist() == [[1.0, 0, 0.5, 0, 0.25, 0]]
    by_doubling = history_matrix(contexts([5, 4, 2, 0]), 6, 0.5, "doubling").toarray()
    assert by_doubling[0] == pytest.approx([1.0, 0, 1 / 2, 0, 1 / 3, 1 / 4])


def test_event_weights_multiply_and_repeats_add_up() -> None:
    row = history_matrix([UserContext(history=(1, 1, 3), weights=(2.0, 1.0, 0.5))], 6, 0.5).toarray()[0]
    assert row.tolist() == [0, 2.0 * 0.25 + 0.5, 0, 0.5, 0, 0]


def test_the_trigger_is_the_newest_event_once() -> None:
    added = history_matrix([UserContext(history=(1,), trigger=3)], 6, 0.5).toarray()[0]
    assert added.tolist() == [0, 0.5, 0, 1.0, 0, 0]
    already = history_matrix([UserContext(history=(1, 3), trigger=3)], 6, 0.5).toarray()[0]
    assert already.tolist() == added.tolist()


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("name", list(FLOORS))
def test_the_scale_of_event_weights_changes_nothing(name: str, scale: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    users, items, given = np.repeat(np.arange(30), 6), rng.integers(0, 12, 180), rng.integers(1, 5, 180)

    def scores(scale: float) -> np.ndarray:
        rows = {"user": users, "item": items, "timestamp": np.arange(180), "weight": given * scale}
        dataset = from_arrow(pa.table(rows), pa.table({"item": np.arange(12), "title": TITLES * 2}))
        asked = [dataset.sequences.context(u) for u in range(30)]
        asked = [replace(c, trigger=0, query="green") for c in asked]
        tool = FLOORS[name]().fit(dataset.sequences, dataset.catalog)
        tool.save(tmp_path / str(scale))
        found = FLOORS[name].load(tmp_path / str(scale)).score_all(asked)
        assert np.isfinite(found).all() and found.any()
        return found

    np.testing.assert_allclose(scores(scale), scores(1.0), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("largest", [1e-12, 1e-3, 1.0, 1e5, 1e12])
def test_item_weights_of_any_size_are_stored_in_order(largest: float) -> None:
    data = np.array([1.0, -0.5, 0.25, 1e-3], np.float32) * np.float32(largest)
    kept = half(data)
    assert kept.dtype == np.float16 and np.isfinite(kept).all()
    assert kept / kept[0] == pytest.approx([1.0, -0.5, 0.25, 1e-3], rel=2e-3)
    assert np.array_equal(half(kept), kept)
    if 2**-6 < largest < 2**15:
        assert np.array_equal(kept, data.astype(np.float16))


def test_interactions_take_the_largest_weight_and_drop_zeros() -> None:
    x = interaction_matrix(sequences([0, 1, 0], [2], weights=[[0.5, 1.0, 2.0], [0.0]]), 3)
    assert x.toarray().tolist() == [[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert x.nnz == 2


def test_keep_top_keeps_the_largest_magnitudes() -> None:
    m = sparse.csr_matrix(np.array([[1.0, -3.0, 2.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.0]], dtype=np.float32))
    assert keep_top(m, 2).toarray().tolist() == [[0, -3, 2], [0, 0.5, 0], [0, 0, 0]]


def test_scores_are_whole_float32_and_independent_of_the_batch(tool: Tool) -> None:
    asked = contexts([0, 1], [4], [], [2, 3, 4])
    together = tool.score_all(asked)
    assert together.shape == (4, 6) and together.dtype == np.float32 and np.isfinite(together).all()
    one_by_one = np.concatenate([tool.score_all([c]) for c in asked])
    np.testing.assert_allclose(together, one_by_one, rtol=1e-6)


def test_an_empty_history_gets_popularity_and_nothing_from_the_others(tool: Tool) -> None:
    scores = tool.score_all(contexts([]))
    expected = [[3, 2, 3, 3, 2, 2]] if tool.name == "popularity" else [[0] * 6]
    assert scores.tolist() == expected


def test_evidence_leaves_out_history_and_trigger_and_is_ordered(tool: Tool) -> None:
    context = UserContext(history=(0, 1), trigger=2)
    (found,) = tool.retrieve([context], 6)
    assert found.tool == tool.name and found.items.dtype == np.int32 and found.scores.dtype == np.float32
    assert len(found.items) > 0 and not {0, 1, 2} & set(found.items.tolist())
    assert (np.diff(found.scores) <= 0).all() and (found.scores > 0).all()
    scores = tool.score_all([context])[0]
    np.testing.assert_array_equal(found.scores, scores[found.items])
    missing = set(range(3, 6)) - set(found.items.tolist())
    assert all(scores[r] <= 0 for r in missing)


def test_evidence_holds_at_most_k_and_equal_scores_go_by_row() -> None:
    tool = Popularity().fit(TRAIN, catalog())
    (found,) = tool.retrieve(contexts([]), 4)
    assert found.items.tolist() == [0, 2, 3, 1]
    assert tool.retrieve(contexts([]), 0)[0].items.tolist() == []
    assert len(tool.retrieve(contexts([]), 99)[0].items) == 6
    assert tool.retrieve([], 3) == []


def test_the_sentence_names_the_newest_items_and_the_best_ones() -> None:
    (found,) = ItemKNN().fit(TRAIN, catalog()).retrieve(contexts([4, 0, 1]), 1)
    best = TITLES[found.items[0]]
    assert found.sentence == f"People who chose Black tea and Green tea also chose {best}."


def test_without_evidence_the_sentence_says_so() -> None:
    (found,) = Markov().fit(TRAIN, catalog()).retrieve(contexts([]), 3)
    assert len(found.items) == 0 and "Nothing to go by" in found.sentence


def test_titles_in_a_sentence_are_one_bounded_line_of_plain_text() -> None:
    hostile = "{seen} <b>" + "long " * 50 + "\n\x1b[31mred"
    titles = [hostile, *TITLES[1:]]
    (found,) = Popularity().fit(TRAIN, catalog(titles)).retrieve(contexts([1, 2, 3, 4, 5]), 1)
    assert "\n" not in found.sentence and "\x1b" not in found.sentence
    assert found.sentence.startswith("Many people chose {seen} <b>long") and len(found.sentence) < 90
    assert short_title("x" * 60) == "x" * 60 and short_title("x" * 61) == "x" * 59 + "…"


def test_a_saved_tool_gives_the_same_scores_and_sentences(tool: Tool, tmp_path: Path) -> None:
    tool.save(tmp_path / "tool")
    again = type(tool).load(tmp_path / "tool")
    asked = contexts([0, 1], [], [5, 4, 3])
    np.testing.assert_array_equal(again.score_all(asked), tool.score_all(asked))
    assert [e.sentence for e in again.retrieve(asked, 3)] == [e.sentence for e in tool.retrieve(asked, 3)]
    assert again.config == tool.config
    assert {f.name for f in (tmp_path / "tool").iterdir()} == {"tool.json", "tool.safetensors"}


def test_loading_says_what_is_wrong(tmp_path: Path) -> None:
    EASE().fit(TRAIN, catalog()).save(tmp_path)
    with pytest.raises(GenrecError, match="holds the tool 'ease', not 'markov'"):
        Markov.load(tmp_path)
    about = json.loads((tmp_path / "tool.json").read_text())
    for spoiled in (about | {"config": {"lambda": 3}}, {"name": "ease"}, []):
        (tmp_path / "tool.json").write_text(json.dumps(spoiled))
        with pytest.raises(GenrecError, match=r"tool\.json is damaged"):
            EASE.load(tmp_path)
    (tmp_path / "tool.json").write_text(json.dumps(about))
    whole = (tmp_path / "tool.safetensors").read_bytes()
    (tmp_path / "tool.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(GenrecError, match=r"tool\.safetensors is damaged"):
        EASE.load(tmp_path)
    (tmp_path / "tool.safetensors").unlink()
    with pytest.raises(GenrecError, match=r"tool\.safetensors is missing"):
        EASE.load(tmp_path)
    with pytest.raises(GenrecError, match=r"tool\.json is missing"):
        EASE.load(tmp_path / "nowhere")


def test_training_without_any_event_fits_and_scores_zero() -> None:
    empty = sequences([], [])
    for name, kind in FLOORS.items():
        scores = kind().fit(empty, catalog()).score_all(contexts([0, 1]))
        assert scores.shape == (1, 6) and np.isfinite(scores).all()
        assert name == "content" or not scores.any()
