"""Cluster shares and routes on the page: drawn, bounded, escaped."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from genrec.contracts import Evidence
from ui.tools import CLUSTERS, TRIGGERS, details

spec = importlib.util.spec_from_file_location("render_tests", Path(__file__).with_name("test_render.py"))
assert spec and spec.loader
render_tests = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = render_tests
spec.loader.exec_module(render_tests)
Reader, HOSTILE = render_tests.Reader, render_tests.HOSTILE


def evidence(told: dict | None) -> Evidence:
    return Evidence("ebr", np.zeros(0, np.int32), np.zeros(0, np.float32), "", details=told)


def clusters(labels: list[str], shares: list[float]) -> Evidence:
    found = [
        {"cluster": i, "label": label, "share": share, "items": i, "history": 0}
        for i, (label, share) in enumerate(zip(labels, shares, strict=True))
    ]
    return evidence({"alpha": 0.5, "clusters": found})


def route(row: int, channel: str, value: float, title: str = "Tea") -> dict:
    return {"trigger": title, "row": row, "channel": channel, "value": value, "unique": None, "items": 1}


def routes(*found: dict) -> Evidence:
    told = {"policy": "learned", "quota": 8, "channels": ["markov", "content"], "routes": list(found)}
    return evidence(told)


def test_a_tool_that_tells_nothing_draws_nothing() -> None:
    for told in (None, {}, {"clusters": []}, {"routes": [], "channels": [], "policy": "", "quota": 1}):
        assert details(evidence(told)) == ""


def test_clusters_are_bars_of_their_shares() -> None:
    page = Reader(details(clusters(["nail polish", "tea"], [0.75, 0.25])))
    assert [i["style"] for i in page.all("i", "c0")] == ["width:75.00%", "width:25.00%"]
    assert "alpha 0.5" in page.text and "nail polish75%, 0 items" in page.text and "tea25%, 1 item" in page.text
    many = Reader(details(clusters([f"c{i}" for i in range(50)], [0.02] * 50)))
    assert len(many.all("li")) == CLUSTERS


def test_routes_are_drawn_per_trigger_with_a_colour_per_channel() -> None:
    page = Reader(details(routes(route(4, "content", 0.4), route(2, "markov", 0.1, "Rye"), route(4, "markov", 0.2))))
    bars = page.all("span", "bar")
    assert [b["aria-label"] for b in bars] == ["asks content, markov", "asks markov"]
    widths = [a["style"] for a in page.all("i") if "style" in a]
    assert widths == ["width:50.00%", "width:25.00%", "width:12.50%"]
    many = Reader(details(routes(*(route(i, "markov", 0.1) for i in range(20)))))
    assert len(many.all("span", "bar")) == TRIGGERS and "14 more triggers" in many.text
    assert Reader(details(routes(route(1, "markov", 0.0)))).all("i", "c0")  # a value of zero is still there


@pytest.mark.parametrize("text", HOSTILE)
def test_labels_and_titles_are_escaped(text: str) -> None:
    for page in (Reader(details(clusters([text], [1.0]))), Reader(details(routes(route(1, "markov", 0.5, text))))):
        assert text[:20] in page.text
