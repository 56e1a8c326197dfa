"""Instructions over a user's time: never from the future, shuffled as a control, whole on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from genrec.errors import GenrecError
from genrec.instructions.timeline import Timeline

ANN, BEN, EVE = "ann", "ben", "eve"
TIMELINE = Timeline(
    (ANN, BEN, ANN, ANN, EVE), np.array([20, 5, 5, 10, 7]), ("ann 20", "ben 5", "ann 5", "ann 10", "eve 7"), ("m",) * 5
)


def text(timeline: Timeline, user: str, length: int) -> str | None:
    index = int(timeline.find(user, np.array([length]))[0])
    return None if index < 0 else timeline.texts[index]


def test_a_request_gets_the_newest_text_that_was_there_before_it() -> None:
    asked = {0: None, 4: None, 5: "ann 5", 9: "ann 5", 10: "ann 10", 19: "ann 10", 20: "ann 20", 900: "ann 20"}
    assert {n: text(TIMELINE, ANN, n) for n in asked} == asked
    assert text(TIMELINE, BEN, 4) is None and text(TIMELINE, BEN, 6) == "ben 5"
    assert text(TIMELINE, "nobody", 50) is None
    found = TIMELINE.find(ANN, np.array([4, 5, 30]))
    assert found.tolist() == [-1, 2, 0]


def test_shuffling_moves_texts_between_users_and_keeps_the_times() -> None:
    other = TIMELINE.shuffled(seed=1)
    assert other.users == TIMELINE.users and np.array_equal(other.events, TIMELINE.events)
    for user in (ANN, BEN, EVE):
        mine = [t for u, t in zip(other.users, other.texts, strict=True) if u == user]
        assert mine and not any(t.startswith(user) for t in mine)
        assert len({t.split()[0] for t in mine}) == 1  # one neighbour for all of a user's time
    assert TIMELINE.shuffled(seed=1).texts == other.texts
    with pytest.raises(GenrecError, match="one user"):
        Timeline((ANN,), np.array([1]), ("a",), ("m",)).shuffled()


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    TIMELINE.save(tmp_path / "t.parquet")
    back = Timeline.load(tmp_path / "t.parquet")
    assert (back.users, back.texts, back.models) == (TIMELINE.users, TIMELINE.texts, TIMELINE.models)
    assert np.array_equal(back.events, TIMELINE.events)
    with pytest.raises(GenrecError, match="no such file"):
        Timeline.load(tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(GenrecError, match="holds no instructions over time"):
        Timeline.load(tmp_path / "bad.parquet")
