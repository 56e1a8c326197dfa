import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from genrec.evaluation.auc import (
    auc,
    auc_difference,
    auc_interval,
    buckets,
    detectable,
    gauc,
    gauc_difference,
    gauc_interval,
    user_aucs,
)
from genrec.evaluation.intervals import Interval


def world(seed: int, users: int = 12, n: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    u = rng.integers(0, users, n)
    y = rng.random(n) < 0.4
    return y, np.round(rng.normal(size=n) + 0.7 * y, 1), u  # rounded: with ties


@pytest.mark.parametrize("seed", range(5))
def test_auc_and_gauc_agree_with_scikit_learn(seed: int) -> None:
    y, s, u = world(seed)
    assert auc(y, s) == pytest.approx(roc_auc_score(y, s))
    own = [(roc_auc_score(y[u == v], s[u == v]), (u == v).sum()) for v in np.unique(u) if 0 < y[u == v].mean() < 1]
    assert gauc(y, s, u) == pytest.approx(np.average([a for a, _ in own], weights=[n for _, n in own]))


def test_a_user_with_one_kind_of_label_has_no_auc() -> None:
    y, s, u = np.array([1, 0, 1, 1]), np.array([2.0, 1.0, 0.0, 5.0]), np.array([7, 7, 8, 8])
    assert np.isnan(user_aucs(y, s, u)).tolist() == [False, False, True, True]
    assert gauc(y, s, u) == 1.0
    assert np.isnan(gauc(y[2:], s[2:], u[2:])) and np.isnan(auc(y[2:], s[2:])) and np.isnan(auc(y[:0], s[:0]))


def test_constant_scores_are_a_coin() -> None:
    y, _, u = world(0)
    assert auc(y, np.zeros(len(y))) == 0.5 and gauc(y, np.zeros(len(y)), u) == 0.5


def test_intervals_hold_the_value_and_narrow_with_more_users() -> None:
    widths = []
    for users in (10, 160):
        y, s, u = world(1, users, 20 * users)
        for found, value in ((auc_interval(y, s, u, 300), auc(y, s)), (gauc_interval(y, s, u, 300), gauc(y, s, u))):
            assert found.mean == pytest.approx(value) and found.low < value < found.high
        widths.append(auc_interval(y, s, u, 300))
    assert widths[1].high - widths[1].low < (widths[0].high - widths[0].low) / 2


def test_the_auc_interval_is_that_of_resampled_users() -> None:
    y, s, u = world(2, 6, 60)
    rng = np.random.default_rng(0)
    brute = []
    for _ in range(400):
        rows = np.concatenate([np.flatnonzero(u == v) for v in rng.integers(0, 6, 6)])
        brute.append(roc_auc_score(y[rows], s[rows]))
    found = auc_interval(y, s, u, 400)
    assert [found.low, found.high] == pytest.approx(np.quantile(brute, [0.025, 0.975]))


def test_differences_are_paired_and_average_runs() -> None:
    y, s, u = world(3, 40, 800)
    better = s + 0.5 * y
    for difference, value in (
        (auc_difference(y, better, s, u, 300), auc(y, better) - auc(y, s)),
        (gauc_difference(y, np.stack([better, better]), np.stack([s, s]), u, 300), gauc(y, better, u) - gauc(y, s, u)),
    ):
        assert difference.mean == pytest.approx(value) and difference.low > 0
    same = auc_difference(y, s, s, u, 50)
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_detectable_is_two_point_eight_standard_errors() -> None:
    assert detectable(Interval(0.0, -1.96, 1.96)) == pytest.approx(2.8, abs=0.01)


def test_buckets_cover_every_count_once() -> None:
    found = buckets(np.array([0, 9, 10, 49, 50, 900]), (10, 50))
    assert list(found) == ["0-9", "10-49", "50+"]
    assert np.stack(list(found.values())).sum(0).tolist() == [1] * 6 and found["10-49"].tolist()[2:4] == [True, True]
    with pytest.raises(ValueError, match="rise"):
        buckets(np.array([1]), (5, 5))


@pytest.mark.parametrize("bad", [np.array([np.nan, 1.0]), np.array([1.0])])
def test_bad_scores_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError):
        gauc(np.array([0, 1]), bad, np.array([0, 0]))
