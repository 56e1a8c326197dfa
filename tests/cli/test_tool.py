"""EBR and CAPTS in a bundle: fitted by `genrec fit`, asked by `genrec tool`, steered in a recommendation."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from tests_support import HOSTILE_TITLE

from genrec.bundle import Bundle
from genrec.cli import main
from genrec.recommender import Recommender
from genrec.tools import CAPTS, EBR, TOOLS, CAPTSConfig, Controls, EBRConfig
from training.config import MORE_TOOLS
from training.config import TOOLS as DEFAULT_TOOLS

CHOSEN = ("popularity", "markov", "ebr", "capts")


@pytest.fixture(scope="module")
def bundle(tiny_config: Callable[..., object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from training.fit import fit

    with pytest.MonkeyPatch.context() as quick:
        quick.setattr(EBR, "config_type", partial(EBRConfig, steps=40, check=20))
        quick.setattr(CAPTS, "config_type", partial(CAPTSConfig, ebr_steps=20))
        return fit(tiny_config(tmp_path_factory.mktemp("tools") / "bundle", tools=CHOSEN))  # type: ignore[arg-type]


def said(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    assert main(list(command)) == 0
    return capsys.readouterr().out


def test_the_settings_name_the_learned_tools_and_leave_them_out_by_default() -> None:
    assert tuple(TOOLS) == (*DEFAULT_TOOLS, *MORE_TOOLS)


def test_a_fit_holds_them_and_its_table_measures_them(bundle: Path) -> None:
    parts = Bundle.load(bundle)
    assert list(parts.tools) == list(CHOSEN) and isinstance(parts.tools["ebr"], EBR)
    report = json.loads((bundle / "report" / "report.json").read_text())
    assert {"ebr", "capts"} <= {row["system"] for row in report["rows"]}
    assert not list(bundle.rglob("*work*"))  # checkpoints stay behind


def test_ebr_answers_with_items_clusters_and_a_vector(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, "tool", "ebr", f"--bundle={bundle}", "--user=u0", "--k=6", "--json"))
    assert found["tool"] == "ebr" and len(found["items"]) == 6 and len(found["vector"]) == 64
    assert sum(c["items"] for c in found["details"]["clusters"]) == 6 and found["details"]["alpha"] == 1.0
    even = ["tool", "ebr", f"--bundle={bundle}", "--history=tea-1,tea-2", "--k=10", "--alpha=0", "--json"]
    clusters = json.loads(said(capsys, *even))["details"]["clusters"]
    assert all(c["items"] == 1 for c in clusters if c["share"] > 0) and len({c["share"] for c in clusters}) == 1
    label = next(c["label"] for c in clusters if c["cluster"] == 0)  # the largest: shares are alike but for rounding
    steered = json.loads(said(capsys, *even, f"--quota={label}=3", "--floor=1=2"))["details"]["clusters"]
    assert {c["label"]: c["items"] for c in steered}[label] == 3
    assert {c["cluster"]: c["items"] for c in steered}[1] >= 2


def test_capts_answers_with_routes(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["tool", "capts", f"--bundle={bundle}", "--history=tea-1,tea-2", "--k=4"]
    found = json.loads(said(capsys, *asked, "--quota=3", "--policy=recent", "--json"))
    assert found["details"]["policy"] == "recent" and len(found["details"]["routes"]) == 3
    assert {r["trigger"] for r in found["details"]["routes"]} <= {"Tea number 1", "Tea number 2"}
    text = said(capsys, *asked)
    assert "Routes, policy learned, quota 10" in text and "What leads on best" in text


def test_every_tool_can_be_asked_and_shown(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "tool", "ebr", f"--bundle={bundle}", "--user=u1")
    assert "Clusters, alpha 1" in text and "Items" in text
    assert "Soon after" in said(capsys, "tool", "markov", f"--bundle={bundle}", "--history=tea-1")
    hostile = said(capsys, "tool", "capts", f"--bundle={bundle}", "--history=tea-3")
    assert "\x1b" not in hostile and HOSTILE_TITLE not in hostile
    assert "Nothing to go by" in said(capsys, "tool", "ebr", f"--bundle={bundle}", "--history=")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["ease", "--user=u0"], "this bundle has no tool 'ease'; it has: popularity, markov, ebr, capts"),
        (["ebr", "--user=nobody"], "unknown user 'nobody'"),
        (["ebr", "--history=tea-99"], "unknown item 'tea-99'"),
        (["ebr", "--user=u0", "--alpha=-1"], "alpha is -1"),
        (["ebr", "--user=u0", "--quota=3"], "ebr takes CLUSTER=N"),
        (["ebr", "--user=u0", "--quota=jam tarts=3"], "no cluster 'jam tarts'"),
        (["ebr", "--user=u0", "--k=2", "--floor=0=3"], "ask for 3 items in a list of 2"),
        (["ebr", "--user=u0", "--policy=recent"], "ebr cannot be asked with --policy"),
        (["capts", "--user=u0", "--quota=tea=3"], "capts takes a number of pairs"),
        (["capts", "--user=u0", "--policy=best"], "unknown policy 'best'"),
        (["capts", "--user=u0", "--alpha=1"], "capts cannot be asked with --alpha"),
        (["markov", "--user=u0", "--alpha=1"], "markov cannot be asked with --alpha"),
    ],
)
def test_what_is_wrong_is_one_line(
    flags: list[str], message: str, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tool", *flags, f"--bundle={bundle}"]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.count("\n") == 0


def test_a_recommendation_consults_a_steered_tool(bundle: Path) -> None:
    recommender = Recommender.load(bundle)
    ebr, capts = recommender.bundle.tools["ebr"], recommender.bundle.tools["capts"]
    assert isinstance(ebr, EBR) and isinstance(capts, CAPTS)
    context = recommender.context(history=["tea-1", "tea-2", "soap-4"])
    tools = {"ebr": ebr.steered(Controls(alpha=0.0)), "capts": capts.steered(quota=2)}
    trace = recommender.recommend(context, k=5, weights={"ebr": 1.0}, tools=tools)
    said = {e.tool: e.details for e in trace.evidence}
    assert said["ebr"]["alpha"] == 0.0 and len({c["share"] for c in said["ebr"]["clusters"]}) == 1  # type: ignore[index]
    assert len(said["capts"]["routes"]) == 2  # type: ignore[index]
    plain = recommender.recommend(context, k=5, weights={"ebr": 1.0})
    assert [r.row for r in plain.recommended] != [r.row for r in trace.recommended]
    whole = plain.as_dict(recommender.bundle.dataset.catalog)
    assert json.dumps(whole) and "details" in next(e for e in whole["evidence"] if e["tool"] == "ebr")


def test_the_page_has_a_slider_for_alpha_and_follows_it(bundle: Path) -> None:
    from ui.app import build
    from ui.session import Form, Session, ask
    from ui.trace import trace_view

    recommender = Recommender.load(bundle)
    (slider,) = [b for b in build(recommender).blocks.values() if getattr(b, "elem_id", None) == "alpha"]
    assert slider.value == 1.0 and slider.minimum == 0  # type: ignore[attr-defined]
    form = Form(Session(history=(0, 1)), weights={"ebr": 1.0, "capts": 1.0}, alpha=0.0)
    trace = ask(recommender, form)
    assert next(e for e in trace.evidence if e.tool == "ebr").details["alpha"] == 0.0  # type: ignore[index]
    page = trace_view(trace, recommender.bundle.dataset.catalog)
    assert "Clusters, alpha 0" in page and "Triggers and the channels they ask" in page
    assert HOSTILE_TITLE not in page and "<script" not in page
