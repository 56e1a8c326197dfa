"""The generator learns what there is to learn, and a killed run ends where an unbroken one does."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from genrec.data.dataset import Sequences
from genrec.errors import GenrecError
from genrec.generator.batches import Batch, ScenarioTask, TrainingData
from genrec.generator.config import GeneratorConfig
from genrec.generator.model import GeneratorModel
from genrec.generator.search import beam_search, make_history, make_request
from genrec.tokenizer.semantic_ids import SemanticIDs, TokenizerConfig
from training.generator import Progress, TrainingConfig, loss_of, train

ITEMS = 24


def cycle(users: int = 60, length: int = 9) -> Sequences:
    """Everybody walks round the catalogue: item i is followed by i + 1."""
    rng = np.random.default_rng(0)
    items = (rng.integers(0, ITEMS, (users, 1)) + np.arange(length)) % ITEMS
    offsets = np.arange(users + 1, dtype=np.int64) * length
    n = items.size
    return Sequences(
        [str(u) for u in range(users)],
        offsets,
        items.reshape(-1).astype(np.int32),
        np.tile(np.arange(length) * 86400.0, users),
        np.ones(n, np.float32),
        np.full(n, np.nan, np.float32),
    )


def model_and_data(dropout: float = 0.1) -> tuple[GeneratorModel, TrainingData]:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(ITEMS, 8)).astype(np.float32)
    ids = SemanticIDs.fit(x, TokenizerConfig(levels=2, codes=8))
    torch.manual_seed(0)
    config = GeneratorConfig(
        items=ITEMS, text_dim=8, d_model=16, heads=2, d_ff=32, encoder_layers=1, decoder_layers=1, levels=2, codes=8,
        max_history=6, dropout=dropout, scenarios=["home", "item", "search"],
    )  # fmt: skip
    model = GeneratorModel(config).set_catalog(ids.trie, torch.from_numpy(x))
    sequences = cycle()
    everything = np.ones(sequences.events, bool)
    tasks = (
        ScenarioTask("item", everything, 0.2, trigger=True),
        ScenarioTask("search", everything, 0.2, query=True),
    )
    return model, TrainingData(sequences, tasks, {"home": 0, "item": 1, "search": 2}, x[:, None], 8)


def test_a_rule_in_the_data_is_learned(tmp_path: Path) -> None:
    model, data = model_and_data(dropout=0.0)
    said: list[Progress] = []
    config = TrainingConfig(epochs=60, positions=256, learning_rate=1e-2, warmup=5, evaluations=2)
    train(model, data, config, tmp_path, lambda m: 0.5, said.append)
    batch = data.batch(data.epoch(6, 256, 0, 0)[0], 0)
    with torch.no_grad():
        loss, _ = loss_of(model, batch)
    assert loss < 0.5 < sum(said[0].loss)


def test_what_the_profile_alone_says_is_learned(tmp_path: Path) -> None:
    """All begin with item 0; those of one plan go on to 1, those of the other to 2."""
    base, _ = model_and_data(dropout=0.0)
    reads = GeneratorConfig(**base.config.to_dict() | {"profiles": True})
    model = GeneratorModel(reads).set_catalog(base.trie, base.item_text)
    users = 64
    train_on = Sequences(
        [f"u{i}" for i in range(users)],
        np.arange(0, 2 * users + 1, 2),
        np.array([[0, 1 + i % 2] for i in range(users)], np.int32).ravel(),
        np.tile(np.arange(2.0), users),
        np.ones(2 * users, np.float32),
        np.full(2 * users, np.nan, np.float32),
        [(("plan", ("free", "paid")[i % 2]),) for i in range(users)],
    )
    data = TrainingData(train_on, (), {"home": 0}, None, 8)
    config = TrainingConfig(epochs=80, positions=64, learning_rate=1e-2, warmup=5, evaluations=1)
    train(model, data, config, tmp_path, lambda m: 0.5)
    contexts = [train_on.context(0, 1), train_on.context(1, 1)]
    beam = beam_search(model.eval(), make_history(contexts, 6), make_request(model, contexts), 3)
    assert beam.items[:, 0].tolist() == [1, 2] and (beam.scores[:, 0] > -0.1).all()


def test_the_tools_teach_first_and_the_users_own_choices_finish(tmp_path: Path) -> None:
    model, data = model_and_data()
    taught = np.zeros((data.train.events, 1), np.int32)  # the tools always say 0
    zeros: list[float] = []

    class Watched(TrainingData):
        def batch(self, windows: np.ndarray, seed: int, teaching: float = 0.0) -> Batch:
            made = super().batch(windows, seed, teaching)
            at_home = (made.targets >= 0) & (made.request.scenario == 0)
            zeros.append(float((made.targets[at_home] == 0).float().mean()))
            return made

    watched = Watched(**{f.name: getattr(data, f.name) for f in fields(data)} | {"taught": taught})
    config = TrainingConfig(epochs=5, positions=10_000, evaluations=1, teaching=1.0)
    train(model, watched, config, tmp_path, lambda m: 0.0)
    assert zeros[:3] == [1.0] * 3
    assert len(zeros) == 5 and max(zeros[3:]) < 0.5


class Killed(Exception):
    pass


def test_a_killed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    config = TrainingConfig(epochs=4, positions=64, evaluations=4)

    def run(folder: Path, kill_at: int | None) -> GeneratorModel:
        model, data = model_and_data()
        calls = 0

        def evaluate(m: GeneratorModel) -> float:
            nonlocal calls
            calls += 1
            if calls == kill_at:
                raise Killed
            return float(m.start.detach().sum())

        return train(model, data, config, folder, evaluate, checkpoint_seconds=0.0)

    whole = run(tmp_path / "whole", None)
    with pytest.raises(Killed):
        run(tmp_path / "broken", 2)
    with pytest.raises(Killed):
        run(tmp_path / "broken", 2)
    resumed = run(tmp_path / "broken", None)
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    model, data = model_and_data()
    train(model, data, TrainingConfig(epochs=1, evaluations=1), tmp_path, lambda m: 0.0)
    with pytest.raises(GenrecError, match="another configuration"):
        train(model, data, TrainingConfig(epochs=2, evaluations=1), tmp_path, lambda m: 0.0)


def test_the_best_average_is_kept(tmp_path: Path) -> None:
    model, data = model_and_data()
    scores = iter([0.9, 0.1, 0.2])
    kept: list[torch.Tensor] = []

    def evaluate(m: GeneratorModel) -> float:
        kept.append(m.start.detach().clone())
        return next(scores)

    train(model, data, TrainingConfig(epochs=3, positions=64, evaluations=3), tmp_path, evaluate)
    assert torch.equal(model.start, kept[0]) and not torch.equal(kept[0], kept[2])


def test_windows_cover_long_sequences_and_every_position_has_one_target() -> None:
    _, data = model_and_data()
    seen = np.zeros(data.train.events, int)
    for windows in data.epoch(4, 64, seed=3, epoch=1):
        batch = data.batch(windows, 0)
        assert batch.history.rows.shape[1] <= 4
        for start, end in windows:
            seen[start + 1 : end] += 1
    first = np.zeros(data.train.events, bool)
    first[data.train.offsets[:-1]] = True
    assert (seen[~first] == 1).all() and (seen[first] == 0).all()


def test_scenarios_are_drawn_by_their_shares_and_carry_what_they_promise() -> None:
    _, data = model_and_data()
    batch = data.batch(data.train.offsets[:-1, None] + np.array([[0, 9]]), 0)
    scenario, real = batch.request.scenario, batch.targets >= 0
    assert 0.1 < (scenario[real] == 1).float().mean() < 0.3
    assert torch.equal(batch.request.trigger[scenario == 1], batch.history.rows[scenario == 1])
    assert not batch.request.instructed[scenario != 2].any()
    told = batch.request.instructed
    assert 0.7 < told[scenario == 2].float().mean() < 1.0  # the rest keep the learned default
    wanted = torch.from_numpy(data.queries)[batch.targets[told], 0]  # type: ignore[arg-type]
    assert torch.equal(batch.request.instruction[told], wanted)


def test_nothing_to_learn_from_is_said() -> None:
    one = cycle().keep(np.arange(60 * 9) % 9 == 0)
    with pytest.raises(GenrecError, match="nothing to learn"):
        TrainingData(one, (), {"home": 0}, None, 8)
