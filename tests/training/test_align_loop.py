"""The loop of alignment on a tiny generator: learns what is rewarded, never ends below its start, survives a kill."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from genrec.alignment.judges import Bench, Judge
from genrec.alignment.rewards import Rewards, ScenarioWeights
from genrec.candidates import allowed_items
from genrec.data.dataset import Sequences
from genrec.errors import GenrecError
from genrec.generator.batches import ScenarioTask, TrainingData
from genrec.generator.config import GeneratorConfig
from genrec.generator.model import GeneratorModel
from genrec.generator.search import make_history, make_request, score_items
from genrec.tokenizer.semantic_ids import SemanticIDs, TokenizerConfig
from genrec.tools.fusion import standardise
from training.align import verdict
from training.align_config import LOSSES, AlignConfig
from training.policy import Aligner, Positions, advantages_of, histogram, learning_rate, loss_function, unit

ITEMS, DIMENSIONS = 24, 8


def world() -> tuple[GeneratorModel, Positions, Bench]:
    """An untrained generator, users who walk round the catalogue, and judges without any tool."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(ITEMS, DIMENSIONS)).astype(np.float32)
    ids = SemanticIDs.fit(x, TokenizerConfig(levels=2, codes=8))
    torch.manual_seed(0)
    config = GeneratorConfig(
        items=ITEMS, text_dim=DIMENSIONS, d_model=16, heads=2, d_ff=32, encoder_layers=1, decoder_layers=1, levels=2,
        codes=8, max_history=6, dropout=0.1, scenarios=["home", "item", "search", "discovery"],
    )  # fmt: skip
    model = GeneratorModel(config).set_catalog(ids.trie, torch.from_numpy(x))
    users, length = 30, 7
    items = (rng.integers(0, ITEMS, (users, 1)) + np.arange(length)) % ITEMS
    train = Sequences(
        [str(u) for u in range(users)],
        np.arange(users + 1, dtype=np.int64) * length,
        items.reshape(-1).astype(np.int32),
        np.tile(np.arange(length) * 86400.0, users),
        np.ones(users * length, np.float32),
        np.full(users * length, np.nan, np.float32),
    )
    every = np.ones(train.events, bool)
    tasks = (
        ScenarioTask("item", every, 0.2, trigger=True),
        ScenarioTask("search", every, 0.2, query=True),
        ScenarioTask("discovery", train.items >= 12, 0.2),
    )
    data = TrainingData(train, tasks, {"home": 0, "item": 1, "search": 2, "discovery": 3}, x[:, None], DIMENSIONS)
    fold = np.arange(users) % 2
    judge = Judge({}, np.eye(ITEMS, dtype=np.float32), np.full(ITEMS, 0.5, np.float32))
    bench = Bench.of([judge, judge], ids.trie, x, lambda _: {}, train)
    return model, Positions(data, fold, x), bench


class Ranker:
    """A tool that ranks the same for everyone: the higher the row, the better."""

    def score_all(self, contexts: list) -> np.ndarray:
        return np.tile(np.arange(ITEMS, dtype=np.float32), (len(contexts), 1))


def ranked(bench: Bench) -> Bench:
    judges = tuple(replace(j, tools={"ranker": Ranker()}) for j in bench.judges)  # type: ignore[dict-item]
    return replace(bench, judges=judges, fusion=lambda _: {"ranker": 1.0})


RANKING = ScenarioWeights({"home": {"ranking": 1.0}}, {"home": 1.0})
TAIL = ScenarioWeights(
    {n: {"format": 0.1, "tail": 0.9} for n in ("home", "item", "search", "discovery")}, {"home": 1.0}
)


def settings(**changes: object) -> AlignConfig:
    made: dict[str, object] = {
        "bundle": Path("b"), "out": Path("o"), "steps": 12, "updates": 3, "requests": 8, "group": 6, "anchor": 0.1,
        "anchor_positions": 64, "evaluate_steps": 6, "patience": 0, "learning_rate": 1e-2,
    }  # fmt: skip
    return AlignConfig(**(made | changes))  # type: ignore[arg-type]


def aligner(config: AlignConfig, weights: ScenarioWeights = TAIL) -> Aligner:
    model, positions, bench = world()
    return Aligner(model, positions, bench, weights, config, [f"item {i}" for i in range(ITEMS)])


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def constant(_: GeneratorModel) -> dict[str, float]:
    return {"ndcg": 0.5}


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_earns_more_of_what_is_rewarded(loss: str, tmp_path: Path) -> None:
    """The reward is the long tail, which has nothing to do with the target: the floor stays out of its way."""
    run = aligner(settings(loss=loss, steps=60, anchor=0.0, evaluate_steps=60, floor=False))
    run.run(tmp_path, constant, lambda _: None)
    said = log(tmp_path)
    first, last = (np.mean([line["reward"] for line in part]) for part in (said[1:4], said[-3:]))
    assert last > first + 0.05
    assert all(not line["skipped"] for line in said[1:])


@pytest.mark.parametrize("rollouts", ["sampled", "beam"])
def test_the_anchored_ranking_leads_to_the_start_times_the_rankers_exponential(rollouts: str, tmp_path: Path) -> None:
    """pi0 exp(s / beta), among what may be recommended: the order of the fused list."""
    model, positions, bench = world()
    config = settings(steps=60, anchor=0.0, evaluate_steps=60, rollouts=rollouts, group=12, beta=1.0, average=0.5,
                      injected=4, floor=False)  # fmt: skip
    run = Aligner(model, positions, ranked(bench), RANKING, config)
    assert run.start is not None
    contexts, _ = positions.draw(30, {"home": 1.0}, np.random.default_rng(5))
    history, request = make_history(contexts, 6), make_request(model, contexts)
    every = torch.arange(ITEMS).expand(30, -1)
    allowed = torch.from_numpy(allowed_items(contexts, ITEMS))

    def log_p(scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(~allowed, -1e9).log_softmax(-1)

    s = torch.from_numpy(standardise(Ranker().score_all(contexts)))
    start = log_p(score_items(run.start, history, request, every))
    aim = log_p(start + s)
    run.run(tmp_path, constant, lambda _: None)
    run.use(run.average)
    end = log_p(score_items(run.model, history, request, every))
    far, near = ((aim.exp() * (aim - x)).sum(1).mean() for x in (start, end))
    assert near < 0.75 * far
    assert log(tmp_path)[-1]["drift"] > 0


def test_the_rankers_score_and_drift_count_alike_in_every_scenario() -> None:
    """All completions are legal: `format` adds the same to each, and takes weight from the ranking."""
    model, positions, bench = world()
    config, shares = settings(beta=1.0, requests=24), {"home": 0.5, "item": 0.5}
    heavy = ScenarioWeights({"home": {"ranking": 1.0}, "item": {"ranking": 1.0}}, shares)
    light = ScenarioWeights({"home": {"ranking": 1.0}, "item": {"ranking": 0.1, "format": 0.9}}, shares)
    found = []
    for weights in (heavy, light):
        run = Aligner(model, positions, ranked(bench), weights, config)
        assert run.start is not None
        torch.manual_seed(0)
        for p in run.start.parameters():  # as after some steps: the policy has drifted
            p.add_(0.2 * torch.randn_like(p))
        found.append(run.roll_out())
    one, two = found
    mine = np.array([c.scenario == "item" for c in two.contexts])
    assert torch.equal(one.items, two.items) and 0 < mine.sum() < len(mine) and np.abs(one.drift).max() > 0.1
    assert torch.allclose(one.advantages, two.advantages, atol=1e-3) and one.advantages.abs().max() > 0.5
    assert torch.equal(one.zeroed, two.zeroed) and one.zeroed[mine].any()
    assert (
        two.rewards.total[mine].max() < one.rewards.total[mine].max()
    )  # what is said of them is as the weights have it
    none = ScenarioWeights({"home": {"tail": 1.0}}, {"home": 1.0})
    plain = Aligner(model, positions, ranked(bench), none, settings(floor=False)).roll_out()
    total = torch.from_numpy(plain.rewards.total)
    assert torch.allclose(plain.advantages, total - total.mean(1, keepdim=True), atol=1e-6)
    assert unit(np.array([0.8, 0.05, 0.001, 0.0])).tolist() == [0.8, 0.05, 0.05, 1.0]


def test_a_beams_last_completions_are_the_target_and_the_rankers_best() -> None:
    model, positions, bench = world()
    run = Aligner(model, positions, ranked(bench), RANKING, settings(rollouts="beam", group=8, injected=4))
    rollout = run.roll_out()
    wanted = rollout.rewards.hits.sum(1)
    allowed = allowed_items(rollout.contexts, ITEMS)
    floors = np.isfinite(rollout.rewards.floor)
    assert (wanted[floors] == 1).all() and floors.any()
    for items, may in zip(rollout.items.tolist(), allowed, strict=True):
        assert len(set(items)) == 8 and may[items].all()
        assert set(np.flatnonzero(may)[-3:].tolist()) <= set(items)
    _, said = run.update(rollout, None)  # pi_old is taken of what was injected too
    assert said["ratio_mean"] == 1.0 and not said["skipped"]


def test_shuffled_rewards_and_no_policy_loss_are_controls() -> None:
    one, two = (aligner(settings(shuffled=x), ScenarioWeights.load()).roll_out() for x in (False, True))
    assert torch.equal(one.items, two.items)
    assert (np.sort(one.rewards.total, 1) == np.sort(two.rewards.total, 1)).all()
    assert (one.rewards.total != two.rewards.total).any()
    run = aligner(settings(policy=0.0, anchor=0.0))
    before = [p.detach().clone() for p in run.parameters]
    _, said = run.update(run.roll_out(), None)
    assert said["gradient_norm"] == 0
    assert all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(before, run.parameters, strict=True))  # weight decay


def test_the_untouched_model_comes_back_where_nothing_is_better(tmp_path: Path) -> None:
    run = aligner(settings())
    before = [p.detach().clone() for p in run.parameters]
    values = iter([0.9, 0.5, 0.8])
    model = run.run(tmp_path, lambda _: {"ndcg": next(values)}, lambda _: None)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert verdict((tmp_path / "log.jsonl").read_text()) == (
        "validation NDCG@10 0.9000: no later weights passed the guard, the model stays as it was"
    )


def test_the_best_average_is_kept_and_patience_ends_the_run(tmp_path: Path) -> None:
    run = aligner(settings(steps=60, patience=2))
    values, seen = iter([0.1, 0.7, 0.6, 0.5, 0.4]), []

    def evaluate(m: GeneratorModel) -> dict[str, float]:
        seen.append(m.start.detach().clone())
        return {"ndcg": next(values)}

    model = run.run(tmp_path, evaluate, lambda _: None)
    assert len(seen) == 4 and run.step == 18  # two validations after the best, then the end
    assert torch.equal(model.start, seen[1])
    assert verdict((tmp_path / "log.jsonl").read_text()) == "validation NDCG@10 0.1000 -> 0.7000 at step 6"


def test_the_guard_against_harm_keeps_the_last_weights_that_are_not_significantly_worse(tmp_path: Path) -> None:
    run = aligner(settings(steps=60, guard="harm", patience=2))
    values, seen = iter([(0.5, 0.0), (0.3, 0.1), (0.4, 0.01), (0.2, -0.01), (0.1, -0.2), (0.9, 0.9)]), []

    def evaluate(m: GeneratorModel) -> dict[str, float]:
        seen.append(m.start.detach().clone())
        return dict(zip(("ndcg", "high"), next(values), strict=True))

    model = run.run(tmp_path, evaluate, lambda _: None)
    assert len(seen) == 5 and torch.equal(model.start, seen[2])
    assert verdict((tmp_path / "log.jsonl").read_text()) == "validation NDCG@10 0.5000 -> 0.4000 at step 12"


class Killed(Exception):
    pass


def test_a_killed_run_ends_with_the_same_weights_and_the_same_log(tmp_path: Path) -> None:
    config = settings(steps=18, checkpoint_seconds=0.0)

    def run(folder: Path, kill_at: int | None) -> GeneratorModel:
        calls = 0

        def evaluate(m: GeneratorModel) -> dict[str, float]:
            return {"ndcg": float(m.start.detach().sum())}

        def report(line: dict) -> None:
            nonlocal calls
            calls += 1
            if calls == kill_at:  # after the log, before the checkpoint
                raise Killed

        return aligner(config).run(folder, evaluate, report)

    whole = run(tmp_path / "whole", None)
    for kill_at in (1, 3, 2):
        with pytest.raises(Killed):
            run(tmp_path / "broken", kill_at)
    resumed = run(tmp_path / "broken", None)
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    one, two = (
        [{k: v for k, v in x.items() if k != "seconds"} for x in log(tmp_path / n)] for n in ("whole", "broken")
    )
    assert one == two
    again = run(tmp_path / "broken", None)  # a finished run is only read
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    aligner(settings(steps=3)).run(tmp_path, constant, lambda _: None)
    with pytest.raises(GenrecError, match="alignment of other settings"):
        aligner(settings(steps=3, learning_rate=1e-3)).run(tmp_path, constant, lambda _: None)
    other = ScenarioWeights(TAIL.weights, {"home": 0.5, "item": 0.5})
    with pytest.raises(GenrecError, match="of other settings"):
        aligner(settings(steps=3), other).run(tmp_path, constant, lambda _: None)


def test_the_log_holds_what_must_be_watched(tmp_path: Path) -> None:
    weights = ScenarioWeights.load()
    aligner(settings(steps=6), weights).run(tmp_path, constant, lambda _: None)
    first, *rest = log(tmp_path)
    assert first == {"step": 0, "validation": {"ndcg": 0.5}, "best": 0.5, "kept": 0}
    for line in rest:
        assert set(line["reward_by_part"]) >= {"format", "hit", "ranking"} and line["reward_by_part"]["format"] == 1
        assert 0 <= line["suppressed"] <= 1 and 0 <= line["groups_without_positive"] <= 1
        assert len(line["entropy"]) == 2 == len(line["legality"]) and line["legality"][0] == pytest.approx(1)
        for shares in (line["ratio_histogram"], line["gate_histogram"]):  # written with six digits each
            assert sum(shares) == pytest.approx(1, abs=1e-4)
        assert line["ratio_largest"] != 1.0  # the last of several steps is off-policy: the gate works
        assert {"rollout", "reward", "update"} <= set(line["seconds"])
        assert line["completions"] == 48


def test_the_first_of_several_steps_is_on_policy() -> None:
    run = aligner(settings())
    rollout = run.roll_out()
    old, said = run.update(rollout, None)
    assert said["ratio_mean"] == 1.0 == said["ratio_largest"]
    _, said = run.update(rollout, old)
    assert said["ratio_largest"] > 1.0


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    run = aligner(settings())
    rollout = run.roll_out()
    old, _ = run.update(rollout, None)
    before = [p.detach().clone() for p in run.parameters]
    run.loss = lambda new, *_: new.sum() * torch.nan
    _, said = run.update(rollout, old)
    assert said["skipped"] and all(torch.equal(a, b) for a, b in zip(before, run.parameters, strict=True))


def test_a_run_resumes_after_a_step_that_was_left_out(tmp_path: Path) -> None:
    """The optimiser's own count of steps is stored: a skipped one is none of them."""

    def run(folder: Path, kill_at: int | None) -> GeneratorModel:
        one, calls = aligner(settings(steps=9, checkpoint_seconds=0.0)), 0
        real = one.loss

        def loss(new: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            return new.sum() * torch.nan if one.step == 1 else real(new, *rest)

        def report(_: dict) -> None:
            nonlocal calls
            calls += 1
            if calls == kill_at:
                raise Killed

        one.loss = loss
        return one.run(folder, lambda m: {"ndcg": float(m.start.detach().sum())}, report)

    whole = run(tmp_path / "whole", None)
    with pytest.raises(Killed):
        run(tmp_path / "broken", 3)  # its checkpoint was written after the first batch, with the skipped step in it
    resumed = run(tmp_path / "broken", None)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_requests_of_rollouts_follow_the_instructions_of_the_timeline() -> None:
    model, positions, bench = world()
    events = positions.data.train.events
    told = np.where(np.arange(events) % 2, np.arange(events) % 3, -1).astype(np.int32)
    written = np.random.default_rng(2).normal(size=(3, DIMENSIONS)).astype(np.float32)
    data = replace(positions.data, told=told, instructions=written)
    at = np.array([1, 2, 3])
    queries = np.full((3, DIMENSIONS), np.nan, np.float32)
    queries[2] = 7.0
    found = replace(positions, data=data).told(at, queries)
    assert found is not None and (found[0] == written[1]).all() and np.isnan(found[1]).all() and (found[2] == 7).all()
    assert positions.told(at, None) is None
    run = Aligner(model, replace(positions, data=data), bench, TAIL, settings(requests=30))
    given = run.roll_out().request.instructed
    assert given.any() and not given.all()


def test_requests_take_turns_among_users_and_qualify_for_their_scenario() -> None:
    _, positions, _ = world()
    shares = {"home": 0.25, "item": 0.25, "search": 0.25, "discovery": 0.25}
    contexts, events = positions.draw(30, shares, np.random.default_rng(0))
    train = positions.data.train
    assert sorted(c.user for c in contexts) == sorted(train.users)  # type: ignore[type-var]
    for context, event in zip(contexts, events.tolist(), strict=True):
        start = int(train.offsets[train.user_of[event]])
        assert context.history == tuple(train.items[start:event].tolist()) and context.history
        assert (context.trigger == context.history[-1]) if context.scenario == "item" else context.trigger is None
        assert context.scenario != "discovery" or train.items[event] >= 12
    asked = positions.asked(contexts, train.items[events])
    assert asked is not None
    for context, row in zip(contexts, asked, strict=True):
        assert np.isfinite(row).all() == (context.scenario == "search")
    assert len(positions.draw(100, shares, np.random.default_rng(0))[0]) == 100  # more than there are users


def test_missing_and_equal_rewards_say_nothing() -> None:
    total = np.array([[0.5, 0.5, 0.5], [0.1, 0.9, 0.4], [0.1, 0.9, 0.4]], np.float32)
    floor = np.array([0.9, 0.95, np.nan], np.float32)
    given = Rewards(total, total, floor, np.zeros((3, 3), bool), {})
    items = np.array([[1, 2, 3], [1, 2, -1], [1, 2, 3]])
    advantages, zeroed = advantages_of(given, items, settings())
    assert advantages[0].tolist() == [0, 0, 0]
    assert advantages[1, 2] == 0 and advantages[1, 0] < 0 and zeroed[1].tolist() == [False, True, False]
    assert advantages[2, 1] > 0 and not zeroed[2].any()  # no target, no floor
    assert advantages[2].tolist() == pytest.approx(total[2] - total[2].mean(), abs=1e-6)  # not divided
    divided = advantages_of(given, items, settings(ranking="place"))[0]
    assert float(divided[2].std()) == pytest.approx(1, abs=1e-3)
    for other in (settings(loss="sapo"), settings(floor=False)):
        assert not advantages_of(given, items, other)[1].any()


def test_temperatures_go_to_the_gated_losses_alone() -> None:
    new, old = torch.zeros(1, 1), torch.full((1, 1), -0.7)
    rest = (torch.ones(1), torch.ones(1, 1, dtype=torch.bool))
    for loss in ("sa-gcpo", "sapo"):
        one, two = (loss_function(settings(loss=loss, temperature_positive=t))(new, old, *rest) for t in (1.0, 3.0))
        assert one != two
    assert loss_function(settings(loss="grpo", temperature_positive=9.0))(new, old, *rest).item() == pytest.approx(-1.2)


def test_the_learning_rate_warms_up_and_falls_to_nothing() -> None:
    config = settings(steps=400, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in range(401)]
    assert rates[0] == pytest.approx(0.05) and max(rates) > 0.99
    assert rates[200] == pytest.approx(0.5) and rates[400] == pytest.approx(0)
    assert all(a >= b for a, b in itertools.pairwise(rates[20:]))


def test_histograms_are_shares_and_open_above() -> None:
    assert histogram(np.array([0.1, 0.9, 5.0, 1e9]), (0.0, 0.5, 2.0)) == [0.25, 0.25, 0.5]
    assert histogram(np.zeros(0), (0.0, 1.0)) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"loss": "ppo"}, "unknown loss 'ppo'; there are: sa-gcpo"), ({"rollouts": "greedy"}, "unknown rollouts"),
     ({"group": 1}, "group is 1; it must be at least 2"), ({"steps": 0}, "steps is 0"),
     ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"), ({"anchor": -1.0}, "anchor is -1.0"),
     ({"temperature_negative": float("nan")}, "temperature_negative is nan"), ({"average": 1.0}, "average is 1.0"),
     ({"ranking": "best"}, "unknown ranking"), ({"guard": "none"}, "unknown guard"), ({"beta": -1.0}, "beta is -1.0"),
     ({"rollouts": "beam", "injected": 6}, r"injected is 6; it must be less than group \(6\)"),
     ({"teaching": 1.5}, "teaching is 1.5")],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(GenrecError, match=message):
        settings(**changes)


def test_the_choices_of_the_flag_are_the_losses_there_are() -> None:
    from genrec.alignment import losses

    assert tuple(losses.LOSSES) == LOSSES
