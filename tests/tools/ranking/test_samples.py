from pathlib import Path

import numpy as np
import pytest

from genrec.data import load_dataset
from genrec.errors import GenrecError
from genrec.tools.ranking.planted import HIGH, KINDS, THIRD, Asked, planted
from genrec.tools.ranking.samples import TEST, TRAIN, VALIDATION, Rule, by_time, load_samples, per_user, rated_samples
from tests.tools.small_world import rated

ROWS = """user,item,timestamp,rating,label,long_view
b,x,2020-01-03,4,0,1
a,x,2020-01-02,5,1,0
a,y,2020-01-01,2,0,1
a,z,2020-01-04,3,1,
b,y,2020-01-05,1,1,0
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "interactions.csv").write_text(ROWS)
    return tmp_path


def test_ratings_give_nested_labels(folder: Path) -> None:
    found = rated_samples(load_dataset(folder))
    assert found.names == ("high", "through", "top")
    at = {(found.sequences.users[u], found.catalog.item(int(i))): k for k, (u, i) in enumerate(
        zip(found.sequences.user_of, found.sequences.items, strict=True))}  # fmt: skip
    assert found.labels[at["a", "x"]].tolist() == [1, 1, 1]
    assert found.labels[at["a", "z"]].tolist() == [0, 1, 0]
    assert found.labels[at["b", "y"]].tolist() == [0, 0, 0]


def test_columns_keep_the_order_of_the_events(folder: Path) -> None:
    found = load_samples(folder, ["like=label", "long_view", "fair=rating>=3"])
    events = [(found.sequences.users[u], found.catalog.item(int(i))) for u, i in zip(
        found.sequences.user_of, found.sequences.items, strict=True)]  # fmt: skip
    said = dict(zip(events, found.labels.tolist(), strict=True))
    assert said["a", "y"] == [0, 1, 0] and said["b", "x"] == [0, 1, 1] and said["b", "y"] == [1, 0, 0]
    assert said["a", "z"][:1] == [1] and np.isnan(said["a", "z"][1])


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["nothing"], "no column 'nothing'"),
        (["a=label", "a=long_view"], "twice"),
        (["label>=9"], "same for every event"),
        (["label>9"], "is no label"),
        (["item"], "is not a number"),
    ],
)
def test_bad_labels_are_one_clear_line(folder: Path, labels: list[str], says: str) -> None:
    with pytest.raises(GenrecError, match=says) as error:
        load_samples(folder, labels)
    assert "\n" not in str(error.value)


def test_without_ratings_a_label_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "interactions.csv").write_text("user,item,timestamp\na,x,1\na,y,2\n")
    with pytest.raises(GenrecError, match="--label"):
        load_samples(tmp_path)


def test_rules_are_read_as_written() -> None:
    assert Rule.parse("high=rating>=4") == Rule("high", "rating", 4.0)
    assert Rule.parse("is_follow") == Rule("is_follow", "is_follow", None)
    assert Rule("x", "x").of(np.array([0.0, 2.0, np.nan])).tolist()[:2] == [0, 1]


def test_each_user_is_asked_last() -> None:
    samples = rated(5, 20, 6, 10)
    part = per_user(samples).reshape(5, 20)
    assert (part[:, :14] == TRAIN).all() and (part[:, 14:16] == VALIDATION).all() and (part[:, 16:] == TEST).all()
    assert (per_user(rated(3, 6, 6, 10)) == TRAIN).all()  # too few for a validation event


def test_the_clock_cuts_all_users_alike() -> None:
    samples = rated(5, 20, 6, 10)
    part, times = by_time(samples), samples.sequences.times
    assert times[part == TRAIN].max() < times[part == VALIDATION].min() <= times[part == VALIDATION].max()
    assert times[part == VALIDATION].max() < times[part == TEST].min()
    with pytest.raises(ValueError):
        by_time(samples, 0.5, 0.6)


def test_the_planted_labels_are_what_the_stream_shows() -> None:
    """A plain reading of the docstring, event by event."""
    samples = planted(40, 96, 2, 3, seed=2)
    kinds = [name.rsplit("-", 1)[0] for name in samples.catalog.items]
    like, right = [], {"like": [], "follows": []}
    for u in range(40):
        at = slice(int(samples.sequences.offsets[u]), int(samples.sequences.offsets[u + 1]))
        seen, labels = [kinds[i] for i in samples.sequences.items[at]], samples.labels[at]
        newest: dict[str, bool] = {}
        for i, kind in enumerate(seen):
            name, _, group = kind.rpartition("-")
            if name in ("second", "other-second"):
                own = seen[i - 1] == f"{name.replace('second', 'first')}-{group}" if i else False
                newest[group] = own
                if not np.isnan(labels[i, 1]):
                    right["follows"].append(labels[i, 1] == own)
            if name == "third" and group in newest and not np.isnan(labels[i, 0]):
                like.append(labels[i, 0])
                right["like"].append(labels[i, 0] == newest[group])
            assert np.isnan(labels[i, 0]) or name == "third"
            assert np.isnan(labels[i, 1]) or name in ("second", "other-second")
    assert len(like) > 500 and abs(np.mean(like) - 0.5) < 0.07
    for found in right.values():
        assert abs(np.mean(found) - HIGH) < 0.02
    task = Asked.make(samples)
    assert not task.feedback.any() and not task.dense.any() and task.dense.shape == (40 * 96, task.width)


def test_where_each_of_the_four_stands_says_nothing_of_a_block() -> None:
    """How far back the newest of each is, is as likely whatever the label."""
    samples = planted(600, 112, 1, 1, seed=3)
    s, names = samples.sequences, samples.catalog.items
    found: dict[tuple[str, int], list[int]] = {}
    for at in np.flatnonzero(~np.isnan(samples.labels[:, 0])):
        before = [names[i] for i in s.items[int(s.offsets[s.user_of[at]]) : at]][::-1]
        for kind in KINDS[:THIRD]:
            found.setdefault((kind, int(samples.labels[at, 0])), []).append(before.index(f"{kind}-0-0"))
    for kind in KINDS[:THIRD]:
        shares = [np.bincount(found[kind, label], minlength=15) / len(found[kind, label]) for label in (0, 1)]
        assert shares[0].sum() == pytest.approx(1) and np.abs(shares[0] - shares[1]).max() < 0.05


def test_thirds_of_the_test_ask_about_blocks_of_the_test() -> None:
    samples = planted(30, 140, 2, 1, seed=4)
    task = Asked.make(samples)
    s, names = samples.sequences, samples.catalog.items
    known = ~np.isnan(task.samples.labels[:, 0])
    assert 0 < known[task.part == TEST].sum() < (~np.isnan(samples.labels[:, 0]))[task.part == TEST].sum()
    for at in np.flatnonzero(known & (task.part != TRAIN)):
        group = names[s.items[at]].split("-")[-2]
        start = int(s.offsets[s.user_of[at]])
        block = max(i for i in range(start, at) if names[s.items[i]].rsplit("-", 1)[0].endswith(f"second-{group}"))
        assert task.part[block] == task.part[at]
    train = task.part == TRAIN
    assert np.array_equal(task.samples.labels[train], samples.labels[train], equal_nan=True)
