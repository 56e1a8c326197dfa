import math

import numpy as np
import pyarrow as pa
import pytest

from genrec.contracts import Instruction, UserContext
from genrec.data.dataset import Catalog
from genrec.instructions import quality
from genrec.instructions.attributes import Attributes

SHOP = Catalog(
    pa.table(
        {
            "item": list("abcdef"),
            "title": list("ABCDEF"),
            "category": [["Tea"], ["Tea"], ["Jam"], ["Jam"], ["Tea", "Jam"], ["Soap bars"]],
        }
    )
)
LABELS = Attributes(SHOP)
ITEMS = np.eye(6, dtype=np.float32)


def test_likeness_weighs_labels_by_rarity() -> None:
    tea, jam = math.log(6 / 3), math.log(6 / 3)
    assert quality.likeness(["Tea"], ["Tea"], LABELS) == 1
    assert quality.likeness(["Tea"], ["Jam"], LABELS) == 0 == quality.likeness([], [], LABELS)
    assert quality.likeness(["Tea", "Jam"], ["Tea"], LABELS) == pytest.approx(tea / (tea + jam))
    rare = math.log(6)
    assert quality.likeness(["Tea", "Soap bars"], ["Soap bars"], LABELS) == pytest.approx(rare / (rare + tea))


def test_intent_hit_is_the_likeness_of_what_is_retrieved_without_the_history() -> None:
    contexts = [UserContext(history=(0,)), UserContext(history=(0,)), UserContext(history=tuple(range(6)))]
    queries = np.array([[9, 5, 1, 0, 0, 0], [0, 0, 5, 4, 1, 0], [1, 0, 0, 0, 0, 0]], np.float32)
    found = quality.intent_hits(queries, contexts, np.array([1, 1, 1]), ITEMS, LABELS, k=2)
    assert found.tolist() == [0.5, 0.0, 0.0]  # rows 1 and 2, not the 0 of the history; rows 2 and 3; nothing is left
    tied = quality.intent_hits(np.zeros((1, 6), np.float32), contexts[:1], np.array([1]), ITEMS, LABELS, k=1)
    assert tied.tolist() == [1.0]  # equal similarities: the lower row, 1


def test_the_history_is_its_newest_items_faded() -> None:
    vectors = quality.history_vectors([UserContext(history=(0, 1)), UserContext()], ITEMS)
    assert vectors[0] == pytest.approx(np.array([0.8, 1, 0, 0, 0, 0]) / math.hypot(0.8, 1)) and not vectors[1].any()


def test_the_ring_gives_everyone_another_ones_text() -> None:
    for users in (2, 3, 50):
        other = quality.ring(users)
        assert sorted(other.tolist()) == list(range(users)) and (other != np.arange(users)).all()
    with pytest.raises(ValueError, match="one user cannot be shuffled"):
        quality.ring(1)


def test_named_counts_labels_as_whole_words() -> None:
    assert quality.named("green TEAS and cups", 0, LABELS) == 1
    assert quality.named("teapots", 0, LABELS) == 0
    assert quality.named("a soap bar", 5, LABELS) == 1 and quality.named("soap", 5, LABELS) == 0
    assert quality.named("jam", 4, LABELS) == pytest.approx(0.5)


def test_groundedness_counts_content_words_that_the_model_was_shown() -> None:
    shown = 'Chosen: "Wool Socks"; "Emma"\nKinds: Running, Socks'
    said = Instruction("someone who likes running", ("more sock",), "wool socks and jazz")
    assert quality.groundedness(said, shown) == pytest.approx(4 / 5)  # running, sock, wool, sock, not jazz
    assert quality.groundedness(Instruction("someone", ("something",), "more"), shown) == 1


def test_distinctness_sums_to_the_number_of_different_texts() -> None:
    found = quality.distinctness(["Drama", "dramas", "comedy"])
    assert found.tolist() == [0.5, 0.5, 1.0] and found.sum() == 2


def test_repetition_is_the_share_of_words_that_were_said_before() -> None:
    assert quality.repetition("Firm, The; Firm, The; Dracula; Comedy, comedies, Drama") == pytest.approx(1 / 6)
    assert quality.repetition("comedy, comedy, comedy") == pytest.approx(2 / 3)
    assert quality.repetition("Lion King, The; Drama") == quality.repetition("the") == 0


def test_values_of_fields_are_cut_and_nothing_else() -> None:
    table = {"item": ["a", "b"], "title": ["A", "B"], "category": [["Tea"], ["Jam"]], "year": ["1997", "1997"]}
    labels = Attributes(Catalog(pa.table(table), ("year",)))
    assert quality.without_values("Tea, in 1997, 1997", labels) == "Tea, in 1997"
    assert quality.without_values("1997", labels) == "1997"
