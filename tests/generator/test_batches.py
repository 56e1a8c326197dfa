"""What training batches hold: times between events, known and not known, and the newest event and
profiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests_support import tiny_model

from genrec.contracts import UserContext
from genrec.data.dataset import Sequences
from genrec.generator import batches
from genrec.generator.batches import ScenarioTask, TrainingData
from genrec.generator.profile import bucket
from genrec.generator.search import make_history

DAY = 86_400.0


def test_a_history_without_times_is_not_taken_for_one_day() -> None:
    timed = UserContext(history=(1, 2, 3), times=(0.0, DAY, DAY))
    history = make_history([timed, UserContext(history=(1, 2, 3))], 6)
    assert history.gaps.tolist() == [[0, DAY, 0], [-1, -1, -1]]
    one_day = make_history([UserContext(history=(1, 2, 3), times=(5.0, 5.0, 5.0))], 6)
    model = tiny_model()
    known, unknown = model.encode(one_day), model.encode(make_history([UserContext(history=(1, 2, 3))], 6))
    assert not torch.allclose(known, unknown)


def test_the_longest_known_gap_is_not_the_unknown_one() -> None:
    model = tiny_model()
    age = make_history([UserContext(history=(1, 2), times=(0.0, 1e12))], 6)
    assert not torch.allclose(model.encode(age), model.encode(make_history([UserContext(history=(1, 2))], 6)))


def test_some_windows_are_trained_without_times() -> None:
    users, n = 400, 3
    train = Sequences(
        [f"u{i}" for i in range(users)],
        np.arange(0, users * n + 1, n, dtype=np.int64),
        np.tile(np.arange(n, dtype=np.int32), users),
        np.tile(np.arange(n) * DAY, users),
        np.ones(users * n, np.float32),
        np.full(users * n, np.nan, np.float32),
    )
    data = TrainingData(train, (), {"home": 0}, None, 4)
    gaps = data.batch(data.windows(6, np.random.default_rng(0)), seed=0).history.gaps
    untimed = (gaps < 0).all(1)
    assert 0.5 * batches.UNTIMED < untimed.float().mean() < 2 * batches.UNTIMED
    assert (gaps[~untimed] == torch.tensor([0.0, DAY])).all()


def test_the_newest_event_of_every_position_is_the_one_before_its_target() -> None:
    items = np.array([3, 5, 8, 1, 2], np.int32)
    train = Sequences(
        ["u", "v"],
        np.array([0, 3, 5]),
        items,
        np.arange(5, dtype=np.float64),
        np.ones(5, np.float32),
        np.full(5, np.nan, np.float32),
    )
    windows = np.array([[0, 3], [3, 5]])
    batch = TrainingData(train, (), {"home": 0}, None, 4).batch(windows, seed=0)
    assert batch.request.newest.tolist() == [[3, 5], [1, -1]]
    assert batch.targets.tolist() == [[5, 8], [2, -1]]
    assert batch.history.profile is None
    known = TrainingData(replace(train, attributes=[(), (("plan", "free"),)]), (), {"home": 0}, None, 4)
    assert known.batch(windows, seed=0).history.profile.tolist() == [[-1], [bucket("plan", "free")]]


def test_some_windows_are_trained_without_profiles_and_attributes() -> None:
    users = 2000
    train = Sequences(
        [f"u{i}" for i in range(users)],
        np.arange(0, 2 * users + 1, 2),
        np.zeros(2 * users, np.int32),
        np.zeros(2 * users),
        np.ones(2 * users, np.float32),
        np.full(2 * users, np.nan, np.float32),
        [tuple((f"a{i}", "x") for i in range(6))] * users,
    )
    data = TrainingData(train, (), {"home": 0}, None, 4)
    hidden = data.batch(data.windows(6, np.random.default_rng(0)), seed=0).history.profile < 0
    assert hidden.all(1).float().mean() == pytest.approx(batches.UNKNOWN, abs=0.02)
    assert hidden[~hidden.all(1)].float().mean() == pytest.approx(batches.UNKNOWN, abs=0.02)


# -- which text a training position follows ------------------------------------------------------------------

USERS, EVENTS = 60, 8
TOLD = np.arange(USERS * EVENTS, dtype=np.int32)  # every event as a target has a text of its own
TOLD[::3] = -1  # but not all
TEXTS = np.stack([np.arange(USERS * EVENTS), np.full(USERS * EVENTS, 1.0)], 1).astype(np.float32)
SEARCH = 2


def told_data(**changes: Any) -> TrainingData:
    """Events are items of their own, so that a target says which event it is; queries are (-1, row)."""
    n = USERS * EVENTS
    train = Sequences(
        [f"u{i}" for i in range(USERS)],
        np.arange(0, n + 1, EVENTS, dtype=np.int64),
        np.arange(n, dtype=np.int32),
        np.tile(np.arange(EVENTS) * DAY, USERS),
        np.ones(n, np.float32),
        np.full(n, np.nan, np.float32),
    )
    queries = np.stack([np.full(n, -1.0), np.arange(n)], 1).astype(np.float32)[:, None]
    every = np.ones(n, bool)
    tasks = (ScenarioTask("item", every, 0.3, trigger=True), ScenarioTask("search", every, 0.3, query=True))
    made: dict[str, Any] = {"told": TOLD, "instructions": TEXTS, "instruction_dropout": 0.0}
    made |= {"queries": queries} | changes
    return TrainingData(train, tasks, {"home": 0, "item": 1, "search": SEARCH}, text_dim=2, **made)


def positions_of(data: TrainingData, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Of every real position: the target, the scenario, the text, and whether there is one."""
    batch = data.batch(data.windows(5, np.random.default_rng(0)), seed=seed)
    real = (batch.targets >= 0).numpy()
    request = batch.request
    assert request.instruction is not None and request.instructed is not None
    found = (batch.targets, request.scenario, request.instruction, request.instructed)
    return tuple(x.numpy()[real] for x in found)


def test_a_position_follows_the_text_of_its_target_and_a_search_its_query() -> None:
    targets, scenario, text, instructed = positions_of(told_data())
    search, able = scenario == SEARCH, TOLD[targets] >= 0
    assert set(scenario.tolist()) == {0, 1, 2}
    assert instructed[search].all() and (text[search] == np.stack([-np.ones(search.sum()), targets[search]], 1)).all()
    other = ~search
    assert (instructed[other] == able[other]).all()
    assert (text[other & able] == TEXTS[targets[other & able]]).all()
    assert not text[other & ~able].any()  # the learned default


def test_without_queries_or_texts_positions_have_the_learned_default() -> None:
    _, scenario, text, instructed = positions_of(told_data(queries=None))
    assert not instructed[scenario == SEARCH].any()  # a stored text is no query
    _, scenario, text, instructed = positions_of(told_data(told=None, instructions=None))
    assert instructed[scenario == SEARCH].all() and not instructed[scenario != SEARCH].any()
    assert not text[scenario != SEARCH].any()


@pytest.mark.parametrize("dropout", [0.1, 0.5, 1.0])
def test_some_texts_and_queries_are_left_out_so_that_the_default_is_learned(dropout: float) -> None:
    share: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(4):
        targets, scenario, text, instructed = positions_of(told_data(instruction_dropout=dropout), seed)
        search = scenario == SEARCH
        share[True].append(instructed[search].mean())
        share[False].append(instructed[~search & (TOLD[targets] >= 0)].mean())
        assert not text[~instructed].any()
    for found in share.values():
        assert np.mean(found) == pytest.approx(1 - dropout, abs=0.06)
