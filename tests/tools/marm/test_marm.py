import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from genrec.contracts import Ranker, UserContext
from genrec.errors import GenrecError
from genrec.evaluation.auc import auc
from genrec.tools.marm import MARM, MARMConfig
from genrec.tools.marm.cache import CacheConfig, StateCache
from genrec.tools.marm.memory import CachedStates, cache_for
from genrec.tools.ranking.planted import Asked, planted
from genrec.tools.ranking.samples import TEST, TRAIN, VALIDATION
from genrec.tools.ranking.task import Batch, Task
from genrec.tools.ranking.train import (
    TrainConfig,
    make_ranker,
    positions_of,
    predict,
    predict_sequences,
    train,
    train_sequences,
)
from tests.tools.small_world import rated

SMALL = MARMConfig(layers=3, events=6, d=8)


@pytest.fixture(scope="module")
def task() -> Task:
    return Task.make(rated(12, 20, 3, 2))


@pytest.fixture(scope="module")
def fitted(task: Task) -> MARM:
    return MARM.fit(task, SMALL, TrainConfig(epochs=1, batch=16))


def randomised(task: Task, **sizes: int) -> torch.nn.Module:
    model = make_ranker(task, "attention", 1, **sizes)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float16", 2e-2)])
def test_frozen_weights_and_a_full_cache_are_the_causal_transformer(task: Task, dtype: str, bound: float) -> None:
    model = randomised(task, layers=4, n=6, d=8)
    memory = CachedStates(StateCache(cache_for(model.config, task.users, dtype=dtype)), task.samples.sequences.users)
    s = task.samples.sequences
    times = s.times.copy()
    times[5:9], times[50:52] = times[5], times[50]  # events of one moment do not read each other
    task = Task(replace(task.samples, sequences=replace(s, times=times)), task.part)
    everything = np.arange(s.events)
    streamed = predict(model, task, everything, TrainConfig(batch=5), memory)
    exact = predict_sequences(model, task)
    assert np.abs(streamed - exact).max() < bound
    assert dtype == "float32" or np.abs(streamed - exact).max() > 1e-6


def test_states_hold_no_noise_of_the_training(task: Task) -> None:
    """What is cached while training is what a request would compute with the same weights."""
    model = make_ranker(task, "attention", 0, layers=3, n=6, d=8, dropout=0.5, unknown=0.5)
    batch = task.batch(np.array([15, 35]), 6)
    noisy, states = model.train()(batch)
    exact, served = model.eval()(batch)
    assert torch.equal(states, served) and not torch.allclose(noisy, exact)


class Spy(CachedStates):
    """Checks every read and write: what is read was written before and is of the past."""

    written: set[tuple[int, int]]

    def read(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        states, present = super().read(batch)
        for u, place, events, there in zip(batch.user, batch.place, batch.events, present, strict=True):
            asked = events[events >= 0].tolist()
            assert all(e < place for e in asked)
            assert {(int(u), int(e)) for e in events[there]} <= self.written
        return states, present

    def write(self, batch: Batch, states: torch.Tensor) -> None:
        super().write(batch, states)
        new = {(int(u), int(p)) for u, p in zip(batch.user, batch.place, strict=True)}
        assert not new & self.written  # one real exposure, once
        self.written |= new

    def clear(self) -> None:
        super().clear()
        self.written = set()


def test_no_future_event_is_ever_in_the_cache(task: Task) -> None:
    model = make_ranker(task, "attention", 0, layers=3, n=6, d=8)
    memory = Spy(StateCache(cache_for(model.config, task.users)), task.samples.sequences.users)
    train(model, task, TrainConfig(epochs=2, batch=7), memory)
    s = task.samples.sequences
    asked = {(int(u), int(p)) for u, p in zip(s.user_of, np.arange(s.events) - s.offsets[s.user_of], strict=True)}
    tested = {(int(s.user_of[p]), int(p - s.offsets[s.user_of[p]])) for p in np.flatnonzero(task.part == TEST)}
    assert memory.written == asked - tested


@pytest.mark.parametrize("whole", [False, True])
def test_the_result_is_an_average_of_the_weights(whole: bool, task: Task) -> None:
    found = {}
    for average in (0.0, 0.9):
        model = make_ranker(task, "attention", 0, layers=2, n=6, d=8)
        config = TrainConfig(epochs=1, batch=16, average=average)
        if whole:
            train_sequences(model, task, config)
        else:
            memory = CachedStates(StateCache(cache_for(model.config, task.users)), task.samples.sequences.users)
            train(model, task, config, memory)
        assert not model.training
        found[average] = model.item.weight.detach().clone()
    first = make_ranker(task, "attention", 0, layers=2, n=6, d=8).item.weight.detach()
    moved = {average: float((weight - first).norm()) for average, weight in found.items()}
    assert 0 < moved[0.9] < moved[0.0]  # it lags behind
    assert not torch.allclose(found[0.9], found[0.0], atol=1e-4)
    with pytest.raises(GenrecError, match=r"average is 1\.0; it must be at least 0 and less than 1"):
        TrainConfig(average=1.0)


def test_scoring_writes_nothing_and_observing_does(fitted: MARM, task: Task) -> None:
    s = task.samples.sequences
    assert isinstance(fitted, Ranker) and fitted.memory is not None
    upto = int((task.part[: s.offsets[1]] < TEST).sum())
    context = s.context(0, upto)
    before = fitted.memory.cache.snapshot()
    scores = fitted.score([context], np.array([[0, 1, -1]]))
    assert scores.shape == (1, 3) and np.isneginf(scores[0, 2]) and (scores[0, :2] > 0).all()
    fitted.explain(context, np.array([0, 1]))
    for old, new in zip(before[2:], fitted.memory.cache.snapshot()[2:], strict=True):
        assert np.array_equal(old, new)
    entries = fitted.memory.cache.entries
    rates = fitted.observe([context], np.array([1]))
    assert rates[0, 0] == pytest.approx(scores[0, 1], abs=1e-6)
    kept = fitted.memory.cache.read(fitted.memory.keys[:1], np.array([[upto]]), np.array([[1]]))[1]
    assert kept.all() and fitted.memory.cache.entries >= entries
    fitted.memory.restore(before)
    with pytest.raises(GenrecError, match="twice"):
        fitted.observe([context, context], np.array([1, 2]))


def test_what_was_said_of_an_observed_event_is_read_later(task: Task, tmp_path: Path) -> None:
    tool = MARM.fit(task, SMALL, TrainConfig(epochs=1, batch=16))
    context = task.samples.sequences.context(0)
    grown = replace(context, history=(*context.history, 1), times=(), weights=())
    with pytest.raises(GenrecError, match="labels must be"):
        tool.observe([context], np.array([1]), np.array([1.0]))
    tool.observe([context], np.array([1]))
    assert not tool.profile.said(grown)[-1].any()  # not known
    silent = tool.score([grown], np.array([[0]]))
    tool.observe([context], np.array([1]), np.array([[1.0]]))
    assert tool.profile.said(grown)[-1].tolist() == [1.0]
    assert not tool.profile.said(replace(grown, history=(*context.history, 2)))[-1].any()
    heard = tool.score([grown], np.array([[0]]))
    assert not np.array_equal(heard, silent)
    tool.save(tmp_path)
    assert np.array_equal(MARM.load(tmp_path).score([grown], np.array([[0]])), heard)
    tool.observe([UserContext(user="nobody")], np.array([1]), np.array([[0.0]]))
    assert "nobody" not in tool.profile.later


def test_candidates_do_not_see_each_other(fitted: MARM, task: Task) -> None:
    contexts = [task.samples.sequences.context(u, 14) for u in (0, 3)]
    together = fitted.score(contexts, np.array([[0, 1, 2, 3], [4, 5, 0, 1]]))
    alone = fitted.score(contexts[1:], np.array([[0]]))
    assert together[1, 2] == pytest.approx(alone[0, 0], abs=1e-6)


def test_strangers_empty_histories_and_unknown_items(fitted: MARM) -> None:
    scores = fitted.score([UserContext(), UserContext(history=(0, 1), user="nobody")], np.array([[0, 1], [2, 3]]))
    assert np.isfinite(scores).all()
    reason = fitted.explain(UserContext(), np.array([0]))[0]
    assert reason.events == () and "without any history" in reason.sentence
    for items in (np.array([[999]]), np.array([[-2]])):
        with pytest.raises(GenrecError, match="outside of the"):
            fitted.score([UserContext()], items)
    with pytest.raises(GenrecError, match="outside of the"):
        fitted.score([UserContext(history=(999,))], np.array([[0]]))
    with pytest.raises(GenrecError, match="candidates must be rows"):
        fitted.score([UserContext()], np.array([0]))
    assert fitted.score([], np.zeros((0, 3), np.int64)).shape == (0, 3)


def test_another_history_of_a_known_user_reads_no_cached_state(fitted: MARM, task: Task) -> None:
    context = task.samples.sequences.context(0, 16)
    other = replace(context, history=tuple((r + 1) % task.items for r in context.history))
    assert fitted.explain(context, np.array([0]))[0].read == 1.0
    assert fitted.explain(other, np.array([0]))[0].read == 0.0
    assert not fitted.profile.said(other).any() and fitted.profile.said(context).all()


def test_reasons_name_the_events_that_were_attended_to(fitted: MARM, task: Task) -> None:
    context = task.samples.sequences.context(2, 14)
    for reason in fitted.explain(context, np.array([0, 3])):
        shares = [share for _, _, share in reason.events]
        assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1.0
        assert all(context.history[place] == row for place, row, _ in reason.events)
        assert fitted.profile.titles[reason.item] in reason.sentence
        assert fitted.profile.titles[reason.events[0][1]] in reason.sentence


def test_saved_and_loaded_it_says_the_same(fitted: MARM, task: Task, tmp_path: Path) -> None:
    contexts = [task.samples.sequences.context(u, 16) for u in range(4)]
    items = np.arange(4)[None].repeat(4, 0)
    fitted.save(tmp_path / "marm")
    again = MARM.load(tmp_path / "marm")
    assert np.array_equal(again.score(contexts, items), fitted.score(contexts, items))
    other = MARM.fit(task, SMALL, TrainConfig(epochs=1, batch=16, seed=5))
    other.save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "states.cache", tmp_path / "marm" / "states.cache")
    with pytest.raises(GenrecError, match="another model"):
        MARM.load(tmp_path / "marm")
    (tmp_path / "marm" / "states.cache").unlink()
    with pytest.raises(GenrecError, match="no cache"):
        MARM.load(tmp_path / "marm")


@pytest.mark.parametrize("file", ["tool.json", "model.safetensors", "profile.json", "profile.safetensors"])
def test_damaged_folders_are_refused(fitted: MARM, tmp_path: Path, file: str) -> None:
    fitted.save(tmp_path)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(GenrecError):
        MARM.load(tmp_path)
    path.unlink()
    with pytest.raises(GenrecError):
        MARM.load(tmp_path)


def test_one_layer_needs_no_cache(task: Task, tmp_path: Path) -> None:
    tool = MARM.fit(task, MARMConfig(layers=1, events=4, d=8), TrainConfig(epochs=1))
    tool.save(tmp_path)
    assert tool.memory is None and not (tmp_path / "states.cache").exists()
    context = task.samples.sequences.context(0, 10)
    assert np.array_equal(MARM.load(tmp_path).score([context], np.array([[0]])), tool.score([context], np.array([[0]])))


def test_states_go_stale_and_can_be_made_anew(task: Task) -> None:
    tool = MARM.fit(task, SMALL, TrainConfig(epochs=1, batch=16, learning_rate=0.02))
    stale = tool.staleness(task, VALIDATION)
    assert stale["present"] == 1.0 and max(stale["cosine"]) < 0.99999 and len(stale["cosine"]) == 2
    tool.refresh(task, VALIDATION)
    fresh = tool.staleness(task, VALIDATION)
    assert min(fresh["cosine"]) > 0.9999 and max(fresh["relative_error"]) < 2e-3


def test_a_small_cache_forgets_users_and_the_ranker_still_answers(task: Task) -> None:
    tool = MARM.fit(task, replace(SMALL, users=3), TrainConfig(epochs=1, batch=4))
    found = tool.staleness(task, VALIDATION)
    assert 0 < found["present"] < 0.5
    s = task.samples.sequences
    assert np.isfinite(tool.score([s.context(u, 14) for u in range(12)], np.zeros((12, 2), np.int64))).all()


def test_the_same_seed_gives_the_same_model(task: Task) -> None:
    contexts = [task.samples.sequences.context(1, 15)]
    scores = [
        MARM.fit(task, SMALL, TrainConfig(epochs=1, batch=16)).score(contexts, np.array([[0, 1]])) for _ in range(2)
    ]
    assert np.array_equal(scores[0], scores[1])


def test_cache_bytes_are_as_the_law_counts_them(task: Task) -> None:
    model = make_ranker(task, "attention", 0, layers=4, n=1000, d=64)
    sizes = cache_for(model.config, 1)
    assert sizes.state_bytes == 3 * 1000 * 64 * 2  # level 0 is the embedding: (L - 1) n d 2
    assert CacheConfig(1, 1000, 4, 64).state_bytes == 4 * 1000 * 64 * 2  # L n d 2


def test_depth_is_learnable_where_it_is_planted() -> None:
    """The causal transformer: the planted structure is out of the reach of one layer and within that of two."""
    task = Asked.make(planted(300, 112, 1, 1, seed=1))
    at = positions_of(task, TEST)
    found = {}
    for layers in (1, 2):
        model = make_ranker(task, "attention", 0, layers=layers, n=28, d=16, dropout=0.0, unknown=0.0, blank=0.0)
        config = TrainConfig(epochs=5, batch=400, learning_rate=1e-2, inside=False, weight_decay=0.0)
        train_sequences(model, task, config)
        found[layers] = auc(task.samples.labels[at, 0], predict_sequences(model, task)[at, 0])
    assert found[2] > 0.8 and found[1] < 0.6 and task.part[at].min() > TRAIN
