"""EBR as a tool: it learns, its scores are probabilities, controls, files, resuming, what it must not see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genrec.contracts import Retriever, UserContext
from genrec.data.dataset import Sequences
from genrec.errors import GenrecError
from genrec.tools.ebr import EBR, Controls, EBRConfig
from genrec.tools.ebr.clusters import Clusters, divide
from genrec.tools.ebr.index import ClusterIndex
from genrec.tools.ebr.model import Encoder
from genrec.tools.ebr.train import Batches
from genrec.tools.learning import _Run
from tests.tools.ebr.ebr_world import PER_KIND, SMALL, world_catalog, world_sequences
from tests.tools.small_world import contexts, sequences

CONFIG = EBRConfig(**SMALL, steps=40, check=10)
ASKED = contexts([0, 1, 2], [9, 10], [], [16, 3, 25, 31])


@pytest.fixture(scope="module")
def ebr() -> EBR:
    return EBR(CONFIG).fit(world_sequences(), world_catalog())


def test_it_learns_the_next_item_and_beats_chance_by_far() -> None:
    """Eighty steps: forty reach .45 to .7 on one processor and .8 on another, eighty .95 to 1 with three seeds."""
    ebr = EBR(replace(CONFIG, steps=80)).fit(world_sequences(), world_catalog())
    assert isinstance(ebr, Retriever) and ebr.name == "ebr"
    asked = contexts(*([kind * PER_KIND + i, kind * PER_KIND + i + 1] for kind in range(4) for i in range(5)))
    found = ebr.retrieve(asked, 3)
    hits = [c.history[-1] + 1 in e.items.tolist() for c, e in zip(asked, found, strict=True)]
    assert np.mean(hits) > 0.8
    log_p, _ = ebr.parts(ebr.user_vectors(asked))
    assert (log_p.argmax(axis=1) == ebr.clusters.of[[c.history[0] for c in asked]]).mean() > 0.9


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "none"},
        {"prompt": "prefix"},
        {"divide": "random"},
        {"divide": "categories"},
        {"content": 0},
        {"single": True, "prompt": "none", "negatives_from": "catalogue"},
        {"single": True, "prompt": "none", "negatives_from": "mixed"},
        {"single": True, "prompt": "none", "negatives_from": "catalogue", "loss": "bce"},
    ],
)
def test_every_arm_fits_and_its_scores_are_log_probabilities_over_chance(changes: dict[str, Any]) -> None:
    tool = EBR(replace(CONFIG, steps=4, **changes)).fit(world_sequences(20), world_catalog())
    scores = tool.score_all(ASKED)
    assert scores.shape == (4, 32) and scores.dtype == np.float32 and not scores[2].any()
    np.testing.assert_allclose(np.exp(scores).sum(axis=1), 32, rtol=1e-3)
    assert all(e.tool == "ebr" for e in tool.retrieve(ASKED, 4))


def test_a_prompt_starts_as_the_identity() -> None:
    torch.manual_seed(0)
    encoder = Encoder(CONFIG, np.zeros((32, 0), np.float16), 4).eval()
    rows = torch.tensor([[1, 5, 9]])
    plain = encoder(rows, torch.tensor([4]))
    for k in range(4):
        torch.testing.assert_close(encoder(rows, torch.tensor([k])), plain)
    with torch.no_grad():
        assert encoder.prompts is not None
        encoder.prompts[2] += 0.5
    assert not torch.allclose(encoder(rows, torch.tensor([2])), plain)
    torch.testing.assert_close(encoder(rows, torch.tensor([4])), plain)  # no prompt stays no prompt


def test_the_encoder_is_causal() -> None:
    for prompt in ("hadamard", "prefix", "none"):
        torch.manual_seed(0)
        encoder = Encoder(replace(CONFIG, prompt=prompt), np.zeros((32, 0), np.float16), 4).eval()
        a = encoder(torch.tensor([[1, 5, 9, 3]]), torch.tensor([1]))
        b = encoder(torch.tensor([[1, 5, 30, 7]]), torch.tensor([1]))
        torch.testing.assert_close(a[:, :2], b[:, :2])
        assert not torch.allclose(a[:, 2], b[:, 2])


def test_scores_do_not_depend_on_the_batch(ebr: EBR) -> None:
    one_by_one = np.concatenate([ebr.score_all([c]) for c in ASKED])
    np.testing.assert_allclose(ebr.score_all(ASKED), one_by_one, rtol=1e-4, atol=1e-4)


def test_evidence_leaves_out_what_was_seen_and_says_how_it_came_about(ebr: EBR) -> None:
    (found,) = ebr.retrieve([UserContext(history=(0, 1), trigger=2)], 6)
    assert len(found.items) == 6 and not {0, 1, 2} & set(found.items.tolist())
    assert (np.diff(found.scores) <= 0).all() and found.vector is not None and found.vector.shape == (16,)
    assert found.sentence.startswith('Three of the last 3 choices opened the cluster "tea"')
    assert found.details is not None
    clusters = found.details["clusters"]
    assert sum(c["items"] for c in clusters) == 6 and sum(c["share"] for c in clusters) == pytest.approx(1, abs=0.01)
    assert clusters[0]["label"] == "tea" and clusters[0]["history"] == 3
    of = ebr.clusters.of[found.items]
    assert {c["cluster"]: c["items"] for c in clusters if c["items"]} == dict(
        zip(*(x.tolist() for x in np.unique(of, return_counts=True)), strict=True)
    )


def test_nothing_to_go_by_and_lists_of_any_length(ebr: EBR) -> None:
    (empty,) = ebr.retrieve(contexts([]), 5)
    assert len(empty.items) == 0 and empty.vector is None and "Nothing to go by" in empty.sentence
    assert len(ebr.retrieve(contexts([0]), 0)[0].items) == 0
    whole = ebr.retrieve(contexts([0, 1]), 999)[0].items.tolist()  # more than the catalogue has
    assert sorted(whole) == list(range(2, 32))
    assert ebr.retrieve([], 5) == []


def test_a_history_that_has_used_up_its_cluster_gets_the_others(ebr: EBR) -> None:
    (found,) = ebr.retrieve(contexts(list(range(PER_KIND))), 10)
    assert len(found.items) == 10 and (found.items >= PER_KIND).all()


@pytest.mark.parametrize("exact", [True, False])
def test_a_used_up_cluster_and_a_quota_above_its_size_on_the_index(
    ebr: EBR, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ebr, "_index", [ClusterIndex(ebr.items, ebr.clusters, exact, probes=99)])
    (found,) = ebr.retrieve(contexts(list(range(PER_KIND))), 10, Controls(merge="quota"))
    assert len(found.items) == 10 and (found.items >= PER_KIND).all()
    (found,) = ebr.retrieve(contexts([0, 1, 2]), 20, Controls(quotas={"bread": 15}))
    kinds = np.bincount(found.items // PER_KIND, minlength=4)
    assert kinds[1] == PER_KIND and kinds.sum() == 20  # all that there are, and the list is still full


def test_a_large_catalogue_is_searched_by_the_index(ebr: EBR, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [e.items.tolist() for e in ebr.retrieve(ASKED, 6)]
    assert ebr._index == []
    monkeypatch.setattr("genrec.tools.ebr.tool.EXACT", 31)
    monkeypatch.setattr("genrec.tools.ebr.index.EXACT", 31)
    monkeypatch.setattr(ebr, "_index", [])
    found = [e.items.tolist() for e in ebr.steered(Controls()).retrieve(ASKED, 6)]
    assert len(ebr._index) == 1 and ebr._index[0].approximate and ebr._index[0].index.ntotal == 32
    hits = [len(set(a) & set(b)) for a, b in zip(whole, found, strict=True)]
    assert [len(f) for f in found] == [6, 6, 0, 6] and sum(hits) >= 16  # approximate


def test_rows_that_the_tool_does_not_know_are_named(ebr: EBR) -> None:
    for asked in ([99], [-1]):
        with pytest.raises(GenrecError, match=f"context 1 names row {asked[0]}, and the tool was fitted on 32 items"):
            ebr.retrieve(contexts([0], asked), 5)
    with pytest.raises(GenrecError, match="names row 40"):
        ebr.retrieve([UserContext(history=(0,), trigger=40)], 5)


def test_alpha_narrows_the_list(ebr: EBR) -> None:
    def entropy(alpha: float) -> float:
        of = ebr.clusters.of[ebr.retrieve(contexts([0, 9, 17]), 12, Controls(alpha=alpha))[0].items]
        p = np.bincount(of, minlength=4) / len(of)
        return float(-(p[p > 0] * np.log(p[p > 0])).sum())

    found = [entropy(a) for a in (0.0, 0.5, 1.0, 2.0, 8.0)]
    assert found[0] == pytest.approx(np.log(4)) and found == sorted(found, reverse=True)


def test_quotas_and_floors_are_kept_and_steering_leaves_the_tool_as_it_is(ebr: EBR) -> None:
    steered = ebr.steered(Controls(quotas={"bread": 2}, floors={"soap": 3}))
    (found,) = steered.retrieve(contexts([0, 1, 2]), 9)
    kinds = np.bincount(found.items // PER_KIND, minlength=4)
    assert kinds[1] == 2 and kinds[3] >= 3 and kinds.sum() == 9
    assert ebr.controls == Controls()
    with pytest.raises(GenrecError, match="no cluster 'jam'"):
        ebr.steered(Controls(quotas={"jam": 1}))
    with pytest.raises(GenrecError, match="in a list of 4"):
        steered.retrieve(contexts([0]), 4)


def test_without_controls_the_list_is_that_of_the_likeliest_items(ebr: EBR) -> None:
    asked = contexts([0, 9, 17])
    best = ebr.score_all(asked)[0]
    best[[0, 9, 17]] = -np.inf
    expected = np.argsort(-best)[:12].tolist()
    for controls in (None, Controls(), Controls(merge="global")):
        assert ebr.retrieve(asked, 12, controls)[0].items.tolist() == expected
    quotas = ebr.retrieve(asked, 12, Controls(merge="quota"))[0].items.tolist()
    assert quotas == ebr.retrieve(asked, 12, Controls(alpha=1.0))[0].items.tolist() != expected


def test_the_index_finds_what_scores_find(ebr: EBR) -> None:
    for merge in ("quota", "global"):
        ebr._index = []
        whole = ebr.retrieve(ASKED, 6, Controls(merge=merge))
        for exact in (True, False):
            ebr._index = [ClusterIndex(ebr.items, ebr.clusters, exact, probes=99)]  # as for a large catalogue
            found = ebr.retrieve(ASKED, 6, Controls(merge=merge))
            for a, b in zip(whole, found, strict=True):
                assert set(a.items.tolist()) == set(b.items.tolist())
                np.testing.assert_allclose(np.sort(a.scores), np.sort(b.scores), atol=1e-3)
                assert a.details is not None and b.details is not None
                counts = [{c["cluster"]: c["items"] for c in e.details["clusters"]} for e in (a, b) if e.details]
                assert counts[0] == counts[1]
    ebr._index = []


def test_the_sum_over_a_large_cluster_counts_what_was_found_exactly() -> None:
    """Of peaked logits a sample alone would miss the items that matter."""
    rng = np.random.default_rng(0)
    n, d = 6000, 8
    clusters = Clusters(np.repeat(np.arange(2, dtype=np.int32), [5000, 1000]), ("a", "b"))
    items, users = rng.normal(size=(n, d)).astype(np.float32), rng.normal(size=(6, 2, d)).astype(np.float32) * 1.5
    index = ClusterIndex(items, clusters, exact=True)
    counts = np.array([[50, 50]] * 5 + [[0, 1000]])
    rows, logits = index.search(users, counts)
    found = index.log_mass(users, rows, logits)
    whole = np.stack(
        [np.logaddexp.reduce(users[:, k] @ items[clusters.members(k)].T, axis=1) for k in range(2)], axis=1
    )
    assert np.abs(found[:5] - whole[:5]).max() < 0.25 and np.abs(found[:5] - whole[:5]).mean() < 0.08
    assert found[5, 1] == pytest.approx(whole[5, 1], abs=1e-4)  # all of it was found
    alone = index.log_mass(users, rows[:, :0], logits[:, :0])
    assert np.abs(alone - whole).mean() > 2 * np.abs(found - whole).mean()


def test_a_saved_tool_says_the_same(ebr: EBR, tmp_path: Path) -> None:
    ebr.save(tmp_path)
    again = EBR.load(tmp_path)
    np.testing.assert_allclose(again.score_all(ASKED), ebr.score_all(ASKED), atol=1e-5)
    assert [e.sentence for e in again.retrieve(ASKED, 3)] == [e.sentence for e in ebr.retrieve(ASKED, 3)]
    assert again.config == ebr.config and {f.name for f in tmp_path.iterdir()} == {"tool.json", "tool.safetensors"}
    whole = (tmp_path / "tool.safetensors").read_bytes()
    (tmp_path / "tool.safetensors").write_bytes(whole[:-200])
    with pytest.raises(GenrecError, match="damaged"):
        EBR.load(tmp_path)


def test_a_killed_fit_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, train = replace(CONFIG, steps=24, check=3, dropout=0.2), world_sequences(24)
    whole = EBR(config).fit(train, world_catalog()).score_all(ASKED)
    killed = EBR(config)
    killed.work = tmp_path
    save = _Run.save

    def dies(run: _Run, path: Path) -> None:
        save(run, path)
        if run.step == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr("genrec.tools.learning.SAVE_SECONDS", -1.0)
    monkeypatch.setattr(_Run, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        killed.fit(train, world_catalog())
    again = EBR(config)
    again.work = tmp_path
    np.testing.assert_array_equal(again.fit(train, world_catalog()).score_all(ASKED), whole)
    other = EBR(replace(config, dropout=0.1))
    other.work = tmp_path
    with pytest.raises(GenrecError, match="another configuration"):
        other.fit(train, world_catalog())


def test_arms_take_as_many_steps_and_none_ends_early_without_patience() -> None:
    """Prompts make an epoch longer, not a run."""
    for changes in ({}, {"prompt": "none"}):
        tool = EBR(replace(CONFIG, steps=12, check=1, patience=0, **changes))
        said: list[float] = []
        tool.judge = lambda _, said=said: -float(said.append(0.0) or len(said))  # type: ignore[misc]
        tool.fit(world_sequences(24), world_catalog())
        assert (tool.learned.steps, tool.learned.best_step) == (12, 1) and tool.learned.step_seconds > 0


def test_the_vector_is_the_one_of_the_likeliest_cluster(ebr: EBR) -> None:
    vectors = ebr.user_vectors(ASKED)
    log_p, _ = ebr.parts(vectors)
    for b, found in enumerate(ebr.retrieve(ASKED, 3)):
        if ASKED[b].history:
            np.testing.assert_allclose(found.vector, vectors[b, log_p[b].argmax()], atol=1e-5)


def test_what_is_held_out_is_of_training_and_not_trained_on() -> None:
    train = world_sequences(40)
    batches = Batches(train, divide(train, world_catalog(), CONFIG), CONFIG)
    ends = {int(e) for e in batches.ends}
    held = [u for u in range(40) if int(train.offsets[u + 1]) not in ends]
    assert len(held) == len(batches.held_out.targets) == 4
    assert batches.held_out.targets.tolist() == [int(train.items[train.offsets[u + 1] - 1]) for u in held]
    last = {int(train.offsets[u + 1]) for u in held}
    for epoch in range(3):
        assert not last & set(batches.rows_of(epoch)[:, 1].tolist())


def test_rows_of_prompts_learn_every_position_once() -> None:
    """Every (position, own cluster) pair is learned by exactly one row, and every position by the un-prompted one."""
    train = world_sequences(6, length=9, seed=3)
    config = replace(CONFIG, max_history=50, held_out=0)
    batches = Batches(train, divide(train, world_catalog(), config), config)
    of, seen, asked = batches.clusters.of, [], 0
    for step in range(batches.per_epoch):
        _, targets, _, prompts = batches.at(step)
        for row, prompt in zip(targets.tolist(), prompts.tolist(), strict=True):
            there = [t for t in row if t >= 0]
            asked += len(there) if prompt == 4 else 0
            seen += [t for t in there if of[t] == prompt]
    assert asked == len(seen) == 6 * 8


def test_long_histories_are_cut_to_windows_that_cover_them() -> None:
    train = sequences(list(np.random.default_rng(0).integers(0, 32, 120)))
    config = replace(CONFIG, max_history=20, prompt="none", held_out=0)
    batches = Batches(train, divide(train, world_catalog(), config), config)
    for epoch in range(4):
        rows = batches.rows_of(epoch)
        assert (rows[:, 1] - rows[:, 0] <= 21).all()
        learned = {p for a, b, _ in rows.tolist() for p in range(a + 1, b)}
        assert learned == set(range(1, 120))


def test_training_without_events_scores_zero_or_chance() -> None:
    for train in (sequences([], []), sequences([3])):
        tool = EBR(CONFIG).fit(train, world_catalog())
        assert np.isfinite(tool.score_all(ASKED)).all() and not tool.score_all(contexts([])).any()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"clusters": 0}, "clusters is 0"),
        ({"divide": "tags"}, "divide is 'tags'; it must be one of kmeans"),
        ({"width": 15, "heads": 2}, "multiple of its 2 heads"),
        ({"single": True}, "single vector takes prompt 'none'"),
        ({"negatives_from": "catalogue"}, "negatives from the cluster itself"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_settings_say_what_is_wrong(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(GenrecError, match=said):
        EBRConfig(**changes)


def test_weights_of_events_count(ebr: EBR) -> None:
    """An event without weight teaches nothing."""
    train = world_sequences(20)
    tail = train.user_of % 2 == 1
    silent = Sequences(
        train.users, train.offsets, train.items, train.times, np.where(tail, 0, 1).astype(np.float32), train.ratings
    )
    tool = EBR(replace(CONFIG, steps=6, held_out=0)).fit(silent, world_catalog())
    assert np.isfinite(tool.score_all(ASKED)).all()
