"""Dividing a catalogue: k-means, categories, random; labels; bad vectors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from genrec.data.dataset import Catalog
from genrec.errors import GenrecError
from genrec.tools.ebr import EBRConfig
from genrec.tools.ebr.clusters import Clusters, divide, kmeans
from genrec.tools.ebr.vectors import behaviour_vectors, content_vectors
from tests.tools.ebr.ebr_world import KINDS, PER_KIND, world_catalog, world_sequences
from tests.tools.small_world import sequences

CONFIG = EBRConfig(clusters=4)


def same_kind(clusters: Clusters) -> bool:
    """Whether every cluster is one kind of the world."""
    return all(len({row // PER_KIND for row in clusters.members(k)}) == 1 for k in range(len(clusters)))


def test_kmeans_finds_the_kinds_and_names_them() -> None:
    clusters = divide(world_sequences(), world_catalog(), CONFIG)
    assert same_kind(clusters) and sorted(clusters.labels) == sorted(KINDS)
    assert clusters.number("tea") == clusters.number(str(clusters.labels.index("tea"))) == clusters.of[0]
    assert sorted(clusters.order.tolist()) == list(range(32)) and clusters.offsets.tolist() == [0, 8, 16, 24, 32]


def test_categories_are_clusters_and_the_rest_is_one() -> None:
    clusters = divide(world_sequences(), world_catalog(), replace(CONFIG, divide="categories"))
    assert same_kind(clusters) and len(clusters) == 4
    three = divide(world_sequences(), world_catalog(), replace(CONFIG, divide="categories", clusters=3))
    assert sorted(three.sizes.tolist()) == [8, 8, 16]
    bare = Catalog(pa.table({"item": ["a"], "title": ["x"], "category": pa.array([[]], type=pa.list_(pa.string()))}))
    with pytest.raises(GenrecError, match="no categories"):
        divide(sequences([0]), bare, replace(CONFIG, divide="categories"))


def test_random_clusters_are_even_and_follow_the_seed() -> None:
    config = replace(CONFIG, divide="random", clusters=5)
    a, b = (divide(world_sequences(), world_catalog(), c) for c in (config, replace(config, seed=1)))
    assert a.sizes.tolist() == [7, 7, 6, 6, 6] and (a.of != b.of).any()
    assert (a.of == divide(world_sequences(), world_catalog(), config).of).all()


def test_no_cluster_is_empty_and_a_small_catalogue_has_fewer() -> None:
    assert np.bincount(kmeans(np.ones((9, 2)), 4)).min() >= 1  # all vectors alike
    assert len(np.unique(kmeans(np.zeros((3, 2)), 3))) == 3
    clusters = divide(sequences([0, 1]), world_catalog(1), replace(CONFIG, clusters=50))
    assert len(clusters) == 4 and clusters.sizes.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_vectors_that_are_no_numbers_are_refused(bad: float) -> None:
    vectors = np.ones((5, 3), np.float32)
    vectors[3, 1] = bad
    with pytest.raises(GenrecError, match="item row 3 holds NaN or infinity"):
        kmeans(vectors, 2)


def test_an_item_without_events_is_placed_by_its_words() -> None:
    train = world_sequences()
    without = train.keep(train.items != 3)
    assert not behaviour_vectors(without, 32, 8)[3].any()
    clusters = divide(without, world_catalog(), CONFIG)
    assert clusters.of[3] == clusters.of[0]


def test_vectors_of_behaviour_and_words_are_unit_and_deterministic() -> None:
    for make in (lambda: behaviour_vectors(world_sequences(), 32, 8), lambda: content_vectors(world_catalog(), 8)):
        vectors = make()
        assert vectors.shape == (32, 8) and vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
        np.testing.assert_array_equal(vectors, make())
        alike = vectors @ vectors.T
        assert alike[0, 1] > alike[0, 9] + 0.2  # another tea, and a bread
    assert not behaviour_vectors(sequences([], [2]), 4, 3).any()
