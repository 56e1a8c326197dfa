"""The policy's log-probabilities are those of the search; sampled items follow the model; the probe against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests_support import tiny_model

from genrec.alignment.policy import log_probabilities, probe
from genrec.contracts import UserContext
from genrec.generator.search import beam_search, make_history, make_request, score_items

CONTEXTS = [UserContext(history=(1, 2, 3)), UserContext(history=(4,), scenario="item", trigger=4), UserContext()]


@pytest.mark.parametrize("retrieved", [0, 2])
def test_log_probabilities_are_those_of_the_search(retrieved: int) -> None:
    model = tiny_model(retrieved=retrieved)
    history, request = make_history(CONTEXTS, 6), make_request(model, CONTEXTS)
    beam = beam_search(model, history, request, 7)
    found = log_probabilities(model, history, request, beam.items)
    assert found.shape == (3, 7, 3) and found.requires_grad
    assert torch.allclose(found.sum(-1), beam.scores, atol=1e-5)


def test_completions_that_do_not_exist_do_no_harm() -> None:
    model = tiny_model()
    history, request = make_history(CONTEXTS, 6), make_request(model, CONTEXTS)
    items = torch.tensor([[0, -1], [-1, -1], [5, 6]])
    assert torch.isfinite(log_probabilities(model, history, request, items)).all()
    assert log_probabilities(model, history, request, items[:, :0]).shape == (3, 0, 3)
    nothing = probe(model, history, request, torch.full((3, 2), -1))
    assert nothing.entropy == [0.0] * 3 == nothing.legality


def test_drawn_items_are_distinct_allowed_and_carry_their_log_probability() -> None:
    model = tiny_model()
    history, request = make_history(CONTEXTS, 6), make_request(model, CONTEXTS)
    allowed = torch.from_numpy(np.random.default_rng(0).random((3, 30)) < 0.5)
    allowed[2] = False
    allowed[2, 3] = True
    drawn = beam_search(model, history, request, 6, allowed, torch.Generator().manual_seed(0))
    for row, (items, scores) in enumerate(zip(drawn.items, drawn.scores, strict=True)):
        real = items[items >= 0].tolist()
        assert len(set(real)) == len(real) == min(6, int(allowed[row].sum())) and allowed[row, real].all()
        assert torch.isneginf(scores[items < 0]).all()
    exact = score_items(model, history, request, drawn.items)
    assert torch.allclose(drawn.scores[drawn.items >= 0], exact[drawn.items >= 0], atol=1e-5)
    again = beam_search(model, history, request, 6, allowed, torch.Generator().manual_seed(0))
    other = beam_search(model, history, request, 6, allowed, torch.Generator().manual_seed(1))
    assert torch.equal(drawn.items, again.items) and not torch.equal(drawn.items, other.items)


def test_draws_follow_the_model() -> None:
    """The first drawn item is a sample of pi; of two drawn, the pair has the chance of drawing without replacement."""
    model = tiny_model(items=8, levels=2, codes=4)
    n = 6000
    contexts = [UserContext(history=(1, 2))] * n
    history, request = make_history(contexts, 6), make_request(model, contexts)
    p = score_items(model, history.of(torch.tensor([0])), request.of(torch.tensor([0])), torch.arange(8)[None])[0].exp()
    drawn = beam_search(model, history, request, 2, None, torch.Generator().manual_seed(0)).items
    first = torch.bincount(drawn[:, 0], minlength=8) / n
    assert torch.allclose(first, p, atol=0.03)
    second = torch.bincount(drawn[:, 1], minlength=8) / n
    expected = torch.stack([sum(p[i] * p[j] / (1 - p[i]) for i in range(8) if i != j) for j in range(8)])  # type: ignore[arg-type]
    assert torch.allclose(second, expected, atol=0.03)


def test_the_probe_against_loops() -> None:
    model = tiny_model()
    contexts = CONTEXTS[:1]
    history, request = make_history(contexts, 6), make_request(model, contexts)
    found = probe(model, history, request, torch.tensor([[9]]))
    every = torch.arange(30)[None]
    items = score_items(model, history, request, every)[0].exp()
    node = model.path[:, 1]
    first = torch.zeros(int(node.max()) + 1).index_add_(0, node, items)  # chances of the first code
    assert found.entropy[0] == pytest.approx(float(-(first * first.log()).sum()), abs=1e-4)
    assert found.legality[0] == pytest.approx(1.0) and all(0 < x <= 1 for x in found.legality)
    assert found.legality[2] < 0.9  # random weights know nothing of the tree
