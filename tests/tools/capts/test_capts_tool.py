"""CAPTS as a tool: what it learns, evidence, steering, files, resuming, what it must not see."""

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
from genrec.tools import CAPTS, CAPTSConfig
from genrec.tools.capts.model import CATR, calibration_gap, catr_loss
from genrec.tools.learning import _Run
from tests.tools.ebr.ebr_world import PER_KIND, world_catalog, world_sequences
from tests.tools.small_world import contexts, sequences

CHEAP = CAPTSConfig(
    channels=("itemknn", "markov", "content", "item2vec"),
    neighbours=6,
    depth=3,
    quota=4,
    epochs=4,
    width=8,
    rows=32,
    learning_rate=0.01,
)
ASKED = contexts([0, 1, 2], [9, 10], [], [16, 3, 25, 31])


@pytest.fixture(scope="module")
def capts() -> CAPTS:
    return CAPTS(CHEAP).fit(world_sequences(80), world_catalog())


def test_it_is_a_retriever_that_finds_what_comes_next(capts: CAPTS) -> None:
    assert isinstance(capts, Retriever) and capts.name == "capts" and capts.network is not None
    asked = contexts(*([kind * PER_KIND + i, kind * PER_KIND + i + 1] for kind in range(4) for i in range(5)))
    found = capts.retrieve(asked, 3)
    assert np.mean([c.history[-1] + 1 in e.items.tolist() for c, e in zip(asked, found, strict=True)]) > 0.5


def test_it_learns_that_one_channel_knows_and_another_guesses() -> None:
    """Users walk from an item to the next: "markov" lists it, the words of a title only say the kind."""
    config = replace(
        CHEAP, channels=("content", "markov"), neighbours=1, depth=1, quota=2, epochs=15, learning_rate=0.03, window=10
    )
    capts = CAPTS(config).fit(world_sequences(80), world_catalog())
    triggers, values, _ = capts.route(contexts(*([i, i + 1] for i in range(6)), *([i, i + 1] for i in range(16, 22))))
    assert triggers.rows[0].tolist() == [1, 0] and values is not None
    assert values.value[:, 0, 1].mean() > 0.8 and values.value[:, 0, 0].mean() < 0.5


def test_scores_are_whole_and_do_not_depend_on_the_batch(capts: CAPTS) -> None:
    scores = capts.score_all(ASKED)
    assert scores.shape == (4, 32) and scores.dtype == np.float32 and np.isfinite(scores).all()
    assert not scores[2].any() and scores[0].any()
    np.testing.assert_allclose(scores, np.concatenate([capts.score_all([c]) for c in ASKED]), rtol=1e-4, atol=1e-6)


def test_evidence_says_which_triggers_asked_which_channels(capts: CAPTS) -> None:
    (found,) = capts.retrieve([UserContext(history=(0, 1), trigger=2)], 5)
    assert len(found.items) and not {0, 1, 2} & set(found.items.tolist()) and (np.diff(found.scores) <= 0).all()
    assert found.details is not None and found.details["policy"] == "learned"
    told = found.details["routes"]
    assert (
        len(told) == 4 and {r["row"] for r in told} <= {0, 1, 2} and {r["channel"] for r in told} <= set(CHEAP.channels)
    )
    assert all(0 <= r["value"] <= 1 and r["items"] >= 0 for r in told)
    assert "tea number" in found.sentence and found.sentence.count("\n") == 0 and found.sentence.endswith(".")
    (empty,) = capts.retrieve(contexts([]), 5)
    assert len(empty.items) == 0 and "Nothing to go by" in empty.sentence


@pytest.mark.parametrize("asked", [UserContext(history=(0, 32)), UserContext(history=(0,), trigger=-2)])
def test_rows_that_it_does_not_know_are_refused(capts: CAPTS, asked: UserContext) -> None:
    with pytest.raises(GenrecError, match=r"context 1 names row (32|-2), and the tool was fitted on 32 items"):
        capts.retrieve([ASKED[0], asked], 3)


def test_steering_changes_the_routing_only(capts: CAPTS) -> None:
    wide = capts.steered(quota=9, policy="recent", most=3)
    _, _, (found,) = wide.route(contexts([0, 1, 2]))
    assert len(found.pairs) == 9 and max(np.bincount([c for _, c in found.pairs])) <= 3
    assert capts.config == CHEAP
    huge = capts.steered(quota=10_000).retrieve(contexts([0, 1, 2]), 999)[0]  # more than there is
    assert 0 < len(huge.items) <= 29
    with pytest.raises(GenrecError, match="channels is settled by the fit"):
        capts.steered(channels=("markov",))
    with pytest.raises(GenrecError, match="unknown policy 'best'"):
        capts.steered(policy="best")
    with pytest.raises(GenrecError, match="quota is 0"):
        capts.steered(quota=0)


def test_what_is_fetched_is_new_and_within_the_budget(capts: CAPTS) -> None:
    for found, context in zip(capts.fetch(ASKED, 10), ASKED, strict=True):
        assert sum(map(len, found)) <= 10
        assert not set(np.concatenate(found).tolist() if found else []) & set(context.history)


def test_a_saved_tool_says_the_same(capts: CAPTS, tmp_path: Path) -> None:
    capts.save(tmp_path)
    again = CAPTS.load(tmp_path)
    np.testing.assert_allclose(again.score_all(ASKED), capts.score_all(ASKED), atol=1e-6)
    assert [e.sentence for e in again.retrieve(ASKED, 3)] == [e.sentence for e in capts.retrieve(ASKED, 3)]
    assert again.config == capts.config and {f.name for f in tmp_path.iterdir()} == {"tool.json", "tool.safetensors"}
    (tmp_path / "tool.safetensors").write_bytes(b"no")
    with pytest.raises(GenrecError, match="damaged"):
        CAPTS.load(tmp_path)


def test_without_a_later_slice_the_newest_triggers_are_asked(tmp_path: Path) -> None:
    for train in (sequences([], []), sequences([3]), sequences([0], [1])):
        tool = CAPTS(CHEAP).fit(train, world_catalog())
        assert tool.network is None and np.isfinite(tool.score_all(ASKED)).all()
        assert tool.retrieve(ASKED, 3)[0].details["policy"] == "recent"  # type: ignore[index]
        tool.save(tmp_path)
        assert CAPTS.load(tmp_path).network is None


def test_the_trained_channel_of_ebr_is_one_of_them() -> None:
    config = replace(CHEAP, channels=("markov", "ebr"), epochs=1, ebr_steps=2)
    tool = CAPTS(config).fit(world_sequences(20), world_catalog())
    assert (tool.channels.rows[:, 1] >= 0).any()


def test_the_control_learns_from_feedback_on_the_trigger() -> None:
    rated = world_sequences(40)
    weights = np.where(np.arange(rated.events) % 3 == 0, 2.0, 1.0).astype(np.float32)
    rated = Sequences(rated.users, rated.offsets, rated.items, rated.times, weights, rated.ratings)
    control = replace(CHEAP, supervision="trigger", uniqueness=0.0, eta=0.0)
    tools = [CAPTS(c).fit(rated, world_catalog()) for c in (CHEAP, control)]
    asked = [UserContext((0, 1), (0.0, 1.0), (1.0, 2.0))]
    values = [t.route(asked)[1].value[0] for t in tools]  # type: ignore[union-attr]
    assert values[1].std(axis=1).max() < values[0].std(axis=1).max()  # the control cannot tell channels apart


def test_a_killed_fit_ends_with_the_same_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = world_sequences(60)
    whole = CAPTS(CHEAP).fit(train, world_catalog()).score_all(ASKED)
    killed, save = CAPTS(CHEAP), _Run.save
    killed.work = tmp_path

    def dies(run: _Run, path: Path) -> None:
        save(run, path)
        if run.step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr("genrec.tools.learning.SAVE_SECONDS", -1.0)
    monkeypatch.setattr(_Run, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        killed.fit(train, world_catalog())
    again = CAPTS(CHEAP)
    again.work = tmp_path
    np.testing.assert_array_equal(again.fit(train, world_catalog()).score_all(ASKED), whole)


def test_the_tables_of_the_replay_have_not_seen_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Sequences] = []
    tables = CAPTS._tables

    def watched(self: CAPTS, train: Sequences, *rest: Any) -> Any:
        seen.append(train)
        return tables(self, train, *rest)

    monkeypatch.setattr(CAPTS, "_tables", watched)
    whole = world_sequences(40)
    CAPTS(CHEAP).fit(whole, world_catalog())
    assert len(seen) == 2 and seen[1].events == whole.events
    assert seen[0].times.max() < np.quantile(whole.times, CHEAP.past, method="higher")


# -- the network --------------------------------------------------------------------------------------


def test_padding_and_order_of_requests_change_no_value() -> None:
    torch.manual_seed(0)
    net = CATR(4, 3, 8).eval()
    content, about, features = torch.randn(2, 5, 4), torch.randn(2, 5, 6), torch.randn(2, 5, 3, 5)
    there = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    whole = net(content, about, features, there)
    short = net(content[:1, :3], about[:1, :3], features[:1, :3], there[:1, :3])
    torch.testing.assert_close(whole.value[:1, :3], short.value)
    assert whole.value.shape == whole.uniqueness.shape == (2, 5, 3) and whole.trigger.shape == (2, 5)
    assert (torch.nn.functional.softplus(net.slope) > 0).all()


def test_the_loss_of_well_calibrated_values_is_lower() -> None:
    label = torch.tensor([1.0, 0.0, 0.0, 0.0] * 5)
    channel = torch.zeros(20, dtype=torch.long)
    right, wrong = (calibration_gap(torch.full((20,), p), label, channel) for p in (0.25, 0.9))
    assert right < wrong
    out = CATR(4, 3, 8)(torch.zeros(1, 2, 4), torch.zeros(1, 2, 6), torch.zeros(1, 2, 3, 5), torch.ones(1, 2) > 0)
    none = torch.zeros(1, 2, 3)
    assert catr_loss(out, none, none, none > 0, 0.1, 0.1).item() == 0.0
    parts = [catr_loss(out, none, none, none == 0, *weights) for weights in ((0.0, 0.0), (0.1, 0.0), (0.1, 0.1))]
    assert parts[0] < parts[1]
    assert parts[1] == parts[2], "nothing is learned of the uniqueness of pairs that bring nothing"
    one = none.clone()
    one[0, 0, 1] = 1.0
    less, more = (catr_loss(out, one, one, none == 0, 0.1, weight) for weight in (0.0, 0.1))
    assert less < more


def test_calibration_teaches_the_calibrators_alone() -> None:
    torch.manual_seed(0)
    net = CATR(4, 3, 8)
    out = net(torch.randn(4, 2, 4), torch.randn(4, 2, 6), torch.randn(4, 2, 3, 5), torch.ones(4, 2) > 0)
    label = torch.zeros(4, 2, 3)
    label[::2] = 1
    losses = [catr_loss(out, label, label, label >= 0, weight, 0.1) for weight in (0.0, 0.1)]
    for name, p in net.named_parameters():
        plain, calibrated = (torch.autograd.grad(x, p, retain_graph=True, allow_unused=True)[0] for x in losses)
        if name in ("slope", "shift"):
            assert plain is None and calibrated is not None and calibrated.any()
        elif plain is not None and calibrated is not None:
            torch.testing.assert_close(plain, calibrated)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"channels": ()}, "at least one channel"),
        ({"channels": ("markov", "markov")}, "each named once"),
        ({"channels": ("swing",)}, "unknown channel 'swing'"),
        ({"credit": "some"}, "unknown credit"),
        ({"threshold": 1.0}, "threshold is 1.0"),
        ({"supervision": "trigger"}, "set uniqueness and eta to 0"),
        ({"quota": 0}, "quota is 0"),
        ({"least": 3}, "do not fit a quota of 10"),
        ({"least": 2, "most": 1}, "do not fit"),
        ({"past": 1.0}, "past is 1.0"),
        ({"window": float("nan")}, "window is nan"),
    ],
)
def test_settings_say_what_is_wrong(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(GenrecError, match=said):
        CAPTSConfig(**changes)
