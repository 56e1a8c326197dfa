"""M_k by largest remainder, caps, floors, quotas; alpha."""

from __future__ import annotations

import numpy as np
import pytest

from genrec.errors import GenrecError
from genrec.tools.ebr import Controls
from genrec.tools.ebr.clusters import Clusters
from genrec.tools.ebr.merge import apportion, counts_of, sharpened

CLUSTERS = Clusters(np.repeat(np.arange(3, dtype=np.int32), [5, 3, 2]), ("tea", "nail care", "2"))


def test_whole_numbers_go_to_the_largest_remainders() -> None:
    assert apportion(10, np.array([[0.55, 0.27, 0.18]]), np.array([99, 99, 99])).tolist() == [[5, 3, 2]]
    assert apportion(1, np.array([[0.4, 0.4, 0.2]]), np.array([9, 9, 9])).tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("seed", range(20))
def test_counts_add_up_and_respect_caps_and_floors(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shares, caps = rng.dirichlet(np.full(7, 0.3), size=16), rng.integers(0, 12, (16, 7))
    least = np.minimum(rng.integers(0, 3, (16, 7)), caps)
    total = int(rng.integers(21, 60))
    counts = apportion(total, shares, caps, least)
    assert (counts.sum(axis=1) == np.minimum(total, caps.sum(axis=1))).all()
    assert (counts <= caps).all() and (counts >= least).all()
    free = apportion(total, shares, np.full(7, 10_000))
    assert (np.abs(free - total * shares) < 1).all()  # nobody is a whole item away from their share


def test_what_a_full_cluster_leaves_goes_to_the_others_by_share() -> None:
    counts = apportion(20, np.array([[0.8, 0.15, 0.05]]), np.array([4, 50, 50]))
    assert counts.tolist() == [[4, 12, 4]]
    assert apportion(6, np.array([[1.0, 0.0, 0.0]]), np.array([2, 3, 9])).tolist() == [[2, 1, 3]]
    assert apportion(99, np.array([[1.0, 0.0, 0.0]]), np.array([2, 3, 1])).tolist() == [[2, 3, 1]]


def test_alpha_flattens_and_sharpens_monotonically() -> None:
    log_p = np.log(np.array([[0.6, 0.3, 0.1], [0.34, 0.33, 0.33]]))

    def entropy(alpha: float) -> np.ndarray:
        p = sharpened(log_p, alpha)
        assert p.sum(axis=1) == pytest.approx([1, 1])
        return -(p * np.log(np.maximum(p, 1e-300))).sum(axis=1)

    found = np.stack([entropy(a) for a in (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 16.0)])
    assert found[0] == pytest.approx([np.log(3)] * 2) and (np.diff(found, axis=0) < 1e-12).all()
    assert sharpened(log_p, 1.0) == pytest.approx(np.exp(log_p))
    assert sharpened(log_p, 500.0)[0] == pytest.approx([1, 0, 0])
    assert sharpened(np.array([[0.0, -np.inf]]), 0.0).tolist() == [[0.5, 0.5]]


def test_floors_and_quotas_come_first() -> None:
    log_p = np.log(np.array([[0.9, 0.08, 0.02]]))
    caps = np.array([[5, 3, 2]])
    plain = counts_of(6, log_p, caps, CLUSTERS, Controls(), 1.0)
    assert plain.tolist() == [[5, 1, 0]]
    assert counts_of(6, log_p, caps, CLUSTERS, Controls(floors={"2": 2}), 1.0).tolist() == [[4, 0, 2]]
    assert counts_of(6, log_p, caps, CLUSTERS, Controls(quotas={"tea": 1}), 1.0).tolist() == [[1, 3, 2]]
    assert counts_of(4, log_p, caps, CLUSTERS, Controls(quotas={"0": 0}), 1.0).tolist() == [[0, 3, 1]]
    assert counts_of(6, log_p, caps, CLUSTERS, Controls(alpha=0.0), 1.0).tolist() == [[2, 2, 2]]


def test_controls_say_what_is_wrong() -> None:
    with pytest.raises(GenrecError, match="alpha is -1"):
        Controls(alpha=-1.0)
    with pytest.raises(GenrecError, match="alpha is nan"):
        Controls(alpha=float("nan"))
    with pytest.raises(GenrecError, match="quota of cluster 'tea' is -2"):
        Controls(quotas={"tea": -2})
    with pytest.raises(GenrecError, match=r"no cluster .jam.*nail care"):
        counts_of(6, np.zeros((1, 3)), np.array([[5, 3, 2]]), CLUSTERS, Controls(floors={"jam": 1}), 1.0)
    with pytest.raises(GenrecError, match="ask for 5 items in a list of 4"):
        counts_of(4, np.zeros((1, 3)), np.array([[5, 3, 2]]), CLUSTERS, Controls(floors={"tea": 3, "1": 2}), 1.0)


def test_quotas_need_the_merge_that_has_them() -> None:
    assert not Controls().by_quota and not Controls(merge="global", alpha=2.0).by_quota
    assert all(c.by_quota for c in (Controls(alpha=1.0), Controls(floors={"tea": 1}), Controls(merge="quota")))
    for changes in ({"quotas": {"tea": 1}}, {"floors": {"tea": 1}}):
        with pytest.raises(GenrecError, match="merge is 'global', which has no quotas"):
            Controls(merge="global", **changes)  # type: ignore[arg-type]
    with pytest.raises(GenrecError, match="must be quota or global"):
        Controls(merge="best")
