from dataclasses import replace

import numpy as np
import pytest
import torch

from genrec.contracts import UserContext
from genrec.tools.ranking.samples import TRAIN
from genrec.tools.ranking.task import PRIOR, Task, request_batch, stream
from tests.tools.small_world import rated


@pytest.fixture(scope="module")
def task() -> Task:
    return Task.make(rated(6, 20, 3, 2))


def test_a_batch_reads_what_came_before_and_nothing_else(task: Task) -> None:
    s = task.samples.sequences
    at = np.array([s.offsets[2], s.offsets[2] + 3, s.offsets[3] + 19])
    batch = task.batch(at, 5)
    assert batch.events.tolist() == [[-1] * 5, [-1, -1, 0, 1, 2], [14, 15, 16, 17, 18]]
    assert batch.history[0].tolist() == [task.items] * 5 and not batch.feedback[0].any()
    assert batch.history[1, 2:].tolist() == s.items[at[1] - 3 : at[1]].tolist()
    assert batch.item[:, 0].tolist() == s.items[at].tolist() and batch.place.tolist() == [0, 3, 19]


def test_dense_features_count_the_past_alone(task: Task) -> None:
    s, y = task.samples.sequences, task.samples.labels[:, 0]
    prior = y[task.part == TRAIN].mean()

    def odds(yes: float, n: float) -> float:
        rate = (yes + PRIOR * prior) / (n + PRIOR)
        return float(np.log(rate / (1 - rate)) - np.log(prior / (1 - prior)))

    for p in (0, 7, 45, 119):
        u = s.user_of[p]
        own = y[s.offsets[u] : p]
        other = (s.items == s.items[p]) & (s.times < s.times[p]) & (task.part == TRAIN)
        gap = s.times[p] - s.times[p - 1] if p > s.offsets[u] else 0
        expected = [odds(own.sum(), len(own)), odds(y[other].sum(), other.sum())]
        expected += [np.log1p(len(own)) / 5, np.log1p(other.sum()) / 5, np.log1p(gap) / 10]
        assert task.dense[p] == pytest.approx(np.array(expected, np.float32), abs=1e-5)


def test_no_feature_changes_when_the_future_does(task: Task) -> None:
    s = task.samples.sequences
    labels = task.samples.labels.copy()
    late = s.times >= np.median(s.times)
    labels[late] = 1 - labels[late]
    other = Task(replace(task.samples, labels=labels), task.part)
    other.__dict__["rates"] = task.rates  # the prior of all training events is the one thing that knows them
    early = np.flatnonzero(s.times < np.median(s.times))
    assert np.array_equal(task.dense[early], other.dense[early])
    assert torch.equal(task.batch(early, 9).feedback, other.batch(early, 9).feedback)


@pytest.mark.parametrize("size", [1, 4, 99])
def test_the_stream_keeps_every_users_order(task: Task, size: int) -> None:
    s = task.samples.sequences
    batches = list(stream(task, np.arange(s.events), size))
    assert sorted(np.concatenate(batches).tolist()) == list(range(s.events))
    seen = np.full(len(s), -1)
    for batch in batches:
        assert len(batch) <= size and len(set(s.user_of[batch])) == len(batch)
        assert (batch > seen[s.user_of[batch]]).all()
        seen[s.user_of[batch]] = batch
    assert not list(stream(task, np.arange(0), size))


def test_the_stream_is_full_to_its_end(task: Task) -> None:
    """Users of very different lengths: no tail of small batches, and another order with another seed."""
    some = rated(60, 40, 3, 2)
    s = some.sequences
    place = np.arange(s.events) - s.offsets[s.user_of]
    chosen = np.flatnonzero(place < 2 + (s.user_of * 7) % 39)
    wide = Task.make(some)
    sizes = [len(b) for b in stream(wide, chosen, 16)]
    assert max(sizes) == 16 and np.mean(np.array(sizes) >= 12) > 0.9
    assert next(stream(wide, chosen, 16)).tolist() != next(stream(wide, chosen, 16, seed=1)).tolist()


def test_events_of_one_moment_do_not_know_each_other(task: Task) -> None:
    """Whatever the order of the file inside a second, no feature of it changes."""
    s = task.samples.sequences
    times, labels = s.times.copy(), task.samples.labels.copy()
    at = s.offsets[2] + np.arange(5, 9)
    times[at] = times[at[0]]
    tied = Task(replace(task.samples, sequences=replace(s, times=times)), task.part)
    labels[at] = 1 - labels[at]
    other = Task(replace(tied.samples, labels=labels), task.part)
    other.__dict__["rates"] = tied.rates
    assert (tied.known[at] == at[0]).all() and tied.known[at[-1] + 1] == at[-1] + 1
    assert np.array_equal(tied.dense[at], other.dense[at])
    mine, changed = tied.batch(at, 9), other.batch(at, 9)
    assert torch.equal(mine.feedback, changed.feedback) and int(mine.events.max()) == 4
    assert tied.batch(at[-1:] + 1, 9).events.max() == 8  # later they are past


def test_the_stream_refuses_nonsense(task: Task) -> None:
    with pytest.raises(ValueError):
        next(stream(task, np.arange(3), 0))


def test_a_request_looks_like_the_exposure_it_became(task: Task) -> None:
    s = task.samples.sequences
    p = int(s.offsets[4]) + 17  # a test event: the item's counts are those of all training events, all of them earlier
    context = replace(s.context(4, 17), clock=float(s.times[p]))
    said = task.feedback[s.offsets[4] : p]
    items = np.array([[int(s.items[p]), -1]])
    served = request_batch([context], items, 9, task.rates, [4], [said], task.users)
    logged = task.batch(np.array([p]), 9)
    for name in ("user", "history", "feedback", "events", "place"):
        assert torch.equal(getattr(served, name), getattr(logged, name)), name
    assert served.item.tolist() == [[int(s.items[p]), task.items]]
    t = task.tasks
    assert torch.allclose(served.dense[0, 0, :t], logged.dense[0, 0, :t])


def test_an_empty_history_and_a_stranger_are_requests_too(task: Task) -> None:
    batch = request_batch([UserContext()], np.array([[0]]), 4, task.rates, [-1], [np.zeros((0, 1))], task.users)
    assert batch.user.tolist() == [task.users] and batch.events.tolist() == [[-1] * 4]
    assert torch.isfinite(batch.dense).all()
