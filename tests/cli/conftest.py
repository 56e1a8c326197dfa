"""Fixtures of the command line's tests."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def own_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the language model; the list fills with one entry per start."""
    import serving.llm

    reply = json.dumps({"situation": "a tea drinker", "intents": ["tea"], "look_for": "green tea"})
    starts: list[str] = []

    def open_model(backend: str, model: str | None, **_: Any) -> serving.llm.Scripted:
        starts.append(backend)
        return serving.llm.Scripted(lambda chat: reply)

    monkeypatch.setattr(serving.llm, "open_model", open_model)
    return starts
