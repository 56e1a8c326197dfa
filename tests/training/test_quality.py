"""The quality report: every writer at the same validation requests, replies kept, controls beside the figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import training.quality
from genrec.instructions.context import Chat
from serving.llm import Scripted
from training.quality import main


def reply(chat: Chat) -> str:
    """Names the kinds that the prompt shows; breaks off where there is one only."""
    kinds = next(line for line in chat[-1]["content"].split("\n") if line.startswith("Kinds: ")).removeprefix("Kinds: ")
    text = json.dumps({"situation": f"likes {kinds}", "intents": [kinds[:30]], "look_for": kinds[:70]})
    return text if "," in kinds else text[:20]


@pytest.mark.real
def test_the_report_has_every_writer_its_controls_and_its_provenance(
    shop_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engines: list[Scripted] = []

    def start(*_: Any, **__: Any) -> Scripted:
        engines.append(Scripted(reply, name="zero-shot"))
        return engines[-1]

    monkeypatch.setattr(training.quality, "open_model", start)
    ask = ["--data", str(shop_folder), "--protocol", "leave-one-out", "--writers", "template", "values", "packaged"]
    ask += ["--free", "3", "--show", "2", "--out", str(tmp_path / "report")]
    assert main(ask) == 0
    assert len(engines) == 1 and len(engines[0].calls) == 43  # forty users, three of them twice
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    rows = {row["system"]: row["metrics"] for row in report["rows"]}
    assert list(rows) == ["history alone", "template", "template + values", "zero-shot", "zero-shot, no grammar"]
    template, model = rows["template"], rows["zero-shot"]
    assert template["valid"]["mean"] == template["grounded"]["mean"] == 1 > model["valid"]["mean"] > 0
    assert template["intent hit"]["mean"] > template["intent hit, shuffled"]["mean"]  # users stay in their category
    assert template["named"]["mean"] > 0.5 and template["distinct"]["mean"] > 0.5  # the proposals are each user's own
    assert all(interval["low"] <= interval["mean"] <= interval["high"] for interval in template.values())
    pairs = {(c["system"], c["baseline"]) for c in report["comparisons"]}
    assert ("zero-shot", "template") in pairs and ("template", "zero-shot") not in pairs
    assert ("zero-shot", "its texts shuffled") in pairs and ("history + zero-shot", "history alone") in pairs
    assert {"protocol", "command", "commit", "machine", "seconds"} <= set(report["about"])
    shown = capsys.readouterr().err
    assert "1. newest:" in shown and "zero-shot: likes" in shown and "2. newest:" not in shown
    assert main(ask) == 0 and len(engines) == 1  # the replies are kept
    assert main([*ask, "--free", "4"]) == 0 and len(engines) == 2  # another question is asked anew


def test_bad_arguments_are_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--users", "-1"], ["--data", "nowhere"], ["--writers", "./none"]):
        assert main(["--out", str(tmp_path / "r"), "--users", "2", *wrong]) == 2
        error = capsys.readouterr().err.strip().split("\n")
        assert "Traceback" not in error[-1] and not (tmp_path / "r").exists()
