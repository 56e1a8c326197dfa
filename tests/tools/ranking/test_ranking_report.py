import json

import numpy as np
import pytest

from genrec.evaluation.auc import auc, gauc
from genrec.tools.ranking.report import Scored, markdown
from genrec.tools.ranking.samples import TEST
from genrec.tools.ranking.task import Task
from genrec.tools.ranking.train import positions_of
from tests.tools.small_world import rated


def test_a_table_says_what_its_numbers_say() -> None:
    task = Task.make(rated(40, 30, 3, 2))
    at = positions_of(task, TEST)
    y, users = task.samples.labels[at, 0], task.samples.sequences.user_of[at]
    rng = np.random.default_rng(0)
    good = np.stack([y + rng.normal(size=len(y)) for _ in range(2)])[..., None]
    coin = rng.normal(size=(2, len(y), 1))
    mine, other = (Scored(task, at, x, (100, 200), 200) for x in (good, coin))
    found = mine.measured()["like"]
    assert found["gauc"]["mean"] == pytest.approx(np.mean([gauc(y, s[:, 0], users) for s in good]), abs=1e-5)
    assert found["auc"]["mean"] == pytest.approx(np.mean([auc(y, s[:, 0]) for s in good]), abs=1e-5)
    assert found["auc"]["low"] < found["auc"]["mean"] < found["auc"]["high"]
    assert 0 < found["gauc"]["users"] <= 40 and set(found["gauc by exposure"]) <= {"0-99", "100-199", "200+"}
    pair = mine.compared(other)["like"]
    assert pair["gauc"]["low"] > 0 and 0 < pair["gauc"]["detectable"] < 0.5
    assert found["by run"]["gauc"] == [pytest.approx(gauc(y, s[:, 0], users), abs=1e-5) for s in good]
    low = task.exposures[task.samples.sequences.items[at]] < 100
    assert set(found["auc by exposure"]) == set(found["gauc by exposure"]) == set(pair["auc by exposure"])
    if low.any():
        expected = np.mean([auc(y[low], s[low, 0]) for s in good])
        assert found["auc by exposure"]["0-99"]["mean"] == pytest.approx(expected, abs=1e-5)
    each = [gauc(y, a[:, 0], users) - gauc(y, b[:, 0], users) for a, b in zip(good, coin, strict=True)]
    assert pair["by run"] == [pytest.approx(v, abs=1e-5) for v in each]
    text = markdown({"good": {"like": found}}, {"good - coin": {"like": pair}})
    assert ", ".join(f"{v:+.4f}" for v in pair["by run"]) in text
    assert f"{found['gauc']['mean']:.4f}" in text and f"{pair['gauc']['detectable']:.4f}" in text
    json.dumps([found, pair], allow_nan=False)


def test_groups_smaller_than_a_user_are_ranked_apart() -> None:
    """Two folds ranked by different models: only what one model ranked is compared."""
    task = Task.make(rated(40, 30, 3, 2))
    at = positions_of(task, TEST)
    y, users = task.samples.labels[at, 0], task.samples.sequences.user_of[at]
    fold = np.arange(len(at)) % 2
    scores = (y + np.random.default_rng(0).normal(size=len(y)) + 100 * fold)[None, :, None]
    whole = Scored(task, at, scores, (), 200).measured()["like"]
    apart = Scored(task, at, scores, (), 200, groups=users * 2 + fold).measured()["like"]
    assert apart["gauc"]["mean"] > whole["gauc"]["mean"] + 0.1 and apart["gauc by exposure"] == {}
    one = Scored(task, at, scores, (), 200, groups=users * 2 + fold)
    assert apart["auc"] is None and one.compared(one)["like"]["auc"] is None, "no AUC over two models' scores"
    assert "| like |  | 0." in markdown({"apart": {"like": apart}}, {})
