"""The user-clustered bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from genrec.evaluation.intervals import bootstrap, paired


def test_one_request_per_user_agrees_with_scipy() -> None:
    values = np.random.default_rng(0).exponential(size=300)
    (ours,) = bootstrap(values[:, None], np.arange(300), resamples=4000)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, random_state=1)
    assert ours.mean == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.02)


def test_clusters_widen_the_interval_and_copies_add_nothing() -> None:
    values = np.random.default_rng(1).normal(size=100)
    (once,) = bootstrap(values[:, None], np.arange(100))
    copies = np.repeat(values, 10)[:, None]
    (clustered,) = bootstrap(copies, np.repeat(np.arange(100), 10))
    assert (clustered.low, clustered.high) == pytest.approx((once.low, once.high))
    (naive,) = bootstrap(copies, np.arange(1000))
    assert naive.high - naive.low < 0.5 * (clustered.high - clustered.low)


def test_users_of_different_size_are_drawn_whole() -> None:
    """Two users, nine requests of 1 and one of 0: a resample is one of three ratios."""
    values = np.array([1.0] * 9 + [0.0])[:, None]
    (found,) = bootstrap(values, np.array([7] * 9 + [3]), resamples=500)
    assert (found.mean, found.low, found.high) == (0.9, 0.0, 1.0)


def test_columns_do_not_disturb_each_other_and_labels_do_not_matter() -> None:
    rng = np.random.default_rng(2)
    values, users = rng.normal(size=(60, 3)), rng.integers(0, 20, 60)
    together = bootstrap(values, users, resamples=200)
    alone = [bootstrap(values[:, [m]], users, resamples=200)[0] for m in range(3)]
    for a, b in zip(alone, together, strict=True):
        assert (a.mean, a.low, a.high) == pytest.approx((b.mean, b.low, b.high))
    assert bootstrap(values, users * 1000 + 5, resamples=200) == together
    assert bootstrap(values, users, resamples=200, seed=1) != together


def test_many_users_are_done_in_blocks() -> None:
    """More users than fit one block of resamples; the interval of a mean of 0 and 1 is known."""
    values = (np.arange(300_000) % 10 == 0).astype(float)[:, None]
    (found,) = bootstrap(values, np.arange(300_000), resamples=30)
    half = 1.96 * (0.1 * 0.9 / 300_000) ** 0.5
    assert found.mean == pytest.approx(0.1)
    assert found.low == pytest.approx(0.1 - half, abs=half) and found.high == pytest.approx(0.1 + half, abs=half)


def test_one_user_has_no_interval() -> None:
    (found,) = bootstrap(np.array([[1.0], [0.0]]), np.array([4, 4]))
    assert found.mean == 0.5 and np.isnan(found.low) and np.isnan(found.high)


def test_a_wider_level_gives_a_wider_interval() -> None:
    values = np.random.default_rng(3).normal(size=(80, 1))
    (narrow,), (wide,) = (bootstrap(values, np.arange(80), level=level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


def test_a_pairing_sees_what_two_intervals_hide() -> None:
    rng = np.random.default_rng(4)
    base = rng.normal(scale=10, size=(200, 1))
    better = base + 0.5 + rng.normal(scale=0.1, size=(200, 1))
    users = np.arange(200)
    (a,), (b,) = bootstrap(better, users), bootstrap(base, users)
    assert a.low < b.high
    (difference,) = paired(better, base, users)
    assert difference.mean == pytest.approx(0.5, abs=0.05) and difference.low > 0.4
    (reverse,) = paired(base, better, users)
    assert reverse.mean == pytest.approx(-difference.mean) and reverse.high < 0


def test_wrong_shapes_and_values_are_refused() -> None:
    with pytest.raises(ValueError, match="same requests"):
        paired(np.zeros((3, 1)), np.zeros((2, 1)), np.arange(3))
    with pytest.raises(ValueError, match=r"must be \[3, metrics\]"):
        bootstrap(np.zeros(3), np.arange(3))
    with pytest.raises(ValueError, match="at least one request"):
        bootstrap(np.zeros((0, 1)), np.zeros(0))
    with pytest.raises(ValueError, match="finite"):
        bootstrap(np.array([[np.nan]]), np.zeros(1))
