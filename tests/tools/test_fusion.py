"""Standardised late fusion and its weights."""

from __future__ import annotations

import numpy as np
import pytest

from genrec.contracts import UserContext
from genrec.errors import GenrecError
from genrec.evaluation.metrics import ndcg
from genrec.evaluation.protocol import seen_index, target_ranks, tie_numbers
from genrec.tools import fusion
from genrec.tools.fusion import contenders, fit_weights, fuse, search_weights, standardise

NAN, INF = float("nan"), float("inf")
NOBODY = (np.zeros(0, np.int64), np.zeros(0, np.int64))


def test_rows_get_mean_zero_and_deviation_one() -> None:
    scores = np.random.default_rng(0).normal(5, 3, size=(4, 50)).astype(np.float32)
    done = standardise(scores)
    assert done.dtype == np.float32
    np.testing.assert_allclose(done.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(done.std(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(standardise(scores * 100 - 7), done, atol=1e-4)


def test_the_input_is_left_as_it_was() -> None:
    scores = np.array([[1.0, NAN, 3.0]], dtype=np.float32)
    standardise(scores)
    np.testing.assert_array_equal(scores, [[1.0, NAN, 3.0]])


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e6])
def test_a_constant_row_says_nothing(value: float) -> None:
    assert standardise(np.full((2, 12101), value)).tolist() == [[0.0] * 12101] * 2


@pytest.mark.parametrize("gap", [NAN, -INF])
def test_items_without_a_score_lie_one_nat_below_the_worst_one(gap: float) -> None:
    filled = standardise(np.array([[-1.0, gap, -3.0, gap]]))
    np.testing.assert_allclose(filled, standardise(np.array([[-1.0, -4.0, -3.0, -4.0]])))
    lonely = standardise(np.array([[gap, -9.0, gap]]))
    assert lonely[0, 1] > 0 > lonely[0, 0] == lonely[0, 2]
    assert standardise(np.array([[gap, gap]])).tolist() == [[0.0, 0.0]]


def test_plus_infinity_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\+inf"):
        standardise(np.array([[1.0, INF]]))


def test_fuse_is_the_weighted_sum_of_the_named_blocks() -> None:
    rng = np.random.default_rng(1)
    blocks = {name: rng.normal(size=(3, 8)) for name in "abc"}
    expected = 0.3 * standardise(blocks["a"]) + 2.0 * standardise(blocks["c"])
    np.testing.assert_allclose(fuse(blocks, {"a": 0.3, "b": 0.0, "c": 2.0}), expected, rtol=1e-5)
    assert not fuse(blocks, {}).any()
    assert fuse(blocks, {"gone": 0.0}).shape == (3, 8)
    with pytest.raises(GenrecError, match="'gone': the parts are a, b, c"):
        fuse(blocks, {"gone": 1.0})


def world(requests: int = 300, items: int = 40) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Two blocks that each know half of the truth, and one of noise."""
    rng = np.random.default_rng(2)
    targets = rng.integers(0, items, requests)
    blocks = {name: rng.normal(size=(requests, items)).astype(np.float32) for name in ("left", "right", "noise")}
    odd = np.arange(requests) % 2 == 1
    blocks["left"][np.arange(requests)[odd], targets[odd]] += 4
    blocks["right"][np.arange(requests)[~odd], targets[~odd]] += 4
    return blocks, targets


def mean_ndcg(blocks: dict[str, np.ndarray], weights: dict[str, float], targets: np.ndarray) -> float:
    return float(ndcg(target_ranks(fuse(blocks, weights), targets, NOBODY, tie_numbers(len(targets))), 10).mean())


def test_the_weights_beat_every_part_and_drop_the_noise() -> None:
    blocks, targets = world()
    weights = fit_weights([contenders(blocks, targets, NOBODY)])
    assert sum(weights.values()) == pytest.approx(1, abs=1e-3)
    assert weights["noise"] < 0.1 < min(weights["left"], weights["right"])
    alone = max(mean_ndcg(blocks, {name: 1.0}, targets) for name in blocks)
    equal = mean_ndcg(blocks, dict.fromkeys(blocks, 1.0), targets)
    assert mean_ndcg(blocks, weights, targets) > max(alone, equal)
    assert fit_weights([contenders(blocks, targets, NOBODY)]) == weights


def test_the_contenders_change_nothing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, targets = world()
    whole = fit_weights([contenders(blocks, targets, NOBODY)])
    monkeypatch.setattr(fusion, "CONTENDERS", 15)
    assert fit_weights([contenders(blocks, targets, NOBODY)]) == pytest.approx(whole, abs=0.1)


def test_seen_items_do_not_count_against_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "left" is right but for the seen item that it puts first; "right" is a little wrong everywhere."""
    items, requests = 30, 50
    targets = np.full(requests, 7)
    left = np.tile(-np.arange(items, dtype=np.float32), (requests, 1))
    left[:, 7] = 5
    left[:, :7] += 50
    right = np.zeros((requests, items), dtype=np.float32)
    right[:, 20], right[:, 7] = 2, 1
    seen = seen_index([UserContext(history=tuple(range(7)))] * requests)
    for depth in (3, 200):
        monkeypatch.setattr(fusion, "CONTENDERS", depth)
        assert fit_weights([contenders({"left": left, "right": right}, targets, seen)])["left"] > 0.5
        unseen = fit_weights([contenders({"left": left, "right": right}, targets, NOBODY)])
        assert unseen["left"] < 0.5


def test_sparse_blocks_and_a_single_block_can_be_weighed() -> None:
    blocks, targets = world()
    beam = np.full(blocks["left"].shape, np.nan, dtype=np.float32)
    best = np.argsort(-blocks["left"], axis=1)[:, :5]
    np.put_along_axis(beam, best, np.take_along_axis(blocks["left"], best, axis=1), axis=1)
    weights = fit_weights([contenders({"beam": beam, "right": blocks["right"]}, targets, NOBODY)])
    assert min(weights.values()) > 0.1
    assert fit_weights([contenders({"noise": blocks["noise"]}, targets, NOBODY)]) == {"noise": 1.0}


def test_pieces_give_the_weights_of_the_whole() -> None:
    blocks, targets = world()
    whole = contenders(blocks, targets, NOBODY)
    cuts = [slice(0, 1), slice(1, 130), slice(130, len(targets))]
    pieces = [contenders({n: b[cut] for n, b in blocks.items()}, targets[cut], NOBODY) for cut in cuts]
    assert fit_weights(pieces) == fit_weights([whole])
    with pytest.raises(ValueError, match="nothing to choose"):
        fit_weights([])


def test_requests_that_no_weight_can_serve_have_no_say() -> None:
    """The wanted item of the first half was seen before: only the second half decides."""
    blocks, targets = world()
    half = len(targets) // 2
    contexts = [UserContext(history=(int(t),) if b < half else ()) for b, t in enumerate(targets)]
    said = contenders(blocks, targets, seen_index(contexts))
    assert len(said.place) == len(targets) - half
    rest = contenders({n: b[half:] for n, b in blocks.items()}, targets[half:], NOBODY)
    assert fit_weights([said]) == fit_weights([rest])


def test_without_validation_requests_all_weights_are_equal() -> None:
    none = np.zeros((0, 9), dtype=np.float32)
    assert fit_weights([contenders({"a": none, "b": none}, np.zeros(0, np.int64), NOBODY)]) == {"a": 0.5, "b": 0.5}


def test_the_search_climbs_from_its_start_and_revives_a_silent_part() -> None:
    ready = {"a": np.array([[1.0]]), "b": np.array([[1.0]])}
    found = search_weights(ready, lambda total: -abs(float(total[0, 0]) - 1.5), {"a": 1.0, "b": 0.0})
    assert found["a"] + found["b"] == pytest.approx(1.5, abs=0.1)
    stay = search_weights(ready, lambda total: 1.0, {"a": 1.0, "b": 1.0})
    assert sorted(stay.values()) == [0.0, 1.0]  # one can go without loss; the last one stays
