"""Instruction-guided retrieval: what is kept, what the loss is, and where its gradients go."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests_support import TEXT, tiny_model

from genrec.contracts import UserContext
from genrec.generator.batches import Batch
from genrec.generator.igr import VARIANCE_FLOOR, keep, q2i_loss
from genrec.generator.model import distances
from genrec.generator.search import beam_search, make_history, make_request
from training.generator import Q2I_DECORRELATION, Q2I_VARIANCE, loss_of

HISTORY = UserContext(history=(1, 2, 3, 4, 5, 6))


def test_the_newest_and_the_most_similar_are_kept() -> None:
    similarity = torch.tensor([[[0.1, 0.9, 0.2, 0.8, 0.0, 1.0]]] * 2)
    distance = torch.tensor([[[4, 3, 2, 1, 0, -1]]]).expand(2, -1, -1)
    asked = torch.tensor([[True], [False]])
    found = keep(similarity, distance, asked, recent=2, retrieved=1)
    assert found[0, 0].tolist() == [False, True, False, True, True, False]  # .9 is the best of the older ones
    assert found[1, 0].tolist() == [False, False, True, True, True, False]  # nothing to ask with: the next newest
    everything = keep(similarity, distance, asked, recent=2, retrieved=9)
    assert everything[:, 0].tolist() == [[True] * 5 + [False]] * 2
    assert keep(similarity, distance, asked, recent=2, retrieved=0)[0, 0].tolist() == [False] * 3 + [True] * 2 + [False]


def test_the_loss_is_equation_2() -> None:
    torch.manual_seed(0)
    q, t = (torch.nn.functional.normalize(torch.randn(5, 3), dim=1) for _ in range(2))
    pairs = sum(float(q[i] @ q[j]) ** 2 for i in range(5) for j in range(5) if i != j) / 20
    variances = [float(np.var(x.numpy(), axis=0).mean()) + VARIANCE_FLOOR for x in (q, t)]
    wanted = -float((q * t).sum(1).mean()) - 0.3 * np.log(variances[0] * variances[1]) + 0.7 * pairs
    assert float(q2i_loss(q, t, 0.3, 0.7)) == pytest.approx(wanted, abs=1e-5)
    assert float(q2i_loss(q[:1], t[:1], 0.3, 0.7)) == 0.0


def test_q2i_pulls_queries_to_targets_and_apart_from_each_other() -> None:
    torch.manual_seed(0)
    raw = torch.nn.Parameter(torch.randn(16, 8))
    t = torch.nn.functional.normalize(torch.randn(16, 8), dim=1)
    optimizer = torch.optim.Adam([raw], 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        q2i_loss(torch.nn.functional.normalize(raw, dim=1), t, 0.01, 0.01).backward()
        optimizer.step()
    q = torch.nn.functional.normalize(raw.detach(), dim=1)
    assert float((q * t).sum(1).mean()) > 0.9
    assert float((q @ t.T).argmax(1).eq(torch.arange(16)).float().mean()) > 0.9


def test_learned_queries_and_targets_do_not_collapse_into_one_direction() -> None:
    """With both sides free, lambda_r and lambda_d of the trainer keep them apart; those of .01 would not."""
    apart = []
    for variance, decorrelation in ((Q2I_VARIANCE, Q2I_DECORRELATION), (0.01, 0.01)):
        torch.manual_seed(0)
        shared = torch.randn(16) * 4 + torch.randn(64, 16)
        hidden = [shared + 2 * torch.randn(64, 16) for _ in range(2)]  # each sees little of what its pair is
        sides = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(2))
        optimizer = torch.optim.Adam(sides.parameters(), 0.02)
        for _ in range(300):
            q, t = (torch.nn.functional.normalize(f(x), dim=1) for f, x in zip(sides, hidden, strict=True))
            optimizer.zero_grad()
            q2i_loss(q, t, variance, decorrelation).backward()
            optimizer.step()
        apart.append(1 - float((q @ q.T).detach().mean()))
    assert apart[0] > 0.8 > 0.5 > apart[1]


def test_another_instruction_keeps_other_events() -> None:
    model = tiny_model(retrieved=1)
    history = make_history([HISTORY] * 16, 6)
    told = np.random.default_rng(0).normal(size=(16, TEXT)).astype(np.float32) * 5
    kept = model.visible(history, make_request(model, [HISTORY] * 16, told), distances(history))[:, 0] >= 0
    assert kept.sum(1).eq(3).all() and kept[:, -2:].all()
    assert len(kept.unique(dim=0)) > 1


def test_events_that_are_not_kept_change_nothing() -> None:
    """Beyond what kept events have read: as many before each as a request sees, once per encoder layer."""
    model = tiny_model(retrieved=1)
    model.config.recent = 1
    one = UserContext(history=(9, 1, 2, 3, 4, 5), scenario="home")
    other = replace(one, history=(8, 1, 2, 3, 4, 5))
    # nothing to ask with: kept are the newest 1 + 1, and each layer reads one more before them: not the oldest two
    a, b = (beam_search(model, make_history([c], 6), make_request(model, [c]), 30) for c in (one, other))
    assert torch.equal(a.items, b.items) and torch.allclose(a.scores, b.scores)
    near = replace(one, history=(9, 1, 2, 3, 4, 6))
    assert not torch.allclose(
        a.scores, beam_search(model, make_history([near], 6), make_request(model, [near]), 30).scores
    )


def test_only_q2i_trains_retrieval() -> None:
    model = tiny_model(retrieved=1).train()
    contexts = [replace(HISTORY, scenario="search")] * 3
    told = np.random.default_rng(0).normal(size=(3, TEXT)).astype(np.float32)
    request = make_request(model, contexts, told)
    wide = type(request)(*(v.expand(-1, 6, *v.shape[2:]) for v in vars(request).values()))
    history = make_history(contexts, 6)
    chosen = torch.tensor([[2, 3, 4, 5, 6, 7]] * 3)
    batch = Batch(history, chosen, torch.ones(3, 6), wide, chosen)
    for weight, trained in ((0.0, False), (0.5, True)):
        model.zero_grad()
        loss_of(model, batch, weight)[0].backward()
        gradients = [p.grad for p in model.retrieval.parameters()]
        assert all((g is not None and bool(g.abs().sum() > 0)) == trained for g in gradients)
