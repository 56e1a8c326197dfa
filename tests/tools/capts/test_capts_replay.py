"""Tables, triggers and the look-ahead replay, against examples computed by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from genrec.contracts import UserContext
from genrec.data.dataset import Sequences
from genrec.errors import GenrecError
from genrec.tools import CAPTSConfig, ItemKNN, Markov
from genrec.tools.capts.channels import Channels, fit_channels, table_of_vectors, table_of_weights
from genrec.tools.capts.requests import (
    DAY,
    Triggers,
    attribute,
    labels_of,
    look_ahead,
    moments_of,
    on_trigger,
    triggers_of,
)
from tests.tools.small_world import TRAIN, catalog, sequences

CHEAP = CAPTSConfig(channels=("itemknn", "markov", "content", "item2vec"), neighbours=4, depth=3)


def timed(*histories: list[tuple[int, float]]) -> Sequences:
    """Histories of (row, day)."""
    s = sequences(*([row for row, _ in h] for h in histories))
    return replace(s, times=np.array([day * DAY for h in histories for _, day in h]))


# -- tables -------------------------------------------------------------------------------------------


def test_tables_hold_the_nearest_of_every_channel_in_order() -> None:
    channels = fit_channels(TRAIN, catalog(), CHEAP)
    assert channels.rows.shape == channels.scores.shape == (6, 4, 4) and channels.rows.dtype == np.int32
    for c, tool in ((0, ItemKNN()), (1, Markov())):
        dense = tool.fit(TRAIN, catalog()).weights.toarray()
        np.fill_diagonal(dense, 0)
        for item in range(6):
            order = [int(j) for j in np.lexsort((np.arange(6), -dense[item])) if dense[item, j] > 0][:4]
            assert channels.rows[item, c].tolist() == order + [-1] * (4 - len(order))
    there = channels.rows >= 0
    assert (channels.scores[~there] == 0).all() and (np.diff(channels.scores, axis=2) <= 0).all()
    assert not (channels.rows == np.arange(6)[:, None, None]).any()  # nothing is its own neighbour
    assert channels.counts.tolist() == np.bincount(TRAIN.items, minlength=6).tolist()


def test_a_channel_without_neighbours_is_all_padding() -> None:
    channels = fit_channels(sequences([0], [1]), catalog(), replace(CHEAP, channels=("markov", "content")))
    assert (channels.rows[:, 0] == -1).all() and (channels.rows[:, 1] >= 0).any()
    assert np.isfinite(channels.features).all() and not channels.features[:, 0].any()


def test_tables_of_nothing_and_of_one_item() -> None:
    for depth in (1, 9):
        rows, scores = table_of_vectors(np.ones((1, 3), np.float32), depth)
        assert rows.tolist() == [[-1] * depth] and not scores.any()
    from scipy import sparse

    rows, _ = table_of_weights(sparse.csr_matrix((3, 3), dtype=np.float32), 2)
    assert (rows == -1).all()


def test_vectors_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(GenrecError, match="holds NaN or infinity"):
        table_of_vectors(np.array([[1.0, np.nan], [0, 1]], np.float32), 2)


def test_the_share_of_a_list_that_no_other_channel_has() -> None:
    rows = np.array([[[1, 2], [2, -1]], [[0, 2], [-1, -1]], [[-1, -1], [-1, -1]]], np.int32)
    channels = Channels(("a", "b"), rows, (rows >= 0).astype(np.float16), np.ones(3, np.float32))
    assert channels._elsewhere(0).tolist() == [[False, True], [False, False], [False, False]]
    assert channels._elsewhere(1).tolist() == [[True, False], [False, False], [False, False]]


# -- triggers -----------------------------------------------------------------------------------------


def test_triggers_are_the_newest_different_items() -> None:
    context = UserContext((4, 1, 4, 2), (0.0, 1 * DAY, 2 * DAY, 2 * DAY + 5), (1.0, 1.0, 3.0, 1.0))
    found = triggers_of([context, UserContext(), UserContext((3,), trigger=5)], CHEAP)
    assert found.rows.tolist() == [[2, 4, 1], [-1, -1, -1], [5, 3, -1]]
    place, days, weight, repeats, count, same_day = found.about[0].T
    assert place == pytest.approx(np.log([1, 2, 3])) and days == pytest.approx(np.log1p([0, 5 / DAY, 1 + 5 / DAY]))
    assert weight == pytest.approx([1 / 1.5, 3 / 1.5, 1 / 1.5]) and repeats == pytest.approx(np.log([1, 2, 1]))
    assert count == pytest.approx([np.log(4)] * 3) and same_day.tolist() == [1, 1, 0]
    assert triggers_of([context], replace(CHEAP, triggers=2)).rows.tolist() == [[2, 4]]


def test_requests_look_ahead_from_a_few_moments_as_far_as_the_window() -> None:
    train = timed([(0, 0), (1, 1), (2, 10), (0, 11), (3, 12), (4, 200)], [(5, 10)], [(1, 9), (2, 300)])
    assert (moments_of(10 * DAY, 301 * DAY, 50) / DAY).tolist() == [10, 130, 251]
    found = look_ahead(train, 10 * DAY, replace(CHEAP, window=50))
    futures = [sorted(f[f >= 0].tolist()) for f in found.futures]
    assert [c.history for c in found.contexts] == [(0, 1), (1,)]  # everyone with a history and something new
    assert futures == [[2, 3], [2]]  # what was chosen before is nobody's merit
    assert found.users.tolist() == [0, 2]
    assert len(look_ahead(train, 1000 * DAY, CHEAP)) == 0
    assert len(look_ahead(train, 10 * DAY, replace(CHEAP, window=50), most=1)) == 1


def test_no_moment_is_inside_a_day_or_before_the_cut() -> None:
    assert moments_of(10.5 * DAY, 20 * DAY, 5).tolist() == [10.5 * DAY, 12 * DAY, 15 * DAY]
    assert moments_of(10 * DAY, 12 * DAY, 5).tolist() == [10 * DAY]  # a window that does not fit


# -- replay -------------------------------------------------------------------------------------------


def test_replay_against_a_hand_computed_example() -> None:
    lists = np.array([[[[7, 8, 9], [8, -1, -1]], [[8, 5, 6], [4, 5, -1]]]])  # one request, 2 triggers, 2 channels
    futures, gains = np.array([[8, 4, -1]]), np.array([[2.0, 1.0, 9.0]], np.float32)
    value, unique = attribute(lists, futures, gains)
    assert value.tolist() == [[[2, 2], [2, 1]]]  # 8 is found three times, 4 once
    assert unique.tolist() == [[[False, False], [False, True]]]  # 8 is on both channels, 4 on the second alone
    split, _ = attribute(lists, futures, gains, "split")
    np.testing.assert_allclose(split, [[[2 / 3, 2 / 3], [2 / 3, 1]]])
    assert split.sum() == pytest.approx(3)  # no more than the future was worth
    nothing, none = attribute(lists, np.array([[-1, -1, -1]]), gains)
    assert not nothing.any() and not none.any()


def test_a_trigger_alone_on_a_channel_twice_is_still_unique_to_the_channel() -> None:
    lists = np.array([[[[3], [1]], [[3], [2]]]])
    _, unique = attribute(lists, np.array([[3]]), np.ones((1, 1), np.float32))
    assert unique.tolist() == [[[True, False], [True, False]]]


def test_a_label_needs_more_credit_than_the_threshold_of_its_channel() -> None:
    value = np.array([[[1, 0], [2, 0], [4, 0], [0, 0]]], np.float32)
    assert labels_of(value, 0.0)[0, :, 0].tolist() == [True, True, True, False]
    assert labels_of(value, 0.5)[0, :, 0].tolist() == [False, False, True, False]  # the median of what is positive: 2
    assert not labels_of(value, 0.5)[..., 1].any()


def test_feedback_on_the_trigger_is_its_weight_or_that_the_user_went_on() -> None:
    label, known = on_trigger(triggers_of([UserContext((1, 2, 3), (0.0, 1.0, 2.0), (1.0, 5.0, 1.0))], CHEAP))
    assert label.tolist() == [[False, True, False]] and known.all()
    plain = triggers_of([UserContext((1, 2, 3), (0.0, 9 * DAY, 9 * DAY + 60)), UserContext((4,))], CHEAP)
    label, known = on_trigger(plain)
    assert label.tolist() == [[False, True, False], [False, False, False]]
    assert known.tolist() == [[False, True, True], [False, False, False]]  # nobody knows yet what follows the newest


def test_lists_leave_out_what_was_seen_before_they_are_cut() -> None:
    rows = np.array([[[1, 2, 3, 4], [3, -1, -1, -1]], [[0, 3, 2, -1], [-1] * 4]], np.int32)
    rows = np.concatenate([rows, np.full((3, 2, 4), -1, np.int32)])
    channels = Channels(("a", "b"), rows, (rows >= 0).astype(np.float16), np.ones(5, np.float32))
    triggers = triggers_of([UserContext((1, 0, 3)), UserContext((0,))], replace(CHEAP, triggers=2))
    lists = triggers.lists(channels, 2)
    assert triggers.rows.tolist() == [[3, 0], [0, -1]] and triggers.seen[0].tolist() == [0, 1, 3]
    assert lists[0].tolist() == [[[-1, -1]] * 2, [[2, 4], [-1, -1]]]  # 1 and 3 are no places of the list
    assert lists[1].tolist() == [[[1, 2], [3, -1]], [[-1, -1]] * 2]
    assert triggers.take(np.array([1])).lists(channels, 2).tolist() == lists[1:, :1].tolist()


def test_lists_of_padded_triggers_are_padding() -> None:
    channels = fit_channels(TRAIN, catalog(), CHEAP)
    triggers = Triggers(np.array([[2, -1]]), np.zeros((1, 2, 6), np.float32))
    lists = triggers.lists(channels, 3)
    assert lists.shape == (1, 2, 4, 3) and (lists[0, 1] == -1).all()
    np.testing.assert_array_equal(lists[0, 0], channels.rows[2, :, :3])
