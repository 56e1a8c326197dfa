"""Alignment from bundle to bundle: what comes before and after the loop, the command, and the last line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from genrec.errors import GenrecError
from training.align import Align
from training.align_config import AlignConfig
from training.evaluate import ALONE_ROW
from training.fit import SPLITS, Fit

ITEMS, DIMENSIONS = 24, 8


@pytest.mark.parametrize("name", ["queries", "taught.safetensors"])
def test_what_alignments_share_is_made_once_and_taken_over_whole(name: str, tmp_path: Path) -> None:
    def one(work: str) -> Align:
        align = Align.__new__(Align)
        align.work, align.shared = tmp_path / work, tmp_path / "shared"
        align.work.mkdir()
        return align

    def make() -> str:
        path = first.work / name
        if name == "queries":
            path.mkdir()
            path = path / "embeddings.safetensors"
        path.write_text("whole")
        return "made"

    first, second = one("a"), one("b")
    assert first.once(name, make) == "made"
    if name == "queries":  # what a killed copy left
        (second.work / name).mkdir()
        (second.work / name / "embeddings.safetensors").write_text("ha")
    else:
        (second.work / name).write_text("ha")
    assert second.once(name, lambda: pytest.fail("made twice")) == "as for the alignments before"
    files = [sorted(p.relative_to(a.work) for p in a.work.rglob("*")) for a in (first, second)]
    assert files[0] == files[1] and [p.name for p in second.shared.iterdir()] == [name]
    assert all(p.read_text() == "whole" for p in second.work.rglob("*.safetensors"))
    alone = one("c")
    alone.shared = alone.work
    assert alone.once(name, lambda: "made") == "made"


def test_a_bundle_becomes_an_aligned_bundle_and_stays_one(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genrec.bundle import Bundle
    from training.align import Align, align

    config = AlignConfig(
        tiny_bundle, tmp_path / "aligned", steps=6, updates=3, requests=6, group=4, anchor=0.1, anchor_positions=64,
        evaluate_steps=6, patience=0, learning_rate=1e-2,
    )  # fmt: skip
    said: list[str] = []
    with monkeypatch.context() as patch:  # killed after the loop
        patch.setattr(Align, "choose_weights", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            align(config, said.append)
    out = align(config, said.append)
    assert any(line.startswith("generator: done before") for line in said)
    made, source = Bundle.load(out), Bundle.load(tiny_bundle)
    assert made.config["aligned"]["loss"] == "sa-gcpo" and made.config["aligned"]["bundle"]
    assert {k: v for k, v in made.config.items() if k != "aligned"} == source.config
    assert (made.semantic_ids.codes == source.semantic_ids.codes).all() and list(made.tools) == list(source.tools)
    lines = [json.loads(x) for x in (out / "report" / "alignment.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 3, 6]
    assert set(lines[0]["validation"]) == {"ndcg", "low", "high", *source.dataset.scenarios} - {
        "search"
    }  # watched in every scenario
    assert {name: made.fusion(name)["floors"] for name in made.weights} == {
        name: source.fusion(name)["floors"] for name in made.weights
    }
    assert any("before" in line and "test NDCG@10" in line for line in said)
    assert not out.with_name("aligned.work").exists()
    assert align(config, said.append) == out and "is there already" in said[-1]
    with pytest.raises(GenrecError, match="other settings"):
        align(replace(config, seed=1), said.append)


def test_weights_are_kept_by_other_requests_than_the_fit_picked_the_start_by(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Align(AlignConfig(tiny_bundle, tmp_path / "out"), lambda _: None)
    job.split = SPLITS[job.config.protocol](job.source.dataset)
    validation = job.split.validation
    few, most = len(validation) // 3, len(validation) - 1
    monkeypatch.setattr(Fit, "watched", lambda self: self.split.validation.sample(few, seed=1))
    theirs, mine = (set(map(id, x.contexts)) for x in (Fit.watched(job), job.watched()))
    assert len(theirs) == len(mine) == few and not theirs & mine
    monkeypatch.setattr(Fit, "watched", lambda self: self.split.validation.sample(most, seed=1))
    assert list(map(id, job.watched().contexts)) == list(map(id, Fit.watched(job).contexts))  # too few others


def test_a_bundle_that_is_none_and_weights_that_are_none_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    from training.align import align

    with pytest.raises(GenrecError, match="is not a bundle"):
        align(AlignConfig(tmp_path / "absent", tmp_path / "x"))
    with pytest.raises(GenrecError, match="no such file of reward weights"):
        align(AlignConfig(tiny_bundle, tmp_path / "x", weights="absent.toml"))
    assert not (tmp_path / "x").exists()


def test_the_command_takes_every_setting_as_a_flag_and_refuses_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import fields

    from genrec.cli import main, parser

    parsed = vars(parser().parse_args(["align", "--bundle", "b", "--out", "o", "--no-floor", "--loss", "grpo"]))
    assert {f.name for f in fields(AlignConfig)} <= set(parsed) and parsed["floor"] is False
    assert main(["align", "--bundle", "absent", "--out", "o"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "absent is not a bundle" in err and "Traceback" not in err


@pytest.mark.parametrize(("after", "word"), [(0.09, "LOWER than"), (0.11, "against")])
def test_the_last_line_says_what_became_of_the_test_results(
    after: float, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = object.__new__(Align)
    job.source, job.folder = SimpleNamespace(folder=tmp_path / "before"), tmp_path / "after"  # type: ignore[assignment]
    monkeypatch.setattr(Fit, "make_report", lambda _: "report written")
    for folder, value in ((tmp_path / "before", 0.1), (tmp_path / "after", after)):
        (folder / "report").mkdir(parents=True)
        rows = [
            {"system": ALONE_ROW, "slice": part, "metrics": {"NDCG@10": {"mean": x}}}
            for part, x in (("same-day", 0.9), ("all", value))
        ]
        (folder / "report" / "report.json").write_text(json.dumps({"rows": rows}))
    assert job.make_report() == f"report written; {ALONE_ROW} {after:.4f}, {word} 0.1000 before"
