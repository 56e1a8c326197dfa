"""Instructions for training positions: each from the events before it alone, and a fit that follows them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from genrec.bundle import Bundle
from genrec.data import Dataset, leave_one_out, load_dataset
from genrec.data.dataset import Sequences
from genrec.errors import GenrecError
from genrec.instructions import open_store
from genrec.instructions.timeline import Timeline
from serving.llm import Scripted
from training.evaluate import instruction_vectors, requests_of, shortlists
from training.fit import FitConfig, fit
from training.instructions import main, points, write

REPLY = json.dumps({"situation": "a shopper", "intents": ["tea"], "look_for": "green tea"})


def changed_after(dataset: Dataset, user: int, event: int) -> Dataset:
    """The same data set in which everything the user did from `event` on is another item."""
    s = dataset.sequences
    items = s.items.copy()
    start, end = int(s.offsets[user]) + event, int(s.offsets[user + 1])
    items[start:end] = (items[start:end] + 17) % len(dataset.catalog)
    return replace(dataset, sequences=Sequences(s.users, s.offsets, items, s.times, s.weights, s.ratings))


def test_points_lie_in_training_and_at_the_first_requests(shop_folder: Path) -> None:
    dataset = load_dataset(shop_folder)
    split = leave_one_out(dataset)
    found = points(split, window=1, windows=2)
    lengths = dataset.sequences.lengths
    for u in range(len(lengths)):
        mine = {n for user, n in found if user == u}
        whole = int(lengths[u])
        wanted = {n for n in (whole - 4, whole - 3, whole - 2, whole - 1) if n >= 5}
        assert mine == wanted  # two windows of training (whole - 2 events), validation, test


def test_points_of_a_sample_are_points_of_all_and_the_same_again(shop_folder: Path) -> None:
    split = leave_one_out(load_dataset(shop_folder))
    everyone, some = points(split, window=1, windows=1), points(split, window=1, windows=1, users=3)
    chosen = {u for u, _ in some}
    assert len(chosen) == 3 and some == [p for p in everyone if p[0] in chosen]
    assert some == points(split, window=1, windows=1, users=3) != points(split, 1, 1, 3, seed=1)
    told = points(split, window=1, windows=1, validation=False)
    validation = {(u, len(c.history)) for u, c in zip(split.validation.users, split.validation.contexts, strict=True)}
    assert told == [p for p in everyone if p not in validation]
    with pytest.raises(GenrecError, match=r"1,000,000 users were asked for; only \d+"):
        points(split, users=1_000_000)


def test_an_instruction_never_depends_on_what_comes_later(shop_folder: Path) -> None:
    dataset = load_dataset(shop_folder)
    asked = points(leave_one_out(dataset), window=1, windows=3)
    user, events = asked[len(asked) // 2]
    before = write(dataset, asked, "intent_v2", None, None)
    after = write(changed_after(dataset, user, events), asked, "intent_v2", None, None)
    earlier = [i for i, p in enumerate(asked) if p[0] != user or p[1] <= events]
    assert [before.texts[i] for i in earlier] == [after.texts[i] for i in earlier]
    assert before.texts != write(changed_after(dataset, user, 0), asked, "intent_v2", None, None).texts


def test_a_model_is_asked_once_for_each_point(shop_folder: Path, tmp_path: Path) -> None:
    dataset = load_dataset(shop_folder)
    asked = points(leave_one_out(dataset), window=1, windows=1)
    model = Scripted(lambda chat: REPLY)
    for _ in range(2):
        with open_store(tmp_path / "store.sqlite") as store:
            timeline = write(dataset, asked, "intent_v2", model, store, lambda line: None)
    assert len(model.calls) == len(asked) == len(timeline)
    assert set(timeline.texts) == {"green tea"} and set(timeline.models) == {"scripted"}


def test_the_command_writes_shuffles_and_refuses(
    shop_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["--data", str(shop_folder), "--protocol", "leave-one-out", "--window", "1"]
    assert main([*ask, "--out", str(tmp_path / "plain.parquet")]) == 0
    assert main(["--shuffle", str(tmp_path / "plain.parquet"), "--out", str(tmp_path / "mixed.parquet")]) == 0
    plain, mixed = (Timeline.load(tmp_path / f"{n}.parquet") for n in ("plain", "mixed"))
    assert plain.users == mixed.users and plain.texts != mixed.texts
    capsys.readouterr()
    assert main([*ask, "--window", "0", "--out", str(tmp_path / "x.parquet")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0 and "at least 1" in error and not (tmp_path / "x.parquet").exists()


@pytest.mark.real
def test_a_fit_follows_the_instructions(
    tiny_config: Callable[..., FitConfig], shop_folder: Path, tmp_path: Path
) -> None:
    """The whole way with the packaged text encoder: trained, kept in the bundle, found again at evaluation."""
    ask = ["--data", str(shop_folder), "--protocol", "leave-one-out", "--window", "1", "--windows", "5"]
    assert main([*ask, "--out", str(tmp_path / "plain.parquet")]) == 0
    said: list[str] = []
    config = tiny_config(
        tmp_path / "told", embeddings="", instructions=str(tmp_path / "plain.parquet"), retrieved=2, recent=2
    )
    bundle = Bundle.load(fit(config, said.append))
    timeline, dataset = bundle.timeline, bundle.dataset
    assert timeline is not None and any("training positions follow one of" in line for line in said)
    assert bundle.generator.config.retrieved == 2
    test = leave_one_out(dataset).test
    vectors = instruction_vectors(bundle, test)
    assert vectors is not None
    told = ~np.isnan(vectors).any(1)
    assert told.tolist() == [len(c.history) >= 5 for c in test.contexts]
    first = int(np.flatnonzero(told)[0])
    index = int(timeline.find(test.contexts[first].user or "", np.array([len(test.contexts[first].history)]))[0])
    assert vectors[first] == pytest.approx(bundle.embedder([timeline.texts[index]])[0], abs=1e-5)


def test_a_search_is_measured_with_its_query(tiny_bundle: Path, tmp_path: Path) -> None:
    """Evaluation and the choice of fusion weights tell the generator what a recommender tells it online."""
    bundle = Bundle.load(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    split = leave_one_out(bundle.dataset)
    asked = requests_of(bundle, split, split.test, "search")
    assert instruction_vectors(bundle, asked) is None  # own embeddings: it cannot read
    bundle.config["embeddings"] = ""
    read: list[str] = []

    def embedder(texts: list[str], report: object = None) -> np.ndarray:
        read.extend(texts)
        return np.repeat(bundle.embeddings[:1], len(texts), 0)

    bundle.__dict__["embedder"] = embedder
    assert instruction_vectors(bundle, split.test) is None and not read
    vectors = instruction_vectors(bundle, asked)
    assert vectors is not None and (vectors == bundle.embeddings[0]).all()
    assert set(read) == {c.query for c in asked.contexts}
    told = next(shortlists(bundle, asked, {}))[1].beam_scores
    silent = replace(asked, contexts=[replace(c, query=None) for c in asked.contexts])
    assert not np.array_equal(told, next(shortlists(bundle, silent, {}))[1].beam_scores)
