"""Beam search against brute force, and the promises it makes: legal, distinct, filtered, exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests_support import TEXT, tiny_model

from genrec.contracts import MAX_ATTRIBUTES, UserContext
from genrec.errors import GenrecError
from genrec.generator import search
from genrec.generator.model import GeneratorModel, History, Request, distances
from genrec.generator.profile import BUCKETS, bucket, profiles
from genrec.generator.search import beam_search, make_history, make_request, score_items

CONTEXTS = [
    UserContext(history=(1, 2, 3), times=(0.0, 86400.0, 1e7), weights=(1.0, 2.0, 0.5), attributes=(("age", "24"),)),
    UserContext(history=(4,), scenario="item", trigger=4),
    UserContext(attributes=(("age", "24"), ("city", "Oslo"))),
    UserContext(history=tuple(range(10)), scenario="search"),
]


def trained_scores(model: GeneratorModel, history: History, request: Request, targets: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of one target per user, rows [B, 1], the way that training computes them."""
    distance = model.visible(history, request, distances(history))
    hidden = model.decode(history, request, targets, distance)[:, 0]
    return model.log_likelihood(hidden, targets[:, 0]).sum(1, keepdim=True).detach()


@pytest.mark.parametrize("retrieved", [0, 2])
def test_a_wide_beam_equals_brute_force(retrieved: int) -> None:
    model = tiny_model(retrieved=retrieved, profiles=True)
    history, request = make_history(CONTEXTS, 6), make_request(model, CONTEXTS)
    every = torch.arange(30).expand(len(CONTEXTS), -1)
    exact = score_items(model, history, request, every)
    assert torch.allclose(exact.exp().sum(1), torch.ones(len(CONTEXTS)), atol=1e-5)  # a distribution over the catalogue
    beam = beam_search(model, history, request, 30)
    assert torch.equal(beam.items, exact.argsort(1, descending=True))
    assert torch.allclose(beam.scores, exact.sort(1, descending=True).values, atol=1e-5)


@pytest.mark.parametrize("retrieved", [0, 2])
def test_a_batch_gives_what_single_requests_give(retrieved: int) -> None:
    model = tiny_model(retrieved=retrieved, profiles=True)
    together = beam_search(model, make_history(CONTEXTS, 6), make_request(model, CONTEXTS), 8)
    for i, context in enumerate(CONTEXTS):
        alone = beam_search(model, make_history([context], 6), make_request(model, [context]), 8)
        assert torch.equal(alone.items[0], together.items[i])
        assert torch.allclose(alone.scores[0], together.scores[i], atol=1e-5)


@pytest.mark.parametrize("rows", [1, 9, 16, 40])
def test_searching_in_several_passes_changes_nothing(rows: int, monkeypatch) -> None:
    model = tiny_model()
    contexts = [UserContext(history=tuple(range(n))) for n in (3, 0, 6, 1, 6, 2, 5)]
    history, request = make_history(contexts, 6), make_request(model, contexts)
    allowed = torch.from_numpy(np.random.default_rng(0).random((7, 30)) < 0.5)
    items = torch.arange(7 * 8).view(7, 8) % 30
    once = beam_search(model, history, request, 8, allowed), score_items(model, history, request, items)
    monkeypatch.setattr(search, "ROWS", rows)
    assert len(search.passes(history, 8)) == {1: 7, 9: 7, 16: 4, 40: 2}[rows]
    again = beam_search(model, history, request, 8, allowed), score_items(model, history, request, items)
    assert torch.equal(once[0].items, again[0].items)
    assert torch.allclose(once[0].scores, again[0].scores, atol=1e-5) and torch.allclose(once[1], again[1], atol=1e-5)


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_nodes_with_one_item_below_are_decided_exactly(levels: int) -> None:
    """Sparse trees, where most beams end before the last level, and a tree whose second level is all leaves."""
    for seed, items in enumerate((1, 4, 12)):
        model = tiny_model(items=items, levels=levels, codes=4, seed=seed)
        contexts = [UserContext(history=(0, 0)), UserContext(history=(0,), scenario="item", trigger=0), UserContext()]
        history, request = make_history(contexts, 6), make_request(model, contexts)
        exact = torch.cat([trained_scores(model, history, request, torch.full((3, 1), i)) for i in range(items)], 1)
        assert torch.allclose(exact.exp().sum(1), torch.ones(3), atol=1e-5)
        every = torch.arange(items).expand(3, -1)
        assert torch.allclose(score_items(model, history, request, every), exact, atol=1e-5)
        beam = beam_search(model, history, request, items)
        assert torch.allclose(beam.scores, exact.sort(1, descending=True).values, atol=1e-5)
        assert torch.allclose(exact.gather(1, beam.items), beam.scores, atol=1e-5)


@pytest.mark.parametrize("retrieved", [0, 1, 2])
def test_search_scores_are_those_that_training_sees(retrieved: int) -> None:
    model = tiny_model(retrieved=retrieved)
    contexts = [c for c in CONTEXTS if c.history]
    history, request = make_history(contexts, 6), make_request(model, contexts)
    targets = torch.tensor([[7], [8], [9]])
    trained = trained_scores(model, history, request, targets)
    assert torch.allclose(trained, score_items(model, history, request, targets), atol=1e-5)


def test_the_encoder_never_sees_the_future() -> None:
    model = tiny_model()
    long = make_history([UserContext(history=(1, 2, 3, 4))], 6)
    short = make_history([UserContext(history=(1, 2))], 6)
    assert torch.allclose(model.encode(long)[:, :2], model.encode(short), atol=1e-6)


def test_filters_act_inside_the_search() -> None:
    model = tiny_model()
    history, request = make_history(CONTEXTS, 6), make_request(model, CONTEXTS)
    allowed = torch.zeros(len(CONTEXTS), 30, dtype=torch.bool)
    allowed[0, [3, 17, 21]] = True
    allowed[1, 5] = True
    allowed[3] = True
    beam = beam_search(model, history, request, 4, allowed)
    assert sorted(beam.items[0].tolist()) == [-1, 3, 17, 21]
    assert beam.items[1].tolist() == [5, -1, -1, -1]
    assert beam.items[2].tolist() == [-1] * 4 and torch.isinf(beam.scores[2]).all()
    exact = score_items(model, history, request, torch.tensor([[3, 17, 21]] * 4))[0]
    assert torch.allclose(beam.scores[0, :3], exact.sort(descending=True).values, atol=1e-5)


def test_ten_thousand_random_searches_are_legal_and_distinct() -> None:
    """Random catalogues, histories, widths and filters: 0 illegal, 0 duplicate, 0 denied items."""
    rng = np.random.default_rng(0)
    cases = 0
    for seed in range(20):
        items = int(rng.integers(3, 60))
        model = tiny_model(items=items, codes=4, seed=seed)
        contexts = [UserContext(history=tuple(rng.integers(0, items, rng.integers(0, 7)).tolist())) for _ in range(500)]
        allowed = torch.from_numpy(rng.random((500, items)) < rng.choice([0.1, 0.6, 1.0]))
        width = int(rng.integers(1, 12))
        beam = beam_search(model, make_history(contexts, 6), make_request(model, contexts), width, allowed)
        for found, scores, ok in zip(beam.items, beam.scores, allowed, strict=True):
            real = found[found >= 0]
            assert len(real.unique()) == len(real) and bool(ok[real].all()) and bool((real < items).all())
            assert len(real) >= min(1, int(ok.sum()))
            assert bool((scores[:-1] >= scores[1:]).all() | torch.isinf(scores).any())
            cases += 1
    assert cases == 10_000


def test_new_items_can_be_generated_without_training() -> None:
    model = tiny_model(items=30, known=20)
    history, request = make_history(CONTEXTS, 6), make_request(model, CONTEXTS)
    beam = beam_search(model, history, request, 30)
    assert all(set(range(20, 30)) <= set(row) for row in beam.items.tolist())
    assert torch.isfinite(beam.scores).all()


def test_scenario_trigger_and_instruction_all_steer() -> None:
    model = tiny_model()
    base = UserContext(history=(1, 2, 3))
    history = make_history([base], 6)

    def scores(context: UserContext, instruction: np.ndarray | None = None) -> torch.Tensor:
        return beam_search(model, history, make_request(model, [context], instruction), 30).scores

    plain = scores(base)
    assert not torch.allclose(plain, scores(UserContext(history=(1, 2, 3), scenario="discovery")))
    assert not torch.allclose(plain, scores(UserContext(history=(1, 2, 3), trigger=9)))
    assert not torch.allclose(plain, scores(base, np.ones((1, TEXT), np.float32)))
    assert torch.allclose(plain, scores(base, np.full((1, TEXT), np.nan, np.float32)))


def test_the_profile_reaches_every_request() -> None:
    """Of a user with a history and of one without; case and blanks aside; and a model without profiles ignores it."""
    mine, same, other = ((("Plan", " free"),), (("plan", "FREE "),), (("plan", "paid"),))
    for items in ((1, 2, 3), ()):
        contexts = [UserContext(items, attributes=a) for a in (mine, same, other, ())]
        every = torch.arange(30).expand(4, -1)
        for model, differ in ((tiny_model(profiles=True), True), (tiny_model(), False)):
            scores = score_items(model, make_history(contexts, 6), make_request(model, contexts), every)
            assert torch.allclose(scores[0], scores[1], atol=1e-5)
            assert torch.allclose(scores[0], scores[2]) != differ and torch.allclose(scores[0], scores[3]) != differ


def test_profiles_are_padded_and_bounded() -> None:
    many = tuple((f"a{i}", "b") for i in range(2 * MAX_ATTRIBUTES))
    found = profiles([(), (("a0", "b"),), many])
    assert found is not None and found.shape == (3, MAX_ATTRIBUTES)
    assert (found[0] == -1).all() and found[1].tolist() == [bucket("a0", "b")] + [-1] * (MAX_ATTRIBUTES - 1)
    assert bool(((found[2] >= 0) & (found[2] < BUCKETS)).all())
    assert profiles([(), ()]) is None and make_history([UserContext((1,))], 6).profile is None


def test_bos_carries_the_newest_event() -> None:
    """Not the memory alone: the same memory with another newest event gives other scores; none adds nothing."""
    model = tiny_model()
    history, request = make_history(CONTEXTS, 6), make_request(model, CONTEXTS)
    assert request.newest[:, 0].tolist() == [3, 4, -1, 9]
    every = torch.arange(30).expand(len(CONTEXTS), -1)
    other = replace(request, newest=torch.tensor([[3], [5], [-1], [9]]))
    changed = score_items(model, history, request, every) != score_items(model, history, other, every)
    assert changed.any(1).tolist() == [False, True, False, False]
    bos = model.prefix_tokens(request)[:, 0, 0] - model.start - model.slot[0]
    assert torch.allclose(bos[2], torch.zeros_like(bos[2]), atol=1e-6)
    assert torch.allclose(bos[1], model.newest(model.item_vectors(torch.tensor(4))), atol=1e-6)


def test_an_unknown_scenario_is_refused() -> None:
    with pytest.raises(GenrecError, match="unknown scenario 'nowhere'"):
        make_request(tiny_model(), [UserContext(scenario="nowhere")])


def test_saved_weights_give_the_same_beams(tmp_path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    again = GeneratorModel.from_pretrained(tmp_path)
    again.set_catalog(model.trie, model.item_text).eval()
    history, request = make_history(CONTEXTS, 6), make_request(model, CONTEXTS)
    assert torch.equal(beam_search(model, history, request, 9).scores, beam_search(again, history, request, 9).scores)


@pytest.mark.parametrize("constrained", [True, False])
def test_transformers_generate_finds_the_same(constrained: bool, monkeypatch) -> None:
    """The other side of the benchmark is a fair one: same items, same log-probabilities."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    from hf_adapter import GenerateAdapter

    model = tiny_model(items=40)
    contexts = [UserContext(history=(1, 2, 3)), UserContext(history=(4, 4, 9))]
    history, request = make_history(contexts, 6), make_request(model, contexts)
    beam = beam_search(model, history, request, 7)
    items, scores = GenerateAdapter(model).eval().search(history.rows, 7, constrained)
    assert torch.equal(beam.items, items)
    assert torch.allclose(beam.scores, scores, atol=1e-5)
