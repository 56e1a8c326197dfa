"""The sampled softmax: exact where a cluster is small, and what logQ corrects where it is sampled."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from genrec.tools.ebr import EBRConfig
from genrec.tools.ebr.clusters import Clusters
from genrec.tools.ebr.loss import POWER, Objective, pool
from genrec.tools.ebr.model import Encoder
from tests.tools.ebr.ebr_world import SMALL

ITEMS, K = 600, 4
CONFIG = EBRConfig(**SMALL | {"content": 0})
CLUSTERS = Clusters((np.arange(ITEMS) % K).astype(np.int32), tuple(map(str, range(K))))
COUNTS = np.random.default_rng(0).zipf(1.6, ITEMS).clip(max=500)


def objective(**changes: object) -> Objective:
    torch.manual_seed(0)
    config = replace(CONFIG, **changes)  # type: ignore[arg-type]
    encoder = Encoder(config, np.zeros((ITEMS, 0), np.float16), K)
    with torch.no_grad():
        encoder.items.weight.normal_(std=0.2)
    return Objective(encoder, CLUSTERS, COUNTS)


def positions(n: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    e = torch.randn(n, CONFIG.width, generator=generator)
    return e, torch.randint(ITEMS, (n,), generator=generator), torch.rand(n, generator=generator)


def full(loss: Objective, inside: bool) -> torch.Tensor:
    """The softmax over every item of the cluster, or of the catalogue: what sampling stands for."""
    e, targets, weights = positions()
    logits = e @ loss.encoder.items.weight.T
    if inside:
        logits = logits.masked_fill(loss.cluster_of != loss.cluster_of[targets][:, None], -torch.inf)
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return (losses * weights).sum() / weights.sum()


@pytest.mark.parametrize("inside", [True, False])
def test_it_is_exact_where_all_items_are_summed_up(inside: bool) -> None:
    changes = {} if inside else {"single": True, "prompt": "none", "negatives_from": "catalogue"}
    loss = objective(negatives=ITEMS, **changes)
    torch.testing.assert_close(loss(*positions()), full(loss, inside), rtol=1e-5, atol=1e-5)


def test_only_items_of_the_own_cluster_are_negatives() -> None:
    loss = objective(negatives=ITEMS)
    e, targets, weights = (x[:1] for x in positions())
    before = loss(e, targets, weights)
    own = torch.from_numpy(CLUSTERS.of == CLUSTERS.of[int(targets[0])])
    own[targets] = False

    def moved(rows: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            loss.encoder.items.weight[rows] += 1.0
            found = loss(e, targets, weights)
            loss.encoder.items.weight[rows] -= 1.0
        return found

    away = ~own
    away[targets] = False
    torch.testing.assert_close(moved(away), before)
    assert not torch.isclose(moved(own), before)


def test_sampled_negatives_count_as_their_probability_says() -> None:
    """The mean of exp(s) / (N q) over draws is the sum over all items, whatever q prefers."""
    of = pool(np.arange(ITEMS), COUNTS)
    torch.testing.assert_close(
        of.q, torch.from_numpy((COUNTS + 1.0) ** POWER).float() / of.q.new_tensor(((COUNTS + 1.0) ** POWER).sum())
    )
    torch.manual_seed(0)
    score = torch.randn(ITEMS)
    sums = []
    for _ in range(1000):
        rows, log_count = of.draw(500)
        assert len(rows) == 500
        sums.append((score[rows] + log_count).exp().sum())
    assert float(torch.stack(sums).mean()) == pytest.approx(float(score.exp().sum()), rel=0.02)
    rows, log_count = of.draw(ITEMS)
    assert rows.tolist() == list(range(ITEMS)) and not log_count.any()


def test_the_sampled_loss_nears_the_full_one() -> None:
    changes = {"single": True, "prompt": "none", "negatives_from": "catalogue"}

    def off(negatives: int) -> float:
        loss = objective(negatives=negatives, **changes)
        torch.manual_seed(2)
        losses = torch.stack([loss(*positions()).detach() for _ in range(60)])
        return abs(float(losses.mean() - full(loss, False).detach()))

    few, many = off(8), off(400)
    assert many < 0.02 < few  # a logarithm of few samples is too small on average


def test_a_drawn_copy_of_the_wanted_item_is_no_negative() -> None:
    loss = objective(negatives=ITEMS)
    e, targets, _ = positions(1)
    k = int(loss.cluster_of[targets[0]])
    rows = loss.inside[k].rows
    only = loss.sampled(e, targets, [(targets, torch.zeros(1))])
    torch.testing.assert_close(only, torch.zeros(1), atol=1e-6, rtol=0)
    twice = loss.sampled(e, targets, [(torch.cat([rows, targets]), torch.zeros(len(rows) + 1))])
    torch.testing.assert_close(twice, loss.sampled(e, targets, [(rows, torch.zeros(len(rows)))]))
